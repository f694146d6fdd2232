"""Damaged files and bundles give only the errors that say what is wrong, never a traceback, never half a load."""

from __future__ import annotations

import pathlib
import random
import string

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from flowengine.errors import AuthenticationError, IntegrityError, PolicyInvalid
from flowengine.policy.bundle import build, sign, verify
from flowengine.policy.cases import read_test_file
from flowengine.policy.conditions import LineError, Scope, parse_line
from flowengine.policy.model import NamedList
from flowengine.policy.parse import load
from flowengine.policy.problems import Problem
from flowengine.policy.vocabulary import ATTRIBUTES

ROOT = pathlib.Path(__file__).parents[2] / "policies"
FILES = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sorted(ROOT.rglob("*.toml"))}
WORDS = [
    b"true", b"1", b"''", b'"x"', b"[]", b"{}", b"2026-01-01", b"[[rule]]", b"[policy]", b"when", b"= ", b"not", b"\xff",
    b"-1", b"1.5", b"{any = []}", b"{not = [1]}", b"@eea", b"nan", b"[list.x]", b"0x1F", b"1979-05-27T07:32:00",
]  # fmt: skip


def damaged(rng: random.Random, content: bytes) -> bytes:
    """A file with a few lines dropped, doubled, swapped, cut, or words replaced."""
    lines = content.split(b"\n")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        how = rng.randrange(5)
        if how == 0:
            del lines[at]
            lines = lines or [b""]
        elif how == 1:
            lines.insert(at, lines[at])
        elif how == 2:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif how == 3:
            cut = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + rng.choice(WORDS) + lines[at][cut + rng.randint(0, 4) :]
        else:
            key, equals, _ = lines[at].partition(b"=")
            lines[at] = key + equals + b" " + rng.choice(WORDS)
    return b"\n".join(lines)


def damage_and_load(seed: int, count: int) -> tuple[int, int]:
    rng = random.Random(seed)
    names = [name for name in FILES if not name.endswith(".test.toml")]
    loaded = refused = 0
    for _ in range(count):
        name = rng.choice(names)
        # Only what the file needs, to be quick: its own lists and labels, not the other policies.
        wanted = {key: FILES[key] for key in FILES if "/" in key and key.startswith("lists/")}
        wanted |= {key: FILES[key] for key in ("labels.toml", "attributes.toml", "1-eu-personal.toml")}
        try:
            load({**wanted, name: damaged(rng, FILES[name])})
            loaded += 1
        except PolicyInvalid as error:
            problems = error.context["problems"]
            assert isinstance(problems, list)
            assert all(problem["file"] and problem["message"] for problem in problems)
            refused += 1
    return loaded, refused


@pytest.mark.slow
def test_damaged_policy_files_are_loaded_whole_or_refused_in_words() -> None:
    loaded, refused = damage_and_load(seed=1, count=150)
    assert loaded > 6
    assert refused > 50


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4))
def test_many_damaged_policy_files_are_loaded_whole_or_refused_in_words(seed: int) -> None:
    damage_and_load(seed=100 + seed, count=2000)


@pytest.mark.slow
def test_damaged_test_files_are_read_whole_or_refused_in_words() -> None:
    rng = random.Random(2)
    policies = load(FILES)
    refused = 0
    for _ in range(400):
        name = rng.choice([name for name in FILES if name.endswith(".test.toml")])
        problems: list[Problem] = []
        found = read_test_file(name, damaged(rng, FILES[name]), policies, problems)
        assert (found is None) == bool(problems)
        refused += found is None
    assert refused > 100


@pytest.mark.slow
def test_damaged_bundles_are_refused() -> None:
    rng = random.Random(3)
    small = {name: FILES[name] for name in ("1-eu-personal.toml", "labels.toml")}
    owner, security = (Ed25519PrivateKey.from_private_bytes(letter * 32) for letter in (b"o", b"s"))
    good = sign(sign(build(small, 1, 2_000_000_000), "security", security), "policy-owner", owner)
    trusted = {"policy-owner": [owner.public_key()], "security": [security.public_key()]}
    original = verify(good, trusted, 1_900_000_000)
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        del data[rng.choice([len(data), rng.randrange(len(data))]) :]
        try:
            opened = verify(bytes(data), trusted, 1_900_000_000)
        except (IntegrityError, AuthenticationError):
            continue
        assert (opened.lock, opened.files) == (
            original.lock,
            original.files,
        )  # only padding was hit


EEA = NamedList("eea", frozenset(["FR"]), "f", 1, domain="country")
SCOPE = Scope(ATTRIBUTES, {"eea": EEA}.get, lambda: ["eea"], None, "UTC")
PIECES = st.sampled_from(
    ["site.country", "data.labels", "time.now", "is", "not", "in", "includes", "any of", "@eea", "@", "'FR'", "'", "5",
     "5 GiB", "true", "<", "before", "2026-01-01", "ledger.persons_after('any','any','calendar_year')", "(", ",", "."]
)  # fmt: skip


@given(st.lists(st.one_of(PIECES, st.text(string.printable, max_size=6)), max_size=6).map(" ".join))
def test_any_text_is_a_line_or_a_line_error(text: str) -> None:
    try:
        found = parse_line(text, SCOPE).op
    except LineError as error:
        found = error.message
    assert found
