"""Decode prompts greedily with vLLM, which has an environment of its own; read and write JSON.

    python vllm_decode.py < request.json > answer.json

The request: `model` (a directory), vLLM's `speculative_config`, `prompts` (token ids) and `new_tokens` (the
limit of each text). The answer: `tokens` of each text, with EOS; `verified`, the number of passes that
verified drafts; `accepted`, the numbers of these passes that accepted the first, second, ... draft.
"""

import json
import os
import sys

answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # vLLM prints to stdout

from vllm import LLM, SamplingParams  # noqa: E402 - it prints when it is imported

request = json.load(sys.stdin)
llm = LLM(
    request["model"],
    dtype="float32",
    max_model_len=512,
    enforce_eager=True,
    disable_log_stats=False,
    speculative_config=request["speculative_config"],
)
settings = SamplingParams(temperature=0, max_tokens=request["new_tokens"])
# One prompt after the other: the batch size changes the order of sums, and so can change the choice between
# tokens with almost equal logits.
tokens = [
    list(llm.generate({"prompt_token_ids": ids}, settings, use_tqdm=False)[0].outputs[0].token_ids)
    for ids in request["prompts"]
]
metrics = {metric.name: metric for metric in llm.get_metrics()}
with answer:
    json.dump(
        {
            "tokens": tokens,
            "verified": metrics["vllm:spec_decode_num_drafts"].value,
            "accepted": metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values,
        },
        answer,
    )
