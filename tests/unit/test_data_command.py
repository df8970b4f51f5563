"""`data prepare` makes data without a run; `data show` prints the stored data and what they depend on."""

import json

import pytest
from weighted_mtp_core.cli import main

STORING_PLUGIN = """
    import json

    from attrs import frozen
    from weighted_mtp_core.api import (
        SPLITS, Component, DataSource, Example, example_statistics, hookimpl, store_dataset
    )

    @frozen(kw_only=True)
    class Options:
        count: int = 4

    class Kept(DataSource):
        def __init__(self, options, context):
            self.count = options.count
            version = f"v{self.count}"
            self.stored = store_dataset(context.storage, name="kept", version=version, write=self.write)

        def write(self, folder):
            print("writing")
            statistics = {
                "splits": {split: example_statistics(self.examples(split)) for split in SPLITS},
                "solution": {"passed": self.count},
                "sample": {},
            }
            provenance = {"judge": {"seconds": "5"}, "tests_sha256": "ab"}
            (folder / "statistics.json").write_text(json.dumps(statistics))
            (folder / "provenance.json").write_text(json.dumps(provenance))

        def examples(self, split):
            return [
                Example(
                    example_id=f"{split}{i}", problem_id=f"{split}{i}", prompt="p", response="r", reward=i % 2
                )
                for i in range(self.count)
            ]

        def version(self):
            return self.stored.version

    @hookimpl
    def wmtp_data_sources():
        yield Component(name="kept", summary="Kept.", options=Options, build=Kept)
"""
RECIPE = """
    [run]
    name = "small"
    [data]
    use = "storing"
    [weighting]
    use = "example.flat"
"""


@pytest.fixture
def recipe(write_recipe, example_plugin, install_plugin):
    install_plugin("storing", STORING_PLUGIN)
    return str(write_recipe(RECIPE))


def test_show_prints_what_prepare_made_and_what_it_depends_on(recipe, capsys):
    assert main(["data", "prepare", recipe]) == 0
    prepared = capsys.readouterr().out
    assert main(["data", "show", "kept"]) == 0
    shown = capsys.readouterr().out

    (line,) = [line.split() for line in prepared.splitlines() if line.startswith("train")]
    assert line[:4] == ["train", "4", "4", "50.0%"]
    assert prepared.removeprefix("writing\n").strip() in shown
    assert shown.splitlines()[-4:] == ["solution: passed 4", "judge: seconds 5", "tests_sha256: ab", ""]


def test_a_second_prepare_writes_nothing(recipe, capsys):
    main(["data", "prepare", recipe])
    first = capsys.readouterr().out
    main(["data", "prepare", recipe])

    assert first == "writing\n" + capsys.readouterr().out


def test_every_version_is_shown_unless_one_is_named(recipe, capsys):
    main(["data", "prepare", recipe])
    main(["data", "prepare", recipe, "--set", "data.options.count=2"])
    capsys.readouterr()

    main(["data", "show"])
    assert capsys.readouterr().out.count("sha256  ") == 2
    main(["data", "show", "kept/v2"])
    assert capsys.readouterr().out.count("sha256  ") == 1


def test_data_that_keep_nothing_are_counted_too(recipe, tmp_path, capsys):
    rows = [
        {"instruction": "i", "input": "", "output": "o", "problem_id": i, "is_correct": bool(i % 2)}
        for i in range(30)
    ]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ["--set", "data.use=core.jsonl", "--set", f"data.options={{train='{own}', test='{own}.2'}}"]
    own.with_name("own.jsonl.2").write_text(json.dumps({**rows[0], "problem_id": 99}) + "\n")

    assert main(["data", "prepare", recipe, *changes]) == 0
    out = capsys.readouterr().out
    assert "50.0%" in out
    assert "none: read from its own files" in out


def test_show_says_what_there_is_not(recipe, capsys):
    assert main(["data", "show"]) == 2
    assert "there is no data in `storage`" in capsys.readouterr().err
    main(["data", "prepare", recipe])
    assert main(["data", "show", "kpet"]) == 2
    assert "did you mean `kept`?" in capsys.readouterr().err
