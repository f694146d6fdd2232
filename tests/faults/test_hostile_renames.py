"""A target that asked for one file under one name lets the source touch nothing else beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowengine.wire.messages import DirectoryBegin, DirectoryEnd, Message, ObjectBegin, Offer, Options
from tests.faults.test_hostile_source import FakeSource, assert_refused, attack, small, target

__all__ = ["target"]  # the fixture

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "messages",
    [
        [Offer([small(b"other")])],
        [Offer([small(b"file"), small(b"other")])],
        [ObjectBegin(small(b"other", bytes(1 << 20), chunks=b""))],
        [DirectoryBegin(b"file"), Offer([small(b"other")])],
        [DirectoryBegin(b"folder")],
        [DirectoryEnd(0o777, 0)],
    ],
)
def test_only_the_one_name_may_be_offered(target: Path, messages: list[Message]) -> None:
    target.mkdir(mode=0o755)

    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), *messages)
        await fake.heard.park()

    ended = attack(target, act, options=Options(links="inside", rename=b"file", delete=True))
    assert_refused(ended, target)
    assert target.stat().st_mode & 0o777 == 0o755
    assert not (target / "other").exists()
