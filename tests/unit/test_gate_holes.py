"""Ways past the gate that somebody looked for: each is tried here and must stay shut."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from chains import NOW, POLICY, pki, verified
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from flowengine.errors import Denied, LocalError
from flowengine.policy.bundle import build, sign
from flowengine.policy.duties import Terms
from flowengine.store.evidence_folder import read_evidence_folder
from flowengine.store.grants import GrantLedger
from flowengine.transfer.sites import SiteIdentity, SiteTrust
from flowengine.trust.grant import Grant
from flowengine_agent.config import OfferedFolder
from flowengine_agent.evidence import EvidenceLog
from flowengine_agent.gate import Gate
from flowengine_agent.logs import open_log
from flowengine_agent.policies import Policies
from flowengine_agent.rechecks import record_stop
from flowengine_agent.roots import Roots
from flowengine_agent.running import Watch, policy_stopped

KEYS = {role: Ed25519PrivateKey.generate() for role in ("policy-owner", "security")}
TRUSTED = {role: [key.public_key()] for role, key in KEYS.items()}


def signed_bundle(version: int = 1) -> bytes:
    labels = b'[label.secret]\ntitle = "Secret"\n'
    content = build({"home.toml": POLICY.encode(), "labels.toml": labels}, version, int(NOW) + 86_400)
    for role, key in KEYS.items():
        content = sign(content, role, key)
    return content


def identity(site: str) -> SiteIdentity:
    key, der = pki().signer(site)
    pem = x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM).decode()
    return SiteIdentity(pem, key, pki().anchors)


@asynccontextmanager
async def gate_in(folder: Path, **policies: Any) -> AsyncIterator[Gate]:
    """The gate of site alpha with the state in a folder, as its agent makes it."""
    ledger = GrantLedger(str(folder / "grants.sqlite"))
    trust = SiteTrust(identity("alpha"), {}, ledger)
    evidence = EvidenceLog(str(folder / "evidence"), "alpha", trust.identity.signer, now=lambda: NOW)
    kept = Policies(str(folder / "policy"), TRUSTED, **policies)
    try:
        yield Gate(trust, kept, open_log("json", "alpha"), evidence=evidence, clock=lambda: NOW)
    finally:
        evidence.close()
        kept.close()
        ledger.close()


def grant() -> Grant:
    return Grant(
        id=b"g" * 16, transfer="t-1", task="t-1.1", fence=1, epoch=1, issued=int(NOW), expires=int(NOW) + 60,
        source=identity("alpha").party, target=identity("beta").party, dial="target", route=["alpha", "beta"],
        source_path="/data/x", target_path="/data/y", mode="copy", secret=bytes(32), labels=["secret"],
    )  # fmt: skip


@pytest.mark.trio
@pytest.mark.parametrize("what", ["gone", "damaged"])
async def test_a_bundle_that_cannot_be_used_any_more_denies(tmp_path: Path, what: str) -> None:
    """Found open: a site that had policies passed everything once their file was gone or unreadable."""
    async with gate_in(tmp_path) as gate:
        gate.policies.take(signed_bundle(), NOW)
        with pytest.raises(Denied) as refused:
            await gate.release(grant())
        assert refused.value.reason == "policy-denied"
    path = tmp_path / "policy" / "bundle"
    if what == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:600])
    async with gate_in(tmp_path) as gate:
        assert gate.policies.in_force is None
        with pytest.raises(Denied) as refused:
            await gate.release(grant())
        assert refused.value.reason == "policy-missing"
        with pytest.raises(Denied):
            gate.review("release", grant(), [grant().source, grant().target], None)
    lines = read_evidence_folder(str(tmp_path / "evidence"))[0].lines
    assert any(b'"refused":"policy-missing"' in line for line in lines), "and it is on the record"


@pytest.mark.trio
async def test_a_site_that_never_had_policies_passes(tmp_path: Path) -> None:
    async with gate_in(tmp_path) as gate:
        assert (await gate.release(grant())).bundle is None
    async with gate_in(tmp_path, required=True) as gate:
        with pytest.raises(Denied):
            await gate.release(grant())


@pytest.mark.trio
async def test_a_permit_that_cannot_be_recorded_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    async with gate_in(tmp_path) as gate:
        gate.policies.take(signed_bundle(), NOW)

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(Denied) as refused:
            await gate.release(grant())
        assert refused.value.reason == "no-evidence"
        monkeypatch.undo()


def offered(path: Path, name: str) -> OfferedFolder:
    path.mkdir(parents=True, exist_ok=True)
    return OfferedFolder(path=str(path), name=name, access="read-write")


def test_what_is_labelled_under_one_name_is_not_offered_under_another(tmp_path: Path) -> None:
    """Found open: labels on /data/cohort did not bind the same folder that was offered as /open too."""
    (tmp_path / "link").symlink_to(tmp_path / "data" / "cohort")
    data = offered(tmp_path / "data", "/data")
    for inner in (
        offered(tmp_path / "data" / "cohort", "/open"),
        OfferedFolder(path=str(tmp_path / "link"), name="/open", access="read"),
        offered(tmp_path / "data", "/again"),
    ):
        with pytest.raises(LocalError, match="lies in"):
            Roots([data, inner]).check_names()
    Roots([data, offered(tmp_path / "data2", "/data2")]).check_names()


@pytest.mark.trio
async def test_a_stop_leaves_the_decision_that_it_rests_on(tmp_path: Path) -> None:
    """Found open: what stopped a running transfer was on the record as a reason, and not as a decision with its facts."""
    async with gate_in(tmp_path) as gate:
        gate.policies.take(signed_bundle(), NOW)
        ends = [grant().source, grant().target]
        denied = next(one for one in gate.review("release", grant(), ends, None) if not one.decision.permit)
        watch = Watch("t-1.1", "t-1", "source", lambda: (), Terms.of(()), None, data="alpha:/data/x")
        watch.denied = denied
        watch.stop("stop-now", policy_stopped(denied))
        await record_stop(gate, watch, "bundle")
    evidence = read_evidence_folder(str(tmp_path / "evidence"))[0]
    kinds = [json.loads(line)["kind"] for line in evidence.lines]
    assert kinds == ["chain", "policy.activate", "decision", "recheck", "stop", "checkpoint"]
    decision, recheck, stop = (json.loads(line) for line in evidence.lines[2:5])
    assert (decision["decision"], decision["phase"], decision["ask"]["data"]) == (
        "deny",
        "running",
        "alpha:/data/x",
    )
    assert recheck["decision_id"] == stop["decision_id"] == decision["decision_id"]
    verdict = verified(evidence)
    assert (verdict.findings, verdict.evaluated) == ([], 1)


@pytest.mark.trio
async def test_a_clock_that_may_be_off_says_no_time(tmp_path: Path) -> None:
    """What policies ask of the time is unknown then, and the record says by how much it may be off."""
    timed = POLICY.replace('"data.persons < 50_000"', '"time.now before 2099-01-01"')
    content = build({"home.toml": timed.encode(), "labels.toml": b"[label.secret]\n"}, 1, int(NOW) + 86_400)
    for role, key in KEYS.items():
        content = sign(content, role, key)
    async with gate_in(tmp_path) as gate:
        gate.policies.take(content, NOW)
        for error_ms, known in ((0, True), (1000, True), (1001, False)):
            gate.clock_error_ms = lambda error_ms=error_ms: error_ms  # type: ignore[misc]
            with pytest.raises(Denied) as refused:
                await gate.release(grant())
            assert ("time.now" in refused.value.context["missing"]) is not known  # type: ignore[operator]
    records = [json.loads(line) for line in read_evidence_folder(str(tmp_path / "evidence"))[0].lines]
    errors = [one["clock"]["error_ms"] for one in records if one["kind"] == "decision"]
    assert sorted(set(errors)) == [0, 1000, 1001]
