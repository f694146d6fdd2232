"""Transfers between two running agents, asked for at a running coordinator, and limits that hold for them meanwhile."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sites import Federation, federation
from support import MIB, AwakeClock, assert_same, random_file, rich_tree, small_tree, wait_until

from flowengine.api.transfers import Endpoint, Transfer, TransferOptions, TransferRequest
from flowengine.errors import FlowError, NotFound

pytestmark = pytest.mark.slow

RATE = 16_000_000
"""2 MB/s: a quarter of a minute for what is large."""
SIZE = 32 * MIB


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Sites a and b with data ports, site c that only dials out."""
    with federation(tmp_path_factory.mktemp("federation"), "a", "b") as made:
        made.add("c", listen="")
        yield made


def move(sites: Federation, source: str, target: str, mode: str = "copy", **options: object) -> Transfer:
    """Ask for one transfer and wait for its end, whatever that is."""
    (from_site, from_path), (to_site, to_path) = source.split(":"), target.split(":")
    transfer = sites.client.submit(
        TransferRequest(
            source=Endpoint(site=from_site, path=from_path),
            targets=[Endpoint(site=to_site, path=to_path)],
            mode=mode,  # type: ignore[arg-type]
            options=TransferOptions(**options),  # type: ignore[arg-type]
        )
    )
    return wait_until(lambda: transfer.refresh() if transfer.refresh().ended else None, "the end", 180)


@pytest.mark.parametrize(("source", "target"), [("a", "b"), ("c", "b"), ("a", "c")])
def test_a_tree_arrives_as_it_was(sites: Federation, source: str, target: str) -> None:
    # Either side may be the one that dials: c has no port.
    tree = rich_tree(sites[source].data / f"rich-{source}-{target}")
    record = move(sites, f"{source}:/data/{tree.name}/", f"{target}:/data/in-{source}-{target}")
    assert record.state == "completed", record.message
    assert_same(tree, sites[target].data / f"in-{source}-{target}")
    (task,) = record.tasks
    assert task.state == "done"
    assert task.version_id
    assert task.counters.objects == task.counters.objects_done


@pytest.mark.parametrize(("source", "target"), [("a", "b"), ("c", "b")])
def test_one_file_gets_the_targets_name(sites: Federation, source: str, target: str) -> None:
    random_file(sites[source].data / "one", 300_000)
    assert move(sites, f"{source}:/data/one", f"{target}:/data/other-name").state == "completed"
    there = sites[target].data
    assert (there / "other-name").read_bytes() == (sites[source].data / "one").read_bytes()
    (there / "folder").mkdir(exist_ok=True)
    assert move(sites, f"{source}:/data/one", f"{target}:/data/folder").state == "completed"
    assert (there / "folder/one").is_file()
    assert move(sites, f"{source}:/data/one", f"{target}:/data/new-folder/").state == "completed"
    assert (there / "new-folder/one").is_file()


@pytest.mark.parametrize(("source", "target"), [("a", "b"), ("c", "b")])
def test_what_landed_is_told_once_each(sites: Federation, source: str, target: str) -> None:
    tree = small_tree(sites[source].data / f"small-{source}", 3000)
    transfer = sites.client.submit(
        TransferRequest(
            source=Endpoint(site=source, path=f"/data/{tree.name}/"),
            targets=[Endpoint(site=target, path=f"/data/landed-{source}")],
        )
    )
    paths = [item.path for item in transfer.landed()]
    assert len(paths) == len(set(paths)) == 3000
    assert set(paths) == {os.path.relpath(path, tree) for path in tree.rglob("f*")}
    assert transfer.wait(60).state == "completed"
    # Nothing has changed, so nothing lands again.
    again = move(sites, f"{source}:/data/{tree.name}/", f"{target}:/data/landed-{source}")
    assert again.tasks[0].counters.objects_unchanged == 3000


@pytest.mark.parametrize("source", ["a", "c"])
def test_a_verification_finds_what_differs(sites: Federation, source: str) -> None:
    # Also where the source dials, as c does: then too it is the target that tells what it found.
    tree = small_tree(sites[source].data / "checked", 20)
    here, there = f"{source}:/data/checked/", f"b:/data/checked-{source}"
    assert move(sites, here, there).state == "completed"
    assert move(sites, here, there, "verify").state == "completed"
    victim = next((sites["b"].data / f"checked-{source}").rglob("f7"))
    stat = victim.stat()
    damaged = bytearray(victim.read_bytes())
    damaged[5] ^= 1
    victim.write_bytes(damaged)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    record = move(sites, here, there, "verify")
    assert record.state == "terminated"
    assert record.tasks[0].reason == "integrity"
    assert "1 of 20 objects" in record.tasks[0].message
    assert victim.read_bytes() == damaged  # a verification changes nothing
    del tree


@pytest.mark.parametrize("source", ["a", "c"])
def test_a_dry_run_looks_and_leaves_nothing(sites: Federation, source: str) -> None:
    small_tree(sites[source].data / "looked-at", 7)
    record = move(sites, f"{source}:/data/looked-at/", f"b:/data/dry-{source}", dry_run=True)
    assert record.state == "completed", record.message
    assert record.tasks[0].counters.objects == 7
    assert record.tasks[0].counters.objects_done == 0
    assert not (sites["b"].data / f"dry-{source}").exists()


def test_deleting_needs_to_be_asked_for(sites: Federation) -> None:
    small_tree(sites["a"].data / "less", 5)
    target = sites["b"].data / "less"
    target.mkdir()
    (target / "extra").write_text("mine")
    assert move(sites, "a:/data/less/", "b:/data/less").state == "completed"
    assert (target / "extra").exists()
    assert move(sites, "a:/data/less/", "b:/data/less", delete=True).state == "completed"
    assert not (target / "extra").exists()


def test_a_missing_path_is_named(sites: Federation) -> None:
    record = move(sites, "a:/data/no-such-thing", "b:/data/")
    assert record.state == "terminated"
    assert record.tasks[0].reason == "not-found"
    assert "/data/no-such-thing" in record.tasks[0].message


@pytest.mark.parametrize("side", ["source", "target"])
def test_links_do_not_lead_out_of_a_root(sites: Federation, side: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (sites["a"].data / "fine").write_text("fine")
    where = sites["a" if side == "source" else "b"].data / f"way-out-{side}"
    where.symlink_to(tmp_path)
    if side == "source":
        record = move(sites, f"a:/data/{where.name}/secret", "b:/data/stolen")
    else:
        record = move(sites, "a:/data/fine", f"b:/data/{where.name}/planted")
    assert record.state == "terminated"
    assert record.tasks[0].reason == "denied"
    assert not (sites["b"].data / "stolen").exists()
    assert not (tmp_path / "planted").exists()


def test_folders_are_shown_within_what_is_offered(sites: Federation) -> None:
    (sites["a"].data / "shown").mkdir()
    (sites["a"].data / "shown/file").write_bytes(b"12345")
    (sites["a"].data / "shown/way-out").symlink_to("/etc")
    entries = {entry.name: entry for entry in sites.client.ls("a:/data/shown").entries}
    assert (entries["file"].kind, entries["file"].size_bytes) == ("file", 5)
    assert entries["way-out"].kind == "link"
    for path in ("/etc", "/data/shown/way-out", "/data/../etc", "/data/none"):
        with pytest.raises(FlowError):
            sites.client.ls(f"a:{path}")


@pytest.mark.parametrize("source", ["a", "c"])
def test_a_full_budget_is_refused_by_name(sites: Federation, source: str) -> None:
    small = sites.add(f"small-{source}", root_lines=['budget = "1MB"'])
    small.data.joinpath("full").write_bytes(bytes(1_000_000))
    assert small.stop() == 0
    small.start()  # what is there is counted at the start
    random_file(sites[source].data / "more", 1000)
    record = move(sites, f"{source}:/data/more", f"{small.site}:/data/more")
    assert record.state == "terminated"
    assert record.tasks[0].reason == "budget"
    assert "internal error" not in small.log
    assert small.stop() == 0


# --- limits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(sites: Federation) -> None:
    """A file at a and at c that takes its time under a limit."""
    for site in "ac":
        random_file(sites[site].data / "large", SIZE)


def heard(sites: Federation) -> None:
    """Wait until all agents have what the coordinator has set: a question comes to them behind it."""
    for site in "abc":
        sites.client.ls(f"{site}:/data")


@pytest.mark.parametrize(
    ("scope", "source"),
    [
        ("link:a>b", "a"),
        ("site:a", "a"),
        ("tenant:default", "a"),
        ("link:c>b", "c"),
        ("read:a:/data", "a"),
        ("write:b:/data", "c"),
    ],
)
def test_a_limit_holds_and_can_be_lifted(sites: Federation, large: None, scope: str, source: str) -> None:
    client = sites.client
    client.set_limit(scope, RATE)
    heard(sites)
    begun = time.monotonic()
    transfer = client.copy(f"{source}:/data/large", f"b:/data/{re.sub('[:/>]', '-', scope)}/")

    def sent() -> int:
        return transfer.refresh().counters.bytes_sent

    wait_until(lambda: sent() > 2 * MIB, "some of it")
    seen, elapsed = sent(), time.monotonic() - begun
    assert seen < SIZE
    # What is counted may be a window ahead of the frames that the rate lets out.
    assert seen <= RATE / 8 * (elapsed + 1) + MIB
    client.remove_limit(scope)
    with AwakeClock() as clock:
        done = wait_until(lambda: transfer.refresh().ended and transfer.refresh(), "the end", 60)
        assert done.state == "completed"
        assert clock.now_s() < 10  # at 2 MB/s the rest would have taken a quarter of a minute


def test_all_that_is_written_to_one_root_shares_its_limit(sites: Federation, large: None) -> None:
    """Two sites send to one root at once; each alone could take all of its rate."""
    client = sites.client
    client.set_limit("write:b:/data", 4 * RATE)
    heard(sites)
    begun = time.monotonic()
    both = [client.copy(f"{site}:/data/large", f"b:/data/shared-{site}/") for site in "ac"]

    def landed() -> int:
        return sum(transfer.refresh().counters.bytes_sent for transfer in both)

    wait_until(lambda: landed() > 12 * MIB, "some of it", 60)
    assert landed() <= 4 * RATE / 8 * (time.monotonic() - begun + 1) + 8 * MIB
    client.remove_limit("write:b:/data")
    assert [transfer.wait(60).state for transfer in both] == ["completed", "completed"]


def test_storage_that_nobody_offers_has_no_limit(sites: Federation) -> None:
    for scope, words in (("read:a:/elsewhere", "offers no root /elsewhere"), ("write:x:/data", "no site x")):
        with pytest.raises(NotFound, match=words):
            sites.client.set_limit(scope, RATE)
