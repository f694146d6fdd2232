"""Which objects take part: ordered include and exclude patterns with the meaning that rsync gives them.

Goal
    `--include` and `--exclude` decide as rsync's do (rsync(1), "Pattern matching rules"), and a peer's
    patterns cost bounded time.
Plan
    Every rule becomes a regular expression over `/path`, or `/path/` for a directory; all together are one
    alternation, so one call finds the first rule that matches.
    - `*` is any run without a slash, `**` any run, `?` one byte that is no slash, `[a-z]`, `[!a-z]`,
      `[[:digit:]]` one byte of a class, never a slash; a backslash takes the next byte as it is, if the
      pattern has a wildcard.
    - A leading slash anchors the pattern at the root; else it matches the tail of a path: whole names, as
      many as the pattern has.
    - A trailing slash matches directories only. `dir/***` matches `dir` and all below.
Invariants
    - The first rule that matches decides; if none does, the path takes part.
    - A star never tries a second place once what follows it, up to the next star, has matched (its group is
      atomic); this loses no match, see `_join`, and keeps the time polynomial.
    - What rsync reads from a rule besides the pattern ("- ", "+ ", "!", modifiers) has no meaning here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from flowengine.errors import ProtocolError, UsageError
from flowengine.units import show_path

__all__ = ["MAX_PATTERN_BYTES", "MAX_RULES", "MAX_STARS", "MAX_TOTAL_BYTES", "FilterSet", "Rule"]

MAX_RULES: Final = 1000
MAX_PATTERN_BYTES: Final = 4096
MAX_TOTAL_BYTES: Final = 64 * 1024
"""All patterns of a set together: compiling them costs about 10 µs a byte."""
MAX_STARS: Final = 32
"""Stars (`*` or `**`) of one pattern."""

Rule = tuple[bool, bytes]
"""Whether the pattern includes, and the pattern."""

_WILDCARDS: Final = re.compile(rb"[*?\[]")
_ANY: Final = b".*"
_IN_NAME: Final = b"[^/]*"
_CLASSES: Final = {
    b"alnum": rb"0-9A-Za-z", b"alpha": rb"A-Za-z", b"blank": rb" \t", b"cntrl": rb"\x00-\x1f\x7f",
    b"digit": rb"0-9", b"graph": rb"!-~", b"lower": rb"a-z", b"print": rb" -~",
    b"punct": rb"!-/:-@\[-`{-~", b"space": rb" \t-\r", b"upper": rb"A-Z", b"xdigit": rb"0-9A-Fa-f",
}  # fmt: skip
_NEVER: Final = b"(?!)"


class FilterSet:
    """Ordered rules; the first that matches a path decides, and without one the path takes part.

    >>> keep = FilterSet([(True, b"*.py"), (True, b"*/"), (False, b"*")])
    >>> keep.allows(b"a/b.py", False), keep.allows(b"a/b.txt", False), keep.allows(b"a", True)
    (True, False, True)

    Args:
        rules: (include, pattern) in the order of the command line.

    Raises:
        UsageError: a pattern is empty or longer than allowed, or there are too many.
    """

    __slots__ = ("_directories", "_files", "rules")

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self.rules: tuple[Rule, ...] = tuple((bool(include), bytes(pattern)) for include, pattern in rules)
        if len(self.rules) > MAX_RULES:
            raise UsageError(
                f"{len(self.rules)} filter rules are more than {MAX_RULES}", hint="join rules with wildcards"
            )
        patterns = [pattern for _, pattern in self.rules]
        if sum(map(len, patterns)) > MAX_TOTAL_BYTES:
            raise UsageError(
                f"the filter patterns together are longer than {MAX_TOTAL_BYTES} bytes",
                hint="join rules with wildcards",
            )
        self._files = _compile(patterns, is_dir=False)
        self._directories = _compile(patterns, is_dir=True)

    @classmethod
    def from_wire(cls, rules: Sequence[Rule]) -> FilterSet:
        """Rules that a peer sent.

        Raises:
            ProtocolError: the peer sent rules that no side may send.
        """
        try:
            return cls(rules)
        except UsageError as error:
            raise ProtocolError(
                f"the other side sent filter rules beyond the limits: {error.message}"
            ) from None

    def to_wire(self) -> list[Rule]:
        """The rules as plain data for a message."""
        return list(self.rules)

    def __bool__(self) -> bool:
        return bool(self.rules)

    def __eq__(self, other: object) -> bool:
        return self.rules == other.rules if isinstance(other, FilterSet) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.rules)

    def __repr__(self) -> str:
        return f"FilterSet({list(self.rules)!r})"

    def allows(self, path: bytes, is_dir: bool) -> bool:
        """Whether the rules let this one path take part.

        A walk asks this for a directory before it goes in, so what lies below an excluded directory is never
        asked for; who holds a path without having walked to it asks `allows_below`.

        Args:
            path: Relative to the root, without a leading slash.
            is_dir: Whether it is a directory (a link to one is not).
        """
        if not self.rules:
            return True
        if is_dir:
            match = self._directories.fullmatch(b"/%b/" % path)
        else:
            match = self._files.fullmatch(b"/" + path)
        return match is None or match.lastindex is None or self.rules[match.lastindex - 1][0]

    def allows_below(self, path: bytes, is_dir: bool) -> bool:
        """Whether a walk from the root would reach the path: it and all directories above it are allowed."""
        at = path.find(b"/")
        while at >= 0:
            if not self.allows(path[:at], True):
                return False
            at = path.find(b"/", at + 1)
        return self.allows(path, is_dir)


def _compile(patterns: Sequence[bytes], *, is_dir: bool) -> re.Pattern[bytes]:
    return re.compile(b"|".join(b"(%b)" % _translate(p, is_dir=is_dir) for p in patterns), re.DOTALL)


def _translate(pattern: bytes, *, is_dir: bool) -> bytes:
    """A regular expression without groups that captures, for `/path` or `/path/`."""
    if not pattern or b"\0" in pattern:
        raise UsageError(
            "a filter pattern is empty or holds a NUL byte", hint="write it like '*.tmp' or '/cache/'"
        )
    if len(pattern) > MAX_PATTERN_BYTES:
        raise UsageError(f"a filter pattern of {len(pattern)} bytes is longer than {MAX_PATTERN_BYTES}")
    only_directories = len(pattern) > 1 and pattern.endswith(b"/")
    if only_directories:
        if not is_dir:
            return _NEVER
        pattern = pattern[:-1]
    anchored = pattern.startswith(b"/")
    body = pattern[1:] if anchored else pattern
    if _WILDCARDS.search(pattern) is None:
        return (b"/" if anchored else b".*/") + re.escape(body) + (b"/" if is_dir else b"")
    # `dir/***` matches the directory as well: it alone may use the slash behind a directory.
    sees_slash = is_dir and pattern.endswith(b"***")
    tail = b"" if sees_slash or not is_dir else b"/"
    if anchored:
        head = b"/"
    elif pattern.startswith(b"**"):
        head = b""
    else:
        head = b".*/"
    return head + _join(_tokens(body)) + tail


def _tokens(body: bytes) -> list[bytes]:
    """The pattern as `_ANY`, `_IN_NAME` and expressions for one byte each."""
    tokens: list[bytes] = []
    stars = position = 0
    while position < len(body):
        byte = body[position : position + 1]
        position += 1
        if byte == b"*":
            end = position
            while body[end : end + 1] == b"*":
                end += 1
            tokens.append(_IN_NAME if end == position else _ANY)
            position = end
            stars += 1
        elif byte == b"?":
            tokens.append(b"[^/]")
        elif byte == b"[":
            token, position = _class(body, position)
            tokens.append(token)
        elif byte == b"\\":
            # At the end there is nothing to take as it is: such a pattern matches nothing.
            tokens.append(re.escape(body[position : position + 1]) if position < len(body) else _NEVER)
            position += 1
        else:
            tokens.append(re.escape(byte))
    if stars > MAX_STARS:
        raise UsageError(
            f"the filter pattern {show_path(body[:80])!r} has {stars} stars; {MAX_STARS} are allowed",
            hint="write several patterns",
        )
    return tokens


def _join(tokens: list[bytes]) -> bytes:
    """One expression, in which a star is atomic with what follows it up to the next star of its kind.

    Between two `**`, taking the first place where a fixed run fits is never worse than a later one, and the
    same holds between two `*` of a run without `**`; the last star of all has to try every place.
    """
    runs: list[list[bytes]] = [[]]
    for token in tokens:
        if token == _ANY:
            runs.append([])
        else:
            runs[-1].append(token)
    joined = _join_names(runs[0], is_last=len(runs) == 1)
    for number, run in enumerate(runs[1:], start=2):
        is_last = number == len(runs)
        expression = _join_names(run, is_last=is_last)
        joined += b".*" + expression if is_last else b"(?>.*?" + expression + b")"
    return joined


def _join_names(run: list[bytes], *, is_last: bool) -> bytes:
    """An expression for a run without `**`; if it `is_last`, the end of the path must follow it."""
    pieces: list[list[bytes]] = [[]]
    for token in run:
        if token == _IN_NAME:
            pieces.append([])
        else:
            pieces[-1].append(token)
    joined = b"".join(pieces[0])
    for number, piece in enumerate(pieces[1:], start=2):
        fixed = b"".join(piece)
        if is_last and number == len(pieces):
            joined += _IN_NAME + fixed
        else:
            joined += b"(?>[^/]*?" + fixed + b")"
    return joined


def _class(body: bytes, position: int) -> tuple[bytes, int]:
    """The expression for a class whose bracket was read, and where the pattern goes on.

    A class that is not closed, or names a class that does not exist, matches nothing.
    """
    negated = body[position : position + 1] in (b"!", b"^")
    position += negated
    items: list[bytes] = []
    previous: int | None = None
    first = True
    while True:
        if position >= len(body):
            return _NEVER, len(body)
        byte = body[position]
        if byte == 0x5D and not first:
            break
        first = False
        following = body[position + 1 : position + 2]
        if byte == 0x2D and previous is not None and following not in (b"", b"]"):
            position += 1
            if following == b"\\":
                position += 1
                if position >= len(body):
                    return _NEVER, len(body)
            items.append(_span(previous, body[position]))
            previous = None
            position += 1
            continue
        if byte == 0x5B and following == b":":
            end = body.find(b"]", position + 2)
            if end < 0:
                return _NEVER, len(body)
            if end > position + 2 and body[end - 1 : end] == b":":
                named = _CLASSES.get(body[position + 2 : end - 1])
                if named is None:
                    return _NEVER, len(body)
                items.append(named)
                previous = None
                position = end + 1
                continue
        if byte == 0x5C:
            position += 1
            if position >= len(body):
                return _NEVER, len(body)
            byte = body[position]
        items.append(_span(byte, byte))
        previous = byte
        position += 1
    inside = b"".join(items)
    # A class never matches a slash, whatever it says.
    if negated:
        return b"[^/%b]" % inside, position + 1
    return (b"(?!/)[%b]" % inside if inside else _NEVER), position + 1


def _span(low: int, high: int) -> bytes:
    return b"\\x%02x-\\x%02x" % (low, high) if low <= high else b""
