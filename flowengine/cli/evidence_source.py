"""Where `flow evidence` gets chains, certificates and other people's checkpoints from."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from flowengine.errors import FlowError, IntegrityError, NotFound, UsageError
from flowengine.evidence.archive import Evidence, unpack
from flowengine.evidence.chain import Record, read_record
from flowengine.evidence.suites import DEFAULT_SUITE, find_suite
from flowengine.store.evidence_folder import read_evidence_folder
from flowengine.units import is_name

if TYPE_CHECKING:
    from flowengine.client import Client

__all__ = [
    "Found", "ca_for_receipt", "chosen_by", "find_anchors", "find_elsewhere", "fingerprint", "given_policies", "is_site",
    "load", "needed_bundles",
    "receipt_in", "records_of",
]  # fmt: skip

COORDINATOR = "coordinator"


@dataclass(frozen=True, slots=True)
class Found:
    """Evidence, and what was left out of an unfinished record at its end.

    Attributes:
        agent: whose, where that is known without a record.
        begun: why there has to be a record; empty where there may be none yet.
    """

    evidence: Evidence
    torn: int = 0
    agent: str = ""
    begun: str = ""


def load(where: str) -> Found:
    """The evidence of a folder, a file, or the coordinator.

    Raises:
        NotFound: there is none.
    """
    path = Path(where)
    if where == COORDINATOR:
        return _of_coordinator()
    if path.is_dir():
        found, torn = read_evidence_folder(where)
        return Found(found, torn, _agent_of(path), "an agent makes a chain with its first record")
    if path.is_file():
        return Found(unpack(path.read_bytes())[0])
    raise NotFound(
        f"there is no evidence at {where}",
        hint="name STATE/evidence of an agent, or a file that flow evidence export wrote",
    )


def is_site(where: str) -> bool:
    """Whether a name is meant for a site: nothing of that name lies here."""
    return where != COORDINATOR and is_name(where) and not Path(where).exists()


def _agent_of(folder: Path) -> str:
    """Whose folder of evidence it is, as the agent enrolled; empty where that does not lie beside it."""
    beside = folder.resolve().parent / "identity" / "federation.json"
    try:
        return f"site:{json.loads(beside.read_text(encoding='utf-8'))['site']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def given_policies(paths: Iterable[Path]) -> dict[str, bytes]:
    """Policies that are given by hand, by the digest under which records name them.

    Args:
        paths: bundles, and directories as a coordinator runs with them.
    """
    from flowengine.cli.policy_files import read_files
    from flowengine.policy.bundle import build_unversioned, open_bundle

    contents = [
        path.read_bytes() if path.is_file() else build_unversioned(read_files(path)) for path in paths
    ]
    return {open_bundle(content).digest: content for content in contents}


def _of_coordinator() -> Found:
    """The coordinator's own chain, and the policies that its decisions name."""
    from flowengine.cli.federation import open_client
    from flowengine.client.access import find_access

    with open_client() as client:
        evidence = Evidence(
            lines=[row.line.encode() for row in client.evidence()], anchors_pem=find_access().ca_pem
        )
        named = {str(record.get("bundle") or "") for record in records_of(Found(evidence))}
        for digest in sorted(named - {""}):
            with contextlib.suppress(NotFound):  # then verification says that it is not there
                evidence.bundles[digest] = base64.b64decode(client.evidence_bundle(digest).content)
        begun = "" if evidence.lines else _decided_by(client)
    return Found(evidence, agent=COORDINATOR, begun=begun)


def _decided_by(client: Client) -> str:
    """What the coordinator decided by policies, all of which it records; empty where it knows of nothing."""
    for transfer in client.transfers():
        for decision in transfer.decisions:
            if decision.policy_digest:
                return f"transfer {transfer.id} was decided by the policies {decision.policy_digest[:16]}…"
    return ""


def receipt_in(where: str) -> bytes | None:
    """The receipt that a file is, None for anything else."""
    from flowengine.trust.envelope import MAX_DOCUMENT_BYTES, open_envelope
    from flowengine.trust.receipt import RECEIPT_DOMAIN

    path = Path(where)
    if not path.is_file() or path.stat().st_size > 2 * MAX_DOCUMENT_BYTES:
        return None
    content = path.read_bytes()
    for document in (content, _unbased(content)):
        try:
            open_envelope(document, RECEIPT_DOMAIN, "receipt-forged", "receipt")
        except FlowError:
            continue
        return document
    return None


def _unbased(content: bytes) -> bytes:
    try:
        return base64.b64decode(content.strip(), validate=True)
    except ValueError:
        return b""


def records_of(found: Found) -> list[Record]:
    """The records that can be read; `verify` tells of the others."""
    records = []
    suite = find_suite(found.evidence.suite or DEFAULT_SUITE)
    for line in found.evidence.lines:
        try:
            records.append(read_record(line, suite))
        except IntegrityError:
            continue
    return records


def find_anchors(found: Found, where: str, ca: Path | None) -> tuple[str, str]:
    """The CA's certificate, and where it is from, for people.

    Raises:
        UsageError: none is known here.
    """
    if ca is not None:
        pem = ca.read_text(encoding="ascii")
        return pem, f"{fingerprint(pem)} (of {ca})"
    if found.evidence.anchors_pem:
        pem = found.evidence.anchors_pem
        return pem, f"{fingerprint(pem)} (that came with it: compare it, or give --ca)"
    beside = Path(where).resolve().parent / "identity" / "federation.json"
    if beside.is_file():
        pem = str(json.loads(beside.read_text(encoding="utf-8"))["ca_pem"])
        return pem, f"{fingerprint(pem)} (as this agent enrolled)"
    raise UsageError(
        "the federation's CA is not known here",
        hint="give its certificate with --ca FILE; every agent keeps it in STATE/identity/federation.json",
    )


def ca_for_receipt(ca: Path | None) -> str:
    """The CA's certificate for a receipt: the given one, or that of the coordinator one is logged in at."""
    if ca is not None:
        return ca.read_text(encoding="ascii")
    from flowengine.client.access import find_access

    return find_access().ca_pem


def fingerprint(pem: str) -> str:
    """SHA-256 over the certificate, as `flow login` and join tokens know it."""
    from ssl import PEM_cert_to_DER_cert

    try:
        return "sha256:" + sha256(PEM_cert_to_DER_cert(pem)).hexdigest()
    except ValueError:
        raise UsageError("the CA's certificate cannot be read", hint="it is a file in PEM") from None


def find_elsewhere(against: Sequence[str], online: bool) -> list[tuple[str, bytes]]:
    """Checkpoints that other chains hold."""
    found: list[tuple[str, bytes]] = []
    for where in against:
        other = load(where)
        found += other.evidence.elsewhere
        for record in records_of(other):
            if record.kind == "checkpoint":
                document = base64.b64decode(str(record.get("document")))
                found.append((record.agent, document))
    if online:
        from flowengine.cli.federation import open_client

        with open_client() as client:
            found += [(COORDINATOR, base64.b64decode(one.document)) for one in client.checkpoints()]
    return found


def needed_bundles(bundles: Mapping[str, bytes], records: Iterable[Record]) -> dict[str, bytes]:
    """The bundles that records name."""
    named = {str(record.get("bundle")) for record in records}
    return {digest: content for digest, content in bundles.items() if digest in named}


def chosen_by(since: str | None, until: str | None) -> Callable[[Record], bool]:
    """Whether a record lies between two numbers or moments, both included."""
    first, last = _bound(since), _bound(until)

    def chosen(record: Record) -> bool:
        return (first is None or _key(record, first) >= first) and (
            last is None or _key(record, last)[: len(last)] <= last
        )

    return chosen


def _key(record: Record, bound: str) -> str:
    return f"{record.seq:020d}" if len(bound) == 20 and bound.isdigit() else record.time


def _bound(text: str | None) -> str | None:
    """A record's number with zeros before it, or the beginning of a time."""
    if text is None:
        return None
    if text.isdigit():
        return f"{int(text):020d}"
    from datetime import datetime

    try:
        datetime.fromisoformat(text.removesuffix("Z"))
    except ValueError:
        raise UsageError(
            f"{text!r} is neither a record's number nor a day or moment",
            hint="write it like 2026-03-02 or 2026-03-02T12:00:00",
        ) from None
    return text.removesuffix("Z")
