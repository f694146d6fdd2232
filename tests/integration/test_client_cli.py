"""The commands of a federation against a real one: what they print, their exit codes, what they leave running."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from federations import Local, local_federation
from support import Flow, wait_until

pytestmark = pytest.mark.slow

OPEN = """
[policy]
id         = "open"
version    = "1"
title      = "Anywhere, where nothing else forbids it"
owner      = "dpo@example.org"
applies_to = []
effective  = 2026-01-01
review_by  = 2030-01-01

[[rule]]
id     = "known"
effect = "permit"
on     = ["release", "land", "process"]
when   = ["site.operator is 'us'"]
why    = "Our own sites"
"""
POLICY = """
[policy]
id         = "cohort"
version    = "1"
title      = "Patients' data stays in Germany"
owner      = "dpo@example.org"
applies_to = ["data.labels includes 'patients'"]
effective  = 2026-01-01
review_by  = 2030-01-01

[[rule]]
id     = "germany"
effect = "permit"
on     = ["release", "land", "process"]
when   = ["site.country is 'DE'"]
why    = "The ethics board allows Germany"
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    base = tmp_path_factory.mktemp("federation")
    (base / "policies").mkdir()
    (base / "policies/cohort.toml").write_text(POLICY)
    (base / "policies/open.toml").write_text(OPEN)
    (base / "policies/labels.toml").write_text('[label.patients]\ntitle = "Data about patients"\n')
    facts = {"a": "DE", "b": "DE", "c": "FR"}
    sites = {name: f'facts = {{ country = "{country}", operator = "us" }}' for name, country in facts.items()}
    with local_federation(base, sites, coordinator='policies = "policies"') as running:
        folder = running.data("a") / "set"
        folder.mkdir(parents=True)
        for number in range(10):
            (folder / f"f{number}").write_text(f"object {number}\n" * 50)
        (running.data("a") / "large.bin").write_bytes(os.urandom(8 << 20))
        yield running


@pytest.fixture
def flow(flow: Flow, local: Local) -> Flow:
    """The command, logged in as the admin."""
    flow.env["FLOW_CONFIG_DIR"] = str(local.running.config)
    return flow


def test_cp_sync_verify_ls(flow: Flow, local: Local) -> None:
    done = flow("cp", "a:/data/set/", "b:/data/cp", "c:/data/cp")
    assert "done: 20 objects landed" in done.stderr
    assert (local.data("b") / "cp/f3").read_bytes() == (local.data("a") / "set/f3").read_bytes()
    (local.data("b") / "cp/extra").write_text("x")
    record = flow("sync", "--delete", "a:/data/set/", "b:/data/cp", "--json").data
    assert (record["state"], record["counters"]["objects_deleted"]) == ("completed", 1)
    assert not (local.data("b") / "cp/extra").exists()
    assert "f3" in flow("ls", "b:/data/cp").stdout
    assert {row["kind"] for row in flow("ls", "b:/data/cp", "--json").data["entries"]} == {"file"}
    flow("verify", "b:/data/cp", "--against", "a:/data/set/")
    (local.data("b") / "cp/f3").write_text("rotten\n" * 50)
    differs = flow("verify", "b:/data/cp", "--against", "a:/data/set/", code=6)
    assert "1 of 10 objects differ" in differs.stderr


def test_what_is_denied_says_why_and_exits_with_5(flow: Flow, local: Local) -> None:
    said = flow("cp", "--label", "patients", "a:/data/set/", "c:/data/secret", code=5)
    assert "the site's country is “DE”" in said.stderr
    assert not (local.data("c") / "secret").exists()
    flow("plan", "show", "--label", "patients", "a:/data/set", "c:/data", code=5)
    planned = flow(
        "plan", "show", "--label", "patients", "--size", "1GiB", "a:/data/set", "b:/data", "--json"
    ).data
    assert (planned["permitted"], planned["routes"]) == (True, [["a", "b"]])
    flow("cp", "--label", "patients", "a:/data/set/", "b:/data/secret")
    rows = flow("transfer", "ls", "--json").data["transfers"]
    assert [decision["verdict"] for decision in rows[0]["decisions"]] == ["permit", "permit"]
    assert "patients" in flow("transfer", "show", rows[0]["id"]).stdout


def test_no_wait_watch_show_why(flow: Flow) -> None:
    transfer = flow("cp", "--no-wait", "--purpose", "test", "a:/data/set/", "b:/data/nowait").stdout.strip()
    assert "done: 10 objects landed" in flow("transfer", "watch", transfer).stderr
    assert "completed" in flow("transfer", "show", transfer).stdout
    assert flow("why", transfer).stdout.strip()
    assert transfer in flow("transfer", "ls", "--state", "completed", "--site", "b").stdout
    seen = [
        json.loads(line)
        for line in flow(
            "events", "--after", "0", "--transfer", transfer, "--count", "2", "--json"
        ).stdout.splitlines()
    ]
    assert seen[0]["type"] == "transfer.requested"
    refused = flow("events", "--type", "transfer", "--type", "task.compelted", code=2).stderr
    assert "'task.compelted'" in refused
    assert "next: " in refused
    assert flow("transfer", "show", "t-000000", code=3).stderr


def test_a_killed_or_interrupted_client_leaves_its_transfer_running(flow: Flow, local: Local) -> None:
    for site in "bc":
        flow("site", "drain", site)  # so that both transfers last as long as this test likes
    with flow.started("cp", "a:/data/large.bin", "b:/data/killed/") as killed:
        wait_until(lambda: any("transfer t-" in line for line in killed.lines), "the transfer's id")
        os.kill(killed.pid, signal.SIGKILL)
    with flow.started("cp", "a:/data/large.bin", "c:/data/stopped/") as stopped:
        wait_until(lambda: any("transfer t-" in line for line in stopped.lines), "the transfer's id")
        os.kill(stopped.pid, signal.SIGINT)
        assert stopped.finish().code == 130
        assert "flow transfer cancel" in "".join(stopped.lines)
    going = {
        row["request"]["targets"][0]["site"]: row["id"]
        for row in flow("transfer", "ls", "--limit", "2", "--json").data["transfers"]
    }
    assert "terminated" in flow("transfer", "cancel", going["c"]).stderr
    for site in "bc":
        flow("site", "drain", site, "--off")
    assert "done: 1 object landed" in flow("transfer", "watch", going["b"]).stderr
    assert (local.data("b") / "killed/large.bin").read_bytes() == (local.data("a") / "large.bin").read_bytes()
    assert "cancelled" in flow("transfer", "watch", going["c"], code=1).stderr


def test_pause_resume_retry(flow: Flow) -> None:
    flow("site", "drain", "c")
    transfer = flow("cp", "--no-wait", "a:/data/set/", "c:/data/paused/").stdout.strip()
    assert "(draining, for " in flow("why", transfer).stdout, "from the first moment on"
    assert "suspended" in flow("transfer", "pause", transfer).stderr
    assert "pause" in flow("why", transfer).stdout
    flow("transfer", "resume", transfer)

    def waits() -> str:
        said = flow("why", transfer).stdout
        return said if "(draining, for " in said else ""

    said = wait_until(waits, "why tells of the site that drains")
    assert "site c is draining" in said
    assert said.rstrip().endswith("ends when an operator says flow site drain c --off"), (
        "and nothing of a rate"
    )
    shown = flow("transfer", "show", transfer).stdout
    assert "planned at" not in shown
    assert "expected" not in shown
    flow("transfer", "cancel", transfer)
    flow("site", "drain", "c", "--off")
    flow("transfer", "retry", transfer)
    assert "done: 10 objects landed" in flow("transfer", "watch", transfer).stderr


def test_limits(flow: Flow) -> None:
    flow("limit", "set", "link:a>c", "200Mbit/s", "--window", "mon-sun 00:00-24:00 Asia/Shanghai=50Mbit/s")
    shown = flow("limit", "ls").stdout
    assert (
        "link:a>c  50 Mbit/s  200 Mbit/s  mon,tue,wed,thu,fri,sat,sun 00:00-24:00 Asia/Shanghai=50 Mbit/s"
        in shown
    )
    flow("limit", "set", "write:c:/data", "1Gbit/s")
    assert "write:c:/data  1 Gbit/s" in flow("limit", "ls").stdout
    assert "offers no root /else" in flow("limit", "set", "read:c:/else", "1Gbit/s", code=3).stderr
    flow("limit", "rm", "write:c:/data")
    flow("limit", "set", "site:a", "none")
    assert "'link:A>B'" in flow("limit", "set", "a>c", "1Gbit/s", code=2).stderr
    flow("limit", "rm", "link:a>c")
    assert "link:a>c" not in flow("limit", "ls").stdout
    flow("limit", "rm", "site:a")


def test_sites(flow: Flow, tmp_path: Path) -> None:
    assert [row["name"] for row in flow("site", "ls", "--json").data["sites"]] == ["a", "b", "c"]
    flow("site", "set", "a", "--fact", "certs=iso27001,tisax", "--fact", "has_key=true", "--source", "audit")
    shown = flow("site", "show", "a").stdout
    assert "certs = iso27001, tisax  (says audit" in shown
    assert "/data" in shown
    flow("site", "set", "a", "--no-fact", "certs")
    assert "draining" in flow("site", "drain", "c").stderr
    flow("site", "drain", "c", "--off")
    token = flow("site", "token", "new")
    assert token.stdout.startswith("flowj_")
    assert "flowengine-agent run" in token.stderr
    file = tmp_path / "join-token"
    assert flow("site", "token", "new", "--output", file).stdout == ""
    assert file.stat().st_mode & 0o777 == 0o600
    before = file.read_bytes()
    assert before.startswith(b"flowj_")
    assert "is there already" in flow("site", "token", "new", "-o", file, code=2).stderr
    assert file.read_bytes() == before
    flow("site", "token", "newer", "-o", tmp_path / "nowhere/token", code=3)
    flow("site", "show", "newer", code=3)
    told = flow("site", "token", "new", "--json", "-o", tmp_path / "second").data
    assert told["file"] == str(tmp_path / "second")
    assert "token" not in told
    flow("site", "rm", "new", "--yes")
    flow("site", "show", "nowhere", code=3)


def test_users_tokens_tenants(flow: Flow, local: Local, tmp_path: Path) -> None:
    flow("tenant", "set", "lab", "--weight", "2", "--max-running", "3")
    assert "lab" in flow("tenant", "ls").stdout
    login = flow("user", "add", "bob", "--tenant", "lab").stdout
    assert login.startswith("flowl_")
    bob = Flow(tmp_path / "state", env={"FLOW_CONFIG_DIR": str(tmp_path / "bob")})
    assert "as bob" in bob("login", "-", stdin=login.encode()).stderr
    file = tmp_path / "bob.login"
    assert flow("token", "add", "--user", "bob", "--login", "--output", file).stdout == ""
    assert file.stat().st_mode & 0o777 == 0o600
    assert "as bob" in bob("login", file).stderr
    file.chmod(0o644)
    assert "chmod 600" in bob("login", file, code=1).stderr
    assert "is there already" in flow("user", "add", "eve", "-o", file, code=2).stderr
    assert "eve" not in flow("user", "ls").stdout
    assert (tmp_path / "bob/credentials.toml").stat().st_mode & 0o777 == 0o600
    assert bob("whoami").stdout.startswith("bob (user, tenant lab)")
    assert bob("site", "token", "x", code=5).stderr
    bob("cp", "a:/data/set/", "b:/data/bobs")
    flow("user", "set", "bob", "--disable")
    bob("whoami", code=4)
    flow("user", "set", "bob", "--enable", "--role", "auditor")
    assert "auditor" in flow("user", "ls").stdout
    token = flow("token", "add", "--user", "bob", "--comment", "script")
    script = Flow(tmp_path / "state", env={
        "FLOW_CONFIG_DIR": str(tmp_path / "none"), "FLOW_COORDINATOR": local.running.url,
        "FLOW_TOKEN": token.stdout.strip(), "FLOW_CA_FILE": str(tmp_path / "ca.pem"),
    })  # fmt: skip
    (tmp_path / "ca.pem").write_text(local.access().ca_pem)
    assert script("whoami", "--json").data["user"]["name"] == "bob"
    identity = token.stderr.split()[2]
    assert identity in flow("token", "ls").stdout
    flow("token", "rm", identity)
    script("whoami", code=4)
    bob("logout")
    bob("whoami", code=4)


def test_doctor_finds_the_federation_well(flow: Flow) -> None:
    findings = {row["check"]: row for row in flow("doctor", "--json").data["findings"]}
    for check in ("coordinator", "clock", "certificate", "CA", "login", "site a", "site b"):
        assert findings[check]["verdict"] == "ok", findings[check]


def test_a_coordinator_that_is_away_is_said(flow: Flow, tmp_path: Path, local: Local) -> None:
    away = {"FLOW_COORDINATOR": "https://127.0.0.1:9", "FLOW_TOKEN": "x", "FLOW_CONFIG_DIR": str(tmp_path)}
    (tmp_path / "ca.pem").write_text(local.access().ca_pem)
    flow.env |= away | {"FLOW_CA_FILE": str(tmp_path / "ca.pem")}
    finding = {row["check"]: row for row in flow("doctor", "--json", code=1).data["findings"]}["coordinator"]
    assert (finding["verdict"], "cannot reach" in finding["text"]) == ("failed", True)
