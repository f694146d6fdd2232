"""Bandwidth limits of the coordinator, held by the agents, and changed while a transfer runs."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from sites import Federation, federation
from support import MIB, AwakeClock, random_file, wait_until

from flowengine.errors import NotFound

pytestmark = pytest.mark.slow

RATE = 16_000_000
"""2 MB/s: a quarter of a minute for what is copied."""
SIZE = 32 * MIB


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("federation"), "a", "b") as made:
        random_file(made["a"].data / "large", SIZE)
        made.add("c", listen="")
        random_file(made["c"].data / "large", SIZE)
        yield made


def heard(sites: Federation) -> None:
    """Wait until all agents have what the coordinator has set: a question comes to them behind it."""
    for site in sites.sites:
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
def test_a_limit_holds_and_can_be_lifted(sites: Federation, scope: str, source: str) -> None:
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


def test_all_that_is_written_to_one_root_shares_its_limit(sites: Federation) -> None:
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
