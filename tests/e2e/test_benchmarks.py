"""The benchmarks run with the current code; with `--quick`, sizes are tiny and the numbers mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(environment, tmp_path):
    """Run one benchmark with `--quick` in an empty folder; return its rows."""

    def benchmark(group):
        file = tmp_path / "rows.json"
        done = subprocess.run(
            [sys.executable, BENCHMARKS / f"{group}.py", "--quick", "--json", file],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(file.read_text())["rows"]

    return benchmark


@pytest.mark.parametrize(
    "group",
    [
        *("loss", "advantages", "step", "optimisers", "heads", "padding", "corpus", "checkpointing", "busy"),
        *("adapters", "reduction", "mfu"),
    ],
)
def test_a_group_measures_every_row(benchmark, group):
    rows = benchmark(group)

    assert rows
    assert all(isinstance(row["value"], float) for row in rows)


def test_the_benchmarks_of_a_gpu_need_one(environment, tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench.py", "--gpu"],
        cwd=tmp_path,
        env=environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "error: there is no CUDA device here"


def test_a_run_whose_plugin_is_gone_is_skipped(environment, tmp_path):
    run = tmp_path / "lost" / "20261123-140924-abcdef"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "best_model.pt").touch()
    (run / "recipe.toml").write_text(
        '[run]\nname = "lost"\n[data]\nuse = "gone.data"\n[weighting]\nuse = "gone.weights"\n'
    )
    program = "from pathlib import Path; import decoding; print(decoding.newest_usable(Path(), 'lost'))"

    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(BENCHMARKS)),
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == "None\n"
    assert done.stderr.startswith(f"the run `{run.relative_to(tmp_path)}` is skipped: ")
    assert "`gone`" in done.stderr
