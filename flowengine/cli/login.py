"""`flow login`, `flow logout`, `flow whoami`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from flowengine.cli.federation import json_option, note, open_client, plain, remember_sites, show_time
from flowengine.errors import AuthenticationError, Exit, NotFound, UsageError

if TYPE_CHECKING:
    from flowengine.client.access import Access

__all__ = ["login", "logout", "whoami"]


@click.command()
@click.argument("where", required=False, metavar="[URL|FILE|-]")
@click.option(
    "--token", "source", metavar="FILE|-", help="With a URL: take the API token from FILE (- for stdin)."
)
@click.option(
    "--ca-file", type=click.Path(), metavar="FILE", help="With a URL: trust this CA, and ask nothing."
)
def login(where: str | None, source: str | None, ca_file: str | None) -> int:
    """Store who you are at a coordinator, after trying it.

    Asks for a login string, as `flow coordinator run` and `flow user add` give them: it holds address, fingerprint
    and token. From a FILE or stdin (-) it is read without asking. With a URL only the token is asked for.
    """
    from flowengine.client.access import Access, Credentials, normal_url
    from flowengine.client.pairing import access_of_login, fetch_ca

    if where is not None and where.startswith("flowl_"):
        note("this login string now stands in your shell's history and was visible to others on this machine")
        note("  next: give it on stdin (flow login -), and ask for a new token")
        access = access_of_login(where)
    elif where is not None and (where.startswith("https://") or _looks_like_host(where)):
        url = normal_url(where)
        if ca_file is not None:
            ca_pem = _read(ca_file)
        else:
            ca_pem, fingerprint = fetch_ca(url)
            _confirm(url, fingerprint, asked=source != "-")
        access = Access(url, _secret(source, "API token"), ca_pem)
    else:
        access = access_of_login(_secret(where, "login string"))
    user = _try(access)
    stored = Credentials.load()
    stored.put(Access(access.url, access.token, access.ca_pem, user))
    stored.save()
    note(f"logged in to {access.url} as {user}; stored in {stored.path}")
    return Exit.DONE


def _looks_like_host(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    return bool(colon) and port.isdigit() and bool(host) and "/" not in host


def _secret(source: str | None, what: str) -> str:
    if source == "-":
        text = sys.stdin.readline()
    elif source is not None:
        text = _read(source, secret=True)
    elif sys.stdin.isatty():
        text = click.prompt(what.capitalize(), hide_input=True, err=True)
    else:
        text = sys.stdin.readline()
    if not text.strip():
        raise UsageError(f"no {what} was given", hint="paste it, or give the file that holds it")
    return text.strip()


def _read(path: str, *, secret: bool = False) -> str:
    from flowengine.store.secret_files import read_secret

    try:
        if secret:
            return read_secret(path).decode()
        with open(path, encoding="utf-8") as file:
            return file.read(1 << 20)
    except (FileNotFoundError, NotFound):
        raise NotFound(
            f"{path} is neither a file nor an address", hint="write an address as https://HOST:PORT"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None


def _confirm(url: str, fingerprint: str, *, asked: bool) -> None:
    note(f"the CA of {url} has the fingerprint")
    note(f"  {fingerprint}")
    if not asked or not sys.stdin.isatty():
        raise AuthenticationError(
            f"nothing proves that {url} is your coordinator",
            hint="use a login string, which holds the fingerprint, or give the CA with --ca-file",
        )
    click.confirm("Is that what its operator told you?", abort=True, err=True)


def _try(access: Access) -> str:
    from flowengine.client import Client
    from flowengine.errors import FlowError

    with Client(access, retry_for_s=5.0, note=note) as client:
        name = client.me().name
        try:
            remember_sites(client.sites())
        except FlowError:  # completion can do without
            pass
        return name


@click.command()
@click.argument("url", required=False)
def logout(url: str | None) -> int:
    """Forget the token of a coordinator here, the default one unless URL names another.

    The token itself stays valid: `flow token rm ID` makes it worthless.
    """
    from flowengine.client.access import Credentials, normal_url

    stored = Credentials.load()
    entry = stored.find(normal_url(url) if url else None)
    if entry is None:
        raise NotFound("nobody is logged in" if url is None else f"nobody is logged in to {url}")
    stored.remove(entry.url)
    stored.save()
    note(f"logged out of {entry.url}")
    return Exit.DONE


@click.command()
@json_option
def whoami(as_json: bool) -> int:
    """Say who you are, and at which coordinator."""
    from flowengine.cli.output import print_json

    with open_client() as client:
        me, health = client.me(), client.health()
        if as_json:
            print_json({"url": client.url, "user": plain(me), "coordinator": plain(health)})
            return Exit.DONE
        print(f"{me.name} ({me.role}, tenant {me.tenant}) at {client.url}")
        print(f"coordinator {health.version} on {health.database}, its clock says {show_time(health.now)}")
    return Exit.DONE
