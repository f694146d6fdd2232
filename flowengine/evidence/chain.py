"""Chains of records: each names the digest of the one before, so none can be changed, removed or moved unseen.

Goal
    One agent, one chain: what it recorded, in its order, for ever.
Plan
    A record is a canonical JSON object on a line of its own. `hash` is the digest of the record without `hash`, and
    `prev` that of the record before. The first record (`chain`) names the agent, the suite, and a nonce; its hash
    is the chain's id, so that two chains of one agent are told apart.
Invariants
    - A line is its record's only form: other bytes with the same meaning are refused.
    - `seq` counts from 1 without a gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from flowengine.errors import IntegrityError
from flowengine.evidence.canonical import canonical, read_canonical
from flowengine.evidence.suites import DEFAULT_SUITE, Suite, find_suite

__all__ = [
    "KINDS", "MAX_RECORD_BYTES", "VERSION", "Head", "Record", "begin_chain", "moment_ms", "next_record",
    "read_record",
]  # fmt: skip

VERSION: Final = 1
MAX_RECORD_BYTES: Final = 1 << 20

KINDS: Final = frozenset(
    (
        "chain", "recovery", "policy.activate", "decision", "obligation", "chunk-root", "recheck", "stop",
        "quarantine", "delete-certificate", "approval", "break-glass", "checkpoint",
    )
)  # fmt: skip
"""All kinds of record (docs/spec/evidence.md)."""

_OWN: Final = ("v", "kind", "agent", "seq", "time", "prev", "hash")


@dataclass(frozen=True, slots=True)
class Head:
    """Where a chain ends.

    Attributes:
        agent: whose it is: `site:NAME` or `coordinator`.
        chain: hash of its first record.
        seq, hash: of its last record.
    """

    agent: str
    chain: str
    suite: Suite
    seq: int
    hash: str

    def as_peer(self) -> dict[str, object]:
        """How another chain's record names it."""
        return {"agent": self.agent, "chain": self.chain, "seq": self.seq, "hash": self.hash}


@dataclass(frozen=True, slots=True)
class Record:
    """One record: what it says, and the line that says it (without its end)."""

    data: Mapping[str, object]
    line: bytes

    @property
    def kind(self) -> str:
        """What it is about."""
        return str(self.data["kind"])

    @property
    def agent(self) -> str:
        """Whose chain it is in."""
        return str(self.data["agent"])

    @property
    def seq(self) -> int:
        """Its number."""
        found = self.data["seq"]
        assert isinstance(found, int)
        return found

    @property
    def time(self) -> str:
        """When it was made, RFC 3339 in UTC."""
        return str(self.data["time"])

    @property
    def hash(self) -> str:
        """Its digest."""
        return str(self.data["hash"])

    @property
    def prev(self) -> str:
        """The digest of the record before."""
        return str(self.data["prev"])

    def get(self, name: str) -> object:
        """A field, None where there is none."""
        return self.data.get(name)


def begin_chain(
    agent: str,
    nonce: bytes,
    now: float,
    suite_name: str = DEFAULT_SUITE,
    more: Mapping[str, object] | None = None,
) -> tuple[Record, Head]:
    """The first record of a new chain.

    Args:
        agent: `site:NAME` or `coordinator`.
        nonce: 16 random bytes.
        now: Unix seconds.
        more: further fields, as the key that will sign.
    """
    suite = find_suite(suite_name)
    body = {**(more or {}), "suite": suite.name, "nonce": nonce.hex()}
    record = _made(suite, agent, 1, suite.zero, "chain", body, now)
    return record, Head(agent, record.hash, suite, 1, record.hash)


def next_record(head: Head, kind: str, body: Mapping[str, object], now: float) -> tuple[Record, Head]:
    """The record that follows a head, and the head that it makes.

    Args:
        kind: one of `KINDS`.
        body: its own fields; canonical-JSON-able.
        now: Unix seconds.

    Raises:
        ValueError: the kind is none, a field has a name that every record has, or a value has no canonical form.
    """
    if kind not in KINDS or kind == "chain":
        raise ValueError(f"{kind!r} is no kind of record")
    record = _made(head.suite, head.agent, head.seq + 1, head.hash, kind, body, now)
    return record, Head(head.agent, head.chain, head.suite, record.seq, record.hash)


def _made(
    suite: Suite, agent: str, seq: int, prev: str, kind: str, body: Mapping[str, object], now: float
) -> Record:
    taken = [name for name in _OWN if name in body]
    if taken:
        raise ValueError(f"a body cannot say {taken[0]!r}: every record says it itself")
    data = {
        **body, "v": VERSION, "kind": kind, "agent": agent, "seq": seq, "time": moment_ms(now), "prev": prev,
    }  # fmt: skip
    data["hash"] = suite.digest(canonical(data))
    line = canonical(data)
    if len(line) > MAX_RECORD_BYTES:
        raise ValueError(f"a record of {len(line)} bytes is more than {MAX_RECORD_BYTES}")
    return Record(data, line)


def read_record(line: bytes, suite: Suite) -> Record:
    """The record on a line, whose hash is right; where it stands in its chain is not judged.

    Raises:
        IntegrityError: it is none, or was altered; reason "evidence".
    """
    try:
        if len(line) > MAX_RECORD_BYTES:
            raise ValueError("it is too long")
        data = read_canonical(line)
        if not isinstance(data, dict):
            raise ValueError("it is no object")  # noqa: TRY004
        types = {"v": int, "kind": str, "agent": str, "seq": int, "time": str, "prev": str, "hash": str}
        for name, kind in types.items():
            if type(data.get(name)) is not kind:
                raise ValueError(f"its {name!r} is missing or wrong")
        if data["v"] != VERSION or data["kind"] not in KINDS:
            raise ValueError("its version or kind is not known")
    except ValueError as error:
        raise IntegrityError(f"a line is no record: {error}", reason="evidence") from None
    without = {name: value for name, value in data.items() if name != "hash"}
    if suite.digest(canonical(without)) != data["hash"]:
        raise IntegrityError(
            f"record {data['seq']} was altered: its hash is not that of what it says", reason="evidence"
        )
    return Record(data, line)


def moment_ms(now: float) -> str:
    """A moment as records write it: RFC 3339, UTC, milliseconds.

    >>> moment_ms(1772452804.218)
    '2026-03-02T12:00:04.218Z'
    """
    at = datetime.fromtimestamp(int(now * 1000) // 1000, UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{int(now * 1000) % 1000:03d}Z"
