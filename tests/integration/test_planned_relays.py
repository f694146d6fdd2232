"""Real agents over a relay that the plan gives: the routes are used, the leases held, and it is all told."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from sites import Federation, federation
from support import MIB, random_file, wait_until

from flowengine.api.resources import LinkRequest

pytestmark = pytest.mark.slow

MBIT = 1_000_000
LINKS = {("s", "t"): 40 * MBIT, ("s", "r"): 80 * MBIT, ("r", "t"): 80 * MBIT}
SIZE = 90 * MIB


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("federation"), "s", "t") as made:
        made.add("r", lines=["[relay]", "enabled = true"])
        for (source, target), rate in LINKS.items():
            made.client.set_link(source, target, LinkRequest(capacity_bits_per_s=rate))
            made.client.set_limit(f"link:{source}>{target}", rate)  # as the wire would
        random_file(made["s"].data / "large", SIZE)
        yield made


def test_a_transfer_goes_straight_and_over_the_relay(sites: Federation) -> None:
    begun = time.monotonic()
    transfer = sites.client.copy("s:/data/large", "t:/data/in/")
    done = wait_until(lambda: transfer.refresh().ended and transfer.refresh(), "the end", 90)
    seconds = time.monotonic() - begun
    assert done.state == "completed", done
    assert (sites["t"].data / "in/large").read_bytes() == (sites["s"].data / "large").read_bytes()
    # At the rate of the direct link alone it would have taken longer than at both together, whatever else goes on.
    assert seconds > SIZE * 8 / (120 * MBIT) * 0.9
    passed = [int(number) for number in re.findall(r"relay ended.*?bytes=\D*?(\d+)", plain(sites["r"].log))]
    assert sum(passed) > SIZE // 4
    assert list(sites["r"].data.iterdir()) == []


def plain(log: str) -> str:
    """A log without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", log)
