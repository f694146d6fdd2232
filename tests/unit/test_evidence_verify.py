"""What verification finds: removed, altered, moved and invented records, and decisions that no bundle supports."""

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from chains import NOW, bundle, chain_with_decisions, judged, permitted, pki, verified

from flowengine.errors import IntegrityError
from flowengine.evidence.archive import Evidence, choose, pack, unpack
from flowengine.evidence.bodies import (
    DutyState,
    approval_body,
    chunk_root_body,
    obligation_body,
    refusal_body,
)
from flowengine.evidence.canonical import canonical
from flowengine.evidence.chain import begin_chain, next_record, read_record
from flowengine.evidence.checkpoint import sign_checkpoint
from flowengine.evidence.heads import verify_heads
from flowengine.evidence.replay import Replayer
from flowengine.evidence.suites import DEFAULT_SUITE, find_suite
from flowengine.evidence.verify import Verdict, verify_chain, verify_proofs
from flowengine.policy.model import Duty
from flowengine.store.chain_files import ChainFiles
from flowengine.store.evidence_folder import read_evidence_folder

SUITE = find_suite(DEFAULT_SUITE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return chain_with_decisions(tmp_path_factory.mktemp("evidence"))


def kinds(evidence: Evidence, *elsewhere: tuple[str, bytes]) -> list[tuple[str, int | None]]:
    return [(finding.what, finding.seq) for finding in verified(evidence, *elsewhere).findings]


def with_lines(evidence: Evidence, change: Callable[[list[bytes]], object]) -> Evidence:
    lines = list(evidence.lines)
    change(lines)
    return replace(evidence, lines=lines)


def rehashed(evidence: Evidence, number: int, **fields: object) -> list[bytes]:
    """The lines of a forger who changes a record and makes all hashes behind it fit."""
    lines: list[bytes] = []
    before = ""
    for line in evidence.lines:
        data = json.loads(line)
        if data["seq"] == number:
            data |= fields
        if data["seq"] > number:
            data["prev"] = before
        del data["hash"]
        before = data["hash"] = SUITE.digest(canonical(data))
        lines.append(canonical(data))
    return lines


def last_checkpoint(evidence: Evidence) -> bytes:
    return base64.b64decode(json.loads(evidence.lines[-1])["document"])


def test_nothing_is_wrong_with_what_was_left_alone(whole: Evidence) -> None:
    verdict = verified(whole)
    assert verdict.findings == []
    assert (verdict.records, verdict.first, verdict.last, verdict.signed_to) == (12, 1, 12, 11)
    assert (verdict.evaluated, verdict.recorded, verdict.refused) == (4, 0, 1)
    assert (verdict.agent, verdict.suite) == ("site:beta", DEFAULT_SUITE)


def test_a_removed_record_is_found(whole: Evidence) -> None:
    assert ("removed", 4) in kinds(with_lines(whole, lambda lines: lines.pop(3)))


def test_an_altered_record_is_found(whole: Evidence) -> None:
    def alter(lines: list[bytes]) -> None:
        lines[4] = lines[4].replace(b'"decision":"deny"', b'"decision":"permit"')

    found = kinds(with_lines(whole, alter))
    assert ("altered", 5) in found
    assert not [what for what, _ in found if what == "removed"], "it is there, and changed"


def test_a_moved_record_is_found(whole: Evidence) -> None:
    def swap(lines: list[bytes]) -> None:
        lines[3], lines[6] = lines[6], lines[3]

    found = kinds(with_lines(whole, swap))
    assert ("reordered", 4) in found
    assert not [what for what, _ in found if what in ("removed", "altered")]


def test_a_doubled_record_is_found(whole: Evidence) -> None:
    assert ("repeated", 4) in kinds(with_lines(whole, lambda lines: lines.insert(5, lines[3])))


def test_who_makes_all_hashes_fit_lacks_the_key(whole: Evidence) -> None:
    forged = replace(whole, lines=rehashed(whole, 5, decision="permit"))
    assert [what for what, _ in kinds(forged)].count("checkpoint") == 2


def test_who_has_the_key_too_is_found_by_what_others_hold(whole: Evidence) -> None:
    held = last_checkpoint(whole)
    kept = whole.lines[:6]
    head_record = read_record(kept[-1], SUITE)
    first = read_record(kept[0], SUITE)
    from flowengine.evidence.chain import Head

    head = Head("site:beta", first.hash, SUITE, head_record.seq, head_record.hash)
    hashes = [read_record(line, SUITE).hash for line in kept]
    again = sign_checkpoint(head, hashes, NOW + 30, *pki().signer("beta"))
    record, _ = next_record(
        head, "checkpoint",
        {"of": {"agent": "site:beta", "chain": first.hash}, "document": base64.b64encode(again).decode()}, NOW,
    )  # fmt: skip
    shorter = replace(whole, lines=[*kept, record.line])
    assert kinds(shorter) == [], "the chain alone looks whole"
    assert kinds(shorter, ("site:alpha", held)) == [("truncated", 11)]


def test_a_chain_that_was_put_in_anothers_place_is_found(whole: Evidence) -> None:
    record, _ = begin_chain("site:beta", b"other" * 3, NOW)
    other = Evidence(lines=[record.line])
    assert kinds(other) == []
    assert kinds(other, ("coordinator", last_checkpoint(whole))) == [("checkpoint", None)]


def test_other_agents_checkpoints_are_not_compared(whole: Evidence) -> None:
    _, head = begin_chain("site:gamma", b"g" * 16, NOW)
    theirs = sign_checkpoint(head, [head.hash], NOW, *pki().signer("gamma"))
    verdict = verified(whole, ("site:alpha", theirs), ("site:alpha", last_checkpoint(whole)))
    assert (verdict.findings, verdict.held_by) == ([], ["site:alpha"])


def test_a_decision_that_the_bundle_does_not_support_is_found(tmp_path: Path) -> None:
    """An agent that lies to its own log, with hashes and signatures all in order."""
    files = ChainFiles(str(tmp_path), "site:beta", now=lambda: NOW)
    files.keep_bundle(bundle())
    lied = judged("US") | {"decision": "permit"}
    milder = judged() | {"duties": []}
    invented = judged()
    facts = invented["facts"]
    assert isinstance(facts, list)
    invented["facts"] = [
        fact | ({"by": "site:beta"} if fact["attr"] == "data.labels" else {}) for fact in facts
    ]
    late = judged()
    late["facts"] = [fact | {"asof": "2027-01-01T00:00:00Z"} for fact in facts]
    files.append([("decision", body) for body in (lied, milder, invented, late, judged())])
    files.checkpoint(pki().signer("beta"))
    files.close()
    verdict = verified(read_evidence_folder(str(tmp_path))[0])
    assert [(one.what, one.seq) for one in verdict.findings][:3] == [
        ("decision", 2), ("decision", 3), ("facts", 4),
    ]  # fmt: skip
    assert {one.what for one in verdict.findings if one.seq == 5} == {"facts", "obligation"}
    assert verdict.evaluated == 1
    assert "it says permit" in verdict.findings[0].text
    assert "deny" in verdict.findings[0].text


def chain_of(folder: Path, *writes: list[tuple[str, Mapping[str, object]]]) -> Verdict:
    """The verdict on a chain of site beta with these writes."""
    files = ChainFiles(str(folder), "site:beta", now=lambda: NOW)
    files.keep_bundle(bundle())
    for bodies in writes:
        files.append(bodies)
    files.checkpoint(pki().signer("beta"))
    files.close()
    return verified(read_evidence_folder(str(folder))[0])


def test_a_permit_whose_duties_nobody_took_on_is_found(tmp_path: Path) -> None:
    refused = refusal_body(
        "d-0", "land", "beta", "alpha:/data/x", "land", "before-first-byte", "policy-approval", "nobody approved",
        transfer="tr-1", task="tr-1/1",
    )  # fmt: skip
    whole = chain_of(
        tmp_path / "whole", [*permitted()], [("decision", judged("FR", 8)), ("decision", refused)]
    )
    assert (whole.findings, whole.obligations) == ([], {"accepted": 1}), (
        "what was refused lays no duty on anybody"
    )
    verdict = chain_of(tmp_path / "lacking", [*permitted()], [("decision", judged("FR", 8))])
    ((what, seq, text),) = [(one.what, one.seq, one.text) for one in verdict.findings]
    assert (what, seq) == ("obligation", 4)
    assert "o1 (delete_after)" in text


def test_what_moved_under_a_duty_that_nobody_speaks_of_again_is_found(tmp_path: Path) -> None:
    def said(state: DutyState) -> tuple[str, Mapping[str, object]]:
        duty = Duty("window", (("windows", ("UTC 20:00-06:00",)),), ("home/night",))
        return "obligation", obligation_body(
            duty, state, id="o2", transfer="tr-1", task="tr-1/1", decision_id="d-FR-7"
        )

    moved = chunk_root_body(
        transfer="tr-1", task="tr-1/1", direction="landed", path="beta:/x", root="", objects=1, size_bytes=1
    )
    begun = [*permitted(), said("accepted")]
    assert chain_of(tmp_path / "kept", begun, [said("fulfilled"), ("chunk-root", moved)]).findings == []
    verdict = chain_of(tmp_path / "lacking", begun, [("chunk-root", moved)])
    assert [(one.what, one.seq) for one in verdict.findings] == [("obligation", 5)]
    assert "window" in verdict.findings[0].text


def test_more_approvals_than_there_are_on_record_are_found(tmp_path: Path) -> None:
    duty = Duty("approve", (("from", ("dac",)), ("people", 2)), ("home/two",))
    done = obligation_body(duty, "fulfilled", id="o1", transfer="tr-1", task="tr-1/1", decision_id="d-1")
    one, two = (
        approval_body(name, "used", group="dac", by=name, transfer="tr-1") for name in ("anna", "ben")
    )
    assert (
        chain_of(tmp_path / "two", [("approval", one), ("approval", two), ("obligation", done)]).findings
        == []
    )
    verdict = chain_of(tmp_path / "one", [("approval", one), ("approval", one), ("obligation", done)])
    assert [(found.what, found.seq) for found in verdict.findings] == [("obligation", 4)]


def test_what_cannot_be_checked_without_its_policies_is_told_and_is_no_finding(whole: Evidence) -> None:
    bare = replace(whole, bundles={})
    verdict = verified(bare)
    assert (verdict.findings, verdict.evaluated, verdict.undecided) == ([], 0, 4)
    (digest,) = whole.bundles
    (told,) = verdict.unchecked
    assert (told["what"], told["bundle"], told["records"]) == ("bundle", digest, 5), "four, and when it came"
    assert digest in str(told["text"])
    assert "--policies" in str(told["next"])
    assert verified(whole).unchecked == []
    # What is wrong is found as ever.
    found = {what for what, _ in kinds(with_lines(bare, lambda lines: lines.pop(3)))}
    assert "removed" in found
    assert "bundle" not in found
    other = {digest: bundle(2) for digest in whole.bundles}
    assert {what for what, _ in kinds(replace(whole, bundles=other))} == {"bundle"}, "another one is wrong"


def test_a_chain_without_a_record_was_removed_only_where_something_says_so(whole: Evidence) -> None:
    def nothing(agent: str, *held: bytes, begun: str = "") -> Verdict:
        elsewhere = [("site:alpha", one) for one in held]
        return verify_chain([], pki().anchors, Replayer({}), elsewhere=elsewhere, agent=agent, begun=begun)

    empty = nothing("site:beta")
    assert (empty.findings, [one["what"] for one in empty.unchecked]) == ([], ["chain"])
    head = base64.b64decode(json.loads(whole.lines[-1])["document"])
    assert nothing("site:gamma", head).findings == []
    gone = nothing("site:beta", head)
    assert ([one.what for one in gone.findings], gone.held_by, gone.unchecked) == (
        ["removed"],
        ["site:alpha"],
        [],
    )
    made = nothing("site:beta", begun="its file was made with its first record")
    assert "its file was made" in made.findings[0].text


def test_away_from_the_origin_personal_facts_are_recorded_and_no_more(whole: Evidence) -> None:
    verdict = verified(whole, origin=False)
    assert (verdict.findings, verdict.evaluated, verdict.recorded) == ([], 0, 4)


def test_facts_that_no_policy_looks_at_do_not_hinder(whole: Evidence) -> None:
    kept = {digest: one for digest, one in whole.kept.items() if one.name == "data.persons"}
    verdict = verified(replace(whole, kept=kept))
    assert (verdict.findings, verdict.evaluated) == ([], 4)


def test_a_kept_value_that_was_changed_is_found(whole: Evidence) -> None:
    kept = {
        digest: replace(one, value=1) if one.name == "data.persons" else one
        for digest, one in whole.kept.items()
    }
    assert {what for what, _ in kinds(replace(whole, kept=kept))} == {"facts"}


def test_no_persons_and_no_requester_stand_in_the_log(whole: Evidence) -> None:
    text = b"\n".join(whole.lines)
    assert b"eve" not in text
    assert b"49999" not in text


@pytest.mark.parametrize(
    "lines", [[], [b""], [b"{}"], [b'{"seq":1,"suite":"sm3+sm2"}'], [b"\xff"], [b"[" * 10_000]]
)
def test_garbage_is_a_finding(lines: list[bytes]) -> None:
    assert verified(Evidence(lines=lines)).findings


# --- files that travel -----------------------------------------------------------------------------------------------


def test_an_exported_chain_verifies_far_from_home(whole: Evidence) -> None:
    evidence = replace(whole, anchors_pem=pki().anchors, elsewhere=[("site:alpha", last_checkpoint(whole))])
    data = pack(evidence, {"agent": "site:beta"})
    assert whole.key not in data
    again, about = unpack(data)
    assert (about, again.key, again.kept) == ({"agent": "site:beta"}, b"", {})
    verdict = verified(again, *again.elsewhere)
    assert (verdict.findings, verdict.held_by, verdict.recorded) == ([], ["site:alpha"], 4)
    assert pack(again, about) == data


def chosen(whole: Evidence) -> Evidence:
    records = [read_record(line, SUITE) for line in whole.lines]
    wanted = [record for record in records if record.get("transfer") == "tr-2"]
    assert len(wanted) == 1
    return replace(
        whole,
        lines=[record.line for record in wanted],
        proofs=choose(records, wanted, SUITE, pki().anchors),
        suite=DEFAULT_SUITE,
        anchors_pem=pki().anchors,
    )


def test_one_transfers_records_prove_themselves(whole: Evidence) -> None:
    part = unpack(pack(chosen(whole), {}))[0]
    verdict = verify_proofs(part.lines, part.proofs, pki().anchors, Replayer(part.bundles), part.suite)
    assert (verdict.findings, verdict.records, verdict.refused) == ([], 1, 1)
    assert verdict.chain == read_record(whole.lines[0], SUITE).hash


def forgeries(part: Evidence, whole: Evidence) -> Iterator[Evidence]:
    proof = part.proofs[0]
    yield replace(part, lines=rehashed(part, 6, decision="permit"))
    yield replace(part, lines=[whole.lines[7]])
    yield replace(part, proofs=[replace(proof, path=proof.path[1:])])
    yield replace(part, proofs=[replace(proof, path=("X00",))])
    yield replace(part, proofs=[replace(proof, document=b"none")])
    yield replace(part, proofs=[])
    yield replace(part, lines=part.lines * 2)


def test_forged_proofs_are_found(whole: Evidence) -> None:
    for forged in forgeries(chosen(whole), whole):
        verdict = verify_proofs(
            forged.lines, forged.proofs, pki().anchors, Replayer(forged.bundles), forged.suite
        )
        assert verdict.findings


@pytest.mark.parametrize("data", [b"", b"x" * 2000, pack(Evidence(), {})[:600]])
def test_what_is_no_file_of_evidence_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError) as refused:
        unpack(data)
    assert refused.value.reason == "evidence"


def test_heads_that_cannot_be_of_one_history_are_told_apart() -> None:
    _, head = begin_chain("site:beta", b"b" * 16, NOW)
    heads, hashes = [head], [head.hash]
    for number in range(8):
        record, head = next_record(head, "stop", {"number": number}, NOW)
        heads.append(head)
        hashes.append(record.hash)

    def signed(first: int, last: int, at: int, chain: list[str] = hashes) -> bytes:
        """A checkpoint over records, counted from 1."""
        of = replace(heads[last - 1], hash=chain[last - 1])
        return sign_checkpoint(of, chain[first - 1 : last], NOW + at, *pki().signer("beta"))

    def wrong(*documents: bytes) -> list[tuple[str, int | None]]:
        return [(one.what, one.seq) for one in verify_heads("site:beta", documents, pki().anchors).findings]

    side_by_side = [signed(1, 3, 0), signed(4, 6, 1), signed(7, 8, 2)]
    assert wrong(*side_by_side) == wrong(*reversed(side_by_side)) == []
    assert wrong(side_by_side[0], side_by_side[2]) == [], "one that nobody holds is no contradiction"
    assert wrong(*side_by_side, signed(4, 7, 3)) == [("forked", 7), ("forked", 8)]
    other = [*hashes[:5], "sha256:" + "0" * 64, *hashes[6:]]
    assert wrong(side_by_side[1], signed(4, 6, 1, other)) == [("forked", 6)]
    assert wrong(side_by_side[0], side_by_side[0][:-1]) == [("checkpoint", None)]
    theirs = begin_chain("site:beta", b"c" * 16, NOW)[1]
    again = sign_checkpoint(theirs, [theirs.hash], NOW, *pki().signer("beta"))
    assert wrong(*side_by_side, again) == [("checkpoint", None)]
