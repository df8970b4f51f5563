"""Try every causal-LM type of transformers, built tiny, and write the table `docs/models.md`.

    .venv/bin/python tests/models/sweep.py [TYPE ...]

Each type runs in a process of its own with a time limit. A policy that loads is compared with the model
itself by other means than core's own check: logits of another text, the loss and its gradients, generated
text, and the tensors of an export. A difference counts as *wrong* and makes the sweep fail, like a crash.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from attrs import define, field
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.export.transformers import language_model
from weighted_mtp_core.generation.decoding_probe import manner_of
from weighted_mtp_core.generation.generate import generate
from weighted_mtp_core.model.families import body_of
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.loss import normalisers, weighted_mtp_loss
from weighted_mtp_core.model.packing_probe import check_packing
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import align_labels, target_mask
from zoo import VOCABULARY, tiny_model

KINDS = ("parallel", "medusa", "sequential")
TABLE = Path(__file__).parents[2] / "docs" / "models.md"
SECONDS = 400  # the recurrent layers of Kimi Linear take minutes on a busy machine
PAGE = """\
# Models that can be a base

`make test-models` tries to build a tiny model with random weights for each of the {types} causal-LM types of
transformers {version}. It creates a policy from each model for each kind of heads, compares the policy with
the model itself (logits, loss and gradients, generated text, tensors of an export) and writes this page.
When a run loads its base model, the run also compares the logits of the policy with those of the model, in
evaluation mode and in training mode, and tests decoding and, if rows are packed, packed documents. So a type
without a row here either works or is refused before training; if only a way of decoding fails, the run uses
a slower one.

{right} types work with at least one kind of heads, {refused} types are refused before training, and for
{unbuilt} types no tiny model could be built.

The column `model.heads.kind` lists the kinds of heads that work, and the column *why not* gives the reasons
against the other kinds. The column *self-speculative* lists the kinds of heads with which self-speculative
decoding works; with other heads, decoding is plain. The column *packing* shows whether
`data.packing = "documents"` works with all kinds of heads in the first list. A run with this setting is
refused if packing does not work with its heads.

| type | `model.heads.kind` | self-speculative | packing | why not |
|---|---|---|---|---|
"""
K = 3
NEW_TOKENS = 12


@define(kw_only=True)
class Row:
    """What a type can do.

    Attributes:
        heads: The kinds of heads with which nothing went wrong, except perhaps in packed rows.
        drafts: The kinds in `heads` with which self-speculative decoding works.
        packs: Whether documents can share rows, with every kind in `heads`.
        refusals: Core's reasons for refusing kinds of heads.
        wrong: Differences from the model that core did not notice, crashes, and missing answers.
        unbuilt: Why no tiny model could be built and run; empty if one was.
    """

    heads: list[str] = field(factory=list)
    drafts: list[str] = field(factory=list)
    packs: bool = True
    refusals: list[str] = field(factory=list)
    wrong: list[str] = field(factory=list)
    unbuilt: str = ""


def examine(model_type: str) -> Row:
    """Try a type with each kind of head."""
    row = Row()
    try:
        base = tiny_model(model_type)
        with torch.no_grad():
            base(input_ids=text(1, 8), use_cache=False)
    except Exception as error:  # noqa: BLE001 - of any model at all, so of any kind; it is reported
        row.unbuilt = one_line(error)
        return row
    for kind in KINDS:
        try:
            policy = make_policy(copy.deepcopy(base), n_future=K, head_kind=kind).eval()
        except WmtpError as error:
            row.refusals.append(one_line(error))
            continue
        try:
            faults = differences(base, policy)
        except Exception as error:  # noqa: BLE001 - of any model at all, so of any kind; it is reported
            faults = [f"crash: {type(error).__name__}: {one_line(error)}"]
        row.wrong += [f"`{kind}`: {fault}" for fault in faults]
        if faults:
            continue
        row.heads.append(kind)
        if manner_of(policy).no_drafts is None:
            row.drafts.append(kind)
        try:
            check_packing(policy)
            row.wrong += packed_differences(base, policy)
        except WmtpError:
            row.packs = False
    return row


def differences(base: Any, policy: Policy) -> list[str]:
    """Return the names of what differs between a policy and the model itself."""
    found = []
    ids_BT = text(2, 40)
    with torch.no_grad():
        expected_BTV = base(input_ids=ids_BT, use_cache=False).logits
        if gap(policy.logits(1, policy.trunk_states(ids_BT)), expected_BTV) > 1e-3:
            found.append("logits")
    prompts = [text(1, length)[0].tolist() for length in (3, 9, 14)]
    expected = [texts_of(base, prompt) for prompt in prompts]
    for decoding in ("plain", "self_speculative"):
        written = generate(policy, prompts, max_new_tokens=NEW_TOKENS, eos_id=-1, decoding=decoding)
        if any(
            all(differ_before_a_tie(base, prompt, list(own), other) for other in others)
            for prompt, own, others in zip(prompts, written.tokens, expected, strict=True)
        ):
            found.append(f"text, {decoding}")
    state, own = base.state_dict(), language_model(policy).state_dict()
    if state.keys() != own.keys() or any(not torch.equal(state[name], own[name]) for name in state):
        found.append("tensors of the export")
    if loss_differs(base, policy, ids_BT):
        found.append("loss or gradients")
    return found


def packed_differences(base: Any, policy: Policy) -> list[str]:
    """Return a fault if the logits of packed documents differ from those of each alone; otherwise empty."""
    ids_BT = text(2, 12)
    with torch.no_grad():
        expected = base(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)
        position_BT = torch.arange(12).repeat(2)[None]
        hidden_BTH = policy.trunk_states(ids_BT.view(1, -1), position_BT=position_BT)
        actual = policy.unembedding(policy.head_states(1, hidden_BTH, position_BT=position_BT))[0]
    return ["packed rows"] if gap(actual, expected) > 1e-3 else []


def loss_differs(base: Any, policy: Policy, ids_BT: Tensor) -> bool:
    """Return whether head 1's loss or gradient norm differs from autograd's for the logits of the model."""
    base, policy = copy.deepcopy(base), copy.deepcopy(policy)
    everything_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    labels_BTK = align_labels(
        ids_BT, document_BT=torch.zeros_like(ids_BT), response_BT=everything_BT, n_future=K
    )
    target_BTK = target_mask(labels_BTK)
    share_K = torch.zeros(K)
    share_K[0] = 1
    ours = weighted_mtp_loss(
        policy,
        policy.trunk_states(ids_BT),
        labels_BTK=labels_BTK,
        weight_BTK=target_BTK.float(),
        normaliser_K=normalisers(target_BTK.float(), target_BTK, normalise="weights"),
        head_share_K=share_K,
        ids_BT=ids_BT,
    )
    logits_BTV = base(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    theirs = nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())
    theirs.backward()
    expected = sum_of_squares([*body_of(base).parameters(), *base.get_output_embeddings().parameters()])
    trained = [*policy.trunk.parameters(), *policy.unembedding.parameters(), *policy.norm.parameters()]
    head = list(policy.heads[0].parameters())
    actual = sum_of_squares([*trained, *head])
    return abs(float(ours.loss - theirs.detach())) > 1e-3 or abs(actual - expected) > 1e-2 * expected


def sum_of_squares(parameters: list[nn.Parameter]) -> float:
    """Return the squared norm of gradients, each parameter once."""
    once = {id(each): each for each in parameters}
    return sum(float(each.grad.double().square().sum()) for each in once.values() if each.grad is not None)


def texts_of(base: Any, prompt: list[int]) -> list[list[int]]:
    """Return the texts that the model itself generates: without a cache, and with its own cache.

    The texts can differ if a model attends only to the tokens with the best scores and some scores are equal.
    The second text is left out if the model cannot generate with its cache, or if the first halves differ.
    """
    whole = greedy(base, prompt)
    try:
        found = base.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    except Exception:  # noqa: BLE001 - some models cannot generate with their own cache
        return [whole]
    own = found[0, len(prompt) :].tolist()
    return [whole, own] if own[: NEW_TOKENS // 2] == whole[: NEW_TOKENS // 2] else [whole]


@torch.no_grad()
def greedy(base: Any, prompt: list[int]) -> list[int]:
    """Continue a prompt greedily; the model computes the whole text again for each token."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(base(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def differ_before_a_tie(base: Any, prompt: list[int], own: list[int], other: list[int]) -> bool:
    """Return whether the model clearly prefers the token of `other` where the texts first differ."""
    for place, (mine, theirs) in enumerate(zip(own, other, strict=True)):
        if mine != theirs:
            logits_V = base(input_ids=torch.tensor([prompt + other[:place]]), use_cache=False).logits[0, -1]
            return float(logits_V[theirs] - logits_V[mine]) > 1e-3 * float(logits_V.abs().max())
    return len(own) != len(other)


def text(rows: int, length: int) -> Tensor:
    """Return random token ids, none of them special."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(5, VOCABULARY - 5, (rows, length), generator=generator)


def gap(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value; NaN counts as infinite."""
    value = float((actual - expected).abs().max() / expected.abs().max())
    return float("inf") if math.isnan(value) else value


def one_line(error: BaseException) -> str:
    """Return an error message in at most 160 characters, without numbers that machines round differently."""
    line = " ".join(str(error).split())
    line = re.sub(r" \((logits|states) differ by [^)]*\)", "", line)
    return line if len(line) <= 160 else line[:157] + "..."


def in_a_process(model_type: str) -> Row:
    """Examine a type in a separate process, because a crash must not end this process."""
    here, there = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: there.send(examine(model_type)))
    child.start()
    there.close()
    try:
        row: Row = here.recv() if here.poll(SECONDS) else Row(wrong=[f"no answer in {SECONDS} s"])
    except EOFError:
        row = Row(wrong=["the process died"])
    child.kill()
    child.join()
    return row


def table(rows: dict[str, Row]) -> str:
    """Return the text of docs/models.md."""
    right = [row for row in rows.values() if row.heads]
    unbuilt = [name for name, row in rows.items() if row.unbuilt]
    lines = [
        *PAGE.format(
            types=len(rows),
            version=transformers.__version__,
            right=len(right),
            refused=len(rows) - len(right) - len(unbuilt),
            unbuilt=len(unbuilt),
        ).splitlines()
    ]
    for name, row in rows.items():
        heads, drafts = (", ".join(f"`{each}`" for each in kinds) for kinds in (row.heads, row.drafts))
        why = (row.unbuilt and f"not built: {row.unbuilt}") or "; ".join(
            dict.fromkeys([*row.wrong, *row.refusals])
        )
        packs = "yes" if row.heads and row.packs else "no" if row.heads else ""
        lines.append(f"| {name} | {heads} | {drafts} | {packs} | {why.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    """Examine types, by default all types; write the table if all were examined."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    rows = {}
    types = names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, row in zip(types, pool.map(in_a_process, types), strict=True):
            rows[name] = row
            print(name, row, flush=True)
    if not names:
        TABLE.write_text(table(rows), encoding="utf-8")
    wrong = [name for name, row in rows.items() if row.wrong]
    print(
        f"{sum(bool(row.heads) for row in rows.values())} of {len(rows)} types work; wrong: {wrong or 'none'}"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
