"""Write `medusa` heads 2..K as a draft model of vLLM, and make the command that serves an exported model.

docs/serving.md describes which server supports which kind of heads, and how this was checked.

Shape letters: H hidden, V vocabulary.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.export.mtp_layers import transformers_program
from weighted_mtp_core.messages import python_command, quoted
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.recipe.schema import HeadKind, HeadsTable

Server = Literal["transformers", "vllm", "sglang"]

SERVED: Mapping[Server, tuple[HeadKind, ...]] = {
    "transformers": ("sequential",),
    "vllm": ("medusa", "sequential"),
    "sglang": (),
}
"""The kinds of heads with which each server drafts."""

MEDUSA = "medusa"
"""The subfolder of an exported model that contains vLLM's draft model."""


def refuse_unserved(server: Server, *, heads: HeadsTable, n_future: int) -> None:
    """Refuse a policy whose heads 2..K cannot draft in a server.

    Raises:
        WmtpError: The server does not support this kind of heads, the heads were trained for another server
            or come from the base model, or the policy has only one head.
    """
    kind = heads.kind
    plain = "without `--serve`, the exported directory is an ordinary model for every server"
    if n_future == 1:
        raise WmtpError(f"the policy has one head, so nothing drafts in `{server}`", hint=plain)
    kinds = SERVED[server]
    if kind == "sequential" and heads.init == "base":
        raise WmtpError(
            "`--serve` is for heads that do not come from the base model",
            hint="export without `--serve`: the layers keep the names that the base model gives them",
        )
    if kind in kinds:
        if kind == "sequential" and heads.serve != server:
            raise WmtpError(
                f"these `sequential` heads were trained for `{heads.serve}`, so `{server}` would draft badly",
                hint=f'export with `--serve {heads.serve}`, or train with `model.heads.serve = "{server}"`',
            )
        return
    takes = f"it takes {quoted(kinds)}" if kinds else "it takes no kind of heads that is trained here"
    others = [each for each, taken in SERVED.items() if kind in taken]
    raise WmtpError(
        f"`{server}` cannot draft with `{kind}` heads: {takes}",
        hint=f"`{kind}` heads are served by {quoted(others)}; {plain}" if others else plain,
    )


def write_medusa(policy: Policy, folder: Path) -> None:
    """Write vLLM's draft model to the subfolder `medusa/` of an exported model.

    Raises:
        WmtpError: The unembedding has a bias, which vLLM's draft model leaves out.
    """
    if policy.unembedding.bias is not None:
        raise WmtpError(
            "the unembedding of this model has a bias, which vLLM does not apply to drafts",
            hint="export without `--serve`",
        )
    vocabulary, width = policy.unembedding.weight.shape
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": width,
        "vocab_size": vocabulary,
        "truncated_vocab_size": vocabulary,
        "num_heads": policy.n_future - 1,
        "num_hidden_layers": 1,
        "original_lm_head": True,
        "medusa_fc_bias": False,
        "dtype": _name(policy.unembedding.weight.dtype),
    }
    own = folder / MEDUSA
    own.mkdir()
    (own / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(_medusa_tensors(policy), own / "model.safetensors")


def _medusa_tensors(policy: Policy) -> dict[str, Tensor]:
    """Return `blocks.<k - 2>.layers.0.weight` `[H, H]` of each head k > 1, and the unembedding `[V, H]`."""
    found = {"lm_heads.0.weight": policy.unembedding.weight}
    for number, head in enumerate(policy.heads[1:]):
        found[f"blocks.{number}.layers.0.weight"] = head.get_parameter("linear.weight")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def serving_command(path: Path, *, server: Server, kind: HeadKind, dtype: torch.dtype, n_future: int) -> str:
    """Return the shell command that drafts with an exported model.

    Args:
        path: The exported model.
        server: The server.
        kind: The kind of heads.
        dtype: The dtype of the files. vLLM's command contains this dtype, because without it vLLM computes in
            float16 if the files are in float32.
        n_future: K, the number of heads.
    """
    if server == "transformers":
        return shlex.join(["python", "-c", transformers_program(path)])
    draft: dict[str, object] = {"method": "mtp"}
    if kind == "medusa":
        draft = {"method": "medusa", "model": str(path / MEDUSA)}
    draft["num_speculative_tokens"] = n_future - 1
    words = ["vllm", "serve", str(path), "--dtype", _name(dtype), "--speculative-config", json.dumps(draft)]
    return shlex.join(words)


def serving_hints(run: Path, to: Path, *, policy: Policy) -> list[tuple[str, str]]:
    """Return the commands that export a finished run and serve the exported model, as pairs (name, command).

    The list is empty if `--serve` does not apply to the heads of this policy, or if the unembedding has a
    bias.

    Args:
        run: The run folder.
        to: The directory that the first command writes.
        policy: The policy of the run.
    """
    kind = policy.head_kind
    server = next((each for each, kinds in SERVED.items() if kind in kinds), None)
    if kind == "sequential":
        server = policy.heads_table.serve if policy.shipped is None else None
    if server is None or policy.n_future == 1 or policy.unembedding.bias is not None:
        return []
    export = python_command("weighted_mtp_core", "export", str(run), "--to", str(to), "--serve", server)
    serve = serving_command(to, server=server, kind=kind, dtype=torch.float32, n_future=policy.n_future)
    return [("export it", export), ("serve it", serve)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
