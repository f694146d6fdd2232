"""What runs is decided anew: how a session is stopped by what became known last."""

from __future__ import annotations

import pytest
import trio

from flowengine.policy import Engine, load
from flowengine.policy.asking import Judged, Matter, Place, ask
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
        running = Running(silent_s=lambda: 0.0, now=lambda: NOW, stopped=note)
        with running.watch("t.1", "t", "target", lambda: known, permitted) as watch:
            await running.look_at_end(watch)
            await running.look_at_end(watch)  # once is enough
        return watch

    watch = trio.run(main)
    assert (watch.mode, len(stopped)) == (mode, told)
    assert (watch.error is None) == (mode == "")
