"""Provide pytest fixtures for tests of plugins.

Every pytest run imports this module if core is installed, so this module imports neither torch nor numpy
before a test needs them. Importing this module takes 12 ms, mostly for attrs; pytest itself takes 140 ms.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from attrs import frozen

pytest.register_assert_rewrite(
    *(
        f"weighted_mtp_core.testing.{name}"
        for name in ("component", "critic", "data_source", "tracker", "weighting")
    )
)

TINY: Mapping[str, Any] = {
    "run": {"name": "tiny"},
    "model": {
        "n_future": 2,
        "micro": {"vocab_size": 300, "hidden_size": 16, "layers": 2, "attention_heads": 2},
    },
    "data": {"use": "core.jsonl", "options": {"path": "tiny.jsonl"}},
    "train": {"steps": 2, "batch_size": 4, "warmup_steps": 1, "validation_examples": 4, "log_every": 1},
    "evaluate": {"problems": 1, "max_new_tokens": 4},
    "tracker": [],
}
"""The recipe that the runs of the fixture `wmtp_tiny_run` extend; the fixture also writes `tiny.jsonl`.

If the recipe of a run names a data source, the table `data` of `TINY` is left out.
"""


@frozen(kw_only=True)
class TinyRun:
    """A run that finished without an error.

    Attributes:
        folder: The run folder.
        metrics: The last value of each metric; timings are not included.
    """

    folder: Path
    metrics: Mapping[str, float]


@pytest.fixture
def wmtp_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Any]], TinyRun]:
    """Run all stages of a recipe in a few seconds, with a tiny model, two steps and a new working folder.

    The recipe is given as a table, for example `{"weighting": {"use": "my_plugin"}}`, and extends `TINY`. A
    critic that is no better than a constant does not stop the run, because two steps are too few to learn.
    """

    def run(recipe: Mapping[str, Any]) -> TinyRun:
        import tomli_w

        from weighted_mtp_core.cli import main

        working = tmp_path / "tiny"
        working.mkdir()
        monkeypatch.chdir(working)
        Path("tiny.jsonl").write_text("".join(map(_tiny_rows, range(40))), encoding="utf-8")
        lowest = dict(TINY)
        if "critic" in recipe:
            lowest["critic"] = {"allow_uninformative_critic": True, "train": TINY["train"]}
        if "use" in recipe.get("data", {}):
            del lowest["data"]  # otherwise the options in TINY would also apply to a recipe with `core.jsonl`
        Path("lowest.toml").write_text(tomli_w.dumps(lowest), encoding="utf-8")
        Path("recipe.toml").write_text(
            tomli_w.dumps({"extends": ["lowest.toml"], **recipe}), encoding="utf-8"
        )
        assert main(["run", "recipe.toml"]) == 0, "the run failed; see the captured output"
        (journal,) = working.rglob("metrics.jsonl")
        lines = map(json.loads, journal.read_text(encoding="utf-8").splitlines())
        metrics = {
            name: value
            for line in lines
            if line["kind"] == "metrics"
            for name, value in line["metrics"].items()
        }
        return TinyRun(folder=journal.parent, metrics=metrics)

    return run


def _tiny_rows(number: int) -> str:
    """Return two lines: a correct and an incorrect response to one problem."""
    problem = {"instruction": f"Add {number % 7} and {number}.", "problem_id": number}
    answers = (number % 7 + number, True), (number % 7 + number + 1 + number % 3, False)
    rows = [{**problem, "output": f"It is {answer}.", "is_correct": right} for answer, right in answers]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def wmtp_cli() -> Callable[..., int]:
    """Run a command in this process, for example `wmtp_cli("data", "show")`; return its exit code."""

    def run(*arguments: str) -> int:
        from weighted_mtp_core.cli import main

        return main(arguments)

    return run


@pytest.fixture
def wmtp_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for installed packages that is on `sys.path` during one test only."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if (file := getattr(sys.modules[name], "__file__", None)) and Path(file).is_relative_to(folder):
            del sys.modules[name]


@pytest.fixture
def wmtp_install_plugin(wmtp_site: Path) -> Callable[..., Path]:
    """Install a plugin from the source text of its module, for one test; return its `dist-info` folder.

    The fixture writes the module and its metadata to the folder `wmtp_site`, as an installer would, without
    building a package.
    """

    def install(
        name: str,
        source: str,
        *,
        distribution: str | None = None,
        version: str = "0.3.0",
        module: str | None = None,
        requires: str | None = "weighted-mtp-core>=0.1,<0.2",
    ) -> Path:
        distribution = distribution or f"wmtp-{name}"
        module = module or f"wmtp_{name.replace('-', '_')}"
        (wmtp_site / f"{module}.py").write_text(dedent(source), encoding="utf-8")
        metadata = wmtp_site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requires}"] if requires else []
        (metadata / "METADATA").write_text("\n".join([*lines, ""]), encoding="utf-8")
        (metadata / "entry_points.txt").write_text(
            f"[weighted_mtp_core]\n{name} = {module}\n", encoding="utf-8"
        )
        importlib.invalidate_caches()
        return metadata

    return install


@pytest.fixture
def wmtp_no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that searches for installed plugins, because its result would depend on these plugins."""

    def refuse(**_: object) -> None:
        pytest.fail("this test must not look for installed plugins")

    monkeypatch.setattr("weighted_mtp_core.plugins.discovery.distributions", refuse)
