"""The command line: output, exit codes, and modules that must not be imported."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from weighted_mtp_core import cli
from weighted_mtp_core.cli import main
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.messages import python_command

RECIPE = """
    [run]
    name = "first"
    [data]
    use = "example"
    options = { folder = "f" }
    [weighting]
    use = "example.flat"
    [critic]
    use = "example.judge"
"""
HEAVY = ("torch", "transformers", "mlflow", "boto3", "sklearn")
REPORT_IMPORTS = f"""
import sys
from weighted_mtp_core.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
assert code == 0, code
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
"""


@pytest.fixture
def recipe(example_plugin, write_recipe):
    return str(write_recipe(RECIPE))


@pytest.fixture
def failing(monkeypatch):
    """Make the command `check` fail in a given way."""

    def failing(error):
        def fail(_):
            raise error

        monkeypatch.setattr(cli.check, "main", fail)

    return failing


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["plugins", "list"], ["check", "RECIPE"]]
)
def test_no_heavy_import_before_a_run(recipe, site, arguments):
    arguments = [recipe if each == "RECIPE" else each for each in arguments]

    done = subprocess.run(
        [sys.executable, "-c", REPORT_IMPORTS, *arguments],
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr


def test_a_check_takes_less_than_a_second(recipe, site):
    """In CPU time: wall time depends on the other tests that run on the machine."""
    before = os.times()
    command = [sys.executable, "-m", "weighted_mtp_core", "check", recipe]
    subprocess.run(command, env={"PYTHONPATH": str(site)}, check=True, stdout=subprocess.DEVNULL)
    after = os.times()

    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


def test_check_prints_the_length_in_epochs_and_the_optimiser(recipe, capsys):
    changes = (
        "train.epochs=1.5",
        "train.optimiser.name=muon",
        "train.schedule=wsd",
        "train.learning_rate=0.02",
    )
    assert main(["check", recipe, *(part for each in changes for part in ("--set", each))]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert "policy training  1.5 epochs of 16 rows; muon, learning rate 0.02, wsd" in lines


def test_check_prints_the_plan_as_plain_aligned_text(recipe, capsys):
    assert main(["check", recipe, "--set", "train.steps=7"]) == 0

    out, err = capsys.readouterr()
    *lines, recipe_sha256, source_sha256 = out.splitlines()
    assert err == ""
    assert lines == [
        "recipe           recipe.toml",
        "run              first (seed 42)",
        "experiment       weighted_mtp/example",
        "model            micro, 4 parallel heads",
        "data             example.lines  wmtp-example 1.2.3; folder = f, count = 3, workers = 0",
        "critic           example.judge  wmtp-example 1.2.3",
        "weighting        example.flat   wmtp-example 1.2.3; beta = 0.9, clip = [0.1, 3.0]",
        "tracker          none",
        "critic training  300 steps of 16 rows; adamw, learning rate 0.0003, cosine",
        "policy training  7 steps of 16 rows; adamw, learning rate 0.0003, cosine",
        "evaluation       pass@1",
        "",
        "tags",
        "  algo                 example",
        "  wmtp.weighting       example.flat",
        "  wmtp.critic          example.judge",
        "  wmtp.data            example.lines",
        "  wmtp.plugin.example  wmtp-example==1.2.3",
    ]
    assert recipe_sha256.startswith("  wmtp.recipe_sha256   ")
    assert source_sha256.startswith("  wmtp.source_sha256   ")


def test_check_prints_the_resolved_recipe_if_asked(recipe, capsys, write_recipe):
    assert main(["check", recipe, "--resolved"]) == 0

    resolved = write_recipe(capsys.readouterr().out, "resolved.toml")
    assert main(["check", str(resolved)]) == 0


def test_run_hands_the_plan_to_the_stages(recipe, monkeypatch):
    calls = []
    stages = type(sys)("weighted_mtp_core.run")
    stages.run_plan = lambda plan, **options: calls.append((plan, options))
    monkeypatch.setitem(sys.modules, stages.__name__, stages)

    code = main(["run", recipe, "--set", "model.base=big", "--run-name", "second", "--resume", "2026"])

    assert code == 0
    [(plan, options)] = calls
    assert (plan.recipe.run.name, plan.recipe.model.base) == ("second", "big")
    assert options == {"resume": "2026", "allow_change": []}


def test_micro_chooses_the_small_model(recipe, capsys, write_recipe):
    path = write_recipe(RECIPE + '    [model]\n    base = "big"\n', "big.toml")

    main(["check", str(path), "--micro"])

    assert "micro, 4 parallel heads" in capsys.readouterr().out


# --------------------------------------------------------------------------- plugins


def test_plugins_list_shows_names_distributions_versions_and_ranges(example_plugin, install_plugin, capsys):
    install_plugin("broken", "raise RuntimeError", distribution="broken-plugin", requires=None)

    assert main(["plugins", "list"]) == 0

    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["example", "wmtp-example", "1.2.3", ">=0.1,<0.2"] in rows
    assert ["broken", "broken-plugin", "0.3.0", "any"] in rows


def test_plugins_list_shows_every_claim_to_a_name(install_plugin, capsys):
    install_plugin("claimed", distribution="one")
    install_plugin("claimed", distribution="two")

    assert main(["plugins", "list"]) == 0

    claims = [line for line in capsys.readouterr().out.splitlines() if line.startswith("claimed")]
    assert [line.split()[1] for line in claims] == ["one", "two"]
    assert all(line.endswith("(name claimed twice)") for line in claims)


def test_plugins_show_prints_components_and_options(example_plugin, capsys):
    assert main(["plugins", "show", "example"]) == 0

    assert (
        capsys.readouterr().out
        == """\
example: wmtp-example 1.2.3, `wmtp_example`

data source example.lines
  Lines of a file.
    folder   str  required
    count    int  default 3
    workers  int  default 0

critic example.judge
  Values.
  provides value

critic example.reference
  Losses of a reference model.
  provides reference_loss

weighting example.flat
  Flat weights.
    beta  float                     default 0.9
    clip  array of 2: float, float  default [0.1, 3.0]
    mode  str                       optional

weighting example.valued
  Weights from values.
  needs reward, value
    beta  float                     default 0.9
    clip  array of 2: float, float  default [0.1, 3.0]
    mode  str                       optional

tracker example.paper
  Writes runs down.
    experiment_prefix  str  default 'weighted_mtp'
    tracking_uri       str  optional
"""
    )


def test_plugins_check_reports_each_and_goes_on(example_plugin, install_plugin, capsys):
    install_plugin("broken", "raise RuntimeError('no')")

    assert main(["plugins", "check", "broken", "example"]) == 2

    addresses = [f"example.{each}" for each in ("lines", "judge", "reference", "flat", "valued", "paper")]
    assert capsys.readouterr().out.splitlines() == [
        "FAIL broken: plugin `broken` (wmtp-broken 0.3.0) failed to import `wmtp_broken`: RuntimeError: no",
        f"ok   example (wmtp-example 1.2.3): {', '.join(addresses)}",
    ]


def test_plugins_check_checks_all_plugins_by_default(example_plugin, capsys):
    main(["plugins", "check"])

    assert "ok   example" in capsys.readouterr().out


# --------------------------------------------------------------------------- endings


def test_done_is_0(recipe):
    assert main(["check", recipe]) == 0


def test_a_failed_run_is_1(failing, capsys):
    failing(RunFailedError("the loss is NaN at step 3", hint="lower the rate"))

    assert main(["check", "x"]) == 1
    assert capsys.readouterr().err == "error: the loss is NaN at step 3\nhint: lower the rate\n"


def test_wrong_input_is_2(example_plugin, capsys):
    assert main(["check", "missing.toml"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no recipe `missing.toml`")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["chek"],
        ["check"],
        ["check", "a", "b"],
        ["--verzion"],
        ["plugins"],
        ["plugins", "lst"],
        ["run", "--pre"],
    ],
)
def test_wrong_usage_is_2(arguments):
    assert main(arguments) == 2


def test_an_interruption_is_130(failing, capsys):
    failing(KeyboardInterrupt())

    assert main(["check", "x"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_an_unexpected_error_is_1_and_one_line(failing, capsys):
    failing(ZeroDivisionError("division by zero"))

    assert main(["check", "x"]) == 1
    assert capsys.readouterr().err == (
        "error: ZeroDivisionError: division by zero\nhint: add --traceback to see where it happened\n"
    )


@pytest.mark.parametrize("arguments", [["--traceback", "check", "x"], ["check", "x", "--traceback"]])
def test_a_traceback_is_shown_only_if_asked_for(failing, capsys, arguments):
    failing(ZeroDivisionError("division by zero"))

    assert main(arguments) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plugins", "show", "--help"]])
def test_help_and_version_exit_with_0(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 0
    assert capsys.readouterr().err == ""


def test_every_command_has_a_description_and_examples(capsys):
    for module in cli.COMMANDS:
        name = module.__name__.rpartition(".")[2]
        with pytest.raises(SystemExit):
            main([name, "--help"])
        out = capsys.readouterr().out
        assert "examples:" in out, name
        assert out.count("\n") > 8, name
        assert max(map(len, out.splitlines())) <= 110, name


def test_output_has_no_colour(recipe):
    done = subprocess.run(
        [sys.executable, "-m", "weighted_mtp_core", "plugins", "list"],
        env={"FORCE_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("arguments", [["plugins", "list"], ["--help"], ["nonsense"], ["check", "RECIPE"]])
def test_a_closed_pipe_ends_quietly(recipe, arguments, site):
    """As in `plugins list | head -1`: `head` stops reading after a line."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [recipe if each == "RECIPE" else each for each in arguments]

    done = subprocess.run(
        [sys.executable, "-m", "weighted_mtp_core", *arguments],
        env={**os.environ, "PYTHONPATH": str(site)},
        stdout=writer,
        stderr=subprocess.PIPE if arguments != ["nonsense"] else writer,
        text=True,
        check=False,
    )
    os.close(writer)

    assert (done.returncode, done.stderr or "") == (141, "")


def test_a_broken_connection_elsewhere_is_an_error(failing, capsys):
    failing(BrokenPipeError(32, "Broken pipe"))

    assert main(["check", "x.toml"]) == 1
    assert "BrokenPipeError" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--storage=~/kept"], ["--storage", "~/kept"]])
def test_a_home_folder_is_expanded_in_options(arguments, tmp_path, monkeypatch):
    """A shell expands `~` in the second form, but not in the first."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("weights.bin").write_bytes(b"w")

    assert main(["storage", "add-model", "tiny", "1", "~/weights.bin", *arguments]) == 0

    assert (tmp_path / "kept" / "models_v2" / "tiny" / "1" / "weights.bin").is_file()


def test_a_printed_command_can_be_pasted(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    short = python_command("weighted_mtp_core", "track", "sync", "/a b/it's")
    monkeypatch.setenv("PATH", "/nowhere")
    long = python_command("mlflow", "ui")

    assert shlex.split(short) == ["python", "-m", "weighted_mtp_core", "track", "sync", "/a b/it's"]
    assert long == f"{shlex.quote(sys.executable)} -m mlflow ui"
