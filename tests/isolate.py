"""Make an environment in which only the named packages of this repository are installed.

    python tests/isolate.py FOLDER weighted-mtp-core [weighted-mtp-verifiable ...]

Core must work with no plugin installed, and each plugin with no other plugin. If the tests of a plugin need
another plugin, the extra `dev` names the other plugin, which is then installed too. Installing 140
dependencies for each combination would take minutes, so the new venv's site-packages *links* to everything in
the site-packages of the running interpreter, except those editable packages of this repository that are not
needed. For `import` and `importlib.metadata`, in the venv's processes and in the processes that they start,
the unneeded packages do not exist.
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
    """Return whether a distribution was installed with `pip install -e`."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable", False))


def _extra_dev(distribution: Distribution) -> set[str]:
    """Return the names of the distributions that a distribution's extra `dev` requires."""
    every = [Requirement(line) for line in distribution.requires or ()]
    return {
        canonicalize_name(each.name)
        for each in every
        if each.marker and each.marker.evaluate({"extra": "dev"})
    }


def isolate(folder: Path, keep: set[str]) -> None:
    """Make the venv `folder` anew, with all dependencies and with the editable packages that are needed.

    Args:
        folder: The venv.
        keep: Names of editable packages; the editable packages in their extra `dev` are also needed.
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
    # ruff is a separate program, which `python -m ruff` looks for beside the interpreter.
    (folder / "bin" / "ruff").symlink_to(Path(sysconfig.get_path("scripts")) / "ruff")


if __name__ == "__main__":
    isolate(Path(sys.argv[1]), {canonicalize_name(name) for name in sys.argv[2:]})
