"""`flow evidence` as an auditor meets it: output, JSON, exit codes, files that travel."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from chains import NOW, POLICY, chain_with_decisions, pki

from flowengine.cli.evidence_source import given_policies
from flowengine.cli.main import main
from flowengine.coordinator.decisions import Decider
from flowengine.trust.receipt import SignedReceipt, sign_receipt

pytestmark = pytest.mark.slow


def flow(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["evidence", *(str(arg) for arg in args)])
    captured = capsys.readouterr()
    code = ended.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err


def flow_json(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, Any]:
    code, out, _ = flow(capsys, *args, "--json")
    return code, json.loads(out)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The state folder of an agent, as enrolment and a few decisions leave it."""
    state = tmp_path / "state"
    (state / "identity").mkdir(parents=True)
    (state / "identity" / "federation.json").write_text(json.dumps({"ca_pem": pki().anchors}))
    chain_with_decisions(state / "evidence")
    return state / "evidence"


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    path.write_text(pki().anchors)
    return path


def chain_file(folder: Path) -> Path:
    (path,) = (folder / "chain").iterdir()
    return path


def test_a_whole_chain_is_told_to_be_whole(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, out, _ = flow(capsys, "verify", folder)
    assert code == 0
    assert "site:beta: 12 records (1 to 12)" in out
    assert "signed      up to record 11" in out
    assert "4 come out the same" in out
    assert "nobody's checkpoints" in out
    code, said = flow_json(capsys, "verify", folder)
    assert (code, said["ok"], said["findings"], said["signed_to"]) == (0, True, [], 11)


@pytest.mark.parametrize("what", ["removed", "altered", "reordered"])
def test_what_was_tampered_with_is_named(capsys: pytest.CaptureFixture[str], folder: Path, what: str) -> None:
    path = chain_file(folder)
    rows = path.read_bytes().splitlines(keepends=True)
    if what == "removed":
        del rows[3]
    elif what == "altered":
        rows[4] = re.sub(rb'"decision":"(deny|permit)"', b'"decision":"permit"', rows[4])
    else:
        rows[3], rows[4] = rows[4], rows[3]
    path.write_bytes(b"".join(rows))
    code, said = flow_json(capsys, "verify", folder)
    assert (code, said["ok"]) == (6, False)
    assert what in {finding["what"] for finding in said["findings"]}
    code, out, _ = flow(capsys, "verify", folder)
    assert f"WRONG       {what}: " in out


def test_a_cut_end_is_found_by_what_another_holds(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, ca: Path
) -> None:
    flow(capsys, "export", folder, "-o", tmp_path / "held")
    path = chain_file(folder)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:6]))
    assert flow(capsys, "verify", folder)[0] == 0
    code, said = flow_json(capsys, "verify", folder, "--against", tmp_path / "held")
    assert (code, [finding["what"] for finding in said["findings"]]) == (6, ["truncated"])


def test_policies_that_are_not_there_are_asked_for(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    (kept,) = (folder / "bundles").iterdir()
    policies = kept.rename(tmp_path / "policies.bundle")
    code, out, _ = flow(capsys, "verify", folder)
    assert code == 3
    assert "WRONG" not in out
    assert "NOT CHECKED bundle: what 5 records (2 to " in out
    assert f"the policies sha256:{kept.stem} are not at hand" in out
    assert "next: give them with --policies" in out
    assert out.rstrip().endswith("nothing is wrong with what could be checked")
    code, said = flow_json(capsys, "verify", folder)
    assert (code, said["ok"], said["findings"], said["decisions"]["unchecked"]) == (3, False, [], 4)
    code, said = flow_json(capsys, "verify", folder, "--policies", policies)
    assert (code, said["ok"], said["unchecked"], said["decisions"]["evaluated"]) == (0, True, [], 4)
    path = chain_file(folder)
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*rows[:3], *rows[4:]]))
    code, said = flow_json(capsys, "verify", folder)
    assert code == 6, "what is wrong goes before what could not be checked"
    assert "removed" in {finding["what"] for finding in said["findings"]}
    assert said["unchecked"]
    path.write_bytes(b"")
    code, said = flow_json(capsys, "verify", folder)
    assert (code, [finding["what"] for finding in said["findings"]]) == (6, ["removed"])


def test_a_directory_is_known_by_the_digest_that_a_coordinator_records(tmp_path: Path) -> None:
    policies = tmp_path / "policies"
    (policies / "lists").mkdir(parents=True)
    (policies / "home.toml").write_text(POLICY, encoding="utf-8")
    (policies / ".draft.toml").write_text("none", encoding="utf-8")
    given = given_policies([policies])
    assert list(given) == [Decider.load(str(policies))._first.archive]
    (tmp_path / "one.bundle").write_bytes(*given.values())
    assert given_policies([tmp_path / "one.bundle"]) == given


def test_a_range_is_evaluated_alone(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    for bounds, evaluated in (
        (("--from", "3", "--to", "3"), 1),
        (("--from", "4"), 3),
        (("--to", "2026-03-01"), 0),
        (("--from", "2026-03-02", "--to", "2026-03-02"), 4),
    ):
        code, said = flow_json(capsys, "verify", folder, *bounds)
        assert (code, said["decisions"]["evaluated"]) == (0, evaluated), bounds
    assert flow(capsys, "verify", folder, "--from", "yesterday")[0] == 2


def test_records_are_for_people(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, out, _ = flow(capsys, "ls", folder, "--kind", "decision")
    assert (code, len(out.splitlines())) == (0, 5)
    assert "Permitted" in out
    code, out, _ = flow(capsys, "show", folder, "3")
    assert "Inside France" in out
    assert "位于法国境内" in out
    assert flow(capsys, "show", folder, "d-refused")[0] == 0
    assert flow(capsys, "show", folder, "77")[0] == 3
    _, said = flow_json(capsys, "ls", folder, "--transfer", "tr-2")
    assert [record["decision_id"] for record in said["records"]] == ["d-refused"]


def test_an_export_verifies_without_the_site(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, ca: Path
) -> None:
    file = tmp_path / "beta.evidence"
    assert flow(capsys, "export", folder, "-o", file)[0] == 0
    assert file.stat().st_mode & 0o777 == 0o600
    code, said = flow_json(capsys, "verify", file, "--ca", ca)
    assert (code, said["whole"], said["records"], said["decisions"]["recorded"]) == (0, True, 12, 4)
    other = tmp_path / "other.pem"
    other.write_text(pki(12).anchors)
    assert flow(capsys, "verify", file, "--ca", other)[0] == 6


def test_one_transfer_is_exported_alone(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, ca: Path
) -> None:
    file = tmp_path / "one.evidence"
    code, said = flow_json(capsys, "export", folder, "--transfer", "tr-2", "-o", file)
    assert (code, said["records"]) == (0, 2), "the refusal, and when its bundle came into force"
    code, said = flow_json(capsys, "verify", file, "--ca", ca)
    assert (code, said["whole"], said["decisions"]["refused"]) == (0, False, 1)
    assert b"tr-1" not in file.read_bytes()
    assert flow(capsys, "export", folder, "--transfer", "tr-9", "-o", file)[0] == 3
    data = file.read_bytes()
    file.write_bytes(data.replace(b"release-forged", b"release-f0rged"))
    assert flow(capsys, "verify", file, "--ca", ca)[0] == 6


def test_a_receipt_is_verified_by_itself(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, ca: Path
) -> None:
    receipt = SignedReceipt(
        site="beta", transfer="t-1", task="t-1.1", fence=7, grant=b"g" * 16, source="alpha", path="/in",
        version_id=b"v" * 32, state="completed", objects=3, size_bytes=5000, landed=int(NOW),
    )  # fmt: skip
    file = tmp_path / "delivery.receipt"
    document = sign_receipt(receipt, *pki().signer("beta"))
    file.write_bytes(document)
    code, out, _ = flow(capsys, "verify", file, "--ca", ca)
    assert code == 0
    assert "site beta signed for 3 objects, 5000 bytes, completed" in out
    code, said = flow_json(capsys, "verify", file, "--ca", ca)
    assert (code, said["receipt"]["version_id"]) == (0, (b"v" * 32).hex())
    file.write_bytes(document.replace(b"alpha", b"gamma"))
    assert flow(capsys, "verify", file, "--ca", ca)[0] == 6


def test_where_there_is_nothing_the_way_on_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path
) -> None:
    code, _, err = flow(capsys, "verify", tmp_path / "nowhere")
    assert (code, "STATE/evidence" in err) == (3, True)
    (tmp_path / "empty").mkdir()
    assert flow(capsys, "verify", tmp_path / "empty")[0] == 3
    (tmp_path / "junk").write_bytes(b"x" * 40_000)
    assert flow(capsys, "verify", tmp_path / "junk")[0] == 6
    (folder.parent / "identity" / "federation.json").unlink()
    code, _, err = flow(capsys, "verify", folder)
    assert (code, "--ca FILE" in err) == (2, True)
