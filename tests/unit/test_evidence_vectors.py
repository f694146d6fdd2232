"""The bytes of records, trees, digests and checkpoints stay what they are: chains outlive the versions that wrote them.

Made by `python tests/unit/test_evidence_vectors.py`, from this code; the hashes of `records` were computed anew with sha256sum
over the lines without their `hash`.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from chains import NOW, Pki

from flowengine.evidence.bodies import checkpoint_body, stop_body
from flowengine.evidence.canonical import canonical, read_canonical
from flowengine.evidence.chain import begin_chain, next_record, read_record
from flowengine.evidence.checkpoint import read_checkpoint, sign_checkpoint, verify_checkpoint
from flowengine.evidence.merkle import inclusion_path, merkle_root
from flowengine.evidence.private import Private, conceal
from flowengine.evidence.suites import DEFAULT_SUITE, find_suite

PATH = Path(__file__).parent.parent / "vectors" / "evidence.json"
SUITE = find_suite(DEFAULT_SUITE)


def made() -> dict[str, Any]:
    keys = Pki()  # one of its own: what another test signed before would give other serials
    first, head = begin_chain("site:alpha", bytes(range(16)), NOW)
    records = [first]
    for number in range(4):
        record, head = next_record(
            head, "stop", stop_body("stop-now", "policy-denied", transfer=f"t-{number}"), NOW + number
        )
        records.append(record)
    hashes = [record.hash for record in records]
    document = sign_checkpoint(head, hashes, NOW + 9, *keys.signer("alpha"))
    text = base64.b64encode(document).decode()
    last, _ = next_record(head, "checkpoint", checkpoint_body(read_checkpoint(document)[0], text), NOW + 9)
    concealed, _ = conceal(
        {"by": Private("approval.by", "eve@example.org")}, SUITE, b"k" * 32, lambda count: b"s" * count
    )
    return {
        "canonical": [
            [{"€": 1, "\r": 2, "1": [True, None, -5]}, '{"\\r":2,"1":[true,null,-5],"€":1}'],
        ],
        "records": [record.line.decode() for record in (*records, last)],
        "root": merkle_root(SUITE, hashes),
        "path_of_3": inclusion_path(SUITE, hashes, 3),
        "digest": concealed["by"],
        "checkpoint": text,
        "ca": keys.anchors,
    }


def test_the_pinned_bytes_are_made_again() -> None:
    assert made() == json.loads(PATH.read_text("utf-8"))


def test_the_pinned_bytes_are_read() -> None:
    pinned = json.loads(PATH.read_text("utf-8"))
    for value, text in pinned["canonical"]:
        assert read_canonical(text.encode()) == value
        assert canonical(value) == text.encode()
    records = [read_record(line.encode(), SUITE) for line in pinned["records"]]
    assert [record.seq for record in records] == [1, 2, 3, 4, 5, 6]
    found, facts = verify_checkpoint(base64.b64decode(pinned["checkpoint"]), pinned["ca"])
    assert (found.hash, found.root, facts.site) == (records[4].hash, pinned["root"], "alpha")


if __name__ == "__main__":
    PATH.write_text(json.dumps(made(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
