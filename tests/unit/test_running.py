"""What runs is decided anew: how a session is stopped by what became known last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import trio

from flowengine.errors import FlowError, TemporaryError
from flowengine.policy import Engine, load
from flowengine.policy.asking import Judged, Matter, Place, ask
from flowengine.policy.duties import Instant
from flowengine_agent.running import Running, Watch

POLICY = """
[policy]
id = "p"
version = "1"
title = "t"
owner = "o"
applies_to = []
effective = 2020-01-01
review_by = 2099-01-01
[[rule]]
id = "all"
effect = "permit"
on = ["land"]
when = []
why = "w"
"""
ENDED = """
[[rule]]
id = "ended"
effect = "forbid"
on = ["land"]
stop = "{stop}"
when = []
why = "w"
"""
NOW = 1_800_000_000


def judged(*rules: str) -> tuple[Judged, ...]:
    engine = Engine(load({"p.toml": "".join([POLICY, *rules]).encode()}))
    place = Place("b", "0" * 64, ())
    return (ask(engine, "land", place, Matter((), place, "u", ""), NOW),)


@pytest.mark.parametrize(
    ("stop", "mode", "told"),
    [("finish-file", "finish-file", 1), ("drain", "drain", 1), ("stop-now", "", 0), (None, "", 0)],
)
def test_a_mild_stop_that_comes_as_a_session_ends_leaves_what_landed(
    stop: str | None, mode: str, told: int
) -> None:
    """What stops at once is left to the decision at the end, which takes away what had landed."""
    permitted = judged()
    known = permitted if stop is None else judged(ENDED.replace("{stop}", stop))
    stopped: list[str] = []

    async def note(watch: Watch, cause: str) -> None:
        stopped.append(watch.mode)

    async def main() -> Watch:
        running = Running(silent_s=lambda: 0.0, now=lambda: Instant(NOW, NOW), stopped=note)
        with running.watch("t.1", "t", "target", lambda: known, permitted) as watch:
            await running.look_at_end(watch)
            await running.look_at_end(watch)  # once is enough
        return watch

    watch = trio.run(main)
    assert (watch.mode, len(stopped)) == (mode, told)
    assert (watch.error is None) == (mode == "")


class Unwilling:
    """A session that cannot be halted."""

    def halt(self, why: str) -> None:
        raise RuntimeError("dictionary changed size during iteration")


async def until_stopped(
    running: Running, review: Callable[[], tuple[Judged, ...]], permitted: tuple[Judged, ...]
) -> None:
    with running.watch("bad", "t", "target", review, permitted) as watch:
        watch.session = cast(Any, Unwilling())
        running.recheck("bundle")
        await trio.sleep_forever()


def undecidable() -> tuple[Judged, ...]:
    raise RuntimeError("a bug")


@pytest.mark.parametrize("what", ["halting", "deciding"])
def test_a_bug_in_one_stop_cuts_that_session_and_leaves_the_others(what: str) -> None:
    permitted, ended = judged(), judged(ENDED.replace("{stop}", "finish-file"))
    stopped: list[tuple[str, str]] = []
    both = trio.Event()

    async def note(watch: Watch, cause: str) -> None:
        assert watch.error is not None
        assert str(watch.bug) in watch.error.message or what == "halting"
        stopped.append((watch.task, watch.mode))

    async def main() -> None:
        running = Running(silent_s=lambda: 0.0, now=lambda: Instant(NOW, NOW), stopped=note)
        review = {"halting": lambda: ended, "deciding": undecidable}[what]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.run)
            with running.watch("good", "t", "target", lambda: permitted, permitted):
                with pytest.raises(FlowError):
                    await until_stopped(running, review, permitted)
                both.set()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert both.is_set()
    assert stopped == [("bad", "stop-now")]


NIGHT = """
[[rule]]
id = "night"
effect = "require"
on = ["land"]
when = []
then = [{window = {tz = "UTC", from = "20:00", to = "06:00"}}]
why = "At night"
"""


@pytest.mark.parametrize(("early", "late", "runs"), [(-60, -60, True), (-60, 60, False), (60, 60, False)])
def test_a_window_has_to_be_open_whichever_time_it_is(early: int, late: int, runs: bool) -> None:
    six = NOW // 86_400 * 86_400 + 6 * 3600

    async def note(watch: Watch, cause: str) -> None:
        """Nobody is told."""

    async def main() -> str:
        now = Instant(six + early, six + late)
        running = Running(silent_s=lambda: 0.0, now=lambda: now, stopped=note)
        permitted = judged(NIGHT)
        try:
            with running.watch("t.1", "t", "target", lambda: permitted, permitted):
                return ""
        except TemporaryError as error:
            return error.reason

    assert trio.run(main) == ("" if runs else "policy-window")
