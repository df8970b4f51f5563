"""SHA-256 sums of the source code that a result depends on. This module imports no plugin.

If a plugin is installed in editable mode, its code can change while its version stays the same. Two results
with the same version can therefore come from different code; the SHA-256 sums of their code then differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from packaging.utils import canonicalize_name

from weighted_mtp_core.plugins.discovery import CORE_DISTRIBUTION, FoundPlugin

LIBRARIES = ("torch", "transformers")
"""Distributions identified by their version without the build, so that 2.9.0+cpu equals 2.9.0+cu130."""

_NO_RESULT = ("cli", "compare", "executors", "export", "report", "scaffold", "testing", "tracking")
"""Packages of core that do not affect the results of a run."""

_NOT_INSTALLED = frozenset({"conftest", "docs", "setup", "test", "tests"})
"""Names of modules that may lie next to the packages of an editable distribution but do not belong to it."""


def source_identity(plugins: Iterable[FoundPlugin]) -> dict[str, str]:
    """Return versions of `LIBRARIES`, and version and source of core, plugins and editable requirements.

    The keys are names of distributions, and the values are `<version>, source <SHA-256>`, or only the version
    for `LIBRARIES`. The result contains core, the distributions of the plugins, and those requirements of the
    plugins that are installed in editable mode.
    """
    found = {name: distribution(name).version.partition("+")[0] for name in LIBRARIES}
    sources = {CORE_DISTRIBUTION: {"weighted_mtp_core"}}
    for plugin in plugins:
        sources.setdefault(plugin.distribution, set()).add(plugin.module.partition(":")[0].partition(".")[0])
        for name in _editable_requirements(plugin):
            sources.setdefault(name, set())
    for name, modules in sources.items():
        installed = distribution(name)
        if name != CORE_DISTRIBUTION:
            modules |= set(_modules(installed))
        found[name] = f"{installed.version}, source {_sha256(_paths(modules))}"
    return dict(sorted(found.items()))


def _editable_requirements(plugin: FoundPlugin) -> Iterator[str]:
    for requirement in plugin.requirements():
        try:
            installed = distribution(requirement.name)
        except PackageNotFoundError:  # a requirement of an extra or of another platform
            continue
        if json.loads(installed.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"):
            yield canonicalize_name(requirement.name)


def _modules(installed: Distribution) -> Iterator[str]:
    """Yield the names of the top-level modules of a distribution, according to its metadata."""
    yield from (installed.read_text("top_level.txt") or "").split()
    for file in installed.files or ():
        name = file.parts[0].removesuffix(".py")
        if name.isidentifier() and "editable_" not in name:
            yield name
        elif file.suffix == ".pth":  # editable distribution: each line is a folder with its modules
            folders = [Path(line) for line in Path(str(file.locate())).read_text("utf-8").splitlines()]
            for entry in (entry for folder in folders if folder.is_dir() for entry in folder.iterdir()):
                if entry.suffix == ".py" or (entry / "__init__.py").is_file():
                    yield entry.stem


def _paths(modules: Iterable[str]) -> tuple[Path, ...]:
    paths: set[Path] = set()
    for name in set(modules) - _NOT_INSTALLED:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            paths |= set(map(Path, spec.submodule_search_locations))
        elif spec is not None and spec.has_location:
            paths.add(Path(str(spec.origin)))
    return tuple(sorted(paths))


@cache
def _sha256(paths: tuple[Path, ...]) -> str:
    """Return one SHA-256 of modules and package folders; it is cached, because hashing core takes 15 ms."""
    digest = hashlib.sha256()
    for path in paths:
        for file in [path] if path.is_file() else sorted(filter(Path.is_file, path.rglob("*"))):
            inside = file.relative_to(path).parts if file != path else (path.name,)
            if _is_source(inside) and not (path.name == "weighted_mtp_core" and inside[0] in _NO_RESULT):
                sum_of_file = hashlib.sha256(file.read_bytes()).hexdigest()
                digest.update(f"{path.name}/{'/'.join(inside)} {sum_of_file}\n".encode())
    return digest.hexdigest()


def _is_source(parts: tuple[str, ...]) -> bool:
    """Return whether a file is source code or package data, and not a cache or an editor's backup copy."""
    return not (
        "__pycache__" in parts
        or any(part.startswith(".") for part in parts)
        or parts[-1].endswith(("~", ".pyc", ".pyo"))
    )
