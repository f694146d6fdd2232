"""Replaying a chain: is every record the one that was made, in its place, signed for, and does the bundle support it.

Goal
    An auditor with the files, the CA's certificate and no network says what is wrong, record by record.
Plan
    Lines, then order, then checkpoints (the chain's own, and those that others hold), then each decision anew from its
    recorded facts with the recorded bundle. Everything that is wrong is a finding; nothing stops at the first one.
Invariants
    - Without a finding the records are those that were signed, up to the last checkpoint; what lies behind it is
      chained and not signed, and `Verdict.signed_to` says where that begins.
    - A decision counts as evaluated only if it came out the same, field by field.
    - What could not be looked at is no finding, and is told: `Verdict.unchecked`. A removal is claimed only where something
      says that there was more.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flowengine.errors import FlowError, IntegrityError
from flowengine.evidence.chain import Record, read_record
from flowengine.evidence.checkpoint import Checkpoint, verify_checkpoint
from flowengine.evidence.merkle import merkle_root, root_from_path
from flowengine.evidence.obligations import Finder
from flowengine.evidence.replay import Replayer
from flowengine.evidence.suites import DEFAULT_SUITE, Suite, find_suite
from flowengine.trust.deletion import verify_deletion
from flowengine.trust.receipt import verify_receipt

__all__ = ["Finding", "Proof", "Verdict", "verify_chain", "verify_proofs"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it has to be.

    Attributes:
        what: `altered`, `removed`, `reordered`, `repeated`, `other-agent`, `checkpoint`, `truncated`, `bundle`,
            `facts`, `decision`, `obligation`, `receipt` or `proof`.
        seq: of the record; None where it is about no single one.
        text: what, in a sentence.
    """

    what: str
    seq: int | None
    text: str

    def as_dict(self) -> dict[str, object]:
        """As JSON-able data."""
        return {"what": self.what, "seq": self.seq, "text": self.text}


@dataclass(slots=True)
class Verdict:
    """What came out.

    Attributes:
        agent, chain: whose, and its id.
        records: how many are there and whole.
        first, last: numbers of the first and the last.
        signed_to: up to which record checkpoints were verified; 0 for none.
        held_by: agents that hold checkpoints of this chain which were compared with it.
        evaluated: decisions that came out the same again.
        recorded: decisions that rest on values that are only there as keyed digests.
        refused: denials that needed no policy.
        obligations: records of duties, by their state.
        receipts, deletions: signed receipts and certificates of deletion that were verified.
        findings: what is wrong.
        lacking: records that could not be looked at by policies that are not at hand, by the policies' digest.
        undecided: how many of these are decisions.
        nothing: why there is no chain; empty where there is one.
    """

    agent: str = ""
    chain: str = ""
    suite: str = ""
    records: int = 0
    first: int = 0
    last: int = 0
    signed_to: int = 0
    held_by: list[str] = field(default_factory=list)
    evaluated: int = 0
    recorded: int = 0
    refused: int = 0
    obligations: dict[str, int] = field(default_factory=dict)
    receipts: int = 0
    deletions: int = 0
    findings: list[Finding] = field(default_factory=list)
    lacking: dict[str, list[int]] = field(default_factory=dict)
    undecided: int = 0
    nothing: str = ""

    @property
    def unchecked(self) -> list[dict[str, object]]:
        """What could not be looked at, why, and what helps; as JSON-able data."""
        found: list[dict[str, object]] = []
        if self.nothing:
            found.append(
                {
                    "what": "chain", "bundle": "", "records": 0, "first": 0, "last": 0, "text": self.nothing,
                    "next": "look again when it has recorded something; --against compares with what others hold of it",
                }
            )  # fmt: skip
        for digest, seqs in self.lacking.items():
            shown = (
                f"record {seqs[0]}" if len(seqs) == 1 else f"{len(seqs)} records ({seqs[0]} to {seqs[-1]})"
            )
            found.append(
                {
                    "what": "bundle", "bundle": digest, "records": len(seqs), "first": seqs[0], "last": seqs[-1],
                    "text": f"what {shown} decided or put in force: the policies {digest} are not at hand",
                    "next": "give them with --policies: the bundle of that digest, or the directory that the coordinator ran with",
                }
            )  # fmt: skip
        return found

    def add(self, what: str, seq: int | None, text: str) -> None:
        """One more finding."""
        self.findings.append(Finding(what, seq, text))

    def as_dict(self) -> dict[str, object]:
        """As JSON-able data."""
        return {
            "agent": self.agent,
            "chain": self.chain,
            "suite": self.suite,
            "records": self.records,
            "first": self.first,
            "last": self.last,
            "signed_to": self.signed_to,
            "unsigned": max(0, self.last - self.signed_to),
            "held_by": self.held_by,
            "decisions": {
                "evaluated": self.evaluated, "recorded": self.recorded, "refused": self.refused,
                "unchecked": self.undecided,
            },
            "obligations": self.obligations,
            "receipts": self.receipts,
            "deletions": self.deletions,
            "findings": [finding.as_dict() for finding in self.findings],
            "unchecked": self.unchecked,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Proof:
    """That a record is under a checkpoint: the Merkle path, and the signed checkpoint."""

    seq: int
    path: tuple[str, ...]
    document: bytes


def verify_chain(
    lines: Sequence[bytes],
    anchors_pem: str,
    replayer: Replayer,
    *,
    elsewhere: Iterable[tuple[str, bytes]] = (),
    chosen: Callable[[Record], bool] = lambda record: True,
    agent: str = "",
    begun: str = "",
) -> Verdict:
    """Verify a chain from its first record on.

    Args:
        lines: of all its files, in order, without their ends.
        anchors_pem: the federation's CA.
        replayer: evaluates decisions anew, by the bundles and values that are at hand.
        elsewhere: checkpoints of this agent that others hold: (who, document).
        chosen: which records' contents are looked at; order and signatures are verified for all.
        agent: whose chain it is, where that is known without it; for one that has no record.
        begun: why there has to be a record; empty where there may be none yet.
    """
    verdict = Verdict(agent=agent)
    if not lines:
        _nothing(anchors_pem, elsewhere, begun, verdict)
        return verdict
    suite = _suite(lines, verdict)
    if suite is None:
        return verdict
    records = _read(lines, suite, verdict)
    _order(records, verdict)
    by_seq = {record.seq: record for record in records}
    _checkpoints(by_seq, anchors_pem, suite, elsewhere, verdict)
    for record in records:
        if chosen(record):
            _contents(record, anchors_pem, replayer, verdict)
    _obligations([by_seq[seq] for seq in sorted(by_seq)], chosen, verdict)
    return verdict


def _obligations(records: Sequence[Record], chosen: Callable[[Record], bool], verdict: Verdict) -> None:
    """Whether something is on record for every duty; what is missing is judged in the whole chain only."""
    wanted = {record.seq for record in records if chosen(record)}

    def add(seq: int, text: str) -> None:
        if seq in wanted:
            verdict.add("obligation", seq, text)

    finder = Finder(add)
    finder.look(records)
    verdict.obligations = {state: number for state, number in finder.states.items() if number}


def verify_proofs(
    lines: Sequence[bytes], proofs: Sequence[Proof], anchors_pem: str, replayer: Replayer, suite_name: str
) -> Verdict:
    """Verify single records of a chain by their proofs.

    Args:
        lines: the records.
        proofs: one for each.
        suite_name: of the chain.
    """
    verdict = Verdict(suite=suite_name)
    try:
        suite = find_suite(suite_name)
    except IntegrityError as error:
        verdict.add("altered", None, error.message)
        return verdict
    records = _read(lines, suite, verdict)
    by_seq = {proof.seq: proof for proof in proofs}
    for record in records:
        proof = by_seq.get(record.seq)
        if proof is None:
            verdict.add("proof", record.seq, f"record {record.seq} comes without a proof")
        else:
            _proof(record, proof, anchors_pem, suite, verdict)
        _contents(record, anchors_pem, replayer, verdict)
    if len({record.seq for record in records}) != len(records):
        verdict.add("repeated", None, "a record comes twice")
    return verdict


def _proof(record: Record, proof: Proof, anchors_pem: str, suite: Suite, verdict: Verdict) -> None:
    try:
        found, _ = verify_checkpoint(proof.document, anchors_pem)
        root = root_from_path(suite, record.hash, proof.path)
    except (FlowError, ValueError) as error:
        text = error.message if isinstance(error, FlowError) else "the path is none"
        verdict.add("proof", record.seq, f"the proof of record {record.seq} is wrong: {text}")
        return
    if (
        root != found.root
        or found.agent != record.agent
        or found.suite != suite.name
        or not found.first <= record.seq <= found.seq
    ):
        verdict.add("proof", record.seq, f"record {record.seq} is not under the checkpoint that it came with")
        return
    if verdict.chain not in ("", found.chain):
        verdict.add("proof", record.seq, f"record {record.seq} is of another chain")
        return
    verdict.chain = found.chain
    verdict.signed_to = max(verdict.signed_to, record.seq)


# --- lines and order -------------------------------------------------------------------------------------------------


def _nothing(anchors_pem: str, elsewhere: Iterable[tuple[str, bytes]], begun: str, verdict: Verdict) -> None:
    """A chain without a record: taken away where somebody holds a checkpoint of it, or it must have begun."""
    for holder, document in elsewhere:
        try:
            found, _ = verify_checkpoint(document, anchors_pem)
        except FlowError as error:
            verdict.add("checkpoint", None, f"a checkpoint (held by {holder}) is wrong: {error.message}")
            continue
        if not verdict.agent or found.agent != verdict.agent:
            continue
        verdict.held_by += [holder] if holder not in verdict.held_by else []
        verdict.add(
            "removed",
            found.seq,
            f"there is no record at all, and a checkpoint (held by {holder}) of {found.time} signs for {found.seq}",
        )
    if begun and not verdict.held_by:
        verdict.add("removed", None, f"there is no record at all, and {begun}")
    if not verdict.findings:
        verdict.nothing = "there is no record yet, and nothing says that there has ever been one"


def _suite(lines: Sequence[bytes], verdict: Verdict) -> Suite | None:
    try:
        first = json.loads(lines[0])
        name = first["suite"] if first["seq"] == 1 else DEFAULT_SUITE
    except (ValueError, KeyError, TypeError, RecursionError):
        name = DEFAULT_SUITE  # the line itself is found to be wrong below
    try:
        suite = find_suite(name)
    except IntegrityError as error:
        verdict.add("altered", 1, error.message)
        return None
    verdict.suite = suite.name
    return suite


def _read(lines: Sequence[bytes], suite: Suite, verdict: Verdict) -> list[Record]:
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(read_record(line, suite))
        except IntegrityError as error:
            verdict.add("altered", _seq_of(line), f"line {number}: {error.message}")
    verdict.records = len(records)
    if records:
        verdict.agent = records[0].agent
        verdict.first, verdict.last = records[0].seq, max(record.seq for record in records)
    return records


def _seq_of(line: bytes) -> int | None:
    try:
        found = json.loads(line)["seq"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, int) else None


def _order(records: Sequence[Record], verdict: Verdict) -> None:
    """What is missing, moved, doubled or replaced."""
    altered = {finding.seq for finding in verdict.findings if finding.what == "altered"}
    there: dict[int, Record] = {}
    highest = 0
    for record in records:
        if record.agent != verdict.agent:
            verdict.add("other-agent", record.seq, f"record {record.seq} is of {record.agent[:80]}")
        if record.seq in there:
            verdict.add("repeated", record.seq, f"record {record.seq} is there twice")
            continue
        if record.seq < highest:
            verdict.add("reordered", record.seq, f"record {record.seq} stands behind record {highest}")
        highest = max(highest, record.seq)
        there[record.seq] = record
    for first, last in _gaps(there, altered):
        shown = f"record {first} is" if first == last else f"records {first} to {last} are"
        verdict.add("removed", first, f"{shown} missing")
    for seq, record in sorted(there.items()):
        before = there.get(seq - 1)
        if before is not None and record.prev != before.hash:
            verdict.add(
                "altered", seq, f"record {seq} follows another record {seq - 1} than the one that is there"
            )
    begin = there.get(1)
    if begin is not None:
        verdict.chain = begin.hash
        if begin.kind != "chain" or begin.prev != find_suite(verdict.suite).zero:
            verdict.add("altered", 1, "record 1 does not begin a chain")
    for seq, record in there.items():
        if seq != 1 and record.kind == "chain":
            verdict.add("altered", seq, f"record {seq} begins a chain in the middle of one")


def _gaps(there: Mapping[int, Record], altered: set[int | None]) -> list[tuple[int, int]]:
    """Runs of numbers that are missing, but for lines that are there and cannot be read."""
    missing = [seq for seq in range(1, max(there, default=0)) if seq not in there and seq not in altered]
    runs: list[tuple[int, int]] = []
    for seq in missing:
        if runs and runs[-1][1] == seq - 1:
            runs[-1] = (runs[-1][0], seq)
        else:
            runs.append((seq, seq))
    return runs


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _checkpoints(
    by_seq: Mapping[int, Record],
    anchors_pem: str,
    suite: Suite,
    elsewhere: Iterable[tuple[str, bytes]],
    verdict: Verdict,
) -> None:
    for record in by_seq.values():
        if record.kind != "checkpoint":
            continue
        of = record.get("of")
        if not isinstance(of, dict) or of.get("agent") != verdict.agent:
            continue
        document = _decoded(record.get("document"))
        _checkpoint(by_seq, document, anchors_pem, suite, verdict, record.seq, "its own")
    for holder, document in elsewhere:
        if _checkpoint(by_seq, document, anchors_pem, suite, verdict, None, f"held by {holder}") and (
            holder not in verdict.held_by
        ):
            verdict.held_by.append(holder)


def _checkpoint(
    by_seq: Mapping[int, Record],
    document: bytes,
    anchors_pem: str,
    suite: Suite,
    verdict: Verdict,
    seq: int | None,
    whose: str,
) -> bool:
    """Compare one checkpoint with the chain; whether it was one of this agent."""
    try:
        found, _ = verify_checkpoint(document, anchors_pem)
    except FlowError as error:
        verdict.add("checkpoint", seq, f"a checkpoint ({whose}) is wrong: {error.message}")
        return False
    if found.agent != verdict.agent:
        return False
    if found.chain != verdict.chain:
        verdict.add(
            "checkpoint",
            seq,
            f"a checkpoint ({whose}) of {found.time} is of another chain of {found.agent}: "
            "that one was put aside, or this one was put in its place",
        )
        return True
    if found.seq > verdict.last:
        verdict.add(
            "truncated",
            found.seq,
            f"the chain ends with record {verdict.last}; a checkpoint ({whose}) of {found.time} signs for "
            f"{found.seq}",
        )
        return True
    if wrong := _differs(by_seq, found, suite):
        verdict.add("checkpoint", found.seq, f"a checkpoint ({whose}) of {found.time} {wrong}")
        return True
    verdict.signed_to = max(verdict.signed_to, found.seq)
    return True


def _differs(by_seq: Mapping[int, Record], found: Checkpoint, suite: Suite) -> str:
    there = by_seq.get(found.seq)
    if there is None or there.hash != found.hash:
        return f"signs for another record {found.seq} than the one that is there"
    covered = [by_seq.get(seq) for seq in range(found.first, found.seq + 1)]
    if any(record is None for record in covered):
        return f"signs for records from {found.first} on of which some are not there"
    if merkle_root(suite, [record.hash for record in covered if record is not None]) != found.root:
        return f"signs for other records between {found.first} and {found.seq} than those that are there"
    return ""


def _decoded(value: object) -> bytes:
    try:
        return base64.b64decode(str(value), validate=True)
    except (binascii.Error, ValueError):
        return b""


# --- contents --------------------------------------------------------------------------------------------------------


def _contents(record: Record, anchors_pem: str, replayer: Replayer, verdict: Verdict) -> None:
    bundle = str(record.get("bundle") or "")
    if (
        record.kind in ("decision", "policy.activate")
        and not record.get("refused")
        and replayer.lacks(bundle)
    ):
        verdict.lacking.setdefault(bundle, []).append(record.seq)
        verdict.undecided += record.kind == "decision"
    elif record.kind == "decision":
        outcome, problems = replayer.replay(record, find_suite(verdict.suite))
        for what, text in problems:
            verdict.add(what, record.seq, f"record {record.seq}: {text}")
        if not problems:
            setattr(verdict, outcome, getattr(verdict, outcome) + 1)
    elif record.kind == "policy.activate" and (text := replayer.bundle_problem(bundle)):
        verdict.add("bundle", record.seq, f"record {record.seq}: {text}")
    if receipt := record.get("receipt"):
        _signed(record, "receipt", receipt, anchors_pem, verdict)
    if certificate := record.get("certificate"):
        _signed(record, "certificate of deletion", certificate, anchors_pem, verdict)


def _signed(record: Record, what: str, text: object, anchors_pem: str, verdict: Verdict) -> None:
    """A document that a site signed, which a record carries."""
    try:
        if what == "receipt":
            said, _ = verify_receipt(_decoded(text), anchors_pem)
            same = (said.transfer, said.task) == (record.get("transfer"), record.get("task"))
            verdict.receipts += same
        else:
            gone, _ = verify_deletion(_decoded(text), anchors_pem)
            same = (gone.transfer, gone.task) == (record.get("transfer"), record.get("task"))
            verdict.deletions += same
    except FlowError as error:
        verdict.add("receipt", record.seq, f"record {record.seq}: its {what} is wrong: {error.message}")
        return
    if not same:
        verdict.add("receipt", record.seq, f"record {record.seq}: its {what} is of another transfer")
