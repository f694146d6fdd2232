"""An agent that lies: `python lying_feeder.py COMMAND…` runs the agent's COMMAND, and what it passes on is not the version.

It is the real agent in a process of its own but for one thing: when it has shown the manifest of what a transfer brought
there, it plants a file, changes another one, and gives whatever it finds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Final

from flowengine.store.scan_events import Event
from flowengine.store.selection import Selection
from flowengine.transfer.session import Session
from flowengine_agent import hands
from flowengine_agent.main import main

__all__ = ["CHANGED", "PLANTED"]

PLANTED: Final = "planted-by-the-feeder"
CHANGED: Final = "small"

_honest = hands._only_version


def _admit_all(event: Event) -> None:
    """Whatever it is, it goes."""


def _lying(
    session: Session, selection: Selection, how: hands.Giving, stack: ExitStack
) -> tuple[Any, Iterator[bytes]]:
    _, shown = _honest(session, selection, how, stack)
    for name in (PLANTED, CHANGED):
        with open(os.path.join(os.fsdecode(selection.roots[0].path), name), "wb") as file:
            file.write(b"of the feeder")
    return _admit_all, shown


if __name__ == "__main__":
    hands._only_version = _lying  # type: ignore[assignment]
    main(sys.argv[4:])  # after the command's interpreter, -m and module
