"""`flow serve`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

from flowengine.cli.own_policy import OwnPolicy, Side, policy_options, read_own_policy
from flowengine.errors import Denied, Exit, LocalError, UsageError
from flowengine.machine import usable_processors

if TYPE_CHECKING:
    from flowengine.wire.messages import Options

__all__ = ["serve"]


@click.command()
@click.argument("root", type=click.Path())
@click.option(
    "--listen",
    default="127.0.0.1:0",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to listen; port 0 takes a free one.",
)
@click.option(
    "--advertise",
    metavar="HOST",
    help="Host name or address to print in the ticket, when others reach this host by another one.",
)
@click.option("--read-only", is_flag=True, help="Refuse to receive.")
@click.option(
    "--links",
    type=click.Choice(["inside", "keep"]),
    default="inside",
    show_default=True,
    help="Symbolic links that are received: refuse those that lead out, or keep all.",
)
@click.option(
    "--ticket-file", type=click.Path(), metavar="FILE", help="Write the ticket to FILE (0600) as well."
)
@click.option(
    "--identity",
    type=click.Path(),
    metavar="FILE",
    help="Keep key and secret in FILE (0600, made where missing), so that the ticket outlives a restart.",
)
@click.option(
    "--threads", type=click.IntRange(0, 256), default=0, help="Threads that read one large file; 0 chooses."
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="LABEL",
    help="With --policy: what is given and taken; may be repeated.",
)
@click.option("--purpose", default="", metavar="TEXT", help="With --policy: what it is for.")
@policy_options
def serve(
    root: str,
    listen: str,
    advertise: str | None,
    read_only: bool,
    links: str,
    ticket_file: str | None,
    identity: str | None,
    threads: int,
    labels: tuple[str, ...],
    purpose: str,
    policy: str | None,
    site_facts: str | None,
    contracts: tuple[str, ...],
) -> int:
    """Offer the folder ROOT to other hosts until interrupted.

    Prints one line, the ticket: whoever has it may read ROOT and, without --read-only, write to it. Nothing outside
    ROOT can be reached.
    """
    from flowengine.transfer.identity import Identity
    from flowengine.transfer.listen import Listener
    from flowengine.transfer.serve import ServedRoot

    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(
            f"--listen {listen!r} is not HOST:PORT", hint="write it like 0.0.0.0:7171 or [::]:7171"
        )

    def log(line: str) -> None:
        print(f"flow: {line}", file=sys.stderr, flush=True)

    if policy is None and (labels or purpose):
        raise UsageError("--label and --purpose need --policy", hint="name the folder of the policies")
    own = read_own_policy(policy, labels, contracts, purpose, site_facts)
    served = ServedRoot(
        os.fsencode(root), read_only, links, threads or max(1, usable_processors() // 2), on_event=log
    )
    if own is not None:
        served.permit = _permit(own, os.path.abspath(root))
    listener = Listener(host, int(port), identity=Identity.load(identity) if identity else None, log=log)
    try:
        listener.bind()
    except OSError as error:
        raise LocalError(
            f"cannot listen on {listen}: {error.strerror}",
            hint="choose another address or port; 0 takes a free one",
        ) from None
    if advertise is None and host in ("0.0.0.0", "::"):  # noqa: S104 - what the user asked for
        import socket

        advertise = socket.gethostname()
    ticket = listener.ticket(advertise).format_secret_url()

    def tell() -> None:
        if ticket_file:
            from flowengine.store.secret_files import write_secret

            write_secret(ticket_file, f"{ticket}\n".encode())
        print(ticket, flush=True)

    return _serve_until_signal(listener, served, tell)


_ENDS: Final[dict[str, tuple[Side, Side]]] = {"release": ("here", "there"), "land": ("there", "here")}


def _permit(own: OwnPolicy, root: str) -> Callable[[str, bytes, Options], None]:
    """What a served folder asks before it gives or takes; a look is part of either.

    What the client states of the data counts beside what this server was told of them: each has to permit.
    """

    def permit(use: str, path: bytes, options: Options) -> None:
        at = os.path.join(root, os.fsdecode(path))
        if use in ("release", "land"):
            source, target = _ENDS[use]
            own.check(source, target, at)
            if options.labels or options.contracts or options.purpose:
                own.stated(options.labels, options.contracts, options.purpose).check(source, target, at)
        else:
            try:
                own.check("there", "here", at)
            except Denied as taking:
                try:
                    own.check("here", "there", at)
                except Denied as giving:
                    both = f"{taking.message} And to give it: {giving.message}"
                    raise Denied(both, hint=giving.hint, reason=giving.reason) from None

    return permit


def _serve_until_signal(listener: Any, served: Any, tell: Callable[[], None]) -> int:
    import trio

    async def main() -> None:
        with contextlib.ExitStack() as listening:
            signals = listening.enter_context(trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM))
            tell()  # whoever reads it may end this at once
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listener.serve, served.handle)
                async for _ in signals:
                    break
                listening.close()  # the next one ends this, whatever hangs
                nursery.cancel_scope.cancel()

    trio.run(main)
    return Exit.DONE
