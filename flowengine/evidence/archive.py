"""Evidence in one file, to be verified years later on a machine that knows nothing of the federation.

An uncompressed tar (ustar, sorted, times and owners zero): `evidence.json` says what it is; `anchors.pem` is the CA;
`chain.jsonl` the records, all of them or chosen ones; `proofs.json` for chosen ones their Merkle paths and checkpoints;
`checkpoints.json` what others hold; `bundles/HEX.bundle` the policies; `receipts/N` signed receipts.
"""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from flowengine.errors import IntegrityError
from flowengine.evidence.canonical import canonical, read_canonical
from flowengine.evidence.chain import Record
from flowengine.evidence.checkpoint import verify_checkpoint
from flowengine.evidence.merkle import inclusion_path
from flowengine.evidence.private import Kept
from flowengine.evidence.suites import Suite
from flowengine.evidence.verify import Proof

__all__ = ["MAX_ARCHIVE_BYTES", "Evidence", "choose", "pack", "unpack"]

MAX_ARCHIVE_BYTES: Final = 4 << 30
_MAX_MEMBERS: Final = 100_000


@dataclass(slots=True)
class Evidence:
    """What there is to verify.

    Attributes:
        lines: records, without line ends.
        proofs: for chosen records; empty where the chain is whole.
        suite: of the chain; for chosen records.
        bundles: archives by digest.
        elsewhere: checkpoints that others hold: (who, document).
        receipts: signed receipts that no record carries.
        anchors_pem: the federation's CA; empty where it is not known here.
        key, kept: of keyed digests; only at the origin.
    """

    lines: list[bytes] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    suite: str = ""
    bundles: dict[str, bytes] = field(default_factory=dict)
    elsewhere: list[tuple[str, bytes]] = field(default_factory=list)
    receipts: list[bytes] = field(default_factory=list)
    anchors_pem: str = ""
    key: bytes = b""
    kept: dict[str, Kept] = field(default_factory=dict)


def choose(
    records: Sequence[Record], wanted: Sequence[Record], suite: Suite, anchors_pem: str
) -> list[Proof]:
    """Proofs for some records of a whole chain, each under the first own checkpoint that covers it.

    Raises:
        IntegrityError: no checkpoint covers one of them yet.
    """
    hashes = {record.seq: record.hash for record in records}
    agent = records[0].agent if records else ""
    checkpoints = []
    for record in records:
        of = record.get("of")
        if record.kind == "checkpoint" and isinstance(of, dict) and of.get("agent") == agent:
            document = base64.b64decode(str(record.get("document")))
            checkpoints.append((verify_checkpoint(document, anchors_pem)[0], document))
    proofs = []
    for record in wanted:
        found = next(((one, doc) for one, doc in checkpoints if one.first <= record.seq <= one.seq), None)
        if found is None:
            raise IntegrityError(
                f"no checkpoint signs for record {record.seq} yet",
                hint="the agent makes one every minute; try again then",
                reason="evidence",
            )
        one, document = found
        leaves = [hashes[seq] for seq in range(one.first, one.seq + 1)]
        path = inclusion_path(suite, leaves, record.seq - one.first)
        proofs.append(Proof(record.seq, tuple(path), document))
    return proofs


def pack(evidence: Evidence, about: Mapping[str, object]) -> bytes:
    """The file; the same evidence gives the same bytes. Keys and values of digests are never in it.

    Args:
        about: what it is of, for people: agent, range, transfer.
    """
    members: dict[str, bytes] = {
        "evidence.json": canonical(
            {"v": 1, "whole": not evidence.proofs, "suite": evidence.suite, "about": dict(about)}
        ),
        "anchors.pem": evidence.anchors_pem.encode("ascii"),
        "chain.jsonl": b"".join(line + b"\n" for line in evidence.lines),
        "checkpoints.json": canonical(
            [{"by": by, "document": _text(document)} for by, document in evidence.elsewhere]
        ),
    }
    if evidence.proofs:
        members["proofs.json"] = canonical(
            [
                {"seq": proof.seq, "path": list(proof.path), "checkpoint": _text(proof.document)}
                for proof in evidence.proofs
            ]
        )
    for digest, content in evidence.bundles.items():
        members[f"bundles/{digest.partition(':')[2]}.bundle"] = content
    for number, document in enumerate(evidence.receipts):
        members[f"receipts/{number:06d}"] = document
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(members.items(), key=lambda item: (item[0] != "evidence.json", item[0])):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def unpack(data: bytes) -> tuple[Evidence, Mapping[str, object]]:
    """What a file holds, none of it believed yet, and what it says it is about.

    Raises:
        IntegrityError: it is no file of evidence; reason "evidence".
    """
    try:
        members = _members(data)
        head = read_canonical(members["evidence.json"])
        if not isinstance(head, dict) or head.get("v") != 1:
            raise ValueError("of another version")
        evidence = Evidence(
            lines=members["chain.jsonl"].split(b"\n")[:-1],
            suite=str(head["suite"]),
            anchors_pem=members["anchors.pem"].decode("ascii"),
            elsewhere=[
                (str(item["by"]), base64.b64decode(item["document"], validate=True))
                for item in json.loads(members["checkpoints.json"])
            ],
            proofs=[
                Proof(
                    int(item["seq"]),
                    tuple(str(step) for step in item["path"]),
                    base64.b64decode(item["checkpoint"], validate=True),
                )
                for item in json.loads(members.get("proofs.json", b"[]"))
            ],
            receipts=[content for name, content in members.items() if name.startswith("receipts/")],
        )
        if not members["chain.jsonl"].endswith(b"\n") and members["chain.jsonl"]:
            raise ValueError("its last record has no end")
        if not head.get("whole") and evidence.lines and not evidence.proofs:
            raise ValueError("it holds chosen records without their proofs")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"this is no file of evidence: {error}", hint="export or fetch it again", reason="evidence"
        ) from None
    for name, content in members.items():
        if name.startswith("bundles/"):
            evidence.bundles["sha256:" + name.removeprefix("bundles/").removesuffix(".bundle")] = content
    about = head.get("about")
    return evidence, about if isinstance(about, dict) else {}


def _members(data: bytes) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    if len(data) > MAX_ARCHIVE_BYTES:
        raise ValueError("it is too large")
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file is None or member.name in members or len(members) >= _MAX_MEMBERS:
                    raise ValueError(f"{member.name!r} is no plain file, or comes twice")
                members[member.name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"it is no archive ({error})") from None
    return members


def _text(document: bytes) -> str:
    return base64.b64encode(document).decode("ascii")
