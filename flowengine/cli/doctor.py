"""`flow doctor`: what would keep transfers from working well, and what to do about it."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal

import click

from flowengine.cli.federation import json_option, show_time
from flowengine.errors import Exit, FlowError
from flowengine.units import format_bytes, format_duration

if TYPE_CHECKING:
    from flowengine.api.sites import Site
    from flowengine.client import Client
    from flowengine.client.access import Access

__all__ = ["Finding", "doctor", "look_at_accounts", "look_here"]

_LEAST_FREE_BYTES: Final = 1 << 30
_LEAST_FILES: Final = 4096
_SKEW_WARNS_S: Final = 5.0
_SKEW_FAILS_S: Final = 60.0
"""Grants are believed this far from their time."""
_EXPIRES_SOON_S: Final = 2 * 86400.0
_PORT_TIMEOUT_S: Final = 3.0
_AGENT_CONFIG: Final = "/etc/flowengine-agent/site.toml"
_MAY_CHANGE_ACCOUNT: Final = 1 << 6 | 1 << 7  # CAP_SETGID, CAP_SETUID


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    verdict: Literal["ok", "warning", "failed"]
    text: str
    todo: str = ""


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Look at this machine and, where one is known, at the coordinator and its sites.

    Clock, ports, certificates, disk, versions, what is compiled. Exit code 1 when something is broken; warnings
    leave it 0.
    """
    from flowengine.cli.output import print_json

    findings = [*look_here(), *_look_there()]
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        marks = {"ok": "ok     ", "warning": "WARNING", "failed": "FAILED "}
        for finding in findings:
            print(f"{marks[finding.verdict]}  {finding.check}: {finding.text}")
            if finding.todo:
                print(f"         next: {finding.todo}")
    return Exit.FAILED if any(finding.verdict == "failed" for finding in findings) else Exit.DONE


def look_here() -> Iterator[Finding]:
    """What can be seen without a coordinator."""
    import flowengine

    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(
        "versions", "ok", f"flowengine {flowengine.__version__}, Python {version}, {ssl.OPENSSL_VERSION}"
    )
    if not ssl.HAS_TLSv1_3:
        yield Finding(
            "tls", "failed", "this Python speaks no TLS 1.3", "use a Python with OpenSSL 1.1.1 or newer"
        )
    yield _chunker()
    yield _small_files()
    yield _cipher()
    yield _open_files()
    yield from _disks()
    yield from look_at_accounts()


def _chunker() -> Finding:
    from flowengine.chunking.cutting import is_compiled
    from flowengine.chunking.hashing import best_hash_way

    if not is_compiled():
        return Finding(
            "chunker",
            "warning",
            "the compiled library is missing: large files are cut many times slower",
            "install a C compiler and then this package again",
        )
    if best_hash_way() < 0:
        return Finding(
            "chunker",
            "warning",
            "the compiled library hashes otherwise than blake3 does on this processor, and is left alone for that",
            "install this package again with another C compiler, and please report it",
        )
    return Finding("chunker", "ok", "compiled")


def _small_files() -> Finding:
    from flowengine.store.many import is_compiled

    if not is_compiled():
        return Finding(
            "small files",
            "warning",
            "system calls are made one by one: many small files take longer",
            "install a C compiler and then this package again",
        )
    return Finding("small files", "ok", "compiled")


def _cipher() -> Finding:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    aead, data = AESGCM(bytes(32)), bytes(1 << 20)
    sealed = bytearray(len(data) + 16)  # as a lane has it: memory that is used again and again
    aead.encrypt_into(bytes(12), data, None, sealed)
    began = time.perf_counter()
    for nonce in range(4):
        aead.encrypt_into(nonce.to_bytes(12, "big"), data, None, sealed)
    rate = 4 * len(data) / max(time.perf_counter() - began, 1e-9)
    if rate < 300e6:
        return Finding(
            "cipher",
            "warning",
            f"AES-GCM runs at {rate / 1e6:.0f} MB/s",
            "sealing may bound transfers: this processor has no AES instructions, or hides them",
        )
    return Finding("cipher", "ok", f"AES-GCM {rate / 1e9:.1f} GB/s in one thread")


def look_at_accounts(config: str = _AGENT_CONFIG, proc: str = "/proc") -> Iterator[Finding]:
    """Whether an agent of this host that maps accounts can act as them: whether its spawner runs, with its two rights.

    Args:
        config: the agent's; nothing is told where it maps no accounts, or cannot be read.
        proc: what the kernel tells of processes.
    """
    import tomllib

    try:
        with open(config, "rb") as file:
            mapped = tomllib.load(file).get("accounts")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return
    if not isinstance(mapped, dict):
        return
    for pid in filter(str.isdigit, os.listdir(proc)):
        with contextlib.suppress(OSError):
            status = dict(line.partition(":")[::2] for line in _lines(f"{proc}/{pid}/status"))
            able = int(status.get("CapEff", "0"), 16) & _MAY_CHANGE_ACCOUNT == _MAY_CHANGE_ACCOUNT
            if status.get("Name", "").strip() == "flow-spawner" and able:
                yield Finding("accounts", "ok", "the agent of this host acts as its requesters' accounts")
                return
    yield Finding(
        "accounts",
        "warning",
        f"{config} maps accounts, and nothing runs here that may act as them",
        "flowengine-agent check and the agent's log tell why; it needs CAP_SETUID and CAP_SETGID: "
        "AmbientCapabilities= in the unit, as in agents/deploy/accounts.conf",
    )


def _lines(path: str) -> list[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().splitlines()


def _open_files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _LEAST_FILES:
        return Finding(
            "open files",
            "warning",
            f"at most {soft} at a time",
            f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}, or LimitNOFILE= in the unit",
        )
    return Finding("open files", "ok", f"at most {soft} at a time")


def _disks() -> Iterator[Finding]:
    from flowengine.client.access import config_dir
    from flowengine.store.scan_cache import state_directory

    try:
        places = {"state folder": os.fsdecode(state_directory()), "config folder": str(config_dir())}
    except FlowError as error:
        yield Finding("state folder", "failed", error.message, error.hint)
        return
    for what, path in places.items():
        there = path
        while not os.path.exists(there):
            there = os.path.dirname(there) or "/"
        found = os.statvfs(there)
        free = found.f_bavail * found.f_frsize
        if not os.access(there, os.W_OK):
            yield Finding(
                what,
                "failed",
                f"{path} cannot be written",
                "give this account the right, or set FLOW_STATE_DIR and FLOW_CONFIG_DIR",
            )
        elif free < _LEAST_FREE_BYTES:
            yield Finding(
                what,
                "warning",
                f"{path} has {format_bytes(free)} free",
                "make room: caches of what was read live there",
            )
        else:
            yield Finding(what, "ok", f"{path}, {format_bytes(free)} free")


# --- the coordinator and its sites ---


def _look_there() -> Iterator[Finding]:
    from flowengine.client import Client
    from flowengine.client.access import find_access

    try:
        access = find_access()
    except FlowError as error:
        severity: Literal["ok", "failed"] = (
            "ok" if error.reason == "authentication" and "no coordinator" in error.message else "failed"
        )
        yield Finding("coordinator", severity, error.message, error.hint)
        return
    with Client(access, retry_for_s=0) as client:
        try:
            began = datetime.now(UTC)
            health = client.health()
            took_s = (datetime.now(UTC) - began).total_seconds()
        except FlowError as error:
            yield Finding("coordinator", "failed", error.message, error.hint)
            return
        yield _version("coordinator", f"{access.url} answers in {took_s * 1e3:.0f} ms", health.version)
        yield _clock(health.now, began, took_s)
        yield from _certificate(access)
        try:
            me = client.me()
            yield Finding("login", "ok", f"{me.name}, {me.role}, tenant {me.tenant}")
            yield from _sites(client)
        except FlowError as error:
            yield Finding("login", "failed", error.message, error.hint or "flow login")


def _version(check: str, text: str, theirs: str) -> Finding:
    import flowengine

    if theirs.split(".")[:2] != flowengine.__version__.split(".")[:2]:
        return Finding(
            check,
            "warning",
            f"{text}, version {theirs} and not {flowengine.__version__}",
            "bring both to one version",
        )
    return Finding(check, "ok", f"{text}, version {theirs}")


def _clock(theirs: datetime, began: datetime, took_s: float) -> Finding:
    skew_s = (theirs - began).total_seconds() - took_s / 2
    text = f"{abs(skew_s):.1f} s {'behind' if skew_s > 0 else 'ahead of'} the coordinator's"
    if abs(skew_s) > _SKEW_FAILS_S:
        return Finding(
            "clock",
            "failed",
            text,
            "set the clock (timedatectl set-ntp true): grants and certificates are not believed",
        )
    if abs(skew_s) > _SKEW_WARNS_S:
        return Finding(
            "clock", "warning", text, "let a time service keep both clocks (timedatectl set-ntp true)"
        )
    return Finding("clock", "ok", f"within {max(abs(skew_s), took_s / 2):.2f} s of the coordinator's")


def _certificate(access: Access) -> Iterator[Finding]:
    """How long the coordinator's certificate and the CA are good."""
    from urllib.parse import urlsplit

    from cryptography import x509

    from flowengine.client.tls import client_context

    where = urlsplit(access.url)
    try:
        with (
            socket.create_connection(
                (where.hostname or "", where.port or 443), timeout=_PORT_TIMEOUT_S
            ) as plain,
            client_context(access.ca_pem).wrap_socket(plain, server_hostname=where.hostname) as tls,
        ):
            served = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError) as error:
        yield Finding("certificate", "failed", f"{access.url}: {error}", "flow login with a new login string")
        return
    yield _expiry(
        "certificate",
        "the coordinator's",
        served.not_valid_after_utc,
        "restart the coordinator: it makes a new one",
    )
    if access.ca_pem:
        ca = x509.load_pem_x509_certificate(access.ca_pem.encode())
        yield _expiry(
            "CA",
            "the federation's",
            ca.not_valid_after_utc,
            "the operator must renew the CA; then log in again",
        )


def _expiry(check: str, whose: str, until: datetime, todo: str) -> Finding:
    left_s = (until - datetime.now(UTC)).total_seconds()
    if left_s <= 0:
        return Finding(check, "failed", f"{whose} ended {show_time(until)}", todo)
    if left_s < _EXPIRES_SOON_S:
        return Finding(check, "warning", f"{whose} ends in {format_duration(left_s)}", todo)
    return Finding(check, "ok", f"{whose} is good until {show_time(until)}")


def _sites(client: Client) -> Iterator[Finding]:
    for site in client.sites():
        check = f"site {site.name}"
        if site.state == "expected":
            yield Finding(
                check,
                "warning",
                "its agent never came",
                f"flow site token {site.name}, and run the agent there",
            )
        elif site.state in ("offline", "revoked"):
            verdict: Literal["ok", "warning"] = "ok" if site.state == "revoked" else "warning"
            todo = (
                ""
                if site.state == "revoked"
                else "look at the agent there: flowengine-agent check, journalctl -u flowengine-agent"
            )
            yield Finding(check, verdict, f"{site.state} since {show_time(site.since)}", todo)
        else:
            yield _version(check, site.state, site.software.removeprefix("flowengine").strip(" /") or "?")
            yield from _site_details(check, site)


def _site_details(check: str, site: Site) -> Iterator[Finding]:
    if site.certificate is not None:
        found = _expiry(
            check,
            "its certificate",
            site.certificate.not_after,
            "its agent should have renewed it: look at its log",
        )
        if found.verdict != "ok":
            yield found
    for root in site.roots:
        if root.free_bytes is not None and root.free_bytes < _LEAST_FREE_BYTES:
            yield Finding(
                check, "warning", f"{root.name} has {format_bytes(root.free_bytes)} free", "make room there"
            )
    for address in site.addresses:
        host, _, port = address.rpartition(":")
        try:
            with contextlib.closing(
                socket.create_connection((host.strip("[]"), int(port)), timeout=_PORT_TIMEOUT_S)
            ):
                yield Finding(check, "ok", f"its data port {address} can be reached from here")
        except (OSError, ValueError) as error:
            yield Finding(
                check,
                "warning",
                f"its data port {address} cannot be reached from here: {error}",
                "other sites need to reach it, or to be reached by it: check firewall and `advertise`",
            )
