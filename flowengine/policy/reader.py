"""Strict reading of TOML tables: every unknown key and every value of a wrong kind becomes a `Problem`.

Reading goes on after a problem, so that one run shows all of them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from datetime import date, datetime

from flowengine.policy.conditions import LineError, as_instant, instant, parse_quantity
from flowengine.policy.countries import COUNTRIES, NOT_COUNTRIES
from flowengine.policy.model import Attribute, Value
from flowengine.policy.positions import Positions
from flowengine.policy.problems import Problem, closest

__all__ = ["MAX_FILE_BYTES", "Source", "Table", "fact_value", "read_source"]

MAX_FILE_BYTES = 4 * 1024 * 1024
"""A policy file larger than this is refused."""

_AT_LINE = re.compile(r"\(at line (\d+), column \d+\)")


class Source:
    """One TOML file: its data, the lines of its keys, and the list that its problems go to."""

    def __init__(self, path: str, text: str, data: dict[str, object], problems: list[Problem]) -> None:
        self.path = path
        self.data = data
        self.problems = problems
        self._text = text
        self._positions: Positions | None = None

    def line(self, path: Sequence[str | int]) -> int:
        """The line of a key or item."""
        if self._positions is None:
            self._positions = Positions(self._text)
        return self._positions.line(*path)

    def problem(self, path: Sequence[str | int], message: str, hint: str = "") -> None:
        """Note a problem at a key or item."""
        self.problems.append(Problem(self.path, self.line(path), message, hint))

    def root(self, known: Iterable[str]) -> Table:
        """The whole file as a table."""
        return Table(self, (), self.data, known)


def read_source(path: str, content: bytes, problems: list[Problem]) -> Source | None:
    """Parse one file; None, and a problem, where it is no TOML."""
    if len(content) > MAX_FILE_BYTES:
        problems.append(
            Problem(path, 0, f"the file has {len(content)} bytes, more than {MAX_FILE_BYTES}", "split it")
        )
        return None
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        problems.append(Problem(path, line, "the file is not UTF-8", "save it with the encoding UTF-8"))
        return None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = _AT_LINE.search(str(error))
        lines = text.rstrip().split("\n")
        line = min(int(match[1]), len(lines)) if match else len(lines)
        around = lines[line - 1].strip()
        message = _AT_LINE.sub("", str(error)).strip().rstrip(".")
        hint = "texts stand in quotes, lists in [ ], every [ and quote needs its closing one"
        problems.append(
            Problem(path, line, f"not TOML: {message}" + (f" near {around[:60]!r}" if around else ""), hint)
        )
        return None
    return Source(path, text, data, problems)


class Table:
    """A table of a file, read key by key."""

    def __init__(
        self, source: Source, path: tuple[str | int, ...], data: object, known: Iterable[str] | None
    ) -> None:
        self.source = source
        self.path = path
        self.data: dict[str, object] = data if isinstance(data, dict) else {}
        if not isinstance(data, dict):
            self.problem((), f"{self._name()} is a table, not {data!r}", "write [name] and keys below it")
        if known is not None:
            known = list(known)
            for key in self.data:
                if key not in known:
                    hint = closest(key, known) or f"known here: {', '.join(known)}"
                    self.problem((key,), f"unknown key {key!r} in {self._name()}", hint)

    def _name(self) -> str:
        names = [str(part) for part in self.path if isinstance(part, str)]
        return f"[{'.'.join(names)}]" if names else "the file"

    def problem(self, path: Sequence[str | int], message: str, hint: str = "") -> None:
        """Note a problem at a key below this table."""
        self.source.problem((*self.path, *path), message, hint)

    def line(self, *path: str | int) -> int:
        """The line of a key below this table."""
        return self.source.line((*self.path, *path))

    def table(self, key: str, known: Iterable[str] | None = None) -> Table:
        """A table below this one, empty where it is not given."""
        return Table(self.source, (*self.path, key), self.data.get(key, {}), known)

    def tables(self, key: str, known: Iterable[str] | None) -> list[Table]:
        """An array of tables below this one."""
        found = self.data.get(key, [])
        if not isinstance(found, list):
            self.problem((key,), f"{key!r} is a list of tables", f"write [[{key}]] with two brackets")
            return []
        return [Table(self.source, (*self.path, key, index), item, known) for index, item in enumerate(found)]

    def _missing(self, key: str, example: str) -> None:
        self.problem((), f"{self._name()} lacks {key!r}", f"add {key} = {example}")

    def text(
        self, key: str, default: str | None = None, choices: Sequence[str] = (), example: str = '"..."'
    ) -> str:
        """A text; a problem where it is missing (without default), no text or none of the choices."""
        value = self.data.get(key, default)
        if value is None:
            self._missing(key, example)
            return ""
        if not isinstance(value, str):
            self.problem((key,), f"{key!r} is a text, not {value!r}", f'put it in quotes: {key} = "{value}"')
            return default or ""
        if choices and value not in choices:
            hint = closest(value, choices) or "use " + ", ".join(choices)
            self.problem((key,), f"{key!r} cannot be {value!r}", hint)
            return default or choices[0]
        return value

    def texts(self, key: str, required: bool = False) -> list[str]:
        """A list of texts."""
        value = self.data.get(key)
        if value is None:
            if required:
                self._missing(key, '["..."]')
            return []
        if not isinstance(value, list):
            self.problem((key,), f"{key!r} is a list of texts, not {value!r}", f'write {key} = ["..."]')
            return []
        for index, item in enumerate(value):
            if not isinstance(item, str):
                self.problem((key, index), f"{key!r} holds {item!r}, which is no text", "put it in quotes")
        return [item for item in value if isinstance(item, str)]

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            self.problem((key,), f"{key!r} is true or false, not {value!r}", f"write {key} = true")
            return default
        return value

    def day(self, key: str, required: bool = False) -> int | None:
        """A date as seconds since 1970."""
        value = self.data.get(key)
        if value is None:
            if required:
                self._missing(key, "2026-12-31")
            return None
        if not isinstance(value, (date, datetime)):
            self.problem(
                (key,), f"{key!r} is a date, not {value!r}", f"write {key} = 2026-12-31, without quotes"
            )
            return None
        return as_instant(value)

    def seconds(self, key: str, default: int) -> int:
        """A duration."""
        text = self.text(key, "")
        if not text:
            return default
        try:
            number, unit = parse_quantity(text)
        except LineError as error:
            self.problem((key,), error.message, error.hint)
            return default
        if unit != "seconds":
            self.problem((key,), f"{key!r} is a duration, not {text!r}", "write it like '5 min'")
            return default
        return number


def fact_value(attribute: Attribute, raw: object) -> Value:
    """A TOML or JSON value as the value of an attribute.

    Raises:
        LineError: It is of another type, or no country where one is expected.
    """
    kind, shown = attribute.type, attribute.name
    if kind == "flag" and isinstance(raw, bool):
        return raw
    if kind == "number":
        if isinstance(raw, int) and not isinstance(raw, bool):
            return raw
        if isinstance(raw, str):
            number, unit = parse_quantity(raw)
            if unit == attribute.unit or (unit == "" and attribute.unit in ("count", "bits", "percent")):
                return number
            raise LineError(f"{shown} is in {attribute.unit}, not {raw!r}")
    if kind == "time":
        if isinstance(raw, (date, datetime)):
            return as_instant(raw)
        if isinstance(raw, str):
            try:
                return instant(raw)
            except (ValueError, TypeError):
                raise LineError(f"{shown} is a date, not {raw!r}", "write it like 2026-12-31") from None
    if kind == "text" and isinstance(raw, str):
        _check_country(attribute, raw)
        return raw
    if kind == "set" and isinstance(raw, list) and all(isinstance(item, str) for item in raw):
        for item in raw:
            _check_country(attribute, item)
        return frozenset(raw)
    example = {"flag": "true", "number": "1000", "time": "2026-12-31", "text": '"..."', "set": '["..."]'}[
        kind
    ]
    raise LineError(f"{shown} is a {kind}, not {raw!r}", f"write it like {example}")


def _check_country(attribute: Attribute, value: str) -> None:
    if attribute.domain == "country" and value not in COUNTRIES:
        hint = NOT_COUNTRIES.get(value.upper()) or closest(value, COUNTRIES)
        raise LineError(f"{attribute.name}: {value!r} is no ISO 3166-1 country code", hint)
