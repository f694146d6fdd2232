"""A source against targets that ask for what they may not: it ends the session, and its memory stays bounded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from support import MIB, random_file

from flowengine.chunking import CHUNK_BYTES
from flowengine.errors import Exit, FlowError, TemporaryError, exit_code
from flowengine.store.selection import Root, Selection
from flowengine.transfer import control
from flowengine.transfer.channel import session_errors
from flowengine.transfer.listen import Incoming, Listener
from flowengine.transfer.passes import TransferSettings
from flowengine.transfer.run import push
from flowengine.transfer.session import Session
from flowengine.wire.messages import (
    WANT_ALL,
    WANT_NONE,
    WANT_SOME,
    EncodedOffer,
    Finer,
    Message,
    ObjectRun,
    Options,
    Progress,
    Want,
)

Answer = Callable[[Message], list[Want]]


def attacked(
    source: Path,
    answer: Answer,
    beside: Callable[[Session, Message], None] = lambda session, message: None,
    *,
    dry_run: bool = False,
) -> FlowError:
    """Let a fake target answer the offers of a push; how the push ended.

    Args:
        beside: called with each message before it is answered.
    """

    async def main() -> FlowError:
        listener = Listener("127.0.0.1", 0)
        listener.bind()

        async def handle(incoming: Incoming) -> None:
            async with incoming.accept(incoming.request.options) as session:
                await session.streams.next()
                try:
                    async with (
                        session_errors(incoming.channel),
                        trio.open_nursery() as nursery,
                        contextlib.aclosing(session.control.receive()) as batches,
                    ):
                        nursery.start_soon(session.control.run_writer)
                        async for batch in batches:
                            for message in batch:
                                beside(session, message)
                                if isinstance(message, EncodedOffer | ObjectRun | Finer):
                                    for want in answer(message):
                                        session.control.post(want)
                finally:
                    session.streams.close()

        settings = TransferSettings(
            use_cache=False, streams=1, retry_for_s=0.0, stall_s=20.0, options=Options(dry_run=dry_run)
        )
        selection = Selection([Root(os.fsencode(source), b"")])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, handle)
            with trio.fail_after(50), pytest.raises(FlowError) as raised:
                await push(selection, listener.ticket(), b"", settings)
            nursery.cancel_scope.cancel()
        return raised.value

    return trio.run(main)


def test_a_session_that_only_looks_carries_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found open: a target got everything by a dry run, which nobody counts."""
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))
    random_file(tmp_path / "source" / "file", 5000)
    error = attacked(tmp_path / "source", lambda message: [Want(WANT_ALL, b"")], dry_run=True)
    assert exit_code(error) == Exit.INTEGRITY
    assert "only looks" in error.message


def _finer_and_wanted(message: Message) -> list[Want]:
    return [Want(WANT_SOME, b"\x01", b"\x01")]


def _finer_and_all(message: Message) -> list[Want]:
    return [Want(WANT_ALL, b"", b"\x01")]


def _finer_of_nothing(message: Message) -> list[Want]:
    return [Want(WANT_NONE, b"", b"\xff" * 1000)]


def _finer_of_the_fine(message: Message) -> list[Want]:
    return [Want(WANT_NONE, b"", b"\x01")]


@pytest.mark.parametrize("answer", [_finer_and_wanted, _finer_and_all, _finer_of_nothing, _finer_of_the_fine])
def test_a_wish_for_a_finer_cut_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))
    random_file(tmp_path / "source" / "file", 5000)
    error = attacked(tmp_path / "source", answer)
    assert exit_code(error) == Exit.INTEGRITY
    assert "finer" in error.message


def test_more_than_may_be_open_of_finer_cuts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))
    for number in range(10):
        random_file(tmp_path / "source" / f"{number}", 7 * MIB, seed=number)
    runs: list[ObjectRun] = []

    def answer(message: Message) -> list[Want]:
        assert isinstance(message, ObjectRun)
        runs.append(message)
        if len(runs) < 10:
            return []
        counts = [len(run.chunks) // CHUNK_BYTES for run in runs]
        return [
            Want(WANT_NONE, b"", ((1 << count) - 1).to_bytes((count + 7) // 8, "little")) for count in counts
        ]

    error = attacked(tmp_path / "source", answer)
    assert exit_code(error) == Exit.INTEGRITY
    assert "answers none" in error.message


def test_a_target_that_ends_its_connections_is_heard_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk shows as broken data connections first; what the target says of it afterwards is what counts."""
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(control, "LAST_WORD_S", 40.0)  # however slow this machine is
    random_file(tmp_path / "source" / "file", 8 * MIB)
    ended: list[bool] = []

    def beside(session: Session, message: Message) -> None:
        if isinstance(message, ObjectRun) and not ended:
            session.streams.shut()
            ended.append(True)
        elif isinstance(message, Progress) and ended:  # by now the source has met the broken connections
            raise TemporaryError("no room left", reason="disk-full")

    error = attacked(tmp_path / "source", lambda message: [Want(WANT_ALL, b"", b"")], beside)
    assert ended
    assert (error.reason, error.message) == ("disk-full", "no room left")
