"""Write the tables of docs/cluster.md about memory: the forecast for large models on given GPUs.

    python scripts/memory_tables.py [NAME]...

A model is given by a `config.json` with its shape; no weights are needed. For each NAME, by default for each
table, the text between the lines `<!-- memory: NAME -->` and `<!-- end -->` of the page is replaced. The
script takes a minute or two and needs `baseline_mtp`, `peft` and `torchao`.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import LlamaConfig
from weighted_mtp_core.memory import table
from weighted_mtp_core.memory.fit import find_target
from weighted_mtp_core.memory.forecast import forecast, parse_size
from weighted_mtp_core.memory.longest import longest_documents
from weighted_mtp_core.plan import make_plan

FILE = Path(__file__).parents[1] / "docs" / "cluster.md"
ONE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
EIGHT = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
COMMON = ("model.activation_checkpointing = true", "data.max_tokens = 2048", "train.batch_size = 16")
CASES: Mapping[str, tuple[Mapping[str, object], str, int, Sequence[str]]] = {
    "1 B on one GPU": (
        ONE,
        "24GB",
        1,
        (
            *COMMON,
            "train.accumulation = 16",
            'train.optimiser.name = "adamw_8bit"',
            "evaluate.batch_size = 8",
        ),
    ),
    "8 B on one GPU": (
        EIGHT,
        "80GB",
        1,
        (
            *COMMON,
            "train.accumulation = 16",
            'model.train = "adapters"',
            'model.base_dtype = "bfloat16"',
            "evaluate.batch_size = 8",
        ),
    ),
    "8 B on eight GPUs": (
        EIGHT,
        "80GB",
        8,
        (*COMMON, "train.accumulation = 2", "model.shard = true", "evaluate.batch_size = 8"),
    ),
}
"""Shape of the base model, memory of a GPU, number of GPUs, and keys that differ from the defaults."""

RECIPE = """
extends = ["core:defaults.toml"]
tracker = []
[run]
name = "memory"
[data]
use = "core.jsonl"
options = { path = "nowhere.jsonl" }
[weighting]
use = "baseline_mtp"
"""


def block(name: str) -> str:
    """Return the keys and the forecast of a case as Markdown."""
    shape, memory, processes, keys = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**shape, max_position_embeddings=8192).save_pretrained(folder)
        recipe = Path(folder, "recipe.toml")
        recipe.write_text(RECIPE)
        plan = make_plan(recipe, overrides=[*keys, f'model.base="{folder}"'])
        target, device, _ = find_target(plan, processes=processes, device_memory=parse_size(memory))
        found = forecast(plan, longest_documents(plan, tokenise=False), target)
    head, *rows = table.phase_rows(found.device)
    lines = [
        "```toml",
        *keys,
        "```",
        "",
        f"{found.parameters / 1e9:.2f} billion parameters, K = 4. Per GPU:",
        "",
    ]
    lines += [_row(head), "|---" * len(head) + "|", *map(_row, rows), ""]
    lines.append(
        f"{table.verdict('GPU', found.peak, device)}; {table.verdict('main memory', found.host_peak, None)}."
    )
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Replace the blocks of the page that the arguments name; without arguments, all blocks."""
    for name in sys.argv[1:] or CASES:
        marks = rf"(<!-- memory: {re.escape(name)} -->\n).*?(\n<!-- end -->)"
        text = block(name)
        page = FILE.read_text(encoding="utf-8")
        page, count = re.subn(
            marks, lambda found, text=text: found[1] + text + found[2], page, flags=re.DOTALL
        )
        assert count == 1, name
        FILE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
