"""`plugins new` writes packages that install, pass their own tests, ruff and mypy --strict as they are."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from attrs import frozen
from packaging.version import Version
from weighted_mtp_core import scaffold
from weighted_mtp_core.cli import main
from weighted_mtp_core.plugins.discovery import find

KINDS = ("weighting", "critic", "data", "tracker")
SHORTEST, LONGEST = "x", "a_name_of_20_letters"
REPOSITORY = Path(__file__).parents[2]


@frozen(kw_only=True)
class Package:
    """A package that was just written, and a folder into which pip installed it."""

    name: str
    kind: str
    folder: Path
    site: Path

    def python(self, *arguments, cwd=None):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd or self.folder,
            env={**environment, "PYTHONPATH": str(self.site), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module", params=KINDS)
def package(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    written = Package(
        name=f"my_{request.param}", kind=request.param, folder=root / "package", site=root / "site-packages"
    )
    assert main(["plugins", "new", written.name, "--kind", written.kind, str(written.folder)]) == 0
    offline = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    installed = written.python("-m", "pip", "install", *offline, "--target", written.site, written.folder)
    assert installed.returncode == 0, installed.stderr
    return written


# ------------------------------------------------------------------ a new package


def test_core_can_use_it_at_once(package):
    checked = package.python("-m", "weighted_mtp_core", "plugins", "check", package.name)

    assert checked.stdout == (
        f"ok   {package.name} (weighted-mtp-my-{package.kind} 0.1.0): {package.name}.{package.name}\n"
    )


def test_it_passes_its_own_tests(package):
    tested = package.python("-m", "pytest", "-q", "-p", "no:cacheprovider")

    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert int(re.search(r"(\d+) passed", tested.stdout)[1]) > 20


def test_it_passes_mypy_strict(package):
    # The cache is kept between runs: most of the time goes into reading torch.
    cache = REPOSITORY / ".mypy_cache" / "scaffold"

    checked = package.python("-m", "mypy", "--cache-dir", cache)

    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("name", [SHORTEST, LONGEST])
@pytest.mark.parametrize("kind", KINDS)
def test_it_passes_ruff_whatever_its_name(kind, name, tmp_path):
    assert main(["plugins", "new", name, "--kind", kind, str(tmp_path)]) == 0

    for arguments in (("check",), ("format", "--diff")):
        checked = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_nothing_is_left_to_fill_in(package):
    written = [path for path in package.folder.rglob("*") if path.is_file()]
    texts = {str(path.relative_to(package.folder)): path.read_text() for path in written}

    assert [name for name, text in texts.items() if re.search(r"\{\{\w|\.tmpl", name + text)] == []
    assert {"README.md", ".gitignore", ".github/workflows/test.yml", "pyproject.toml"} <= set(texts)


def test_its_metadata_say_what_it_is_and_which_core_it_works_with(package):
    project = tomllib.loads((package.folder / "pyproject.toml").read_text())["project"]

    assert project["entry-points"]["weighted_mtp_core"] == {package.name: f"weighted_mtp_my_{package.kind}"}
    assert "weighted-mtp-core>=0.1,<0.2" in project["dependencies"]


@pytest.mark.parametrize(
    ("core", "expected"), [("0.1.0", ">=0.1,<0.2"), ("0.12.3", ">=0.12,<0.13"), ("2.3.4", ">=2.3,<3")]
)
def test_the_range_ends_where_core_may_break(core, expected):
    assert scaffold._core_range(Version(core)) == expected


# ------------------------------------------------------------------ the command


def test_says_what_to_do_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    assert main(["plugins", "new", "top_k", "--kind", "weighting"]) == 0

    assert capsys.readouterr().out == (
        "weighted-mtp-top-k: a package `weighted-mtp-top-k` with the weighting `top_k`\n"
        "\n"
        "next:\n"
        "  cd weighted-mtp-top-k\n"
        "  pip install -e '.[dev]'                          where core is installed\n"
        "  python -m weighted_mtp_core plugins check top_k\n"
        "  pytest                                           core's checks, and numbers worked out by hand\n"
        "  edit src/weighted_mtp_top_k/_top_k.py            to implement your idea\n"
    )
    assert (tmp_path / "weighted-mtp-top-k" / "src" / "weighted_mtp_top_k" / "_top_k.py").exists()


@pytest.mark.parametrize(
    "order", [("NAME", "DIR", "--kind"), ("NAME", "--kind", "DIR"), ("--kind", "NAME", "DIR")]
)
def test_arguments_come_in_any_order(order, tmp_path):
    words = {"NAME": ["top_k"], "DIR": [str(tmp_path / "here")], "--kind": ["--kind", "data"]}

    assert main(["plugins", "new", *(word for each in order for word in words[each])]) == 0
    assert (tmp_path / "here" / "pyproject.toml").exists()


MALFORMED = "cannot be a plugin's name: expected lower-case words and digits joined by `_`"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Top-K", f"error: `Top-K` {MALFORMED}\nhint: for example `top_k`\n"),
        ("../evil", f"error: `../evil` {MALFORMED}\nhint: for example `evil`\n"),
        ("2nd__order_", f"error: `2nd__order_` {MALFORMED}\nhint: for example `top_k`\n"),
        ("lambda", "error: `lambda` cannot be a plugin's name: it is a keyword of Python\n"),
        (LONGEST + "x", f"error: `{LONGEST}x` has 21 characters; the maximum is 20\n"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name, expected, tmp_path, capsys):
    assert main(["plugins", "new", name, "--kind", "weighting", str(tmp_path / "new")]) == 2

    assert capsys.readouterr().err == expected
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_taken_is_refused(example_plugin, tmp_path, capsys):
    for name in (example_plugin, "core"):
        assert main(["plugins", "new", name, "--kind", "critic", str(tmp_path / "new")]) == 2
        assert capsys.readouterr().err == (
            f"error: the name is taken by {find()[name]}\n"
            "hint: choose another name; `plugins list` shows all that are taken\n"
        )
    assert not (tmp_path / "new").exists()


def test_nothing_that_exists_is_written_over(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")

    for taken in (tmp_path / "full", tmp_path / "file"):
        assert main(["plugins", "new", "top_k", "--kind", "weighting", str(taken)]) == 2
        assert capsys.readouterr().err.startswith(f"error: `{taken}` exists and is not an empty folder\n")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_place_that_cannot_be_written_to_is_an_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "below"

    assert main(["plugins", "new", "top_k", "--kind", "weighting", str(target)]) == 2
    assert capsys.readouterr().err == f"error: cannot write to `{target}`: Not a directory\n"
