"""A policy that changes under way: the transfer stops at once, what arrived goes, and it is signed for.

A real coordinator and real agents. Bundles are signed with two keys of the test.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from liars import evidence_of
from proxy import Proxy
from sites import Federation, federation
from studies import STUDY
from support import MIB, AwakeClock, files_below, random_file, wait_until, written_below

from flowengine.api.transfers import ENDED
from flowengine.client.synchronous import Transfer
from flowengine.errors import Denied
from flowengine.evidence.replay import Replayer
from flowengine.evidence.verify import Verdict, verify_chain
from flowengine.policy.bundle import build, sign
from flowengine.store.evidence_folder import read_evidence_folder
from flowengine.trust.approval import Yes, sign_approval
from flowengine.trust.deletion import DeleteCertificate, verify_deletion
from flowengine.wire.ticket import Ticket

pytestmark = pytest.mark.slow

KEYS = {"policy-owner": Ed25519PrivateKey.generate(), "security": Ed25519PrivateKey.generate()}
APPROVERS = {
    "anna": ("privacy", Ed25519PrivateKey.generate()),
    "ben": ("lead", Ed25519PrivateKey.generate()),
}
RATE = 24_000_000
"""3 MB/s, so that a transfer is under way for long."""
STOPS_S = 5.0
"""On a machine that is awake."""
OFFLINE_S = 3.0
LONG_OFFLINE_S = 300.0
"""For all that is not about being offline: a machine may stand still for a while."""

POLICY = (
    STUDY
    + """
max_offline = "{offline}"

[[rule]]
id     = "members"
effect = "permit"
on     = ["release", "relay", "hold", "land", "process"]
when   = []
then   = [{then}]
why    = "Members of the study"
"""
)
FORBID = """
[[rule]]
id     = "ended"
effect = "forbid"
on     = ["land"]
stop   = "{stop}"
when   = []
why    = "The agreement has ended"
"""
OTHERS = """
[policy]
id = "others"
version = "1"
title = "Data of nobody"
owner = "dac@example.org"
applies_to = ["data.labels includes 'open'"]
effective = 2020-01-01
review_by = 2099-01-01
[[rule]]
id = "all"
effect = "permit"
on = ["release", "relay", "hold", "land", "process"]
when = []
why = "Open data"
"""


class Bundles:
    """Builds, signs and activates one version after the other."""

    def __init__(self, made: Federation) -> None:
        self._made = made
        self._version = 0

    def activate(self, *rules: str, then: str = "", offline_s: float = LONG_OFFLINE_S) -> None:
        """Put policies in force and wait for nobody."""
        self._version += 1
        text = POLICY.replace("{then}", then).replace("{offline}", f"{offline_s:.0f} seconds") + "".join(
            rules
        )
        approvers = "".join(
            f"[approver.{name}]\ngroups = ['{group}']\nkey = '{key.public_key().public_bytes_raw().hex()}'\n"
            for name, (group, key) in APPROVERS.items()
        )
        files = {
            "study.toml": text.encode(),
            "others.toml": OTHERS.encode(),
            "approvers.toml": approvers.encode(),
        }
        content = build(files, self._version, int(time.time()) + 86_400)
        for role, key in KEYS.items():
            content = sign(content, role, key)
        self._made.client.activate_bundle(content)

    def everywhere(self, *rules: str, then: str = "", offline_s: float = LONG_OFFLINE_S) -> None:
        """The same, and wait until all agents have it."""
        self.activate(*rules, then=then, offline_s=offline_s)

        wait_until(lambda: all(map(self.is_at, "abc")), f"version {self._version} everywhere", 20)

    def is_at(self, site: str) -> bool:
        """Whether a site has said that it decides by the newest version."""
        return self._made.client.site(site).policy.version == self._version


class Link:
    """The way of one site to the coordinator, which can be cut for that site alone."""

    def __init__(self) -> None:
        self._proxy: Proxy | None = None
        self._is_cut = False

    def open(self, listen: str) -> str:
        """Begin to pass on; gives the address to ask."""
        host, _, port = listen.rpartition(":")
        self._proxy = Proxy(
            Ticket(host, int(port), b"", bytes(32), bytes(32)),
            lambda way, data: None if self._is_cut else data,
        )
        return f"https://127.0.0.1:{self._proxy.ticket.port}"

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """No word passes while the block lasts."""
        assert self._proxy is not None
        self._is_cut = True
        self._proxy.cut()
        try:
            yield
        finally:
            self._is_cut = False

    def close(self) -> None:
        """End it."""
        if self._proxy is not None:
            self._proxy.close()


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    """Between b and the coordinator."""
    with contextlib.closing(Link()) as opened:
        yield opened


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, link: Link) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    options = []
    public = {}
    for role, key in KEYS.items():
        public[role] = key.public_key().public_bytes_raw().hex()
        (folder / f"{role}.pub").write_text(public[role] + "\n")
        options += [f"--{role}-key", str(folder / f"{role}.pub")]
    lines = [
        "[policy]", f'policy_owner = ["{public["policy-owner"]}"]', f'security = ["{public["security"]}"]',
        "required = true", 'purge_after = "1 s"',
    ]  # fmt: skip
    with federation(folder, options=[*options, "--offline-s", "5"]) as running:
        running.add("a", lines=lines)
        running.add("b", lines=[f'coordinator = ["{link.open(running.coordinator.listen)}"]', *lines])
        running.add("c", lines=lines, listen="")  # dials out only: it is the one that pushes
        for source in ("a", "c"):
            data = running[source].data
            random_file(data / "set/later/large", 40 * MIB)
            for number in range(
                20
            ):  # a folder's objects come before the folders in it, so that these land first
                random_file(data / f"set/{number}", 10_000, seed=number + 1)
                random_file(data / f"small/{number}", 10_000, seed=number + 1)
        running.client.set_limit("link:a>b", RATE)
        running.client.set_limit("link:c>b", RATE)
        yield running


@pytest.fixture(scope="module")
def bundles(made: Federation) -> Bundles:
    return Bundles(made)


def begin(made: Federation, source: str, to: str, **options: object) -> Transfer:
    """A copy of labelled data that is well under way: small objects have landed, the large one has not."""
    transfer = made.client.copy(f"{source}:/data/set", f"b:/data/{to}/", labels=["study"], **options)

    def under_way() -> bool:
        assert not transfer.refresh().ended, transfer.record.message
        return len(visible(made, to)) >= 20 and staged_bytes(made, to) > 2 * MIB and established(made) > 0

    wait_until(under_way, "the copy under way", 40)
    return transfer


def staged_bytes(made: Federation, to: str) -> int:
    return written_below(made["b"].data / to, staged=True)


def established(made: Federation) -> int:
    """Connections to the agents' data ports."""
    ports = {int(site.listen.rpartition(":")[2]) for site in made.sites.values() if site.listen}
    found = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        found += words[3] == "01" and int(words[1].rpartition(":")[2], 16) in ports
    return found


def until_quiet(made: Federation, clock: AwakeClock) -> float:
    """Seconds of a clock until no agent has a connection to another: from then on no byte can move."""
    wait_until(lambda: not established(made), "the end of the session", 30)
    print(f"last byte after {clock.now_s():.2f} s")
    return clock.now_s()


def certificate(made: Federation, transfer: Transfer) -> DeleteCertificate:
    """The certificate of a transfer that was purged, checked."""
    record = wait_until(lambda: transfer.refresh().state == "purged" and transfer.record, "the purge", 30)
    found = record.tasks[0].disposal
    assert found is not None
    anchors = (made.coordinator.folder / "secrets/ca.pem").read_text()
    said, signer = verify_deletion(base64.b64decode(found.certificate), anchors)
    assert (said.site, signer.site, said.transfer, said.cause) == ("b", "b", transfer.id, "policy-stopped")
    assert said.objects == found.objects
    return said


def visible(made: Federation, to: str) -> list[str]:
    folder = made["b"].data / to
    return sorted(
        str(path.relative_to(folder))
        for path in files_below(folder)
        if path.is_file() and ".flow-staging" not in path.parts
    )


@pytest.mark.parametrize("source", ["a", "c"])
def test_stop_now_cuts_in_seconds_and_takes_everything_that_arrived(
    made: Federation, bundles: Bundles, source: str
) -> None:
    bundles.everywhere()
    transfer = begin(made, source, f"now-{source}")
    assert len(visible(made, f"now-{source}")) == 20
    with AwakeClock() as clock:
        bundles.activate(FORBID.replace("{stop}", "stop-now"))
        assert until_quiet(made, clock) < STOPS_S
    said = certificate(made, transfer)
    assert transfer.record.reason in ("policy-stopped", "policy-denied")
    assert (said.objects, said.size_bytes) == (20, 200_000)
    assert said.staged_bytes > MIB
    assert visible(made, f"now-{source}") == []
    assert not list((made["b"].data / ".flow-staging").glob("quarantine/*"))
    why = transfer.why()
    assert "study/ended" in why.line
    assert "destroyed" in why.line


@pytest.fixture
def more(made: Federation) -> Iterator[None]:
    """More large objects behind the one that is under way: they are offered, and asked for, long before their turn."""
    folders = [made[source].data / "set/later/more" for source in ("a", "c")]
    for folder in folders:
        for number in range(5):
            random_file(folder / str(number), 8 * MIB, seed=100 + number)
    yield
    for folder in folders:
        shutil.rmtree(folder)


@pytest.mark.parametrize(("source", "who"), [("a", "land"), ("a", "release"), ("c", "land")])
def test_finish_file_ends_what_had_begun_and_nothing_else(
    made: Federation, bundles: Bundles, more: None, source: str, who: str
) -> None:
    bundles.everywhere()
    to = f"file-{source}-{who}"
    transfer = begin(made, source, to)
    rule = FORBID.replace("{stop}", "finish-file").replace('["land"]', f'["{who}"]')
    bundles.activate(rule)
    wait_until(lambda: stops(made, source, transfer), "the source's stop", STOPS_S)
    if who == "land":
        wait_until(lambda: stops(made, "b", transfer), "the target's stop", STOPS_S)
    else:
        assert stops(made, "b", transfer) == ""  # by its own policies it might go on
    assert visible(made, to) == [f"set/{number}" for number in sorted(map(str, range(20)))]
    made.client.remove_limit(f"link:{source}>b")
    try:
        said = certificate(made, transfer)
    finally:
        made.client.set_limit(f"link:{source}>b", RATE)
    assert said.objects == 0  # what had landed was lawful, and stays
    landed = visible(made, to)
    assert len(landed) == 21
    assert same_bytes(made, source, to, "set/later/large")
    assert "study/ended" in transfer.why().line


def test_finish_file_begins_no_small_file_that_was_asked_for(made: Federation, bundles: Bundles) -> None:
    """Small objects are wanted by the hundred before the first of them is sent."""
    bundles.everywhere()
    folder = made["a"].data / "many"
    for number in range(240):
        random_file(folder / f"{number:03}", 200_000, seed=1000 + number)
    transfer = made.client.copy("a:/data/many", "b:/data/few/", labels=["study"])
    wait_until(lambda: len(visible(made, "few")) >= 5, "the first of them", 40)
    bundles.activate(FORBID.replace("{stop}", "finish-file"))
    wait_until(lambda: stops(made, "b", transfer), "the target's stop", STOPS_S)
    stopped = len(visible(made, "few"))
    made.client.remove_limit("link:a>b")
    try:
        said = certificate(made, transfer)
    finally:
        made.client.set_limit("link:a>b", RATE)
    landed = visible(made, "few")
    # What was written and not yet named at that moment, and no more: a batch of the publisher.
    assert stopped <= len(landed) < stopped + 60
    assert {(made["b"].data / "few" / name).stat().st_size for name in landed} == {200_000}
    assert said.objects == 0


def test_a_target_that_is_killed_as_it_finishes_a_file_begins_nothing_when_it_is_back(
    made: Federation, bundles: Bundles, more: None
) -> None:
    bundles.everywhere()
    transfer = begin(made, "a", "killed")
    bundles.activate(FORBID.replace("{stop}", "finish-file"))
    wait_until(lambda: stops(made, "b", transfer), "the target's stop", STOPS_S)
    made["b"].kill()
    landed = visible(made, "killed")
    assert len(landed) == 20
    made["b"].start()
    said = certificate(made, transfer)
    assert (said.objects, said.staged_bytes > MIB) == (
        0,
        True,
    )  # the half of a file goes, what had landed stays
    assert visible(made, "killed") == landed
    assert transfer.record.reason in ("policy-stopped", "policy-denied")
    assert "agreement has ended" in transfer.why().line


def same_bytes(made: Federation, source: str, to: str, name: str) -> bool:
    return (made["b"].data / to / name).read_bytes() == (made[source].data / name).read_bytes()


def test_drain_lets_the_session_come_to_its_end_and_begins_none(made: Federation, bundles: Bundles) -> None:
    bundles.everywhere()
    transfer = begin(made, "a", "drain")
    bundles.activate(FORBID.replace("{stop}", "drain"))
    wait_until(lambda: stops(made, "a", transfer), "the source's stop", STOPS_S)
    made.client.remove_limit("link:a>b")
    try:
        wait_until(lambda: transfer.refresh().ended, "the end", 30)
    finally:
        made.client.set_limit("link:a>b", RATE)
    assert transfer.record.state == "completed", transfer.record.message
    source = made["a"].data
    assert visible(made, "drain") == sorted(
        str(path.relative_to(source)) for path in (source / "set").rglob("*") if path.is_file()
    )
    with pytest.raises(Denied, match="agreement has ended"):
        made.client.copy("a:/data/set", "b:/data/drain-2/", labels=["study"])


def stops(made: Federation, site: str, transfer: Transfer) -> str:
    """What a site has said of stopping a transfer."""
    lines = made[site].log.splitlines()
    return "".join(line for line in lines if "transfer is stopped" in line and transfer.id in line)


def test_a_site_that_is_cut_off_stops_by_itself_and_goes_on_when_it_may(
    made: Federation, bundles: Bundles
) -> None:
    with AwakeClock() as clock:
        bundles.everywhere(offline_s=OFFLINE_S)
        transfer = begin(made, "a", "offline")
        before = [stops(made, site, transfer) for site in "ab"]
        since = clock.now_s()
        made.coordinator.kill()
        try:
            quiet = until_quiet(made, clock) - since
            landed = len(visible(made, "offline"))
            # Whoever looks first cuts it for both.
            wait_until(
                lambda: any(
                    "policy-offline" in stops(made, site, transfer)[len(said) :]
                    for site, said in zip("ab", before, strict=True)
                ),
                "a stop",
                STOPS_S,
            )
        finally:
            made.coordinator.start()
        check_offline(quiet, clock)
    assert landed == 20
    made.client.remove_limit("link:a>b")
    try:
        wait_until(lambda: transfer.refresh().ended, "the end", 60)
    finally:
        made.client.set_limit("link:a>b", RATE)
    assert transfer.record.state == "completed", transfer.record.message


def check_offline(quiet_s: float, clock: AwakeClock) -> None:
    """The last word may have come before the machine stood still; that time counts for a site, and not for the clock."""
    assert OFFLINE_S - 2 - clock.asleep_s() < quiet_s < OFFLINE_S + STOPS_S


def test_one_site_alone_that_is_cut_off_stops_and_destroys_when_it_hears_of_the_change(
    made: Federation, bundles: Bundles, link: Link
) -> None:
    with AwakeClock() as clock:
        bundles.everywhere(offline_s=OFFLINE_S)
        transfer = begin(made, "a", "alone")
        before = {site: stops(made, site, transfer) for site in "ab"}
        with link.cut():
            since = clock.now_s()
            quiet = until_quiet(made, clock) - since
            wait_until(
                lambda: "policy-offline" in stops(made, "b", transfer)[len(before["b"]) :],
                "b's own stop",
                STOPS_S,
            )
            assert stops(made, "a", transfer) == before["a"]  # it is connected, and nothing has changed
            bundles.activate(FORBID.replace("{stop}", "stop-now"), offline_s=OFFLINE_S)
            wait_until(lambda: bundles.is_at("a"), "the change at a", 20)
            assert not bundles.is_at("b")
            assert len(visible(made, "alone")) == 20  # b cannot know
        check_offline(quiet, clock)
    assert certificate(made, transfer).objects == 20
    assert visible(made, "alone") == []


def test_a_stop_of_which_a_site_cannot_tell_ends_at_the_coordinator_and_once(
    made: Federation, bundles: Bundles, link: Link
) -> None:
    bundles.everywhere(offline_s=OFFLINE_S)
    transfer = begin(made, "a", "unheard")
    with link.cut():
        bundles.activate(FORBID.replace("{stop}", "stop-now"), offline_s=OFFLINE_S)
        wait_until(lambda: transfer.refresh().ended, "the end at the coordinator", 40)
        assert (transfer.record.state, transfer.record.reason) == ("terminated", "policy-unheard")
        line = transfer.why().line
        assert "study/ended" in line
        assert "the agent of b has not been heard since" in line
        assert not established(made)
    assert certificate(made, transfer).objects == 20
    assert visible(made, "unheard") == []
    assert "destroyed" in transfer.why().line
    ends = []
    with made.client.events(after=0, transfer=transfer.id) as events:
        for event in events:
            if event.type in {f"transfer.{state}" for state in ENDED}:
                ends.append(event.type)
            if event.type == "transfer.purged":
                break
    # Where it is destroyed before the coordinator was told of the quarantine, it hears of both at once.
    assert [end for end in ends if end != "transfer.quarantined"] == [
        "transfer.terminated",
        "transfer.purged",
    ]


def test_what_is_due_is_destroyed_by_the_target_itself_over_a_restart(
    made: Federation, bundles: Bundles
) -> None:
    bundles.everywhere(then='{delete_after = "10 seconds", proof = "certificate"}')
    transfer = made.client.copy("a:/data/small", "b:/data/due/", labels=["study"])
    wait_until(lambda: transfer.refresh().ended, "the end", 30)
    assert transfer.record.state == "completed", transfer.record.message
    made["b"].kill()
    assert len(visible(made, "due")) == 20
    made["b"].start()
    record = wait_until(lambda: transfer.refresh().state == "purged" and transfer.record, "the purge", 30)
    assert visible(made, "due") == []
    found = record.tasks[0].disposal
    assert found is not None
    assert (found.cause, found.objects, found.size_bytes) == ("delete-after", 20, 200_000)


def test_what_landed_under_onward_forbid_is_no_source_again(made: Federation, bundles: Bundles) -> None:
    bundles.everywhere(then='{onward = "forbid"}, {rate_max = "800 Mbit/s"}')
    first = made.client.copy("a:/data/small", "b:/data/once/", labels=["study"])
    wait_until(lambda: first.refresh().ended, "the end", 30)
    assert first.record.state == "completed", first.record.message
    again = made.client.copy("b:/data/once", "a:/data/back/", labels=["open"])
    wait_until(lambda: again.refresh().ended, "the end", 30)
    assert (again.record.state, again.record.reason) == ("terminated", "policy-onward")
    assert not [path for path in files_below(made["a"].data / "back") if path.is_file()]


def evidence_verdict(made: Federation, site: str) -> Verdict:
    """What an auditor says of a site's evidence, with all that the other sites hold of it."""
    anchors = (made.coordinator.folder / "secrets/ca.pem").read_text()
    found, _ = read_evidence_folder(str(made[site].state / "evidence"))
    held = [
        (f"site:{other}", base64.b64decode(record["document"]))
        for other in made.sites if other != site
        for record in evidence_of(made[other]) if record["kind"] == "checkpoint"
    ]  # fmt: skip
    replayer = Replayer(found.bundles, found.key, found.kept)
    return verify_chain(found.lines, anchors, replayer, elsewhere=held)


def approve(made: Federation, handle: str, who: str) -> None:
    asked = next(one for one in made.client.approvals() if one.handle == handle)
    now = int(time.time())
    said = Yes(
        who=who, dataset=asked.dataset, recipient=asked.recipient, purpose=asked.purpose,
        duties=asked.duties_digest, requester=asked.requester, given=now, until=now + 600,
    )  # fmt: skip
    made.client.approve(handle, sign_approval(said, APPROVERS[who][1]))


def test_people_approve_exactly_what_they_saw_and_may_take_it_back(
    made: Federation, bundles: Bundles
) -> None:
    bundles.everywhere(then='{approve = {from = ["privacy", "lead"], people = 2, not = "requester"}}')

    def ask(to: str) -> Transfer:
        return made.client.copy("a:/data/set", f"b:/data/{to}/", labels=["study"])

    with pytest.raises(Denied) as refused:
        ask("approved")
    assert refused.value.reason == "policy-approval"
    (handle,) = refused.value.context["handles"]  # type: ignore[misc]
    approve(made, handle, "anna")
    with pytest.raises(Denied):  # one of two
        ask("approved")
    approve(made, handle, "ben")
    with pytest.raises(Denied):  # another data set is another question
        made.client.copy("a:/data/small", "b:/data/approved/", labels=["study"])
    transfer = begin(made, "a", "approved")
    with AwakeClock() as clock:
        made.client.withdraw_approval(handle, "ben")
        assert until_quiet(made, clock) < STOPS_S
    said = certificate(made, transfer)
    assert said.objects == 20
    assert visible(made, "approved") == []


COUNTED = """
[[rule]]
id     = "enough"
effect = "forbid"
on     = ["land"]
when   = ["ledger.transfers_after('study', 'recipient', 'calendar_year') > {most}"]
why    = "The agreement covers so many"
"""


def test_transfers_count_at_the_coordinator_and_at_the_source(made: Federation, bundles: Bundles) -> None:
    count = '{count = {ledger = "transfers", label = "study", window = "calendar_year"}}'
    bundles.everywhere(COUNTED.replace("{most}", "1"), then=count)
    first = made.client.copy("c:/data/small", "a:/data/count-1/", labels=["study"])
    wait_until(lambda: first.refresh().ended, "the end", 30)
    assert first.record.state == "completed", first.record.message
    with pytest.raises(Denied, match="covers so many"):
        made.client.copy("c:/data/small", "a:/data/count-2/", labels=["study"])
    rows = sqlite3.connect(made["c"].state / "exports.sqlite").execute("SELECT party FROM export").fetchall()
    assert ("site:a",) in rows


def test_a_closed_window_makes_it_wait_by_name(made: Federation, bundles: Bundles) -> None:
    now = time.gmtime(time.time() + 6 * 3600)
    later = time.gmtime(time.time() + 7 * 3600)
    window = f'{{window = {{tz = "UTC", from = "{now.tm_hour:02}:00", to = "{later.tm_hour:02}:00"}}}}'
    bundles.everywhere(then=window)
    transfer = made.client.copy("a:/data/small", "b:/data/window/", labels=["study"])

    def waits() -> bool:
        wait = transfer.refresh().tasks[0].wait
        return wait is not None and wait.name == "policy-window"

    wait_until(waits, "waiting for its window", 30)
    assert visible(made, "window") == []
    transfer.cancel()


def test_every_duty_is_on_the_record_of_who_carried_it_out(made: Federation) -> None:
    """After all stops, kills and denials above: what was taken on, what became of it, and nothing that is missing."""
    done: dict[tuple[str, str], set[str]] = {}
    for site in "abc":
        verdict = evidence_verdict(made, site)
        assert verdict.findings == [], site
        for record in evidence_of(made[site]):
            if record["kind"] == "obligation":
                done.setdefault((site, record["duty"]["type"]), set()).add(record["state"])
    both = {"accepted", "fulfilled"}
    assert done["a", "rate_max"] == done["b", "delete_after"] == done["b", "onward"] == both
    assert done["a", "approve"] == both
    assert done["c", "count"] == both
    used = [record for record in evidence_of(made["a"]) if record["kind"] == "approval"]
    assert {(record["state"], record["group"]) for record in used} == {("used", "lead"), ("used", "privacy")}
    ids = {record["id"] for record in used}
    lines = [json.loads(one.line) for one in made.client.evidence()]
    told = {(one["state"], one["group"]) for one in lines if one["kind"] == "approval" and one["id"] in ids}
    assert told == {("given", "lead"), ("given", "privacy"), ("withdrawn", "lead")}
    stopped = [
        record["stopped"] for record in evidence_of(made["b"])
        if record["kind"] == "chunk-root" and "stopped" in record
    ]  # fmt: skip
    assert sorted(set(stopped)) == ["drain", "finish-file"], "a mild stop says what landed under it"
