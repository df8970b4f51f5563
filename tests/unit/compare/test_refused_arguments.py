"""Arguments of `compare` that cannot be meant are refused with the reason."""

import pytest
from weighted_mtp_core.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either recipes, or runs that are in MLflow with `--experiment` and `--runs`"),
        (["a.toml", "--runs", "1"], "name either recipes, or runs that are in MLflow"),
        (["--runs", "1", "--executor", "local:2"], "`--grid`, `--executor` and `--seeds` are for recipes"),
        (["--experiment", "a", "--seeds", "3"], "`--grid`, `--executor` and `--seeds` are for recipes"),
        (["a.toml", "--seeds", "0"], "`--seeds 0`: expected 1 to 20"),
        (["a.toml", "--seeds", "21"], "`--seeds 21`: expected 1 to 20"),
        (["a.toml", "--executor", "local:0"], "`--executor local:0`: expected `local:N` with N of 1 or more"),
        (["a.toml", "--executor", "dask://x"], "or `dask://HOST:PORT`"),
        (
            ["a.toml", "--set", "train.steps=9", "--grid", "train.steps=1,2"],
            "`--set train.steps=9` has no effect, because `--grid` sets the same key",
        ),
        (["a.toml", "--set", "run.seed=1"], "`--set run.seed` would give every run the same seed"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, message, capsys):
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err
