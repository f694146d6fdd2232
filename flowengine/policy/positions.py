"""On which line of a TOML text each key and each array item stands.

Goal: an error names its line, and `tomllib` gives values without positions. Plan: walk over text that `tomllib`
has accepted already, so that no syntax needs checking here, and note the line of every key, item and table
header under the path by which the value is reached in the parsed data. Invariant: every step moves forward.
"""

from __future__ import annotations

import bisect
import re
from typing import Final

__all__ = ["Positions"]

Path = tuple[str | int, ...]

_BLANK: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_STRING: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}' + r"|'''.*?'{3,5}" + r'|"(?:\\.|[^"\\])*"' + r"|'[^']*'", re.DOTALL
)
_SCALAR: Final = re.compile(r"[^,\]}\n#]*")


class Positions:
    """Lines of a TOML text by path: `line("rule", 0, "when", 2)`.

    Args:
        text: TOML that parses.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._found: dict[Path, int] = {}
        self._counts: dict[Path, int] = {}
        self._read()

    def line(self, *path: str | int) -> int:
        """The line of the value, or of the nearest thing around it."""
        while path:
            if (found := self._found.get(path)) is not None:
                return found
            path = path[:-1]
        return 1

    def _here(self) -> int:
        return bisect.bisect_left(self._newlines, self._at) + 1

    def _skip(self) -> None:
        match = _BLANK.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _key(self) -> str:
        text, at = self._text, self._at
        if text[at] in "\"'":
            match = _STRING.match(text, at)
            assert match is not None
            self._at = match.end()
            quoted = match[0]
            return quoted[1:-1] if quoted[0] == "'" else _unescape(quoted[1:-1])
        match = _BARE_KEY.match(text, at)
        assert match is not None
        self._at = match.end()
        return match[0]

    def _dotted(self) -> list[str]:
        keys = [self._key()]
        self._skip()
        while self._text[self._at] == ".":
            self._at += 1
            self._skip()
            keys.append(self._key())
            self._skip()
        return keys

    def _table(self, keys: list[str], of_array: bool) -> Path:
        path: Path = ()
        for index, key in enumerate(keys):
            path += (key,)
            if of_array and index == len(keys) - 1:
                count = self._counts.get(path, 0)
                self._counts[path] = count + 1
                return (*path, count)
            if path in self._counts:
                path += (self._counts[path] - 1,)
        return path

    def _read(self) -> None:
        table: Path = ()
        self._skip()
        while self._at < len(self._text):
            line = self._here()
            if self._text[self._at] == "[":
                of_array = self._text.startswith("[[", self._at)
                self._at += 2 if of_array else 1
                self._skip()
                table = self._table(self._dotted(), of_array)
                self._at += 2 if of_array else 1
                self._found[table] = line
            else:
                self._pair(table)
            self._skip()

    def _pair(self, table: Path) -> None:
        line = self._here()
        path = table
        for key in self._dotted():
            path += (key,)
            self._found.setdefault(path, line)
        self._at += 1
        self._skip()
        self._value(path)

    def _value(self, path: Path) -> None:
        text = self._text
        self._found.setdefault(path, self._here())
        opening = text[self._at]
        if opening in "\"'":
            match = _STRING.match(text, self._at)
            assert match is not None
            self._at = match.end()
        elif opening in "[{":
            self._at += 1
            index = 0
            self._skip()
            while text[self._at] not in "]}":
                if opening == "[":
                    self._value((*path, index))
                    index += 1
                else:
                    self._pair(path)
                self._skip()
                if text[self._at] == ",":
                    self._at += 1
                    self._skip()
            self._at += 1
        else:
            match = _SCALAR.match(text, self._at)
            assert match is not None
            self._at = match.end()


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    import tomllib

    value = tomllib.loads(f'x = "{text}"')["x"]
    assert isinstance(value, str)
    return value
