"""Sites that map accounts to requesters: what may be read and written for whom is the kernel's word.

One federation for the file: both sites' agents are started as root, as the only one who can make a test's accounts, and run as an account
of their own.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from liars import evidence_of
from sites import Federation, SiteAgent, federation
from support import stats_below, wait_until, written_below

import flowengine
from flowengine.api.people import TenantRequest, TokenRequest, UserRequest
from flowengine.api.transfers import Transfer
from flowengine.client.synchronous import Client, connect
from flowengine.errors import FlowError
from flowengine.policy.bundle import build, sign
from flowengine.store.evidence_folder import read_evidence_folder

pytestmark = [pytest.mark.root, pytest.mark.slow]

OWN, ALICE, BOB, PHYSICS = 31_000, 31_001, 31_002, 31_003
_ACCOUNTS = """
[accounts]
account = "{own}:{own}"
state = "{state}"
idle = "{idle}"
[accounts.map]
alice = "{alice}:{alice}"
bob = "{bob}:{bob}"
"physics/*" = "{physics}:{physics}"
"""


def readable_by_all(base: Path) -> list[str]:
    """What to put before a command so that accounts may read the program: a mount namespace where folders above it are open.

    Where Python or the checkout lies below a folder of root's own, nobody else could run it.
    """
    needed = [sys.base_prefix, sys.prefix, str(Path(flowengine.__file__).parents[1])]
    closed: dict[str, list[str]] = {}
    for path in needed:
        shut = [str(above) for above in reversed(Path(path).parents) if not above.stat().st_mode & 0o001]
        if shut:
            closed.setdefault(shut[0], []).append(path)
    script = ["set -e"]
    for top, paths in closed.items():
        aside = base / f"aside-{len(script)}"
        script += [f"mkdir -p '{aside}'", f"mount --bind '{top}' '{aside}'"]
        script += [f"mount -t tmpfs -o mode=755 tmpfs '{top}'"]
        for path in paths:
            script += [f"mkdir -p '{path}'", f"mount --bind '{aside}/{Path(path).relative_to(top)}' '{path}'"]
    return ["unshare", "--mount", "sh", "-c", "; ".join([*script, 'exec "$@"']), "sh"] if closed else []


KEYS = {"policy-owner": Ed25519PrivateKey.generate(), "security": Ed25519PrivateKey.generate()}
POLICY = b"""
[policy]
id = "study"
version = "1"
title = "A study"
owner = "dac@example.org"
applies_to = ["data.labels includes 'study'"]
effective = 2020-01-01
review_by = 2099-01-01
[[rule]]
id = "members"
effect = "permit"
on = ["release", "relay", "hold", "land", "process"]
when = []
then = [{delete_after = "1 second", proof = "certificate"}]
why = "Members of the study, for a second"
"""


def accounts_table(base: Path, idle: str = "60s") -> list[str]:
    text = _ACCOUNTS.format(
        own=OWN, alice=ALICE, bob=BOB, physics=PHYSICS, state=base / "accounts", idle=idle
    )
    keys = [
        f"{name} = ['{key.public_key().public_bytes_raw().hex()}']"
        for name, key in (("policy_owner", KEYS["policy-owner"]), ("security", KEYS["security"]))
    ]
    return [*text.splitlines(), "[policy]", *keys]


def write(path: Path, data: bytes, uid: int, mode: int = 0o600) -> None:
    path.write_bytes(data)
    os.chown(path, uid, uid)
    path.chmod(mode)


def folder(path: Path, uid: int, mode: int = 0o700) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    os.chown(path, uid, uid)
    path.chmod(mode)
    return path


@dataclass
class Lab:
    made: Federation
    users: dict[str, Client]

    def data(self, site: str) -> Path:
        return self.made[site].data

    def copy(self, who: str, source: str, target: str, **options: object) -> Transfer:
        return self.users[who].copy(source, target, **options).wait()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    base = Path(tempfile.mkdtemp(prefix="flow-accounts-"))
    base.chmod(0o755)
    try:
        options = []
        for role, key in KEYS.items():
            (base / f"{role}.pub").write_text(key.public_key().public_bytes_raw().hex() + "\n")
            options += [f"--{role}-key", str(base / f"{role}.pub")]
        with federation(base, options=options) as made:
            users = {}
            made.client.add_tenant(TenantRequest(name="physics"))
            for name, tenant in (
                ("alice", "default"),
                ("bob", "default"),
                ("eve", "default"),
                ("pat", "physics"),
            ):
                made.client.add_user(UserRequest(name=name, tenant=tenant))
                secret = made.client.add_token(TokenRequest(user=name)).secret
                pem = (made.coordinator.folder / "secrets" / "ca.pem").read_text()
                users[name] = connect(made.coordinator.url, token=secret, ca_pem=pem)
            start_mapped(made, "a", base, as_unit=False)
            start_mapped(made, "b", base, as_unit=True)
            for site in ("a", "b"):
                made[site].wait_ready()
            yield Lab(made, users)
            for user in users.values():
                user.close()
    finally:
        shutil.rmtree(base)


UNPRIVILEGED = [
    "setpriv", f"--reuid={OWN}", f"--regid={OWN}", "--clear-groups",
    "--inh-caps=-all,+setuid,+setgid", "--ambient-caps=-all,+setuid,+setgid", "--no-new-privs",
]  # fmt: skip
"""As the systemd unit starts it."""


def start_mapped(made: Federation, site: str, base: Path, *, as_unit: bool, idle: str = "60s") -> SiteAgent:
    prefix = readable_by_all(base) + (UNPRIVILEGED if as_unit else [])
    folder(base / site, 0, 0o755)
    # The second only dials out: what it sends it pushes, so that each of the four ends of a session is at work here.
    port = {"listen": ""} if as_unit else {}
    agent = made.make(site, lines=accounts_table(base / site, idle), prefix=prefix, **port)
    folder(agent.data, 0, 0o755)
    folder(agent.state, OWN)
    if as_unit:
        folder(base / site / "accounts", 0, 0o1733)
    for name, uid in (("alice", ALICE), ("bob", BOB), ("physics", PHYSICS)):
        folder(agent.data / name, uid)
    agent.start(ready=False)
    return agent


def family(agent: SiteAgent) -> dict[int, dict[str, str]]:
    """What /proc says of an agent's processes, itself first, by process id."""
    assert agent.process is not None
    found: dict[int, dict[str, str]] = {}
    waiting = [agent.process.popen.pid]
    while waiting:
        pid = waiting.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[pid] = {
            name: value.strip() for name, _, value in (line.partition(":") for line in status.splitlines())
        }
    return found


def movers(agent: SiteAgent, uid: int) -> list[int]:
    return [pid for pid, status in family(agent).items() if status["Uid"].split() == [str(uid)] * 4]


def refused(call: Callable[[], object]) -> FlowError:
    with pytest.raises(FlowError) as raised:
        call()
    return raised.value


_BECOME = """
import os
from flowengine_agent.privileges import become, keep_only, lock_down

become(31001, 31001, [31001, 31005])
keep_only(())
lock_down("flow-test")
assert os.getresuid() == os.getresgid() == (31001,) * 3
assert sorted(os.getgroups()) == [31001, 31005]
for back in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.setuid(31002)):
    try:
        back()
    except PermissionError:
        continue
    raise AssertionError("there is a way back")
"""


def test_an_account_has_its_groups_and_no_way_back(tmp_path: Path) -> None:
    subprocess.run([*readable_by_all(tmp_path), sys.executable, "-c", _BECOME], check=True, timeout=60)


def test_files_are_read_and_written_as_the_requesters_account(lab: Lab) -> None:
    write(lab.data("a") / "alice/secret", b"of alice" * 1000, ALICE)
    assert lab.copy("alice", "a:/data/alice/secret", "b:/data/alice/got").state == "completed"
    got = (lab.data("b") / "alice/got").stat()
    assert (got.st_uid, got.st_gid, got.st_mode & 0o777) == (ALICE, ALICE, 0o600)
    folder(lab.data("a") / "physics/run", PHYSICS)
    write(lab.data("a") / "physics/run/x", b"of all in the tenant", PHYSICS)
    lab.copy("pat", "a:/data/physics/run/", "b:/data/physics/new/deep")
    for made in ("new", "new/deep", "new/deep/x"):
        assert (lab.data("b") / "physics" / made).stat().st_uid == PHYSICS
    assert (lab.data("b") / "physics/new").stat().st_mode & 0o777 == 0o750  # by the umask: no source has it


def test_a_site_that_dials_out_pushes_with_the_accounts_rights(lab: Lab) -> None:
    folder(lab.data("b") / "alice/set/deep", ALICE)
    write(lab.data("b") / "alice/set/deep/x", random.Random(4).randbytes(2_000_000), ALICE)
    write(lab.data("b") / "alice/set/y", b"small", ALICE, 0o640)
    lab.copy("alice", "b:/data/alice/set", "a:/data/alice/pushed")
    for name in ("set", "set/deep", "set/deep/x", "set/y"):
        there = (lab.data("a") / "alice/pushed" / name).stat()
        assert (there.st_uid, there.st_mode) == (ALICE, (lab.data("b") / "alice" / name).stat().st_mode)
    lab.copy("alice", "b:/data/alice/set/y", "a:/data/alice/renamed")
    assert (lab.data("a") / "alice/renamed").read_bytes() == b"small"
    error = refused(lambda: lab.copy("bob", "b:/data/alice/set", "a:/data/bob/set"))
    assert "Permission denied" in error.message
    error = refused(lambda: lab.copy("alice", "b:/data/alice/set", "a:/data/bob/set"))
    assert "Permission denied" in error.message
    assert lab.users["alice"].verify("b:/data/alice/set", "a:/data/alice/pushed").wait().state == "completed"


def test_what_the_account_may_not_read_or_write_is_refused_by_the_kernel(lab: Lab) -> None:
    write(lab.data("a") / "alice/private", b"of alice", ALICE)
    shared = folder(lab.data("a") / "shared", 0, 0o755)
    write(shared / "hers", b"of alice", ALICE)
    write(shared / "everybodys", b"of alice, for all", ALICE, 0o644)
    error = refused(lambda: lab.copy("bob", "a:/data/alice/private", "b:/data/bob/stolen"))
    assert "Permission denied" in error.message
    error = refused(lambda: lab.copy("bob", "a:/data/shared/", "b:/data/bob/shared"))
    assert error.reason == "some-objects-failed"
    assert "hers" in error.message
    assert sorted(path.name for path in (lab.data("b") / "bob/shared").iterdir() if path.is_file()) == [
        "everybodys"
    ]
    write(lab.data("b") / "alice/kept", b"as it was", ALICE)
    write(lab.data("a") / "bob/other", b"of bob", BOB)
    error = refused(lambda: lab.copy("bob", "a:/data/bob/other", "b:/data/alice/kept"))
    assert "Permission denied" in error.message
    assert (lab.data("b") / "alice/kept").read_bytes() == b"as it was"
    link = lab.data("b") / "bob/way"
    link.symlink_to("../alice")
    os.chown(link, BOB, BOB, follow_symlinks=False)
    refused(lambda: lab.copy("bob", "a:/data/bob/other", "b:/data/bob/way/kept"))
    assert (lab.data("b") / "alice/kept").read_bytes() == b"as it was"


def test_whoever_is_not_mapped_is_refused_with_the_reason(lab: Lab) -> None:
    write(lab.data("a") / "alice/open", b"for all", ALICE, 0o644)
    error = refused(lambda: lab.copy("eve", "a:/data/alice/open", "b:/data/eve"))
    assert error.reason == "account-unmapped"
    assert "'eve'" in error.message
    assert refused(lambda: lab.users["eve"].ls("a:/data")).reason == "account-unmapped"


def test_looks_see_what_the_account_may_see(lab: Lab) -> None:
    write(lab.data("a") / "alice/seen", b"123", ALICE)
    assert "seen" in [entry.name for entry in lab.users["alice"].ls("a:/data/alice").entries]
    assert "Permission denied" in refused(lambda: lab.users["bob"].ls("a:/data/alice")).message
    assert {entry.name for entry in lab.users["bob"].ls("a:/data").entries} >= {"alice", "bob"}


def test_no_chunk_of_another_account_is_used(lab: Lab) -> None:
    data = random.Random(1).randbytes(3_000_000)
    for name, uid in (("alice", ALICE), ("bob", BOB)):
        write(lab.data("a") / name / "same", data, uid)
    lab.copy("alice", "a:/data/alice/same", "b:/data/alice/same")
    again = lab.copy("alice", "a:/data/alice/same", "b:/data/alice/twin")
    assert again.counters.bytes_reused == len(data)
    his = lab.copy("bob", "a:/data/bob/same", "b:/data/bob/same")
    assert (his.counters.bytes_reused, his.counters.bytes_unchanged) == (0, 0)
    assert (lab.data("b") / "bob/same").stat().st_uid == BOB


@pytest.mark.parametrize("site", ["a", "b"])
def test_no_process_has_a_right_that_it_does_not_need(lab: Lab, site: str) -> None:
    lab.users["alice"].ls(f"{site}:/data/alice")
    agent, *others = family(lab.made[site]).values()
    assert agent["Uid"].split() == [str(OWN)] * 4
    spawner = [status for status in others if status["Uid"].split() == [str(OWN)] * 4]
    assert [status["CapEff"] for status in spawner] == [f"{1 << 6 | 1 << 7:016x}"]
    assert [status["Threads"] for status in spawner] == ["1"]  # to fork is safe for such a one alone
    moving = [status for status in others if status not in spawner]
    assert str(ALICE) in {status["Uid"].split()[0] for status in moving}
    for status in [agent, *moving]:
        assert {status[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {"0" * 16}
    for status in moving:
        assert status["Gid"].split() == status["Uid"].split()
        assert status["Groups"] == status["Gid"].split()[0]
    assert {status["NoNewPrivs"] for status in [agent, *others]} == {"1"}


def test_a_killed_mover_is_started_again_and_limits_hold_meanwhile(lab: Lab) -> None:
    size, rate = 3_000_000, 8_000_000
    write(lab.data("a") / "alice/large", random.Random(2).randbytes(size), ALICE)
    lab.made.client.set_limit("site:a", rate)
    try:
        lab.users["alice"].ls("a:/data/alice")  # a question that comes to the agent behind the limit
        began = time.monotonic()
        running = lab.users["alice"].copy("a:/data/alice/large", "b:/data/alice/large")
        for site in ("a", "b"):
            before = journalled(lab)
            wait_until(lambda least=before: journalled(lab) > least, "some chunks")
            (pid,) = movers(lab.made[site], ALICE)
            os.kill(pid, signal.SIGKILL)
        done = running.wait(60)
    finally:
        lab.made.client.remove_limit("site:a")
    assert done.state == "completed"
    assert (
        time.monotonic() - began > 0.8 * 8 * size / rate
    )  # it cannot be quicker, however quick the machine is
    assert (lab.data("b") / "alice/large").read_bytes() == (lab.data("a") / "alice/large").read_bytes()
    assert "the mover of account" in lab.made["b"].log


@pytest.mark.parametrize("scope", ["read:a:/data", "write:b:/data"])
def test_limits_of_storage_hold_for_what_movers_read_and_write(lab: Lab, scope: str) -> None:
    size, rate, name = 6_000_000, 12_000_000, scope.partition(":")[0]
    write(lab.data("a") / f"alice/{name}", random.Random(name).randbytes(size), ALICE)
    lab.made.client.set_limit(scope, rate)
    try:
        for site in "ab":
            lab.users["alice"].ls(
                f"{site}:/data/alice"
            )  # a question that comes to the agent behind the limit
        began = time.monotonic()
        assert lab.copy("alice", f"a:/data/alice/{name}", f"b:/data/alice/{name}").state == "completed"
        # What is counted may be a window ahead.
        assert time.monotonic() - began + 1 > 8 * (size - (1 << 20)) / rate
    finally:
        lab.made.client.remove_limit(scope)


def journalled(lab: Lab) -> int:
    """How long the journals are of what is on its way to alice's folder at b."""
    staging = lab.data("b") / "alice/.flow-staging"
    return sum(st.st_size for path, st in stats_below(staging) if path.suffix == ".j")


def established(port: int) -> int:
    """TCP connections that stand at a local port (proc(5): /proc/net/tcp)."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def test_a_mover_that_does_not_answer_is_cut_off(lab: Lab) -> None:
    write(lab.data("a") / "alice/slow", random.Random(3).randbytes(3_000_000), ALICE)
    port = int(lab.made["a"].listen.rpartition(":")[2])
    lab.made.client.set_limit("site:a", 2_000_000)
    try:
        running = lab.users["alice"].copy("a:/data/alice/slow", "b:/data/alice/slow")
        wait_until(lambda: journalled(lab), "some chunks")
        (pid,) = movers(lab.made["a"], ALICE)
        os.kill(pid, signal.SIGSTOP)
        assert established(port) > 1
        running.cancel()
        wait_until(lambda: not established(port), "the end of all connections")
        assert movers(lab.made["a"], ALICE) == [pid]
    finally:
        lab.made.client.remove_limit("site:a")
        os.kill(pid, signal.SIGKILL)


def test_a_budget_counts_what_only_its_owner_may_see_and_is_held(lab: Lab) -> None:
    agent, data = lab.made["a"], lab.data("a")
    write(data / "alice/hidden", os.urandom(300_000), ALICE)
    write(data / "bob/hidden", os.urandom(200_000), BOB)
    (data / "of-the-site").write_bytes(bytes(1000))
    there = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    agent.kill()
    agent.root_lines = [f'budget = "{there + 200_000}"']
    agent.start()

    def used() -> int | None:
        (root,) = lab.made.client.site("a").roots
        return root.used_bytes

    wait_until(lambda: used() == there, "the count of all that lies there")
    write(lab.data("b") / "alice/large", os.urandom(150_000), ALICE)
    assert lab.copy("alice", "b:/data/alice/large", "a:/data/alice/in/").state == "completed"
    full = refused(lambda: lab.copy("alice", "b:/data/alice/large", "a:/data/alice/again/"))
    assert full.reason == "budget"
    agent.kill()
    agent.root_lines = []
    agent.start()


def test_a_killed_agent_leaves_nothing_and_idle_movers_end(lab: Lab) -> None:
    agent = lab.made["a"]
    lab.users["alice"].ls("a:/data/alice")
    pids = set(family(agent))
    assert len(pids) >= 3
    agent.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the end of all")
    agent.lines = [line.replace('idle = "60s"', 'idle = "1s"') for line in agent.lines]
    agent.start()
    lab.users["alice"].ls("a:/data/alice")
    wait_until(lambda: "why=idle" in agent.log, "the end of its mover")
    wait_until(lambda: not movers(agent, ALICE), "the end of its process")


def test_without_the_capabilities_nothing_starts(lab: Lab) -> None:
    bare = [part for part in UNPRIVILEGED if not part.startswith("--ambient")]
    agent = lab.made["a"]
    config = agent.write_config()
    command = [*agent.prefix, *bare, sys.executable, "-m", "flowengine_agent.main"]
    ended = subprocess.run([*command, "run", "--config", config], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "lacks CAP_SETUID" in ended.stderr
    assert "AmbientCapabilities" in ended.stderr
    found = subprocess.run(
        [*command, "check", "--config", config], capture_output=True, text=True, timeout=60
    )
    assert "lacks CAP_SETUID" in found.stdout


def activate(lab: Lab, version: int, policy: bytes) -> None:
    content = build({"study.toml": policy}, version, int(time.time()) + 86_400)
    for role, key in KEYS.items():
        content = sign(content, role, key)
    lab.made.client.activate_bundle(content)
    for site in ("a", "b"):
        wait_until(
            lambda at=site: lab.made.client.site(at).policy.version == version, f"the bundle at {site}"
        )


def test_what_policy_takes_away_is_taken_by_the_account_and_the_record_names_it(lab: Lab) -> None:
    activate(lab, 1, POLICY)
    folder(lab.data("a") / "alice/study/deep", ALICE)
    write(lab.data("a") / "alice/study/deep/x", b"for a while", ALICE)
    running = lab.users["alice"].copy("a:/data/alice/study/", "b:/data/alice/due", labels=["study"])
    wait_until(lambda: running.refresh().ended, "the end")
    wait_until(lambda: running.refresh().state == "purged", "the purge", 30)
    assert list((lab.data("b") / "alice/due").iterdir()) == []
    disposal = running.record.tasks[0].disposal
    assert disposal is not None
    assert (disposal.objects, disposal.size_bytes, disposal.missing) == (1, len(b"for a while"), 0)
    assert disposal.name.startswith("/data/alice/due/.flow-staging/quarantine/")
    (left,) = (row for row in evidence_of(lab.made["a"]) if row.get("direction") == "left")
    (landed,) = (row for row in evidence_of(lab.made["b"]) if row.get("direction") == "landed")
    for site, said in (("a", left["account"]), ("b", landed["counted"]["account"])):
        found, _ = read_evidence_folder(str(lab.made[site].state / "evidence"))
        assert found.kept[said["digest"]].value == f"{ALICE}:{ALICE}"  # a name of a person: beside the chain


COUNTED = POLICY.replace(
    b'{delete_after = "1 second", proof = "certificate"}',
    b'{count = {ledger = "transfers", label = "study", window = "calendar_year"}}',
)
FINISH = b"""
[[rule]]
id = "ended"
effect = "forbid"
on = ["land"]
stop = "finish-file"
when = []
why = "The agreement has ended"
"""


def test_what_an_account_copies_without_a_byte_is_decided_counted_and_on_the_record(lab: Lab) -> None:
    activate(lab, 2, COUNTED)
    folder(lab.data("a") / "alice/twins", ALICE)
    write(lab.data("a") / "alice/twins/one", random.Random(2).randbytes(200_000), ALICE)
    for _ in range(2):
        done = lab.copy("alice", "a:/data/alice/twins/", "b:/data/alice/twins", labels=["study"])
        (landed,) = (
            row
            for row in evidence_of(lab.made["b"])
            if row["kind"] == "chunk-root" and row.get("transfer") == done.id
        )
        assert (landed["objects"] >= 1, landed["size_bytes"]) == (True, 200_000)
        counted = [
            row["state"]
            for row in evidence_of(lab.made["a"])
            if row["kind"] == "obligation"
            and row.get("transfer") == done.id
            and row["duty"]["type"] == "count"
        ]
        assert counted.count("accepted") == counted.count("fulfilled") > 0
    assert done.counters.bytes_unchanged == 200_000


@pytest.mark.parametrize(("source", "target"), [("a", "b"), ("b", "a")])
def test_a_mild_stop_reaches_the_files_that_another_process_carries(
    lab: Lab, source: str, target: str
) -> None:
    version = {"a": 3, "b": 5}[source]
    activate(lab, version, COUNTED)
    there = folder(lab.data(source) / "alice/tree", ALICE)
    write(there / "a", random.Random(3).randbytes(12_000_000), ALICE)
    for number in range(4):
        write(there / f"b{number}", random.Random(4 + number).randbytes(4_000_000), ALICE)
    lab.made.client.set_limit(f"link:{source}>{target}", 16_000_000)
    running = lab.users["alice"].copy(
        f"{source}:/data/alice/tree/", f"{target}:/data/alice/file-{source}", labels=["study"]
    )
    to = lab.data(target) / f"alice/file-{source}"
    wait_until(lambda: written_below(to, staged=True) > 1_000_000, "some of the first file", 40)
    activate(lab, version + 1, COUNTED + FINISH)
    wait_until(lambda: "transfer is stopped" in lab.made[target].log, "the target's stop", 20)
    lab.made.client.remove_limit(f"link:{source}>{target}")
    wait_until(lambda: running.refresh().state in ("quarantined", "purged"), "the end", 60)
    assert [path.name for path in to.iterdir() if path.is_file()] == ["a"]
    assert (to / "a").read_bytes() == (there / "a").read_bytes()
    assert (to / "a").stat().st_uid == ALICE
