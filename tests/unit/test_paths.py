"""The path validator against its vectors, its bounds, and a file system that really has such links."""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from flowengine.errors import ProtocolError
from flowengine.wire.paths import (
    MAX_DEPTH,
    MAX_LINK_BYTES,
    MAX_NAME_BYTES,
    MAX_PATH_BYTES,
    STAGING_NAME,
    check_link_target,
    check_name,
    check_relative_path,
    collision_key,
)

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "vectors" / "paths.json").read_text("utf-8")
)


def unescape(text: str) -> bytes:
    """Text of a vector as bytes: `\\xNN` is a byte, everything else UTF-8."""
    first, *rest = text.split("\\x")
    return first.encode() + b"".join(bytes([int(part[:2], 16)]) + part[2:].encode() for part in rest)


@pytest.mark.parametrize("case", VECTORS["paths"], ids=lambda case: case["path"] or "empty")
def test_path_vectors(case: dict[str, Any]) -> None:
    path = unescape(case["path"])
    if case["ok"]:
        check_relative_path(path, reserved=(STAGING_NAME,))
        return
    with pytest.raises(ProtocolError) as caught:
        check_relative_path(path, reserved=(STAGING_NAME,))
    assert caught.value.reason == "unsafe-path"
    assert caught.value.hint
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("case", VECTORS["links"], ids=lambda case: f"{case['link']}->{case['target']}")
def test_link_vectors(case: dict[str, Any]) -> None:
    link, target = unescape(case["link"]), unescape(case["target"])
    if case["ok"]:
        check_link_target(link, target)
    else:
        with pytest.raises(ProtocolError):
            check_link_target(link, target)
    if case.get("keep", True):
        check_link_target(link, target, links="keep")
    else:
        with pytest.raises(ProtocolError):
            check_link_target(link, target, links="keep")


@pytest.mark.parametrize("case", VECTORS["collisions"], ids=lambda case: f"{case['a']}~{case['b']}")
def test_collision_vectors(case: dict[str, Any]) -> None:
    equal = collision_key(unescape(case["a"])) == collision_key(unescape(case["b"]))
    assert equal is case["collide"]


def test_bounds() -> None:
    check_relative_path(b"a" * MAX_NAME_BYTES)
    check_relative_path(b"/".join([b"a"] * MAX_DEPTH))
    longest = b"/".join([b"a" * 255] * 16)
    check_relative_path(longest)
    check_link_target(b"a", b"a" * MAX_LINK_BYTES)
    assert len(longest) == MAX_PATH_BYTES - 1
    for path in (
        b"a" * (MAX_NAME_BYTES + 1),
        b"/".join([b"a"] * (MAX_DEPTH + 1)),
        longest + b"/a",
    ):
        with pytest.raises(ProtocolError):
            check_relative_path(path)
    for links in ("inside", "keep"):
        with pytest.raises(ProtocolError, match="longer"):
            check_link_target(b"a", b"a" * (MAX_LINK_BYTES + 1), links=links)  # type: ignore[arg-type]


def test_names() -> None:
    check_name(b"a")
    check_name(STAGING_NAME)
    for name in (b"", b".", b"..", b"a/b", b"/", b"a\0", b"a" * 256):
        with pytest.raises(ProtocolError):
            check_name(name)
    with pytest.raises(ProtocolError, match="own use"):
        check_name(STAGING_NAME, reserved=(STAGING_NAME,))


@pytest.mark.slow
def test_no_two_accepted_links_lead_out_together(tmp_path: Path) -> None:
    """Every pair of accepted links over a small alphabet, made for real and resolved by the system."""
    root = tmp_path / "root"
    for directory in ("d/e/f", "g"):
        (root / directory).mkdir(parents=True)
    parts = ["..", "d", "e", "l", "m"]
    targets = ["/".join(names) for length in (1, 2, 3) for names in product(parts, repeat=length)]
    inside = os.fsencode(root)
    tried = 0
    for first_at, second_at in (("l", "d/m"), ("d/l", "d/e/m"), ("d/e/l", "m")):
        accepted: dict[str, list[str]] = {}
        for at in (first_at, second_at):
            accepted[at] = []
            for target in targets:
                try:
                    check_link_target(at.encode(), target.encode())
                except ProtocolError:
                    continue
                accepted[at].append(target)
        assert all(len(found) > 20 for found in accepted.values())
        for first, second in product(accepted[first_at], accepted[second_at][::3]):
            os.symlink(first, root / first_at)
            os.symlink(second, root / second_at)
            for at in (first_at, second_at):
                resolved = os.fsencode(os.path.realpath(root / at))
                assert resolved == inside or resolved.startswith(inside + b"/"), (
                    first_at,
                    first,
                    second_at,
                    second,
                )
                tried += 1
            os.unlink(root / first_at)
            os.unlink(root / second_at)
    assert tried > 5000
