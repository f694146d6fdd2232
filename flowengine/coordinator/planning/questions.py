"""What the coordinator asks its planner's process, and how both read and write it: msgpack behind a length."""

from __future__ import annotations

from typing import Final

import msgspec

from flowengine.plan import Demand, Overlay, Plan
from flowengine.plan.pace import Pace, Seen

__all__ = ["LENGTH_BYTES", "Answer", "Failed", "Learn", "Learned", "Question", "Solve", "Solved", "frame"]

LENGTH_BYTES: Final = 8


class Solve(msgspec.Struct, frozen=True, tag="solve"):
    """Make a plan; the arguments of `flowengine.plan.plan`."""

    overlay: Overlay
    demands: tuple[Demand, ...]
    previous: Plan | None
    now_s: float


class Learn(msgspec.Struct, frozen=True, tag="learn"):
    """Learn a pace from each of these."""

    seen: list[list[Seen]]


class Solved(msgspec.Struct, frozen=True, tag="solved"):
    """A plan."""

    plan: Plan


class Learned(msgspec.Struct, frozen=True, tag="learned"):
    """Paces, in the order of the question."""

    paces: list[Pace]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """What is wrong with the question; without words where the planner itself is wrong."""

    message: str = ""
    hint: str = ""


Question = Solve | Learn
Answer = Solved | Learned | Failed


def frame(message: Question | Answer) -> bytes:
    """The message as it travels."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body
