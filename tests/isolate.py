"""Make an environment in which only the named packages of this repository are installed.

    python tests/isolate.py FOLDER weighted-mtp-core [weighted-mtp-verifiable ...]

Core must work with no plugin installed, and each plugin with core alone. A plugin whose tests need another
one names it in its extra `dev`; the other plugin is then installed too. Installing 140 dependencies for each
combination would take minutes, so the new venv's site-packages *links* to everything in that of the running
interpreter, except this repository's own (editable) packages that are not needed. To `import` and
`importlib.metadata`, in the venv's processes and in those that they start, the others do not exist.
"""

from __future__ import annotations

import json
import sys
import sysconfig
import venv
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def is_editable(distribution: Distribution) -> bool:
    """Tell whether a distribution was installed with `pip install -e`."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable", False))


def _extra_dev(distribution: Distribution) -> set[str]:
    """Return the names of what a distribution's extra `dev` requires."""
    every = [Requirement(line) for line in distribution.requires or ()]
    return {
        canonicalize_name(each.name)
        for each in every
        if each.marker and each.marker.evaluate({"extra": "dev"})
    }


def isolate(folder: Path, keep: set[str]) -> None:
    """Make (or remake) the venv `folder` with all dependencies, and of the editable packages those needed.

    Args:
        folder: The venv.
        keep: Names of editable packages; those in their extra `dev` are needed too.
    """
    site_packages = Path(sysconfig.get_path("purelib"))
    editable = {
        canonicalize_name(found.name): found
        for found in distributions(path=[str(site_packages)])
        if is_editable(found)
    }
    if missing := keep - editable.keys():
        sys.exit(f"error: not installed with `pip install -e`: {', '.join(sorted(missing))}")
    keep = keep | {name for each in keep for name in _extra_dev(editable[each]) if name in editable}
    hidden = {
        file.parts[0] for name, found in editable.items() if name not in keep for file in found.files or ()
    }

    venv.create(folder, clear=True, symlinks=True, with_pip=False)
    links = Path(sysconfig.get_path("purelib", vars={"base": str(folder.resolve())}))
    for entry in site_packages.iterdir():
        if entry.name not in hidden:
            (links / entry.name).symlink_to(entry)
    # A program of its own, which `python -m ruff` looks for beside the interpreter.
    (folder / "bin" / "ruff").symlink_to(Path(sysconfig.get_path("scripts")) / "ruff")


if __name__ == "__main__":
    isolate(Path(sys.argv[1]), {canonicalize_name(name) for name in sys.argv[2:]})
