"""Write recipes (in `recipe.py`) and plugin packages (in this module, from the files in `templates/`).

Every package gets the files of `templates/common` and of `templates/<kind>`. In the names and contents of
these files, each `{{word}}` is replaced with the value of the word. The file names of templates end in
`.tmpl`, so that other tools do not read templates as Python or TOML.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from attrs import frozen
from packaging.version import Version

import weighted_mtp_core
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.plugins.discovery import FoundPlugin
from weighted_mtp_core.plugins.loading import Kind

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_LONGEST = 20  # some lines of the templates contain the name three times
_SUFFIX = ".tmpl"
SUMMARIES = {
    Kind.WEIGHTING: "A larger weight for tokens with a text that matches a pattern.",
    Kind.CRITIC: "A linear probe of the policy's states that predicts the reward.",
    Kind.DATA: "Sums of two numbers, with right and wrong answers.",
    Kind.TRACKER: "A folder with one line of JSON per event.",
}


@frozen(kw_only=True)
class Scaffold:
    """A plugin package to write; its one component has the given kind and the name of the plugin."""

    name: str
    kind: Kind

    @property
    def distribution(self) -> str:
        """Name of the distribution for pip."""
        return f"weighted-mtp-{self.name.replace('_', '-')}"

    @property
    def module(self) -> str:
        """Name of the package's Python module."""
        return f"weighted_mtp_{self.name}"

    def write(self, folder: Path) -> None:
        """Write the package to a folder that is empty or does not exist.

        Raises:
            WmtpError: The folder is not empty, or it cannot be written.
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

    def _files(self) -> Iterator[tuple[str, str]]:
        words = {
            "name": self.name,
            "Name": self.name.title().replace("_", ""),
            "module": self.module,
            "distribution": self.distribution,
            "summary": SUMMARIES[self.kind],
            "core_range": _core_range(Version(weighted_mtp_core.__version__)),
        }
        for group in ("common", self.kind.value):
            folder = Path(__file__).parent / "templates" / group
            for path in sorted(folder.rglob(f"*{_SUFFIX}")):
                name = path.relative_to(folder).as_posix().removesuffix(_SUFFIX)
                yield _fill(name, words), _fill(path.read_text(encoding="utf-8"), words)


def check_name(name: str, installed: Mapping[str, FoundPlugin]) -> None:
    """Check that `name` is a possible name for a new plugin.

    Raises:
        WmtpError: The name is not valid in addresses, modules and distributions; is a keyword of Python; is
            too long; or is the name of an installed plugin.
    """
    if not _NAME.fullmatch(name):
        near = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        raise WmtpError(
            f"`{name}` cannot be a plugin's name: expected lower-case words and digits joined by `_`",
            hint=f"for example `{near if _NAME.fullmatch(near) else 'top_k'}`",
        )
    if keyword.iskeyword(name):
        raise WmtpError(f"`{name}` cannot be a plugin's name: it is a keyword of Python")
    if len(name) > _LONGEST:
        raise WmtpError(f"`{name}` has {len(name)} characters; the maximum is {_LONGEST}")
    if name in installed:
        raise WmtpError(
            f"the name is taken by {installed[name]}",
            hint="choose another name; `plugins list` shows all that are taken",
        )


def _fill(text: str, words: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: words[found[1]], text)


def _core_range(version: Version) -> str:
    """Return the range of core versions with the same API; before 1.0, a minor version may change the API."""
    floor = f">={version.major}.{version.minor}"
    ceiling = f"{version.major}.{version.minor + 1}" if version.major == 0 else f"{version.major + 1}"
    return f"{floor},<{ceiling}"
