"""The line of every key of a TOML file. tomli gives values without positions; error messages need the line.

`find_lines` reads text that tomli has already accepted, so it only has to find where each token ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import tomli
from attrs import define, field

KeyPath = tuple[str | int, ...]
"""Keys and array indices from the top of a file: `("tracker", 0, "options", "experiment_prefix")`."""

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_OPENING, _CLOSING = re.compile(r"\[{1,2}"), re.compile(r"\]{1,2}")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?""""{0,2}'  # up to two quotes may precede the closing three
    r"|'''.*?''''{0,2}"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\n]+")


def find_lines(text: str) -> Mapping[KeyPath, int]:
    """Return the line, from 1, of every table, key and array element of a valid TOML text."""
    scanner = _Scanner(text)
    scanner.document()
    return scanner.lines


@define
class _Scanner:
    """A cursor (`at`) that moves through the text and notes the line of each key that it passes."""

    text: str
    at: int = 0
    lines: dict[KeyPath, int] = field(factory=dict)
    _last_index: dict[KeyPath, int] = field(factory=dict)  # of the array that `[[path]]` extends

    def document(self) -> None:
        table: KeyPath = ()
        self._take(_BLANK)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._take(_BLANK)

    def _header(self) -> KeyPath:
        """Read `[a.b]` or `[[a.b]]` and return the path of the table that it opens."""
        line = self._line()
        brackets = self._take(_OPENING)
        *parents, last = self._key()
        self._take(_CLOSING)
        table: KeyPath = ()
        for name in parents:
            table = self._last_element((*table, name))
            self.lines.setdefault(table, line)
        table = (*table, last)
        if brackets == "[[":
            self.lines.setdefault(table, line)
            self._last_index[table] = self._last_index.get(table, -1) + 1
        table = self._last_element(table)
        self.lines[table] = line
        return table

    def _last_element(self, path: KeyPath) -> KeyPath:
        """Return `path`, or its last element if it is an array: `[tracker.options]` is the last tracker's."""
        return (*path, self._last_index[path]) if path in self._last_index else path

    def _pair(self, table: KeyPath) -> None:
        line = self._line()
        path = table
        for name in self._key():
            path = (*path, name)
            self.lines.setdefault(path, line)
        self.at += 1  # the equals sign
        self._take(_SPACE)
        self._value(path)

    def _key(self) -> list[str]:
        """Read `a."b c".d` and the blanks around it."""
        names = []
        while True:
            self._take(_SPACE)
            if self.text[self.at] in "\"'":
                names.append(str(tomli.loads(f"key = {self._take(_STRING)}")["key"]))
            else:
                names.append(self._take(_BARE_KEY))
            self._take(_SPACE)
            if self.text[self.at] != ".":
                return names
            self.at += 1

    def _value(self, path: KeyPath) -> None:
        opening = self.text[self.at]
        if opening == "[":
            self._array(path)
        elif opening == "{":
            self._inline_table(path)
        else:
            self._take(_STRING if opening in "\"'" else _SCALAR)

    def _array(self, path: KeyPath) -> None:
        self.at += 1
        index = 0
        while not self._closes("]"):
            self.lines[*path, index] = self._line()
            self._value((*path, index))
            index += 1
        self.at += 1

    def _inline_table(self, path: KeyPath) -> None:
        self.at += 1
        while not self._closes("}"):
            self._pair(path)
        self.at += 1

    def _closes(self, bracket: str) -> bool:
        """Skip blanks and a comma; return whether the array or inline table ends here."""
        self._take(_BLANK)
        if self.text[self.at] == ",":
            self.at += 1
            self._take(_BLANK)
        return self.text[self.at] == bracket

    def _line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def _take(self, pattern: re.Pattern[str]) -> str:
        """Move behind the match at the cursor and return it."""
        match = pattern.match(self.text, self.at)
        assert match is not None, f"line {self._line()}: tomli accepts this text"
        self.at = match.end()
        return match[0]
