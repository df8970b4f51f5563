"""The tests of this folder share `small_run.py` and a run that the real stages made."""

import sys
from pathlib import Path
from textwrap import dedent

import pytest
from weighted_mtp_core.cli import main

sys.path.insert(0, str(Path(__file__).parent))
from small_run import RECIPE


@pytest.fixture(scope="module")
def trained(tmp_path_factory, judged_plugin, flat_plugin):
    """The folder of a finished run, in `storage/runs` of the working folder."""
    folder = tmp_path_factory.mktemp("trained")
    for plugin, module, source in (
        ("flat_weights", "wmtp_flat", flat_plugin),
        ("sums", "wmtp_sums", judged_plugin),
    ):
        metadata = folder / "site" / f"{module}-0.3.0.dist-info"
        metadata.mkdir(parents=True)
        (folder / "site" / f"{module}.py").write_text(source)
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {module}\nVersion: 0.3.0\n"
            "Requires-Dist: weighted-mtp-core>=0.1,<0.2\n"
        )
        (metadata / "entry_points.txt").write_text(f"[weighted_mtp_core]\n{plugin} = {module}\n")
    (folder / "recipe.toml").write_text(dedent(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder / "site"))
        assert main(["run", "recipe.toml"]) == 0
        (run,) = (file.parent for file in (folder / "storage" / "runs").rglob("run.json"))
        yield run


@pytest.fixture
def wmtp(trained, capsys):
    """Run a command on the finished run; return exit code, stdout and stderr."""

    def wmtp(command, *arguments, run=trained.name):
        code = main([command, run, *arguments])
        return (code, *capsys.readouterr())

    return wmtp
