"""Targets that serve each other: one federation of three sites, the first of which has a narrow way out."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import lying_feeder
import pytest
from liars import PolicyKeys
from lying_feeder import PLANTED
from planned import decided, start
from sites import Federation, SiteAgent, federation
from support import MIB, assert_same, random_file, wait_until

from flowengine.api.links import LinkRequest
from flowengine.api.transfers import Transfer
from flowengine.client.synchronous import Transfer as Handle

pytestmark = pytest.mark.slow

UPLINK_BITS_PER_S = 40_000_000
SIZE = 4 * MIB
_POLICY = """
[policy]
id = "{label}"
version = "1"
title = "Where what is {label} may leave and land"
owner = "dpo@example.org"
applies_to = ["data.labels includes '{label}'"]
unlisted = "deny"
effective = 2026-01-01
review_by = 2100-01-01
[[rule]]
id = "leaves"
effect = "permit"
on = ["release"]
when = ["site.country in @{label}"]
why = "it may leave there"
[[rule]]
id = "lands"
effect = "permit"
on = ["land"]
when = ["site.country in @free"]
why = "it may land there"
"""
_LIST = """
[list.{name}]
domain = "country"
as_of = 2026-01-01
source = "treaty"
review_by = 2100-01-01
members = {members}
"""


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    base, keys = tmp_path_factory.mktemp("federation"), PolicyKeys()
    with federation(base, options=[*keys.options(base), "--lease-s", "6"]) as made:
        for site in "abc":
            made.make(site, lines=keys.site_lines)
        start(made)
        _enact(made, keys)
        made.client.set_limit("site:a", UPLINK_BITS_PER_S)
        for pair in (("b", "c"), ("c", "b")):
            made.client.set_link(*pair, LinkRequest(capacity_bits_per_s=10**9))
        for seed, folder in enumerate(("free", "stays")):
            random_file(made["a"].data / folder / "sub/large", SIZE, seed=seed)
            (made["a"].data / folder / "small").write_text(folder)
        yield made


def _enact(made: Federation, keys: PolicyKeys) -> None:
    """What is free may leave everywhere, what stays only at the first site."""
    pins = ""
    for site, country in {"a": "FR", "b": "DE", "c": "NL"}.items():
        certificate = made.client.site(site).certificate
        assert certificate is not None
        pins += f'[site.{site}]\ncountry = "{country}"\nkey = "{certificate.key_sha256}"\n'
    roots = ["a:/data/free", "a:/data/stays"]
    files = {
        "free.toml": _POLICY.format(label="free"),
        "stays.toml": _POLICY.format(label="stays"),
        "lists/free.toml": _LIST.format(name="free", members=["FR", "DE", "NL"]),
        "lists/stays.toml": _LIST.format(name="stays", members=["FR"]),
        "labels.toml": "[label.free]\n[label.stays]\n",
        "owners.toml": f"[owner.hospital]\nkey = '{keys.owner_public}'\nroots = {roots}\n",
        "sites.toml": pins,
    }
    made.client.activate_bundle(keys.bundle(files, 1))
    for root in roots:
        made.client.set_label(keys.statement(root, root.rpartition("/")[2]))

    def everywhere() -> bool:
        told = [made.client.site(site).policy for site in made.sites]
        return all((one.version, one.labels) == (1, len(roots)) for one in told)

    wait_until(everywhere, "policies at all sites")


def left_a(site: SiteAgent, transfer: Transfer) -> int:
    """Bytes that left the first site for a transfer, by its own count."""
    log = re.sub(r"\x1b\[[0-9;]*m", "", site.log)
    gave = [line for line in log.splitlines() if "gave" in line and transfer.id in line]
    return sum(int(number) for line in gave for number in re.findall(r"\bbytes_sent=(\d+)", line))


def served_from(transfer: Handle) -> dict[str, str]:
    """From which site each target was served in the end."""
    return {task.target.site: task.source.site for task in transfer.refresh().tasks}


def unfed(sites: Federation, transfer: Handle) -> list[str]:
    """Why targets of a complete transfer were served by the source after all."""
    found = []
    with sites.client.events(after=0, transfer=transfer.record.id) as events:
        for event in events:
            if event.type == "task.unfed":
                found.append(str(event.data["why"]))
            if event.type == "transfer.completed":
                break
    return found


def test_a_target_serves_the_other_and_the_source_sends_once(sites: Federation) -> None:
    places = ["b:/data/in/", "c:/data/in/"]
    plan = sites.client.plan("a:/data/free/", places)
    assert [(feed.target, feed.feeder, feed.source) for feed in plan.feeds] in (
        [("c", "b", "a")],
        [("b", "c", "a")],
    )
    (feed,) = plan.feeds
    assert f"to {feed.target}: from {feed.feeder} once it is complete there" in plan.text
    transfer = sites.client.copy("a:/data/free/", places)
    (fed,) = [task for task in transfer.record.tasks if task.fed_by]
    assert (fed.target.site, fed.source.site) == (feed.target, feed.feeder)
    assert fed.wait is not None
    assert (fed.wait.name, f"is served by {feed.feeder}" in fed.wait.text) == ("feed", True)
    assert transfer.wait(60).state == "completed", transfer.record
    assert served_from(transfer) == {feed.feeder: "a", feed.target: feed.feeder}
    assert unfed(sites, transfer) == []
    for site in "bc":
        assert_same(sites["a"].data / "free", sites[site].data / "in")
    wait_until(lambda: left_a(sites["a"], transfer.record) > SIZE, "the source's count")
    assert left_a(sites["a"], transfer.record) < 1.2 * SIZE
    released = decided(sites[feed.feeder], transfer.record, "release")
    assert {line["decision"] for line in released} == {"permit"}
    assert len({task.version_id for task in transfer.record.tasks}) == 1


def test_a_single_file_and_a_folder_by_name_are_served_on_as_well(sites: Federation) -> None:
    file = sites.client.copy("a:/data/free/small", ["b:/data/one", "c:/data/one"])
    folder = sites.client.copy("a:/data/free", ["b:/data/named", "c:/data/named"])
    for transfer in (file, folder):
        assert transfer.wait(60).state == "completed", transfer.record
        assert sorted(served_from(transfer).values()) in (["a", "b"], ["a", "c"])
        assert unfed(sites, transfer) == []
    for site in "bc":
        assert (sites[site].data / "one").read_text() == "free"
        assert_same(sites["a"].data / "free", sites[site].data / "named/free")


def test_what_lay_at_the_feeder_before_goes_nowhere(sites: Federation) -> None:
    for site in "bc":
        (sites[site].data / "used").mkdir()
        (sites[site].data / f"used/private-of-{site}").write_text("not of the source")
    transfer = sites.client.copy("a:/data/free/", ["b:/data/used", "c:/data/used"])
    assert transfer.wait(60).state == "completed", transfer.record
    assert served_from(transfer) == {"b": "a", "c": "a"}
    (why,) = unfed(sites, transfer)
    assert "is not what the transfer brought here" in why
    for site in "bc":
        names = {path.name for path in (sites[site].data / "used").iterdir()}
        assert names == {"sub", "small", f"private-of-{site}"}


@pytest.fixture
def liars(sites: Federation) -> Iterator[None]:
    """Both targets lie when they are to serve the other one."""

    def restart(prefix: list[str]) -> None:
        for site in "bc":
            sites[site].stop()
            sites[site].prefix = prefix
            sites[site].start()

    restart([sys.executable, lying_feeder.__file__])
    try:
        yield
    finally:
        restart([])


@pytest.mark.usefixtures("liars")
def test_a_feeder_that_lies_leaves_nothing(sites: Federation) -> None:
    transfer = sites.client.copy("a:/data/free/", ["b:/data/lies/", "c:/data/lies/"])
    (fed,) = [task for task in transfer.record.tasks if task.fed_by]
    liar, other = sites[fed.source.site], sites[fed.target.site]
    assert transfer.wait(60).state == "completed", transfer.record
    assert (liar.data / "lies" / PLANTED).exists()  # it did try
    assert_same(sites["a"].data / "free", other.data / "lies")
    (why,) = unfed(sites, transfer)
    assert served_from(transfer)[fed.target.site] == "a", why
    assert "it offers what the version does not have" in other.log + liar.log


def test_policy_that_forbids_the_hop_has_the_source_serve(sites: Federation) -> None:
    places = ["b:/data/stays", "c:/data/stays"]
    assert sites.client.plan("a:/data/stays/", places).feeds == []
    transfer = sites.client.copy("a:/data/stays/", places)
    assert transfer.wait(60).state == "completed", transfer.record
    assert served_from(transfer) == {"b": "a", "c": "a"}
    assert [decided(sites[site], transfer.record, "release") for site in "bc"] == [[], []]


def test_a_feeder_that_dies_is_replaced_by_the_source(sites: Federation) -> None:
    random_file(sites["a"].data / "free/sub/more", 2 * SIZE, seed=2)
    transfer = sites.client.copy("a:/data/free/", ["b:/data/killed", "c:/data/killed"])
    (fed,) = [task for task in transfer.record.tasks if task.fed_by]
    feeder = sites[fed.source.site]
    wait_until(lambda: any(task.state == "running" for task in transfer.refresh().tasks), "the first copy")
    feeder.kill()
    wait_until(lambda: served_from(transfer)[fed.target.site] == "a", "the source to take over", 60)
    sites.client.remove_limit(
        "site:a"
    )  # most of it is planned for the dead site until its silence is noticed

    def served() -> bool:
        (task,) = [task for task in transfer.refresh().tasks if task.id == fed.id]
        return task.state == "done"

    wait_until(served, "the other target", 60)
    assert_same(sites["a"].data / "free", sites[fed.target.site].data / "killed")
    feeder.start()
    assert transfer.wait(90).state == "completed", transfer.record
    (why,) = unfed(sites, transfer)
    assert "its own copy was begun and given up" in why
