"""Where in a TOML file each key stands. tomli tells values but no positions; a message needs the line.

`find_lines` reads text that tomli has accepted already, so it only has to know where things end.
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
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?""""{0,2}'  # up to two quotes may stand right before the closing three
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
    text: str
    at: int = 0
    lines: dict[KeyPath, int] = field(factory=dict)
    _array_tables: dict[KeyPath, int] = field(factory=dict)  # `[[path]]` -> index of its last element

    def document(self) -> None:
        table: KeyPath = ()
        self._skip(_BLANK)
        while self.at < len(self.text):
            if self.text.startswith("[[", self.at):
                table = self._header(brackets=2)
            elif self.text[self.at] == "[":
                table = self._header(brackets=1)
            else:
                self._pair(table)
            self._skip(_BLANK)

    def _header(self, *, brackets: int) -> KeyPath:
        line = self._line()
        self.at += brackets
        *parents, last = self._key()
        self.at += brackets
        table: KeyPath = ()
        for name in parents:
            table = self._last_element((*table, name))
            self.lines.setdefault(table, line)
        table = (*table, last)
        if brackets == 1:
            table = self._last_element(table)
        else:
            self.lines.setdefault(table, line)
            self._array_tables[table] = self._array_tables.get(table, -1) + 1
            table = self._last_element(table)
        self.lines[table] = line
        return table

    def _last_element(self, path: KeyPath) -> KeyPath:
        """`[tracker.options]` after `[[tracker]]` means the last tracker."""
        return (*path, self._array_tables[path]) if path in self._array_tables else path

    def _pair(self, table: KeyPath) -> None:
        line = self._line()
        path = table
        for name in self._key():
            path = (*path, name)
            self.lines.setdefault(path, line)
        self.at += 1  # the equals sign
        self._skip(_SPACE)
        self._value(path)

    def _key(self) -> list[str]:
        """Read `a."b c".d` and the blanks around it."""
        names = []
        while True:
            self._skip(_SPACE)
            if self.text[self.at] in "\"'":
                names.append(str(tomli.loads(f"key = {self._take(_STRING)}")["key"]))
            else:
                names.append(self._take(_BARE_KEY))
            self._skip(_SPACE)
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
            self._skip(_STRING if opening in "\"'" else _SCALAR)

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
        """Skip blanks and a comma; tell whether the array or inline table ends here."""
        self._skip(_BLANK)
        if self.text[self.at] == ",":
            self.at += 1
            self._skip(_BLANK)
        return self.text[self.at] == bracket

    def _line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def _take(self, pattern: re.Pattern[str]) -> str:
        start = self.at
        self._skip(pattern)
        return self.text[start : self.at]

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.at)
        if match is None:  # cannot happen in text that tomli accepts
            raise ValueError(
                f"line {self._line()}: cannot read TOML at {self.text[self.at : self.at + 20]!r}"
            )
        self.at = match.end()
