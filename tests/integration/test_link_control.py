"""Over an emulated long link: few round trips, streams that are added, a pace that is found, what is remembered."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import MIB, Flow, assert_same, random_file, wait_until

from flowengine.transfer.streams import stream_count
from perf.link import ADDRESSES, Link, LinkSpec

pytestmark = [pytest.mark.root, pytest.mark.alone, pytest.mark.slow]

FIRST_STREAMS = stream_count(0.06, 0, congestion="reno")


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link("flow-control")
    made.down()
    yield made
    made.down()


def transfer(link: Link, tmp_path: Path, way: str, *options: str) -> dict[str, object]:
    """Move tmp_path/source to tmp_path/target between the link's ends; what --json said."""
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir(exist_ok=True)
    here = Flow(tmp_path / "state-a", prefix=link.command("a"))
    there = Flow(tmp_path / "state-b", prefix=link.command("b"))
    with there.serving(source if way == "pull" else target, listen=f"{ADDRESSES['b']}:7171") as ticket:
        url = ticket.format_secret_url()
        words = [url, target] if way == "pull" else [f"{source}/", url]
        done = here("sync", *words, "--json", *options)
        # The receipt goes before the last of the tidying up; a server that is stopped at once would leave it.
        wait_until(lambda: not (target / ".flow-staging").exists(), "the staging folder to go")
    assert_same(source, target)
    return done.data


@pytest.mark.parametrize("way", ["pull", "push"])
def test_a_lossy_link_gets_more_streams_and_says_why(link: Link, tmp_path: Path, way: str) -> None:
    (tmp_path / "source").mkdir()
    with link.raised(LinkSpec.symmetric(0.06, 300_000_000, loss=0.004, congestion="reno")):
        # Where others keep the processors busy, the network is not the limit: then a second or third look decides.
        for attempt in range(3):
            random_file(tmp_path / "source" / "large", 64 * MIB, seed=attempt)
            (tmp_path / "state-a" / "links.json").unlink(missing_ok=True)
            (tmp_path / "state-b" / "links.json").unlink(missing_ok=True)
            report = transfer(link, tmp_path, way)
            assert isinstance(report["streams"], int)
            if report["streams"] > FIRST_STREAMS:
                break
    changes = report["link_changes"]
    assert isinstance(changes, list)
    assert changes
    # An emulated link on a busy machine delays as a full one does; then it is right not to add any, and to say so.
    limited = any("the network is the limit" in line for line in changes)
    assert limited == (report["streams"] > FIRST_STREAMS), changes


def test_a_number_of_streams_that_was_asked_for_stays(link: Link, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    random_file(tmp_path / "source" / "large", 32 * MIB)
    with link.raised(LinkSpec.symmetric(0.06, 300_000_000, loss=0.004, congestion="reno")):
        report = transfer(link, tmp_path, "pull", "--streams", "3")
    assert report["streams"] == 3


def test_what_a_link_carries_is_remembered_by_the_sender(link: Link, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    random_file(tmp_path / "source" / "large", 96 * MIB)
    with link.raised(LinkSpec.symmetric(0.04, 400_000_000)):
        for number in itertools.count():
            transfer(link, tmp_path, "push")
            known = json.loads((tmp_path / "state-a" / "links.json").read_text())[ADDRESSES["b"]]
            assert known["bytes_per_s"] < 1.2 * 50e6
            if known["bytes_per_s"] > 0.2 * 50e6:
                break
            assert number < 3, f"{known} after four looks, on a machine that may have been busy elsewhere"
            random_file(tmp_path / "source" / "large", 96 * MIB, seed=2 + number)
            (tmp_path / "state-a" / "links.json").unlink()
        random_file(tmp_path / "source" / "second", 16 * MIB, seed=1)
        again = transfer(link, tmp_path, "push")
    assert "an earlier transfer saw" in again["link_changes"][0]  # type: ignore[index]


def test_a_small_file_takes_few_round_trips(link: Link, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    # Four until the session is there; eight data connections dialled in turn alone would make it fourteen. A machine that
    # stands still takes its own time, and cannot save any.
    took = []
    with link.raised(LinkSpec.symmetric(0.5, 100_000_000)):
        while not took or (took[-1] >= 12 * 0.5 and len(took) < 4):
            random_file(tmp_path / "source" / "small", 50_000, seed=len(took))
            seconds = transfer(link, tmp_path, "push")["seconds"]
            assert isinstance(seconds, float)
            assert seconds > 6 * 0.5
            took.append(seconds)
    assert took[-1] < 12 * 0.5, took
