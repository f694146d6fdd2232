"""`flow coordinator`."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from flowengine.cli.groups import Group
from flowengine.errors import Exit, LocalError, NotFound, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

__all__ = ["coordinator"]


@click.group(cls=Group)
def coordinator() -> None:
    """Run the service that decides, plans and grants; no dataset byte passes through it."""


def _secrets(state: str, secrets: str | None) -> str:
    if secrets is not None:
        return secrets
    if not state.startswith(("sqlite:///", "postgresql")):
        raise UsageError(
            f"--state {state!r} is no database",
            hint=f"write sqlite:///{state} for a file, or postgresql://USER@HOST/NAME",
        )
    if not state.startswith("sqlite:///"):
        raise UsageError(
            "--secrets is needed with PostgreSQL",
            hint="name a folder of mode 0700; all coordinators of one database share its content",
        )
    folder = os.path.dirname(os.path.abspath(state.removeprefix("sqlite:///")))
    return os.path.join(folder, "secrets")


_state = click.option(
    "--state",
    required=True,
    metavar="URL",
    envvar="FLOW_COORDINATOR_STATE",
    help="Database: sqlite:///PATH (four slashes for an absolute path) or postgresql://USER@HOST/NAME.",
)
_secrets_option = click.option(
    "--secrets",
    type=click.Path(),
    metavar="DIR",
    envvar="FLOW_COORDINATOR_SECRETS",
    help="Folder of the CA's key and other secrets; beside the SQLite file unless given.",
)


@coordinator.command()
@_state
@_secrets_option
@click.option(
    "--listen",
    default="127.0.0.1:7440",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to listen; port 0 takes a free one.",
)
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="DNS",
    help="Host name under which agents and clients reach it; may be repeated, the first goes into tokens.",
)
@click.option("--policies", type=click.Path(), metavar="DIR", help="Residency policies that decide requests.")
@click.option(
    "--policy-owner-key",
    "policy_owner_keys",
    type=click.Path(),
    multiple=True,
    metavar="FILE.pub",
    help="A key that signs policy bundles as policy owner; may be repeated.",
)
@click.option(
    "--security-key",
    "security_keys",
    type=click.Path(),
    multiple=True,
    metavar="FILE.pub",
    help="A key that signs policy bundles as security; may be repeated.",
)
@click.option(
    "--lease-s", type=click.IntRange(1, 3600), default=300, show_default=True, help="Term of a task's lease."
)
@click.option(
    "--offline-s",
    type=click.FloatRange(1, 3600),
    default=30.0,
    show_default=True,
    help="An agent that was silent for so long is offline.",
)
def run(
    state: str,
    secrets: str | None,
    listen: str,
    names: tuple[str, ...],
    policies: str | None,
    policy_owner_keys: tuple[str, ...],
    security_keys: tuple[str, ...],
    lease_s: int,
    offline_s: float,
) -> int:
    """Serve until SIGTERM; prints `ready: URL` when requests are answered.

    At the first start the login string of the first admin is written to SECRETS/admin-login: flow login reads it.
    """
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(
            f"--listen {listen!r} is not HOST:PORT", hint="write it like 0.0.0.0:7440 or [::]:7440"
        )
    import logging
    import time

    gc.disable()  # loading leaves no garbage; to look for it among all that it makes takes 50 ms, now and each time later
    from flowengine.coordinator.run import Options, serve

    gc.freeze()
    gc.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    sys.setswitchinterval(0.0005)  # the loop answers while a thread works on the database
    options = Options(
        state=state,
        secrets=_secrets(state, secrets),
        host=host,
        port=int(port),
        names=names,
        lease_s=lease_s,
        offline_s=offline_s,
        policies=policies or "",
        policy_keys=_role_keys(policy_owner_keys, security_keys),
    )
    serve(options, lambda url: print(f"ready: {url}", flush=True), time.time)
    return Exit.DONE


def _role_keys(
    policy_owner: tuple[str, ...], security: tuple[str, ...]
) -> Mapping[str, Sequence[Ed25519PublicKey]]:
    from flowengine.policy.bundle import read_public_key

    if bool(policy_owner) != bool(security):
        raise UsageError(
            "bundles are signed by two roles: --policy-owner-key and --security-key go together",
            hint="name a key for each",
        )
    found: dict[str, list[Ed25519PublicKey]] = {}
    for role, names in (("policy-owner", policy_owner), ("security", security)):
        for name in names:
            if not os.path.isfile(name):
                raise NotFound(f"there is no key {name}", hint="flow policy bundle keygen makes one")
            with open(name, "rb") as file:
                found.setdefault(role, []).append(read_public_key(file.read(65536)))
    return found


@coordinator.command("login-string")
@_state
@_secrets_option
def login_string(state: str, secrets: str | None) -> int:
    """Print where the first admin's login string is, and how to use it."""
    path = os.path.join(_secrets(state, secrets), "admin-login")
    if not os.path.exists(path):
        raise LocalError(
            f"there is no {path}",
            hint="it is written at the coordinator's first start, by the account that runs it",
        )
    print(path)
    click.echo(f"flow: log in with: flow login < {path}", err=True)
    return Exit.DONE


@coordinator.command()
@_state
@click.argument("file", type=click.Path())
def backup(state: str, file: str) -> int:
    """Copy a SQLite state that may be in use to FILE, in one consistent state.

    The folder of secrets is not in it: keep a copy of that apart. PostgreSQL has pg_dump.
    """
    import contextlib
    import sqlite3

    if not state.startswith("sqlite:///"):
        raise UsageError("this copies SQLite only", hint="use pg_dump for PostgreSQL")
    path = state.removeprefix("sqlite:///")
    if not os.path.isfile(path):
        raise NotFound(f"there is no database {path}", hint="name it as flow coordinator run does")
    part = f"{file}.{os.getpid()}.part"
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        with (
            contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as source,
            contextlib.closing(sqlite3.connect(part)) as target,
        ):
            source.backup(target)
        with open(part, "rb") as copied:
            os.fsync(copied.fileno())
        os.replace(part, file)
    except (OSError, sqlite3.Error) as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise LocalError(f"cannot copy {path} to {file}: {error}", hint="choose another file") from None
    return Exit.DONE
