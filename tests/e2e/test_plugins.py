"""An installed plugin is not active: a missing or broken plugin affects only the recipes that name it."""

from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
BASELINE, VERIFIABLE = str(CONFIGS / "baseline.toml"), str(CONFIGS / "verifiable.toml")
CORE, BASELINE_MTP, CODE_TASKS = (f"weighted-mtp-{name}" for name in ("core", "baseline-mtp", "code-tasks"))
RAISES_AT_IMPORT = 'raise RuntimeError("this plugin is broken")\n'
QUICK = ("--preset", "ci", "--set", "train.steps=4")


@pytest.fixture(scope="module")
def without_verifiable(isolated):
    return isolated(CORE, BASELINE_MTP, CODE_TASKS)


def test_with_core_alone_only_core_is_listed(wmtp, isolated, tmp_path):
    listed = wmtp("plugins", "list", cwd=tmp_path, python=isolated(CORE))

    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["NAME", "core"]


def test_the_baseline_runs_without_the_other_plugin_and_beside_a_broken_one(
    wmtp, without_verifiable, install, tracked, tmp_path
):
    broken = install("broken", RAISES_AT_IMPORT)

    run = wmtp("run", BASELINE, *QUICK, cwd=tmp_path, python=without_verifiable, env=broken)

    assert run.returncode == 0, run.stderr
    assert "broken" not in run.stdout + run.stderr
    assert run.folder.parts[-4:-2] == ("weighted_mtp", "baseline_mtp")
    assert tracked(run.storage).info.status == "FINISHED"
    assert tracked(run.storage).data.tags["algo"] == "baseline_mtp"
    assert "wmtp.critic" not in tracked(run.storage).data.tags


def test_naming_a_plugin_that_is_not_installed_says_which_are(wmtp, without_verifiable, tmp_path):
    run = wmtp("run", VERIFIABLE, *QUICK, cwd=tmp_path, python=without_verifiable)

    assert run.returncode == 2
    assert run.stderr.startswith(
        "error: no plugin named `verifiable` is installed; installed: `baseline_mtp`, `code_tasks`, `core`\n"
    )
    assert not (tmp_path / "storage").exists()


def test_a_data_source_that_moved_to_a_plugin_is_found_by_its_name(wmtp, tmp_path):
    check = wmtp("check", BASELINE, "--set", "data.use=core.micro_code", cwd=tmp_path)

    assert check.returncode == 2
    assert check.stderr == (
        "error: plugin `core` has no data source named `micro_code`; it has `core.chat`, `core.jsonl`\n"
        "  --set, data.use\n"
        "hint: did you mean `code_tasks.micro_code`?\n"
    )


def test_a_plugin_that_raises_at_import_changes_nothing_for_recipes_that_do_not_name_it(
    wmtp, install, tmp_path
):
    alone = wmtp("check", VERIFIABLE, cwd=tmp_path)

    beside_a_broken_one = wmtp("check", VERIFIABLE, cwd=tmp_path, env=install("broken", RAISES_AT_IMPORT))

    assert alone.returncode == 0, alone.stderr
    assert beside_a_broken_one == alone


def test_a_recipe_that_names_the_broken_plugin_stops_and_says_what_broke(wmtp, install, tmp_path):
    broken = install("broken", RAISES_AT_IMPORT)

    run = wmtp("run", BASELINE, "--set", "weighting.use=broken.any", cwd=tmp_path, env=broken)

    assert run.returncode == 2
    assert run.stderr.startswith(
        "error: plugin `broken` (wmtp-broken 0.3.0) failed to import `wmtp_broken`: "
        "RuntimeError: this plugin is broken\n"
    )
    assert "Traceback" not in run.stderr
