"""A site that may hold data and not read them: what lies there is sealed, comes back equal, and opens for nobody else."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
import trio
from liars import LyingCoordinator, LyingGate, PolicyKeys, evidence_of, identity_of
from sites import Federation, SiteAgent, federation
from support import files_below, stats_below, wait_until, wait_until_nobody_writes

from flowengine.api.transfers import Transfer
from flowengine.cli.third_party import summary
from flowengine.errors import FlowError
from flowengine.evidence.replay import Replayer
from flowengine.evidence.verify import verify_chain
from flowengine.store.evidence_folder import read_evidence_folder
from flowengine.store.selection import Root, Selection
from flowengine.transfer.passes import TransferSettings
from flowengine.transfer.reaching import Way
from flowengine.transfer.routes import RoutedPeer
from flowengine.transfer.run import pull, push
from flowengine.trust.grant import Party
from flowengine.trust.release import Release, Sealed
from flowengine.units import MIB
from flowengine_agent.holdings import Holdings

pytestmark = pytest.mark.slow
MARKER = b"in-the-clear:" + os.urandom(8).hex().encode()
POLICY = """
[policy]
id = "union"
version = "1"
title = "Personal data stay in the EU, sealed copies may lie elsewhere"
owner = "dpo@example.org"
applies_to = ["data.labels includes 'personal'"]
unlisted = "deny"
effective = 2026-01-01
review_by = 2100-01-01
[[rule]]
id = "inside"
effect = "permit"
on = ["release", "relay", "hold", "land", "process"]
when = ["site.country in @eu"]
why = "it stays inside"
[[rule]]
id = "backup"
effect = "permit"
on = ["hold", "land"]
when = ["site.country is 'US'"]
then = [{encrypt = {at = ["flight", "rest"], keys_in = "@eu"}}]
why = "sealed backup with the keys inside"
[[rule]]
id = "give-back"
effect = "permit"
on = ["release"]
when = ["site.country is 'US'"]
why = "what is held may come back"
"""
COUNTRIES = {"paris": "FR", "berlin": "DE", "boston": "US", "denver": "US"}


@dataclass
class World:
    """paris has the data; berlin may have them; boston and denver may hold them sealed; denver only dials out."""

    federation: Federation
    liar: LyingCoordinator
    pins: dict[str, str]
    statement: bytes

    def __getitem__(self, site: str) -> SiteAgent:
        return self.federation[site]

    def copy(self, source: str, target: str, **options: object) -> Transfer:
        done = self.federation.client.copy(source, target, **options).wait(90)  # type: ignore[arg-type]
        assert done.state == "completed", done.message
        return done

    def party(self, site: str) -> Party:
        return Party(site, self.pins[site])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("federation")
    keys = PolicyKeys()
    with federation(base, options=keys.options(base)) as running:
        for site in COUNTRIES:
            running.make(site, lines=keys.site_lines, **({"listen": ""} if site == "denver" else {}))
        for agent in running.sites.values():
            agent.start(ready=False)
        make_data(running["paris"].data)
        pins = {}
        for site in running.sites:
            certificate = wait_until(lambda: running.client.site(site).certificate, "certificate")  # noqa: B023
            pins[site] = certificate.key_sha256
        lines = "".join(
            f'[site.{site}]\ncountry = "{COUNTRIES[site]}"\noperator_countries = ["{COUNTRIES[site]}"]\nkey = "{key}"\n'
            for site, key in pins.items()
        )
        files = {
            "union.toml": POLICY,
            "labels.toml": "[label.personal]\n",
            "lists/eu.toml": '[list.eu]\ndomain = "country"\nas_of = 2026-01-01\nsource = "treaty"\n'
            'review_by = 2100-01-01\nmembers = ["FR", "DE", "NL"]\n',
            "owners.toml": f"[owner.hospital]\nkey = '{keys.owner_public}'\nroots = ['paris:/data/cohort']\n",
            "sites.toml": lines,
        }
        running.client.activate_bundle(keys.bundle(files, 1))
        statement = keys.statement("paris:/data/cohort", "personal")
        running.client.set_label(statement)

        def everywhere() -> bool:
            told = [running.client.site(site).policy for site in running.sites]
            return all((one.version, one.labels) == (1, 1) for one in told)

        wait_until(everywhere, "policies at all sites")
        yield World(running, LyingCoordinator(running.coordinator), pins, sha256(statement).digest())


def make_data(data: Path) -> None:
    cohort = data / "cohort"
    (cohort / "wards" / "empty").mkdir(parents=True)
    (cohort / "genomes").write_bytes(MARKER + os.urandom(6 * MIB))
    for number in range(20):
        (cohort / "wards" / f"{MARKER.decode()}-{number}").write_bytes(MARKER * (number + 1))
    (cohort / "latest").symlink_to("genomes")
    os.utime(cohort / "genomes", ns=(0, 1_700_000_000_123_000_000))


def content(folder: Path) -> dict[str, object]:
    wait_until_nobody_writes(folder)
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in files_below(folder)
    }


def traces(folder: Path) -> list[Path]:
    """Files and names below a folder in which the marker stands."""
    found = [Path(place, name) for place, names, _ in os.walk(folder) for name in names]
    found = [path for path in found if MARKER.decode() in path.name]
    for path in files_below(folder):
        with contextlib.suppress(FileNotFoundError):
            if MARKER.decode() in path.name or (path.is_file() and MARKER in path.read_bytes()):
                found.append(path)
    return found


def keys_command(agent: SiteAgent, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    config = str(agent.write_config())
    command = [sys.executable, "-m", "flowengine_agent.main", "keys", *arguments, "--config", config]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def test_what_is_held_is_sealed_everywhere_and_comes_back_equal(world: World, tmp_path: Path) -> None:
    paris, boston = world["paris"], world["boston"]
    original = content(paris.data / "cohort")
    done = world.copy("paris:/data/cohort/", "boston:/data/held")
    held = [path for path in (boston.data / "held").rglob("*") if path.is_file()]
    assert len(held) == len(original) + 3  # and an object for each folder
    assert all(path.read_bytes()[:8] == b"flowseal" for path in held)
    assert traces(boston.folder) == []  # data, staging, journal, index, evidence, configuration
    assert MARKER.decode() not in boston.log
    assert "genomes" not in boston.log
    uses = {line["ask"]["use"] for line in evidence_of(boston) if line["kind"] == "decision"}
    assert uses == {"hold"}
    (sealed,) = [
        line for line in evidence_of(boston) if line["kind"] == "obligation" and line["state"] == "fulfilled"
    ]
    assert (sealed["duty"]["type"], sealed["proof"]["at_rest"]) == ("encrypt", "sealed with aes-256-gcm")
    (key,) = (paris.state / "sealing").iterdir()
    assert key.stat().st_mode & 0o777 == 0o600
    assert sealed["proof"]["keys"] == [key.stem]
    assert key.read_text().split('"secret": "')[1][:64] not in paris.log
    assert not (boston.state / "sealing").exists()
    world.copy("boston:/data/held/", "paris:/data/restored")
    assert content(paris.data / "restored") == original
    assert (paris.data / "restored/wards/empty").is_dir()
    assert (paris.data / "restored/genomes").stat().st_mtime_ns == 1_700_000_000_123_000_000
    assert not list((paris.data / "restored").rglob(".flow-staging"))
    assert done.counters.objects == len(held)
    assert "sealed, for boston may hold and not read them" in summary(done)
    there = boston.data / "held"
    opened = keys_command(paris, "open", str(there), str(tmp_path / "by-hand"))
    assert opened.returncode == 0, opened.stderr
    assert content(tmp_path / "by-hand") == original
    (there / "readme").write_text("in the clear")
    opened = keys_command(paris, "open", str(there), str(tmp_path / "again"))
    (there / "readme").unlink()
    assert (opened.returncode, content(tmp_path / "again")) == (7, original)
    assert "readme is no sealed object" in opened.stderr


def test_a_second_copy_sends_what_changed_and_verifies(world: World) -> None:
    with open(world["paris"].data / "cohort/genomes", "r+b") as file:
        file.seek(3 * MIB)
        file.write(b"edited")
    again = world.copy("paris:/data/cohort/", "boston:/data/held")
    assert 0 < again.counters.bytes_sent < MIB
    client = world.federation.client
    assert client.verify("paris:/data/cohort/", "boston:/data/held").wait(90).state == "completed"
    path = max((world["boston"].data / "held").iterdir(), key=lambda one: one.stat().st_size)
    good = path.read_bytes()
    path.write_bytes(good[:-100_000] + bytes(100_000))
    with pytest.raises(FlowError, match="differ"):
        client.verify("paris:/data/cohort/", "boston:/data/held").wait(90)
    path.write_bytes(good)


def test_what_is_half_here_is_sealed_too_and_goes_on_after_a_kill(world: World) -> None:
    client, boston = world.federation.client, world["boston"]
    client.set_limit("link:paris>boston", 8_000_000)
    try:
        asked = client.copy("paris:/data/cohort/", "boston:/data/half")
        staging = boston.data / "half/.flow-staging"
        wait_until(
            lambda: any(st.st_size > 300 for path, st in stats_below(staging) if path.suffix == ".j"),
            "journalled chunks",
        )
        boston.kill()
        assert max(path.stat().st_size for path in staging.iterdir()) > MIB
        assert traces(boston.folder) == []
    finally:
        client.remove_limit("link:paris>boston")
    boston.start()
    done = asked.wait(90)
    assert done.state == "completed", done.message
    assert done.counters.bytes_reused > 0  # sealed again, the same bytes


def test_held_copies_move_on_sealed_and_open_only_where_the_key_is(world: World) -> None:
    berlin, denver = world["berlin"], world["denver"]
    client = world.federation.client
    world.copy("boston:/data/held/", "denver:/data/kept")
    assert traces(denver.folder) == []
    stray = world["boston"].data / "held/stray"
    stray.write_bytes(MARKER)
    with pytest.raises(FlowError) as refused:
        client.copy("boston:/data/held/", "denver:/data/mixed").wait(90)
    stray.unlink()
    assert refused.value.reason == "sealed-mixed"
    assert traces(denver.folder) == []
    with pytest.raises(FlowError) as refused:
        client.copy("denver:/data/kept/", "berlin:/data/in").wait(90)
    assert refused.value.reason == "sealing-key-missing"
    assert "keys give" in str(refused.value)
    assert traces(berlin.folder) == []
    (key,) = [path.stem for path in (world["paris"].state / "sealing").glob("*.key")]
    opening = keys_command(berlin, "show").stdout.strip()
    other = keys_command(denver, "show").stdout.strip()
    denied = keys_command(world["paris"], "give", key, "--site", "denver", "--to", other)
    assert denied.returncode == 5, denied.stderr
    assert denied.stdout == ""
    given = keys_command(world["paris"], "give", key, "--site", "berlin", "--to", opening)
    assert given.returncode == 0, given.stderr
    assert keys_command(denver, "take", "-", stdin=given.stdout).returncode == 4
    taken = keys_command(berlin, "take", "-", stdin=given.stdout)
    assert taken.returncode == 0, taken.stderr
    world.copy("denver:/data/kept/", "berlin:/data/in")
    assert content(berlin.data / "in") == content(world["paris"].data / "cohort")


def test_why_it_cannot_be_opened_is_told_also_where_the_holder_dialled(world: World) -> None:
    staging = world["paris"].data / "busy/.flow-staging"
    staging.mkdir(parents=True)
    with open(staging / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # lets data land beside it, and nobody open into the folder
        asked = world.federation.client.copy("denver:/data/kept/", "paris:/data/busy")

        def told() -> bool:
            (task,) = asked.refresh().tasks
            return "another transfer writes to" in task.message

        wait_until(told, "the reason", 30)
    assert asked.wait(90).state == "completed"
    assert content(world["paris"].data / "busy") == content(world["paris"].data / "cohort")


def test_a_damaged_held_object_is_named_and_not_opened(world: World) -> None:
    path = max((world["denver"].data / "kept").iterdir(), key=lambda one: one.stat().st_size)
    data = bytearray(path.read_bytes())
    data[MIB] ^= 1
    path.write_bytes(data)
    with pytest.raises(FlowError) as damaged:
        world.federation.client.copy("denver:/data/kept/", "paris:/data/damaged").wait(90)
    assert damaged.value.reason == "sealed-damaged"
    there = world["paris"].data / "damaged"
    assert not (there / "genomes").exists()
    # What was opened before is on account: when policy takes it back it goes, though nothing was completed.
    account = Holdings(os.path.join(world["paris"].state, "holdings.sqlite"))
    (half,) = [one for one in account.in_state("open") if one.folder == b"damaged"]
    noted = {os.fsdecode(path) for rows in account.to_hide(half) for path, _ in rows}
    account.close()
    assert noted >= set(content(there)) - {name for name in content(there) if ".flow-staging" in name}
    assert f"wards/{MARKER.decode()}-3" in noted


def test_what_is_not_sealed_does_not_stay_where_it_may_only_be_held(world: World, tmp_path: Path) -> None:
    """A source that lies: with a release that says nothing of seals, and with one that says so and sends as it is."""
    source, boston = identity_of(world["paris"]), world["boston"]
    (tmp_path / "loot").mkdir()
    (tmp_path / "loot" / "plain").write_bytes(MARKER * 1000)
    for sealed in ([], [Sealed("aes-256-gcm", "00" * 16, "paris")]):
        grant = world.liar.grant(
            world.party("paris"), world.party("boston"), dial="source", required=["hold"], transfer="t-lie",
            source_path="/data/cohort/", target_path=f"/data/lie{len(sealed)}",
        )  # fmt: skip
        now = int(time.time())
        release = source.sign_release(
            Release(
                transfer=grant.transfer, task=grant.task, fence=grant.fence, route=[grant.source, grant.target],
                source_path=grant.source_path, target_path=grant.target_path, issued=now, expires=now + 300,
                labels=["personal"], statements=[world.statement], requester="admin", sealed=sealed,
            )
        )  # fmt: skip
        peer = RoutedPeer.at(boston.listen, world.liar.trust(source), world.liar.key.sign(grant))
        assert isinstance(peer, RoutedPeer)
        peer.sends, peer.gate = True, LyingGate(release)
        peer.ways = (Way(("paris", "boston"), boston.listen),)
        with pytest.raises((FlowError, BaseExceptionGroup)) as refused:
            trio.run(
                lambda: push(
                    Selection([Root(os.fsencode(tmp_path / "loot"), b"")]),
                    peer,  # noqa: B023
                    os.fsencode(grant.target_path[1:]),  # noqa: B023
                    # Whatever passes is tried again: only what is refused for good says anything here.
                    TransferSettings(retry_for_s=20.0, streams=1),
                )
            )
        if not sealed:
            assert reason_of(refused.value) == "not-sealed"
            continue
        wait_until(  # its connections are cut at once: whether the source still hears why is chance
            lambda: [
                line for line in evidence_of(boston)
                if line["kind"] == "quarantine" and line["task"] == grant.task and "is not sealed" in line["why"]  # noqa: B023
            ],
            f"what came is in quarantine, on the record; the source was told {refused.value!r}",
        )  # fmt: skip
        wait_until(
            lambda: not [path for path in traces(boston.data) if "quarantine" not in str(path)],
            "the plain object is gone",
        )


def reason_of(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, FlowError)
    return error.reason


def test_a_coordinator_that_says_land_where_only_hold_is_permitted_gets_nothing(
    world: World, tmp_path: Path
) -> None:
    boston = identity_of(world["boston"])
    grant = world.liar.grant(world.party("paris"), boston.party, transfer="t-land")
    peer = RoutedPeer.at(world["paris"].listen, world.liar.trust(boston), world.liar.key.sign(grant))
    assert isinstance(peer, RoutedPeer)
    peer.gate, peer.ways = LyingGate(), (Way(("boston", "paris"), world["paris"].listen),)
    with pytest.raises((FlowError, BaseExceptionGroup)) as refused:
        trio.run(
            lambda: pull(
                peer, b"data/cohort/", os.fsencode(tmp_path), TransferSettings(retry_for_s=0.0, streams=1)
            )
        )
    assert reason_of(refused.value) == "policy-denied"
    assert traces(tmp_path) == []


def test_what_became_of_sealing_is_on_the_record_without_a_gap(world: World) -> None:
    """After all that went on above: the chain of every site verifies, each duty is said to be taken on and done."""
    anchors = (world.federation.coordinator.folder / "secrets/ca.pem").read_text()
    for site, agent in world.federation.sites.items():
        found, _ = read_evidence_folder(str(agent.state / "evidence"))
        verdict = verify_chain(found.lines, anchors, Replayer(found.bundles, found.key, found.kept))
        assert verdict.findings == [], site
