"""Locations on the command line: local paths, tickets, and tickets whose secret comes from a file or the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

import msgspec

from flowengine.errors import NotFound, UsageError

if TYPE_CHECKING:
    from flowengine.wire.ticket import Ticket

__all__ = ["Local", "Location", "Remote", "all_at_sites", "parse_location", "parse_locations"]

_NEARLY = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?:(?!/)")
_SITE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?:/(?!/)")


class Local(msgspec.Struct, frozen=True):
    """A path of this machine, as typed."""

    path: bytes


class Remote(msgspec.Struct, frozen=True):
    """A path below what a ticket serves; a trailing slash is kept."""

    ticket: Ticket
    path: bytes


Location = Local | Remote


def all_at_sites(texts: Sequence[str]) -> bool:
    """Whether the arguments name places at sites, `SITE:/PATH`. A local path that looks so is written `./SITE:/PATH`.

    Raises:
        UsageError: some do and some do not.
    """
    at_sites = [_SITE.match(text) is not None for text in texts]
    if any(at_sites) and not all(at_sites):
        other = texts[at_sites.index(False)]
        if _NEARLY.match(other):
            raise UsageError(
                f"{other!r} names no place at a site: its path does not begin with a slash",
                hint=f"write it as SITE:/PATH, or ./{other} for a file of that name here",
            )
        raise UsageError(
            f"{other!r} is not at a site, {texts[at_sites.index(True)]!r} is: bytes go from site to site, not through here",
            hint="run an agent where the data is (flow site token), or flow serve and a ticket between two hosts",
        )
    return all(at_sites)


def parse_location(text: str, ticket_file: str | None) -> Location:
    """What one argument means; as `parse_locations`."""
    return parse_locations([text], ticket_file)[0]


def parse_locations(texts: list[str], ticket_file: str | None) -> list[Location]:
    """What the arguments of one command mean. A ticket that is at hand is read once: a pipe gives it once.

    A ticket may stand in the argument (`flow://HOST:PORT/path#SECRET`), or, so that it shows in no process list, in
    the file that `--ticket-file` or $FLOW_TICKET_FILE names, or in $FLOW_TICKET; the argument is then `flow:///path`
    or `flow://HOST:PORT/path`.

    Raises:
        UsageError: one of them is neither.
        NotFound: the ticket file does not exist.
    """
    at_hand = cache(partial(_stored_ticket, ticket_file))
    return [_parse(text, at_hand) for text in texts]


def _parse(text: str, at_hand: Callable[[], Ticket]) -> Location:
    if not text.startswith("flow:"):
        if not text:
            raise UsageError("an empty path was given", hint="write . for the current folder")
        return Local(os.fsencode(text))
    from flowengine.wire.ticket import Ticket

    location, mark, _ = text.partition("#")
    if mark:
        ticket = Ticket.parse(text)
        return Remote(ticket, _with_slash(ticket.path, location))
    stored = at_hand()
    if location.startswith("flow:///"):
        from urllib.parse import unquote_to_bytes

        below = unquote_to_bytes(location[len("flow:///") :])
        return Remote(stored, _join(stored.path, below))
    ticket = Ticket.parse(f"{location}#{stored.format_secret_url().partition('#')[2]}")
    if (ticket.host, ticket.port) != (stored.host, stored.port):
        raise UsageError(
            f"the ticket at hand is for {stored.location}, not for {ticket.location}",
            hint="give the ticket of that host with --ticket-file",
        )
    return Remote(ticket, _with_slash(ticket.path, location))


def _with_slash(path: bytes, location: str) -> bytes:
    return path + b"/" if location.endswith("/") and path else path


def _join(base: bytes, below: bytes) -> bytes:
    return base.rstrip(b"/") + b"/" + below if base else below


def _stored_ticket(ticket_file: str | None) -> Ticket:
    from flowengine.wire.ticket import Ticket

    path = ticket_file or os.environ.get("FLOW_TICKET_FILE")
    if path:
        from flowengine.store.secret_files import read_secret

        try:
            return Ticket.parse(read_secret(path).decode("ascii", "replace").partition("\n")[0])
        except NotFound:
            raise NotFound(
                f"there is no ticket file {path}", hint="flow serve --ticket-file FILE writes one"
            ) from None
    if text := os.environ.get("FLOW_TICKET"):
        return Ticket.parse(text)
    raise UsageError(
        "this location needs a ticket",
        hint="add #SECRET as flow serve printed it, or use --ticket-file FILE, $FLOW_TICKET_FILE or $FLOW_TICKET",
    )
