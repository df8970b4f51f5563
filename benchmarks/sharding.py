"""Peak memory of each process of a sharded run, over the peak memory of a run in one process.

    python benchmarks/sharding.py

The runs are whole runs of a model with 191 million parameters: loading, the checks before training, steps
with AdamW, a validation, checkpoints, saving the best state, and generation. The peak is the resident memory
of the whole process, including Python and its libraries, but without freed memory that glibc would keep. The
benchmark needs 8 GB of memory and 8 GB in the temporary folder (TMPDIR selects its disk).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from harness import Row, main, return_freed_memory, row, status_kib
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.model.load import load_policy
from weighted_mtp_core.recipe.schema import MicroTable, ModelTable

PEAKS = "WMTP_BENCH_PEAKS"  # environment variable: the folder to which a process writes its peak
LARGE = {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 20}
TINY = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
RECIPE = """
extends = ["core:defaults.toml"]
tracker = []
run.name = "sharding"
model = {{ base = "{base}", n_future = 2, shard = true, device = "cpu" }}
data = {{ use = "core.jsonl", options = {{ path = "{rows}" }} }}
weighting.use = "baseline_mtp.uniform"
train = {{ steps = 2, batch_size = 4, validate_every = 1, log_every = 1, warmup_steps = 0 }}
checkpoint.every = 1
evaluate = {{ max_new_tokens = 4, batch_size = 4 }}
"""


def write_inputs(folder: Path, shape: dict[str, int]) -> float:
    """Write model, data and recipe to a folder; return the number of parameters of the model."""
    texts = [f"{number} plus {number + 1} is {2 * number + 1}, as one can count" for number in range(64)]
    rows = [{"prompt": text[:8], "response": text[8:]} for text in texts]
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    micro = ModelTable(micro=MicroTable(vocab_size=400, hidden_size=16, layers=2, attention_heads=2))
    tokenizer = load_policy(micro, storage=folder, texts=lambda: texts, seed=0).tokenizer
    tokenizer.save_pretrained(folder / "base")
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=False))
    model.save_pretrained(folder / "base", max_shard_size="200MB")
    recipe = RECIPE.format(base=folder / "base", rows=folder / "rows.jsonl")
    (folder / "recipe.toml").write_text(recipe)
    return float(sum(each.numel() for each in model.parameters()))


def peaks(folder: Path, processes: int) -> list[float]:
    """Run the recipe; return the peak memory of each process in MiB.

    Raises:
        RuntimeError: The run failed.
    """
    own = folder / f"{processes}-processes"
    own.mkdir()
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*start, __file__, "run", str(folder / "recipe.toml")],
        cwd=own,
        env={**os.environ, PEAKS: str(own), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return [float(file.read_text()) for file in sorted(own.glob("peak-*"))]


def measure(args: argparse.Namespace) -> list[Row]:
    """Measure runs with one, two and four processes."""
    counts = (1, 2) if args.quick else (1, 2, 4)
    with tempfile.TemporaryDirectory() as name:
        millions = write_inputs(Path(name), TINY if args.quick else LARGE) / 1e6
        found = {count: peaks(Path(name), count) for count in counts}
    (alone,) = found[1]
    rows = [row("sharding: peak of one process", [alone], unit="MiB", note=f"{millions:.0f} M parameters")]
    for count in counts[1:]:
        limit = "<= 0.65" if count == 2 else ""
        note = ", ".join(f"{each:.0f}" for each in found[count]) + " MiB"
        largest = max(found[count]) / alone
        rows.append(
            row(f"sharding: largest peak of {count} processes", [largest], limit=limit, unit="x", note=note)
        )
    return rows


def run_measured() -> None:
    """Run the framework's command line in this process, and write the peak memory of the process."""
    from weighted_mtp_core.cli import main as program

    torch.set_num_threads(1)
    return_freed_memory()
    code = program(sys.argv[1:])
    peak = status_kib("VmHWM") / 1024
    Path(os.environ[PEAKS], f"peak-{os.environ.get('RANK', '0')}").write_text(f"{peak}\n")
    sys.exit(code)


if __name__ == "__main__":
    if PEAKS in os.environ:
        run_measured()
    else:
        main(measure, __doc__)
