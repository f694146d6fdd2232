"""The planner's process: answers questions on its standard input until that ends, one after another.

It is started by `Solver` with `python -m flowengine.coordinator.planning.worker`, holds nothing between two questions,
and touches neither files nor network.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import BinaryIO

import msgspec

from flowengine.coordinator.planning.questions import (
    LENGTH_BYTES,
    Answer,
    Failed,
    Learned,
    Question,
    Solve,
    Solved,
    frame,
)
from flowengine.errors import UsageError
from flowengine.plan import plan
from flowengine.plan.learning import learn

__all__ = ["main"]


def main() -> None:
    """Until the coordinator closes its end, as it does when it stops or is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the coordinator too, which ends this
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is for the log
    serve(sys.stdin.buffer, answers)


def serve(questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer everything that comes."""
    decoder = msgspec.msgpack.Decoder(Question)
    while len(head := questions.read(LENGTH_BYTES)) == LENGTH_BYTES:
        question: Question = decoder.decode(questions.read(int.from_bytes(head, "big")))
        answers.write(frame(_answer(question)))
        answers.flush()


def _answer(question: Question) -> Answer:
    try:
        if isinstance(question, Solve):
            return Solved(plan(question.overlay, question.demands, question.previous, question.now_s))
        return Learned([learn(seen) for seen in question.seen])
    except UsageError as error:
        return Failed(error.message, error.hint or "")
    except Exception:
        traceback.print_exc()  # goes to the coordinator's log
        return Failed()


if __name__ == "__main__":
    main()
