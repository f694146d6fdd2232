"""`flow serve` over a network: push and pull between two hosts, who is let in, and the served folder as a jail."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from support import (
    MIB,
    Flow,
    assert_same,
    bytes_on,
    random_file,
    rich_tree,
    small_tree,
    snapshot,
    two_namespaces,
)

from flowengine.errors import Denied, Exit, FlowError, exit_code
from flowengine.manifest import Entry
from flowengine.transfer.connect import dial, open_session
from flowengine.transfer.listen import Listener
from flowengine.transfer.passes import TransferSettings
from flowengine.transfer.run import list_remote, pull, stat_remote
from flowengine.transfer.serve import ServedRoot
from flowengine.transfer.session import Session
from flowengine.wire.messages import DirectoryBegin, Message, Offer, Open, Options
from flowengine.wire.ticket import Ticket

pytestmark = pytest.mark.slow


@pytest.fixture
def jail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A served folder with a secret beside it and links that lead to the secret."""
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))
    root = tmp_path / "served"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "file").write_bytes(b"public")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    (root / "link-folder").symlink_to("../outside")
    (root / "link-file").symlink_to("../outside/secret")
    (root / "sub" / "absolute").symlink_to(tmp_path / "outside")
    return root


def served(root: Path, visit: Callable[[Ticket], Awaitable[None]], *, read_only: bool = False) -> list[str]:
    """Let a client visit a served folder; what the server logged."""
    log: list[str] = []

    async def main() -> None:
        listener = Listener("127.0.0.1", 0, log=log.append)
        listener.bind()
        door = ServedRoot(os.fsencode(root), read_only)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, door.handle)
            with trio.fail_after(60):
                await visit(listener.ticket())
            nursery.cancel_scope.cancel()
        os.close(door._fd)

    trio.run(main)
    return log


async def ask(
    ticket: Ticket, role: str, path: bytes, options: Options | None = None
) -> Message | FlowError | None:
    """What the server answers to a request; errors as values."""
    channel = await dial(ticket)
    try:
        await channel.send(Open(role, path, bytes(16), 1, "64KiB", options or Options()))
        return await channel.receive(10)
    except FlowError as error:
        return error
    finally:
        await channel.aclose()


OUTSIDE = [b"..", b"../outside", b"sub/../../outside", b"/etc", b"/", b"link-folder", b"link-folder/secret", b"sub/absolute/secret", b"sub//file", b"./sub", b".flow-staging", b"a\0b"]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("role", ["target", "source", "list"])
def test_no_path_leads_out(jail: Path, path: bytes, role: str) -> None:
    before = snapshot(jail.parent / "outside")
    inside = snapshot(jail)

    async def visit(ticket: Ticket) -> None:
        request = path + b"/" if role == "target" else path
        if path == b"/":
            request = b"//"
        answer = await ask(ticket, role, request)
        if path == b"/":  # slashes alone mean the root itself
            return
        assert isinstance(answer, FlowError), answer
        assert exit_code(answer) in (Exit.DENIED, Exit.INTEGRITY, Exit.NOT_FOUND), repr(answer)
        assert "secret" not in answer.message.replace("absolute/secret", "").replace("folder/secret", "")

    served(jail, visit)
    assert snapshot(jail.parent / "outside") == before
    assert snapshot(jail) == inside


@pytest.mark.parametrize("rename", [b"../outside/secret", b"/etc/passwd", b"..", b".flow-staging", b"a\0"])
@pytest.mark.parametrize("path", [b"sub/file", b"sub"])
def test_a_new_name_leads_nowhere_else(jail: Path, path: bytes, rename: bytes) -> None:
    async def visit(ticket: Ticket) -> None:
        target = jail.parent / "got"
        settings = TransferSettings(use_cache=False, options=Options(rename=rename), retry_for_s=0.0)
        refused: FlowError | None = None
        try:
            await pull(ticket, path, os.fsencode(target), settings)
        except FlowError as error:
            refused = error
        assert refused is None or exit_code(refused) == Exit.INTEGRITY
        for found in target.rglob("*") if target.exists() else ():
            assert not found.is_file() or found.is_symlink() or found.read_bytes() == b"public"

    served(jail, visit)


@pytest.mark.parametrize("item", [b"../outside/secret", b"/../outside", b"sub/../../outside"])
def test_a_list_leads_nowhere_else(jail: Path, item: bytes) -> None:
    async def visit(ticket: Ticket) -> None:
        answer = await ask(ticket, "target", b"", Options(files_from=[item]))
        assert isinstance(answer, FlowError)
        assert exit_code(answer) == Exit.INTEGRITY

    served(jail, visit)


def test_links_are_given_as_links_and_never_followed(jail: Path) -> None:
    async def visit(ticket: Ticket) -> None:
        target = os.fsencode(jail.parent / "got")
        report = await pull(
            ticket, b"", target, TransferSettings(use_cache=False, options=Options(links="inside"))
        )
        assert {path for path, _, _ in report.failures} == {b"link-folder", b"link-file", b"sub/absolute"}
        assert await stat_remote(ticket, b"link-folder/secret") is None
        rows = await list_remote(ticket, b"")
        assert [name for name, *_ in rows] == [b"link-file", b"link-folder", b"sub"]

    served(jail, visit)
    assert not (jail.parent / "got" / "link-file").exists()


def test_read_only_refuses_before_anything_is_made(jail: Path) -> None:
    async def visit(ticket: Ticket) -> None:
        answer = await ask(ticket, "source", b"new/folder")
        assert isinstance(answer, FlowError)
        assert answer.reason == Denied.reason

    served(jail, visit, read_only=True)
    assert not (jail / "new").exists()


def test_a_client_that_pushes_lies_is_refused_and_the_server_lives(jail: Path) -> None:
    async def push(ticket: Ticket, *messages: Message) -> FlowError:
        request = Open("source", b"sub", bytes(16), 1, "64KiB", Options())
        caught: list[FlowError] = []

        async def listen(session: Session, done: trio.CancelScope) -> None:
            try:
                async for _ in session.control.receive(10):
                    pass
            except FlowError as error:
                caught.append(error)
            done.cancel()

        async with open_session(ticket, lambda *_: request) as session, trio.open_nursery() as nursery:
            nursery.start_soon(session.control.run_writer)
            for message in messages:
                session.control.post(message)
            await listen(session, nursery.cancel_scope)
        return caught[0]

    async def visit(ticket: Ticket) -> None:
        for bad in (b"..", b"../../outside/owned", b"/etc/owned", b".flow-staging"):
            error = await push(ticket, DirectoryBegin(b""), Offer([Entry(bad, 0, 0o644, 1, 0)]))
            assert exit_code(error) == Exit.INTEGRITY, error
        error = await push(ticket, Offer([Entry(b"x", 0, 0o644, 1, 0)]))
        assert exit_code(error) == Exit.INTEGRITY
        assert await stat_remote(ticket, b"sub/file") is not None

    served(jail, visit)
    assert sorted(os.listdir(jail.parent / "outside")) == ["secret"]


def test_garbage_instead_of_a_connection_is_dropped_and_logged(jail: Path) -> None:
    async def visit(ticket: Ticket) -> None:
        for garbage in (b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\0\5hello", b"\xf4" * 64, bytes(64), b""):
            stream = await trio.open_tcp_stream(ticket.host, ticket.port)
            await stream.send_all(garbage)
            await stream.send_eof()
            try:
                while await stream.receive_some(1000):
                    pass
            except trio.BrokenResourceError:
                pass
            await stream.aclose()
        assert await stat_remote(ticket, b"sub") is not None

    log = served(jail, visit)
    assert log
    assert not [line for line in log if "internal error" in line]


@pytest.mark.root
@pytest.mark.parametrize("way", ["pull", "push"])
def test_between_two_hosts(tmp_path: Path, way: str) -> None:
    source = rich_tree(tmp_path / "source")
    random_file(source / "large", 20 * MIB, seed=5)
    target = tmp_path / "target"
    target.mkdir()
    with two_namespaces() as (here, there):
        near, far = Flow(tmp_path / "near", here), Flow(tmp_path / "far", there)
        options = ["--links", "keep"]
        root = source if way == "pull" else target
        with far.serving(root, *options, "--advertise", "10.77.0.2", listen="0.0.0.0:0") as ticket:
            url = ticket.format_secret_url()
            words = [url, target] if way == "pull" else [f"{source}/", url]
            done = near("sync", *words, "--json", *options).data
            assert_same(source, target)
            before = bytes_on(here, "veth0") + bytes_on(there, "veth0")
            again = near("sync", *words, "--json", *options).data
            passed = bytes_on(here, "veth0") + bytes_on(there, "veth0") - before
            wrong = url[:-4] + ("AAAA" if url[-4:] != "AAAA" else "BBBB")
            near("ls", wrong, code=4)
            near("ls", url.partition("#")[0], code=2)
            near("ls", url)
    assert done["objects_failed"] == 0
    assert again["objects_unchanged"] == again["objects"]
    assert passed < 0.01 * done["bytes"]


@pytest.mark.root
def test_read_only_between_two_hosts(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    with two_namespaces() as (here, there):
        near, far = Flow(tmp_path / "near", here), Flow(tmp_path / "far", there)
        with far.serving(tmp_path / "served", "--read-only", listen="10.77.0.2:0") as ticket:
            done = near("cp", tmp_path / "file", ticket.format_secret_url(), code=5)
    assert "read-only" in done.stderr
    assert os.listdir(tmp_path / "served") == []


def test_a_request_that_is_too_long_to_follow_the_proof_goes_behind_the_welcome(
    flow: Flow, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    small_tree(source, 1200, size=10)
    names = "\n".join(sorted(str(path.relative_to(source)) for path in source.rglob("f*"))[:1199]) + "\n"
    assert len(names) > 12_000
    listed = names + "".join(f"{number:0100d}\n" for number in range(200))
    with flow.serving(source) as ticket:
        done = flow(
            "cp",
            ticket.format_secret_url(),
            tmp_path / "target",
            "--files-from",
            "-",
            "--json",
            stdin=listed.encode(),
            code=None,
        )
    assert done.data["objects"] == 1199
