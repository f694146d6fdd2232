"""`flow site`: the places of the federation."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowengine.cli.federation import (
    ago,
    complete_site,
    json_option,
    note,
    open_client,
    plain,
    print_table,
    remember_sites,
    show_time,
)
from flowengine.cli.groups import Group
from flowengine.cli.secret_output import check_new, give_out, output_option
from flowengine.errors import Exit, NotFound, UsageError
from flowengine.units import format_bytes

if TYPE_CHECKING:
    from flowengine.api.sites import Root

__all__ = ["site"]

_SITE = click.argument("name", metavar="SITE", shell_complete=complete_site)


@click.group(cls=Group)
def site() -> None:
    """The sites: what they offer, who they are, how they join and leave."""


@site.command("ls")
@json_option
def ls(as_json: bool) -> int:
    """List all sites."""
    from flowengine.cli.output import print_json

    with open_client() as client:
        sites = client.sites()
    remember_sites(sites)
    if as_json:
        print_json({"sites": plain(sites)})
        return Exit.DONE
    rows = [
        (
            site.name,
            site.state,
            ago(site.last_seen),
            f"{site.running_tasks}/{site.max_tasks}",
            " ".join(root.name for root in site.roots) or "-",
        )
        for site in sites
    ]
    print_table(("SITE", "STATE", "SEEN", "TASKS", "OFFERS"), rows)
    return Exit.DONE


@site.command("show")
@_SITE
@json_option
def show(name: str, as_json: bool) -> int:
    """Show a site: what it offers, how it is reached, its facts with their sources, its certificate."""
    from flowengine.cli.output import print_json

    with open_client() as client:
        site = client.site(name)
    if as_json:
        print_json(plain(site))
        return Exit.DONE
    print(f"{site.name}: {site.state} since {show_time(site.since)}")
    print(f"  seen         {ago(site.last_seen)}{f', software {site.software}' if site.software else ''}")
    print(f"  reached at   {', '.join(site.addresses) or 'nowhere: it only dials out'}")
    print(f"  tasks        {site.running_tasks} of at most {site.max_tasks}")
    for root in site.roots:
        print(f"  offers       {root.name}  {root.access}{_space(root)}")
    for key, fact in sorted(site.facts.items()):
        value = ", ".join(fact.value) if isinstance(fact.value, list) else str(fact.value)
        print(f"  fact         {key} = {value}  (says {fact.source}, {fact.as_of:%Y-%m-%d})")
    policy = site.policy
    if policy.takes:
        has = f"version {policy.version}, {policy.digest}" if policy.version else "none yet"
        print(f"  policies     {has}; label statements up to {policy.labels}")
    else:
        print("  policies     none: it trusts nobody to sign them")
    if policy.problem:
        print(f"  problem      {policy.problem}")
    if site.can is not None:
        print(f"  can          {', '.join(site.can)}")
    if site.certificate is not None:
        print(
            f"  certificate  until {show_time(site.certificate.not_after)}, key {site.certificate.key_sha256[:16]}…"
        )
    return Exit.DONE


def _space(root: Root) -> str:
    parts = []
    if root.free_bytes is not None:
        parts.append(f"{format_bytes(root.free_bytes)} free")
    if root.budget_bytes is not None:
        parts.append(f"budget {format_bytes(root.budget_bytes)}")
        if root.used_bytes is not None:
            parts.append(f"{format_bytes(root.used_bytes)} used")
    return f"  {', '.join(parts)}" if parts else ""


@site.command("token")
@_SITE
@click.option(
    "--valid", default="15min", show_default=True, metavar="DURATION", help="How long it may be used, once."
)
@output_option("token")
@json_option
def token(name: str, valid: str, output: Path | None, as_json: bool) -> int:
    """Make a one-time token with which the agent of SITE joins; a new site is entered first.

    Prints the token on stdout, or writes it to a file; and on stderr what to run at the site.
    """
    from flowengine.api.sites import SiteRequest
    from flowengine.cli.output import print_json
    from flowengine.units import parse_duration_s

    check_new(output)
    with open_client() as client:
        try:
            client.site(name)
        except NotFound:
            client.add_site(SiteRequest(name=name))
            note(f"site {name} is new: entered")
        made = client.join_token(name, round(parse_duration_s(valid)))
    if output is not None or not as_json:
        give_out(made.token, output)
    if as_json:
        print_json(plain(made) if output is None else {**_but_token(plain(made)), "file": str(output)})
        return Exit.DONE
    if output is None:
        having = "with this line in a file join-token (mode 0600; --output FILE writes one)"
    else:
        having = f"with the file {output.name} (mode 0600)"
    note(f"valid once, until {show_time(made.expires)}. At {name}, {having}:")
    file = "join-token" if output is None else output.name
    note(f"  flowengine-agent run --config site.toml --join-token-file {file}")
    note(
        f'site.toml: site = "{name}", coordinator = "{client.url}", [[root]]; see agents/deploy/site.example.toml'
    )
    return Exit.DONE


def _but_token(made: Any) -> dict[str, Any]:
    return {name: value for name, value in made.items() if name != "token"}


@site.command("set")
@_SITE
@click.option(
    "--fact",
    "facts",
    multiple=True,
    metavar="NAME=VALUE",
    help="State a fact for policies; members of a set by commas.",
)
@click.option("--no-fact", "gone", multiple=True, metavar="NAME", help="Take a fact back.")
@click.option("--source", default="operator", show_default=True, help="Who says so.")
@click.option("--as-of", metavar="DATE", help="As of when it is so. [default: now]")
@click.option(
    "--max-tasks", type=click.IntRange(1, 1000), default=None, help="Tasks that the site carries at a time."
)
@json_option
def set_(
    name: str,
    facts: tuple[str, ...],
    gone: tuple[str, ...],
    source: str,
    as_of: str | None,
    max_tasks: int | None,
    as_json: bool,
) -> int:
    """State facts about SITE (which policies ask for), and bounds. A new site is entered."""
    from flowengine.api.sites import Fact, SiteRequest
    from flowengine.cli.output import print_json

    when = _date(as_of)
    stated: dict[str, Fact | None] = dict.fromkeys(gone)
    for text in facts:
        key, mark, value = text.partition("=")
        if not mark or not key:
            raise UsageError(f"--fact {text!r} is not NAME=VALUE", hint="write it like country=DE")
        stated[key] = Fact(value=_value(key, value), source=source, as_of=when)
    with open_client() as client:
        request = SiteRequest(facts=stated, max_tasks=max_tasks)
        try:
            changed = client.change_site(name, request)
        except NotFound:
            changed = client.add_site(SiteRequest(name=name, facts=stated, max_tasks=max_tasks))
            note(f"site {name} is new: entered; flow site token {name} lets its agent join")
    if as_json:
        print_json(plain(changed))
    return Exit.DONE


def _value(key: str, text: str) -> bool | int | str | list[str]:
    if text in ("true", "false"):
        return text == "true"
    if text.lstrip("-").isdigit():
        return int(text)
    if "," in text or key in _SETS:
        return [part for part in text.split(",") if part]
    return text


_SETS = frozenset({"operator_countries", "certs"})


def _date(text: str | None) -> datetime:
    if text is None:
        return datetime.now(UTC)
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--as-of {text!r} is not a date", hint="write it like 2026-11-23") from None
    return when.astimezone(UTC)


@site.command("drain")
@_SITE
@click.option("--off", is_flag=True, help="Take work again.")
def drain(name: str, off: bool) -> int:
    """Let SITE finish what it carries and give it nothing new, for maintenance."""
    from flowengine.api.sites import SiteRequest

    with open_client() as client:
        changed = client.change_site(name, SiteRequest(draining=not off))
    note(f"{name} is {changed.state}, with {changed.running_tasks} tasks running")
    return Exit.DONE


@site.command("rm")
@_SITE
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(name: str, yes: bool) -> int:
    """Revoke SITE's certificate at once and forget its rights. Data stays where it is.

    To let it back in, make a new token.
    """
    with open_client() as client:
        found: Any = client.site(name)
        if not yes:
            click.confirm(
                f"Revoke {name} ({found.state}, {found.running_tasks} tasks running)?", abort=True, err=True
            )
        client.remove_site(name)
        remember_sites(client.sites())
    note(f"{name} is revoked: other agents and the coordinator refuse it from now on")
    return Exit.DONE
