"""Filter rules: the cases that rsync(1) documents, limits, and the same decisions as a real rsync."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from flowengine.errors import ProtocolError, UsageError
from flowengine.wire.filters import MAX_PATTERN_BYTES, MAX_RULES, MAX_STARS, MAX_TOTAL_BYTES, FilterSet


def matches(pattern: bytes, path: bytes) -> bool:
    """Whether a single exclude rule matches; a path with a trailing slash is a directory."""
    return not FilterSet([(False, pattern)]).allows(path.rstrip(b"/"), path.endswith(b"/"))


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        # rsync(1), "Pattern matching rules" and "Anchoring include/exclude patterns"
        (b"*.o", b"a.o", True),
        (b"*.o", b"deep/down/a.o", True),
        (b"*.o", b"a.o/", True),
        (b"/foo", b"foo", True),
        (b"/foo", b"bar/foo", False),
        (b"foo/", b"foo/", True),
        (b"foo/", b"foo", False),
        (b"/foo/*/bar", b"foo/x/bar", True),
        (b"/foo/*/bar", b"foo/x/y/bar", False),
        (b"/foo/**/bar", b"foo/x/y/bar", True),
        (b"/foo/**/bar", b"foo/bar", False),
        (b"foo/bar", b"x/foo/bar", True),
        (b"foo/bar", b"xfoo/bar", False),
        (b"sub*/file", b"a/sub1/file", True),
        (b"sub*/file", b"sub1/x/file", False),
        (b"**/bar", b"bar", True),
        (b"**/bar", b"a/b/bar", True),
        (b"a/**", b"x/a/b/c", True),
        (b"a/**", b"a/", False),
        (b"a/***", b"a/", True),
        (b"a/***", b"a", False),
        (b"a/***", b"x/a/b", True),
        (b"?oo", b"foo", True),
        (b"?oo", b"/oo", False),
        (b"[a-c]x", b"bx", True),
        (b"[!a-c]x", b"bx", False),
        (b"[^a-c]x", b"dx", True),
        (b"[]x]", b"]", True),
        (b"[a-]", b"-", True),
        (b"[[:digit:]]", b"7", True),
        (b"[[:digit:]", b"7", False),
        (b"[[:nonsense:]]", b"n", False),
        (b"/a[!x]b", b"a/b", False),
        # "a backslash escapes a wildcard, but only if the pattern has one"
        (b"a\\b", b"a\\b", True),
        (b"a\\*", b"a*", True),
        (b"a\\*", b"ab", False),
        (b"foo\\[bar]*", b"foo[bar]1", True),
        (b"a*\\", b"a\\", False),
        (b"\xff*", b"dir/\xff\xfe", True),
        (b"a*b", b"a\nb", True),
        (b"*a*b*c", b"xaxbabxc", True),
        (b"**a*b/**c", b"a/ab/x/c", True),
        (b"/", b"a/", False),
    ],
)
def test_documented_patterns(pattern: bytes, path: bytes, expected: bool) -> None:
    assert matches(pattern, path) is expected


def test_first_match_wins_and_no_match_allows() -> None:
    rules = FilterSet([(True, b"/keep/***"), (False, b"*.tmp"), (True, b"*"), (False, b"**")])
    assert rules.allows(b"keep/a.tmp", False)
    assert not rules.allows(b"a.tmp", False)
    assert rules.allows(b"b", False)
    assert FilterSet([(False, b"x")]).allows(b"y", False)
    assert FilterSet().allows(b"anything", True)
    assert not FilterSet()


def test_allows_below_asks_for_every_directory_on_the_way() -> None:
    rules = FilterSet([(False, b"/a/b/")])
    assert rules.allows(b"a/b/c", False)
    assert not rules.allows_below(b"a/b/c", False)
    assert rules.allows_below(b"a/x/c", False)


def test_travels_and_compares() -> None:
    rules = FilterSet([(True, b"*.py"), (False, b"*")])
    assert FilterSet.from_wire(rules.to_wire()) == rules
    assert hash(FilterSet.from_wire(rules.to_wire())) == hash(rules)
    assert FilterSet() != rules
    assert "*.py" in repr(rules)


@pytest.mark.parametrize(
    "rules",
    [
        [(False, b"")],
        [(False, b"a\0b")],
        [(False, b"x" * (MAX_PATTERN_BYTES + 1))],
        [(False, b"x*" * (MAX_STARS + 1))],
        [(False, b"x")] * (MAX_RULES + 1),
        [(False, b"x" * MAX_PATTERN_BYTES)] * (MAX_TOTAL_BYTES // MAX_PATTERN_BYTES + 1),
    ],
)
def test_limits(rules: list[tuple[bool, bytes]]) -> None:
    with pytest.raises(UsageError):
        FilterSet(rules)
    with pytest.raises(ProtocolError):
        FilterSet.from_wire(rules)


def _walk(root: Path, rules: FilterSet, at: bytes = b"") -> set[bytes]:
    found: set[bytes] = set()
    with os.scandir(os.path.join(os.fsencode(root), at)) as entries:
        for entry in entries:
            path = at + b"/" + entry.name if at else entry.name
            is_dir = entry.is_dir(follow_symlinks=False)
            if rules.allows(path, is_dir):
                found.add(path + b"/" if is_dir else path)
                if is_dir:
                    found |= _walk(root, rules, path)
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
def test_decides_as_a_real_rsync(tmp_path: Path) -> None:
    rng = random.Random(20240611)
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    names = ["a", "b", "ab", "a.b", "ba", "c", "a b", "[a]", "a*", "-", "\\a"]
    for _ in range(150):
        path = source.joinpath(*rng.choices(names, k=rng.randint(1, 4)))
        if not any(p.is_file() for p in [path, *path.parents]) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if rng.random() < 0.3 else path.write_bytes(b"")
    everything = _walk(source, FilterSet())
    assert len(everything) > 100
    pieces = [
        "a",
        "b",
        "c",
        "ab",
        ".",
        "*",
        "**",
        "***",
        "?",
        "[ab]",
        "[a-c]",
        "[!-]",
        "/",
        "/",
        "\\a",
        "\\*",
    ]
    decided: set[int] = set()
    for _ in range(70):
        rules: list[tuple[bool, bytes]] = []
        for _ in range(rng.randint(1, 4)):
            text = "".join(rng.choices(pieces, k=rng.randint(1, 6)))
            if "//" not in text:
                rules.append((rng.random() < 0.4, text.encode()))
        flags = [b"--include=" + p if include else b"--exclude=" + p for include, p in rules]
        command = [b"rsync", b"-rn", b"--8-bit-output", b"--out-format=%n", *flags]
        command += [os.fsencode(source) + b"/", os.fsencode(target) + b"/"]
        listed = subprocess.run(command, capture_output=True, check=True).stdout.splitlines()
        theirs = {line.replace(b"\\#134", b"\\") for line in listed} - {b"./"}
        assert _walk(source, FilterSet(rules)) == theirs, rules
        decided.add(len(theirs))
    assert len(decided) > 20
