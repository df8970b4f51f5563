"""Write a plugin package that works at once, from the files below `templates/`.

`templates/common` goes into every package, `templates/<kind>` into one of that kind. In file names and in
texts, `{{word}}` is replaced; the suffix `.tmpl` keeps tools from taking a template for what it makes.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath

from attrs import frozen
from packaging.version import Version

import weighted_mtp_core
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.plugins.discovery import FoundPlugin
from weighted_mtp_core.plugins.loading import Kind

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_LONGEST = 20  # so that lines which hold it three times stay lines
_SUFFIX = ".tmpl"
_SUMMARIES = {
    Kind.WEIGHTING: "The policy's own loss of a target, but not less than a floor.",
    Kind.CRITIC: "A linear probe of the policy's states that predicts the reward.",
    Kind.DATA: "Sums of two numbers, with right and wrong answers.",
    Kind.TRACKER: "A folder with a line of JSON an event.",
}


@frozen(kw_only=True)
class Scaffold:
    """A package that does not exist yet.

    Attributes:
        name: The plugin's name, and that of its one component.
        kind: What the component is.
    """

    name: str
    kind: Kind

    @property
    def distribution(self) -> str:
        """What pip calls it."""
        return f"weighted-mtp-{self.name.replace('_', '-')}"

    @property
    def module(self) -> str:
        """What Python imports."""
        return f"weighted_mtp_{self.name}"

    def write(self, folder: Path) -> None:
        """Write the package into a folder that is empty or not there yet.

        Raises:
            WmtpError: Something lies there already, or nothing can be written there.
        """
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise WmtpError(
                    f"`{folder}` exists and is not an empty folder",
                    hint="name another folder after the options: plugins new NAME --kind KIND DIR",
                )
            for path, text in self._files():
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise WmtpError(f"cannot write to `{folder}`: {error.strerror}") from error

    def _files(self) -> Iterator[tuple[PurePosixPath, str]]:
        words = self._words()
        templates = files(__name__) / "templates"
        for group in ("common", self.kind.value):
            for path, text in _read(templates / group, PurePosixPath()):
                yield PurePosixPath(_fill(str(path), words)), _fill(text, words)

    def _words(self) -> Mapping[str, str]:
        return {
            "name": self.name,
            "Name": self.name.title().replace("_", ""),
            "module": self.module,
            "distribution": self.distribution,
            "summary": _SUMMARIES[self.kind],
            "core_range": _core_range(Version(weighted_mtp_core.__version__)),
        }


def check_name(name: str, installed: Mapping[str, FoundPlugin]) -> None:
    """Check that a new plugin may be called so.

    Raises:
        WmtpError: It could not be an address, a module and a distribution, or it is taken.
    """
    if not _NAME.fullmatch(name):
        near = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        raise WmtpError(
            f"`{name}` cannot be a plugin's name: small letters and digits, in words joined by `_`",
            hint=f"`{near}` could" if _NAME.fullmatch(near) else "for example `top_k`",
        )
    if keyword.iskeyword(name):
        raise WmtpError(f"`{name}` cannot be a plugin's name: it is a word of Python")
    if len(name) > _LONGEST:
        raise WmtpError(f"`{name}` has {len(name)} characters; a plugin's name has up to {_LONGEST}")
    if name in installed:
        raise WmtpError(
            f"{installed[name]} is installed already, and names are unique",
            hint="choose another name; `plugins list` shows those that are taken",
        )


def _read(folder: Traversable, at: PurePosixPath) -> Iterator[tuple[PurePosixPath, str]]:
    for entry in sorted(folder.iterdir(), key=lambda each: each.name):
        if entry.is_dir():
            yield from _read(entry, at / entry.name)
        elif entry.name.endswith(_SUFFIX):
            yield at / entry.name.removesuffix(_SUFFIX), entry.read_text(encoding="utf-8")


def _fill(text: str, words: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: words[found[1]], text)


def _core_range(version: Version) -> str:
    """Return the range of core that this core's API holds for: before 1.0 a minor version may break."""
    floor = f">={version.major}.{version.minor}"
    ceiling = f"{version.major}.{version.minor + 1}" if version.major == 0 else f"{version.major + 1}"
    return f"{floor},<{ceiling}"
