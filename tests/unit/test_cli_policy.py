"""`flow policy` as a user meets it: output, JSON, exit codes."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import shutil
from typing import Any

import pytest

from flowengine.cli.main import main

ROOT = pathlib.Path(__file__).parents[2] / "policies"
AT = "2026-03-02T12:00:00Z"


def flow(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["policy", *(str(arg) for arg in args)])
    captured = capsys.readouterr()
    code = ended.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err


def flow_json(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, Any]:
    code, out, _ = flow(capsys, *args, "--json")
    return code, json.loads(out)


@pytest.fixture
def copy(tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(ROOT, tmp_path / "policies")
    return tmp_path / "policies"


@pytest.mark.slow
def test_check_passes_on_what_is_shipped_and_strict_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = flow(capsys, "check", "-p", ROOT, "--at", AT)
    assert code == 0
    assert "6 in mode enforce" in out
    assert "0 errors" in out
    assert flow(capsys, "check", "-p", ROOT, "--at", AT, "--strict")[0] == 1
    code, answer = flow_json(capsys, "check", "-p", ROOT, "--at", "2026-11-01")
    assert (code, answer["errors"]) == (0, 0)
    assert "policy-overdue" in {problem["code"] for problem in answer["problems"]}


def test_check_shows_every_error_and_loads_nothing(
    capsys: pytest.CaptureFixture[str], copy: pathlib.Path
) -> None:
    broken = pathlib.Path(__file__).parents[1] / "vectors" / "policy-broken"
    for name in ("02-unknown-attribute.toml", "03-unknown-list.toml"):
        shutil.copy(broken / name, copy / name)
    code, out, err = flow(capsys, "check", "-p", copy)
    assert (code, out) == (1, "")
    assert (
        "02-unknown-attribute.toml:13: 'site.contry' is not a declared attribute (did you mean 'site.country'?)"
        in err
    )
    assert "03-unknown-list.toml:16" in err
    code, answer = flow_json(capsys, "check", "-p", copy)
    assert (code, answer["errors"]) == (1, 3)  # both are called `broken`, too


@pytest.mark.slow
def test_test_passes_and_fails_with_a_reason(capsys: pytest.CaptureFixture[str], copy: pathlib.Path) -> None:
    code, out, _ = flow(capsys, "test", "-p", ROOT)
    assert code == 0
    assert "187 of 187 tests passed" in out
    assert "558 of 558 line truths seen" in out
    code, out, _ = flow(capsys, "test", "-p", ROOT, "--at", "2028-01-01", "-v")
    assert code == 1
    assert "US with clauses and TIA" in out
    text = (
        (copy / "5-export-control.toml")
        .read_text()
        .replace("crypto.strength_bits >= 128", "crypto.strength_bits >= 64")
    )
    (copy / "5-export-control.toml").write_text(text)
    code, out, _ = flow(capsys, "test", "-p", copy, "5-export-control.test.toml")
    assert code == 1
    assert "rule 23: sealed too weakly" in out
    assert "expected deny, found permit" in out
    assert flow(capsys, "test", "-p", copy, "nothing.test.toml")[0] == 3
    (copy / "5-export-control.test.toml").unlink()
    code, out, _ = flow(capsys, "test", "-p", copy)
    assert code == 1
    assert "untested" in out
    assert "itar/never: no test where it decides" in out


@pytest.mark.slow
def test_where_answers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = flow(capsys, "where", "-p", ROOT, "--label", "personal.eu", "--use", "relay", "--at", AT)
    assert code == 0
    assert "singapore-relay  duties" in out
    assert "moscow-relay     never" in out
    assert "site.country not in @never_relay" in out
    code, answer = flow_json(
        capsys, "where", "cohort7", "-p", ROOT, "--site", "virginia", "--use", "land", "--at", AT
    )
    (row,) = answer["answers"]
    assert (code, row["answer"]) == (0, "if")
    assert ["recipient.certifications includes 'eu-us-dpf'"] in row["needs"][0]["any_of"]
    code, _, err = flow(capsys, "where", "cohort8", "-p", ROOT)
    assert code == 3
    assert "did you mean 'cohort7'?" in err
    assert flow(capsys, "where", "-p", ROOT)[0] == 2
    assert flow(capsys, "where", "-p", ROOT / "nowhere", "--label", "personal.eu")[0] == 3


def test_where_keeps_secret_lists_from_the_requester(capsys: pytest.CaptureFixture[str]) -> None:
    ask = (
        "where",
        "--label",
        "public",
        "-p",
        ROOT,
        "--with",
        "sanctions",
        "--with",
        "public-data",
        "--at",
        AT,
    )
    _, out, _ = flow(capsys, *ask)
    assert "sanctioned_parties" not in out
    assert "a condition only auditors see; recipient.sanctioned_share < 50 %" in out
    _, out, _ = flow(capsys, *ask, "--auditor")
    assert "recipient.org not in @sanctioned_parties" in out


@pytest.mark.slow
def test_explain_denies_with_five_and_says_what_would_permit(capsys: pytest.CaptureFixture[str]) -> None:
    ask = ("explain", "cohort7", "-p", ROOT, "--site", "virginia", "--use", "land", "--at", AT)
    code, out, _ = flow(capsys, *ask)
    assert code == 5
    assert "Denied (facts are missing)" in out
    assert "拒绝（缺少事实）" in out
    assert "it would be permitted with\n  recipient.certifications includes 'eu-us-dpf'  (feed)" in out
    facts = ("--fact", "recipient.certifications=eu-us-dpf")
    code, out, _ = flow(capsys, *ask, *facts)
    assert code == 0
    assert "Permitted: Commission adequacy decision" in out
    code, answer = flow_json(capsys, *ask, *facts)
    assert (code, answer["decision"], answer["because"]) == (0, "permit", ["eu-personal/adequate"])
    assert flow(capsys, *ask, "--fact", "recipient.certs=x")[0] == 2
    assert flow(capsys, "explain", "cohort7", "-p", ROOT, "--site", "virgina", "--use", "land")[0] == 3


@pytest.mark.slow
def test_can_reach(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = flow(capsys, "can-reach", "itar", "moscow-relay", "-p", ROOT, "--at", AT)
    assert code == 0
    assert "hold     never" in out
    code, answer = flow_json(capsys, "can-reach", "itar", "moscow-relay", "-p", ROOT, "--at", AT)
    assert {row["use"]: row["possible"] for row in answer["uses"]}["land"] is False
    assert flow(capsys, "can-reach", "clinical", "moscow-relay", "-p", ROOT, "--at", "2020-01-01")[0] == 5
    assert flow(capsys, "can-reach", "itra", "moscow-relay", "-p", ROOT)[0] == 3


@pytest.mark.slow
def test_diff_shows_what_got_weaker_and_which_copies_became_unlawful(
    capsys: pytest.CaptureFixture[str], copy: pathlib.Path
) -> None:
    same = flow(capsys, "diff", ROOT, copy, "--at", AT)
    assert same[0] == 0
    assert "0 changed, 0 got weaker; 0 copies became unlawful" in same[1]
    lists = (copy / "lists" / "countries.toml").read_text()
    (copy / "lists" / "countries.toml").write_text(lists.replace('"AR", "BR", "CH"', '"AR", "CH"'))
    code, out, _ = flow(capsys, "diff", ROOT, copy, "--at", AT, "--all")
    assert code == 1
    assert "cohort7 at sao-paulo (land)" in out
    assert "0 got weaker; 1 copies became unlawful" in out
    study = (copy / "4-ega-genomics.toml").read_text()
    (copy / "4-ega-genomics.toml").write_text(
        study.replace("approvals.valid_from_group('dac') >= 2", "approvals.valid_from_group('dac') >= 1")
    )
    code, out, _ = flow(capsys, "diff", ROOT, copy, "--at", AT)
    assert "weaker  under EGA-DAA-1042: process at" in out
    code, answer = flow_json(capsys, "diff", copy, ROOT, "--at", AT, "--label", "personal.eu")
    assert code == 1
    assert answer["weaker"] == 4
    assert {change["use"] for change in answer["changes"]} == {"release", "hold", "land", "process"}


@pytest.mark.slow
def test_bundles_from_keys_to_verification(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    owner, security, bundle = tmp_path / "owner", tmp_path / "security", tmp_path / "p.bundle"
    for key in (owner, security):
        assert flow(capsys, "bundle", "keygen", key)[0] == 0
        assert key.stat().st_mode & 0o777 == 0o600
    assert flow(capsys, "bundle", "keygen", owner)[0] == 2
    make = ("bundle", "build", "-p", ROOT, "-o", bundle, "--version", 3, "--not-after", "2027-01-01")
    code, _, err = flow(capsys, *make, "--at", "2026-11-01")
    assert code == 1
    assert "reviews are overdue: policy eu-personal" in err
    assert flow(capsys, *make, "--at", AT)[0] == 0
    trust = ("--trust", f"policy-owner={owner}.pub", "--trust", f"security={security}.pub")
    check = ("bundle", "verify", bundle, *trust)
    assert flow(capsys, *check, "--at", AT)[0] == 4
    for role, key in (("policy-owner", owner), ("security", security)):
        assert flow(capsys, "bundle", "sign", bundle, "--role", role, "--key", key)[0] == 0
    code, out, _ = flow(capsys, *check, "--at", AT)
    assert code == 0
    assert "version 3, until 2027-01-01T00:00:00Z, signed by policy-owner" in out
    assert flow(capsys, *check, "--at", "2027-01-01")[0] == 5
    assert flow(capsys, *check, "--at", AT, "--newer-than", 3)[0] == 5
    damaged = bundle.read_bytes().replace(b"personal.eu", b"personal.ue", 1)
    (tmp_path / "damaged").write_bytes(damaged)
    assert flow(capsys, "bundle", "verify", tmp_path / "damaged", *trust, "--at", AT)[0] == 6
    code, out, _ = flow(capsys, "where", "-p", bundle, "--label", "personal.eu", "--use", "land", "--at", AT)
    assert code == 0
    assert "paris            yes" in out


def test_vocabulary_lists_what_conditions_may_say(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = flow(capsys, "vocabulary", "-p", ROOT)
    assert code == 0
    assert "site.operator_countries" in out
    assert "recipient.dua_signed" in out  # declared in attributes.toml
    code, answer = flow_json(capsys, "vocabulary", "-p", ROOT)
    assert "encrypt" in answer["duties"]


def test_what_the_readme_shows_is_what_happens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT.parent)
    blocks = re.findall(
        r"```console\n\$ flow policy (.*?)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert len(blocks) == 2
    for command, expected in blocks:
        _, out, _ = flow(capsys, *shlex.split(command))
        assert out == expected
