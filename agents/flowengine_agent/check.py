"""`flowengine-agent check`: everything that would keep the agent from working, each with what to do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from flowengine.api.events import Health
from flowengine.client.access import Access
from flowengine.client.tls import client_context
from flowengine.client.transport import Transport
from flowengine.errors import Exit, FlowError
from flowengine.units import format_bytes, format_count, format_duration
from flowengine_agent.config import SiteConfig, load_config
from flowengine_agent.identity import Identity, load_identity
from flowengine_agent.join_token import read_join_token
from flowengine_agent.roots import OfferedRoot
from flowengine_agent.spawner import check_privileges

__all__ = ["Finding", "run_checks"]

_LITTLE_SPACE_BYTES: Final = 1 << 30
_SOON_S: Final = 86_400
_SKEW_S: Final = 30.0
_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: in a word.
        verdict: "ok", "warning" (it works, and may not for long) or "wrong".
        text: what was found.
        next: what to do; empty where nothing is to be done.
    """

    what: str
    verdict: Literal["ok", "warning", "wrong"]
    text: str
    next: str = ""


def run_checks(config_path: str, *, as_json: bool) -> Exit:
    """Look at everything and print it; `FAILED` where something is wrong."""
    findings = list(_all(config_path))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.verdict:8}{finding.what:13}{finding.text}")
            if finding.next:
                print(f"{'':21}next: {finding.next}")
    return Exit.FAILED if any(finding.verdict == "wrong" for finding in findings) else Exit.DONE


def _all(config_path: str) -> Iterator[Finding]:
    try:
        config = load_config(config_path)
    except FlowError as error:
        yield Finding("config", "wrong", error.message, error.hint)
        return
    yield Finding(
        "config", "ok", f"{config_path}: site {config.site}, {format_count(len(config.roots), 'root')}"
    )
    yield _account(config)
    yield _state(config)
    for folder in config.roots:
        yield from _root(config, folder.name)
    yield _port(config)
    yield _chunker()
    yield from _identity(config)


def _account(config: SiteConfig) -> Finding:
    if config.accounts is not None:
        try:
            check_privileges(config.accounts)
        except FlowError as error:
            return Finding("account", "wrong", error.message, error.hint)
        names = ", ".join(account.name for account in config.accounts.accounts)
        return Finding("account", "ok", f"user id {os.geteuid()}, may act as {names}")
    if os.geteuid() == 0:
        if config.allow_root:
            return Finding(
                "account", "warning", "runs as root, as allow_root says: everybody gets root's rights"
            )
        return Finding("account", "wrong", "would run as root", "run it under an account of its own")
    return Finding("account", "ok", f"user id {os.geteuid()}")


def _state(config: SiteConfig) -> Finding:
    path = config.state
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        if os.stat(path).st_mode & 0o022:
            return Finding("state", "wrong", f"others can write to {path}", f"chmod 700 {path}")
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding("state", "wrong", f"{path}: {error.strerror}", "make it, owned by the agent's account")
    if not os.access(path, os.W_OK | os.X_OK):
        return Finding("state", "wrong", f"{path} cannot be written", "give it to the agent's account")
    if free < _LITTLE_SPACE_BYTES:
        return Finding(
            "state", "warning", f"{path} has {format_bytes(free)} left", "make room: caches and journal grow"
        )
    return Finding("state", "ok", f"{path}, {format_bytes(free)} free")


def _root(config: SiteConfig, name: str) -> Iterator[Finding]:
    folder = next(folder for folder in config.roots if folder.name == name)
    try:
        root = OfferedRoot(folder, as_account=config.accounts is not None)
    except FlowError as error:
        yield Finding("root", "wrong", error.message, error.hint)
        return
    try:
        free = root.described().free_bytes or 0
        text = f"{name} is {folder.path} ({folder.access}), {format_bytes(free)} free"
        if "write" in folder.access and free < _LITTLE_SPACE_BYTES:
            yield Finding("root", "warning", text, "make room, or offer it for reading only")
            return
        yield Finding("root", "ok", text)
    finally:
        root.close()


def _port(config: SiteConfig) -> Finding:
    if config.listen is None:
        return Finding("port", "ok", "none: this site dials out; one of two sites must have a port")
    host, port = config.listen
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            return Finding(
                "port",
                "wrong",
                f"{host}:{port}: {error.strerror}",
                "stop what uses it (the agent itself?), or change listen",
            )
    if host in ("0.0.0.0", "::") and not config.advertise:  # noqa: S104 - what the file says
        return Finding(
            "port",
            "wrong",
            f"{host}:{port} is free, and nobody is told an address",
            'set advertise = ["HOST:PORT"]',
        )
    return Finding("port", "ok", f"{host}:{port} is free")


def _chunker() -> Finding:
    from flowengine.chunking.cutting import is_compiled
    from flowengine.chunking.hashing import best_hash_way

    if not is_compiled():
        return Finding(
            "chunker",
            "wrong",
            "the compiled library is missing: large files are cut many times slower",
            "install a C compiler and then this package again",
        )
    if best_hash_way() < 0:
        return Finding(
            "chunker",
            "wrong",
            "the compiled library hashes otherwise than blake3 does on this processor, and is left alone for that",
            "install this package again with another C compiler, and please report it",
        )
    return Finding("chunker", "ok", "compiled")


def _identity(config: SiteConfig) -> Iterator[Finding]:
    try:
        identity = load_identity(os.path.join(config.state, "identity"))
    except FlowError as error:
        yield Finding("certificate", "wrong", error.message, error.hint)
        return
    try:
        token = read_join_token(config.join_token_file, required=False)
    except FlowError as error:  # the agent would not start, enrolled or not
        yield Finding("join token", "wrong", error.message, error.hint)
        return
    if identity is None:
        yield Finding(
            "certificate",
            "warning",
            "this site has not enrolled yet",
            "start the agent: its join token is there"
            if token
            else f"start the agent with --join-token-file; `flow site token {config.site}` makes a token",
        )
        return
    left = identity.facts.not_after.timestamp() - time.time()
    if identity.site != config.site:
        yield Finding(
            "certificate",
            "wrong",
            f"it is for site {identity.site}, not {config.site}",
            "use another state folder",
        )
    elif left <= 0:
        yield Finding(
            "certificate",
            "wrong",
            f"it ended {identity.facts.not_after:%Y-%m-%d %H:%M} UTC",
            f"join again: remove {identity.folder} and start with a new join token",
        )
    else:
        verdict: Literal["ok", "warning"] = "warning" if left < _SOON_S else "ok"
        hint = (
            "the running agent renews it by itself; does it reach the coordinator?" if left < _SOON_S else ""
        )
        yield Finding("certificate", verdict, f"valid for {format_duration(left)} more", hint)
    for url in config.coordinators or (identity.url,):
        yield from _coordinator(url, identity)


def _coordinator(url: str, identity: Identity) -> Iterator[Finding]:
    import trio

    async def ask() -> Health:
        context = client_context(identity.ca_pem, cert_file=identity.chain_file, key_file=identity.key_file)
        async with Transport(Access(url), context=context, retry_for_s=0) as transport:
            return await transport.request("GET", "/v1/health", Health, timeout_s=_TIMEOUT_S)

    try:
        health = trio.run(ask)
    except FlowError as error:
        yield Finding("coordinator", "wrong", error.message, error.hint)
        return
    yield Finding("coordinator", "ok", f"{url} answers, version {health.version}")
    skew = (datetime.now(UTC) - health.now).total_seconds()
    if abs(skew) > _SKEW_S:
        yield Finding(
            "clock",
            "wrong",
            f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the coordinator's",
            "set both clocks (NTP): certificates and grants are checked by them",
        )
    else:
        yield Finding("clock", "ok", f"{abs(skew):.1f} s from the coordinator's")
