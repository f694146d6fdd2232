"""The coordinator's process: opens the database, serves until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import text

from flowengine.coordinator.actions.people import first_admin
from flowengine.coordinator.authority import Secrets
from flowengine.coordinator.database.events import last_event
from flowengine.coordinator.database.migrate import prepare_apart
from flowengine.coordinator.database.people import list_users
from flowengine.coordinator.database.transactions import (
    PostgresDatabase,
    SqliteDatabase,
    Writing,
    open_database,
)
from flowengine.coordinator.decisions import Decider
from flowengine.coordinator.housekeeping import Housekeeping
from flowengine.coordinator.hub import Hub
from flowengine.coordinator.service import Service, Settings
from flowengine.coordinator.web.calls import log
from flowengine.coordinator.web.handlers import handlers_of
from flowengine.coordinator.web.principals import Principals
from flowengine.coordinator.web.server import HttpServer
from flowengine.errors import LocalError, UsageError
from flowengine.store.secret_files import write_secret
from flowengine.trust.tokens import Login, make_user_token

__all__ = ["Options", "serve"]

TLS_READ_BYTES: Final = 16 << 10
"""What asyncio reads at once from a TLS connection. Each connection keeps a buffer of this size for all its life, 256 KiB by
default, which with a hundred connections is what all else takes; a request fits into one TLS record."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `flow coordinator run` was asked for.

    Attributes:
        names: host names under which the coordinator is reached; the first goes into join tokens.
        policies: directory or bundle to decide by until a bundle is activated.
        policy_keys: whose signatures count on bundles, by role.
    """

    state: str
    secrets: str
    host: str
    port: int
    names: tuple[str, ...] = ()
    lease_s: int = 300
    offline_s: float = 30.0
    agent_valid_s: int = 7 * 86400
    policies: str = ""
    policy_keys: Mapping[str, Sequence[Ed25519PublicKey]] = field(default_factory=dict)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family[0], socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(family[4])
        listener.listen(1024)
    except OSError as error:
        raise LocalError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            hint="choose another address or port with --listen; port 0 takes a free one",
        ) from None
    return listener


def _names(options: Options, host: str) -> list[str]:
    names = [*options.names]
    if host not in ("0.0.0.0", "::"):  # noqa: S104 - what the user asked for
        names.append(host)
    names += ["localhost", "127.0.0.1", "::1", socket.gethostname()]
    return list(dict.fromkeys(name for name in names if name))


async def _open(
    options: Options,
    url: str,
    secrets: Secrets,
    database: SqliteDatabase | PostgresDatabase,
    clock: Callable[[], float],
) -> Service:
    service = Service(
        Settings(url=url, lease_s=options.lease_s, offline_s=options.offline_s),
        database,
        secrets,
        Decider.load(options.policies) if options.policies else Decider(),
        Hub(),
        clock,
        policy_keys=options.policy_keys,
    )
    await database.write(lambda w: _claim_database(w, secrets.authority.fingerprint.hex()))
    stored = await database.read(
        lambda c: int(c.execute(text("SELECT value FROM counters WHERE name = 'epoch'")).scalar_one())
    )
    epoch = secrets.raise_epoch(stored, clock())
    service.epoch = await database.write(lambda w: w.count_up("epoch", 0, epoch))
    service.hub.start(await database.read(last_event))
    database.on_commit = service.hub.committed
    await _first_login(service, options)
    return service


def _claim_database(writing: Writing, fingerprint: str) -> None:
    """Refuse a database that belongs to another federation's CA."""
    insert = text("INSERT INTO settings (name, value) VALUES ('ca_sha256', :value) ON CONFLICT DO NOTHING")
    writing.connection.execute(insert, {"value": fingerprint})
    stored = writing.connection.execute(text("SELECT value FROM settings WHERE name = 'ca_sha256'"))
    if stored.scalar_one() != fingerprint:
        raise UsageError(
            "the secrets are not those of the federation in this database",
            hint="all coordinators of one database share one folder of secrets: copy it, then start again",
        )


async def _first_login(service: Service, options: Options) -> None:
    """Make the first admin; the login string is on disk before the admin is in the database, so it is never lost."""
    if await service.database.read(lambda c: bool(list_users(c, "", 1))):
        return
    token = make_user_token(os.urandom)
    login = Login(service.settings.url, service.secrets.authority.fingerprint, token)
    path = os.path.join(options.secrets, "admin-login")
    write_secret(path, login.format_secret().encode() + b"\n")
    await service.database.write(lambda w: first_admin(w, token))
    log.info("the first admin logs in with: flow login < %s", path)


def serve(options: Options, ready: Callable[[str], None], clock: Callable[[], float]) -> None:
    """Run the coordinator until SIGTERM or SIGINT.

    Args:
        ready: is told the URL once requests are answered.
        clock: Unix seconds.
    """
    SSLProtocol.max_size = TLS_READ_BYTES
    listener = _listen(options.host, options.port)
    secrets = Secrets(options.secrets, clock(), options.agent_valid_s)
    database = open_database(options.state, clock)
    prepare_apart(lambda: open_database(options.state, clock))
    asyncio.run(_serve(options, listener, secrets, database, ready, clock))


async def _serve(
    options: Options,
    listener: socket.socket,
    secrets: Secrets,
    database: SqliteDatabase | PostgresDatabase,
    ready: Callable[[str], None],
    clock: Callable[[], float],
) -> None:
    port = listener.getsockname()[1]
    names = _names(options, options.host)
    shown = f"[{names[0]}]" if ":" in names[0] else names[0]
    url = f"https://{shown}:{port}"
    service = await _open(options, url, secrets, database, clock)
    runner = web.ServerRunner(HttpServer(handlers_of(service), Principals(service)), shutdown_timeout=5.0)
    housekeeping = asyncio.create_task(Housekeeping(service).run())
    try:
        await runner.setup()
        context = service.secrets.server_context(names, clock())
        await web.SockSite(runner, listener, ssl_context=context).start()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        ready(url)
        await stop.wait()
    finally:
        service.stopping = True
        service.hub.wake_all()
        housekeeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await housekeeping
        await runner.cleanup()
        await service.solver.aclose()
        await service.database.aclose()
