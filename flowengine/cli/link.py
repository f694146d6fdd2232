"""`flow link`: what is known of the links between sites, measured and declared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from flowengine.cli.federation import (
    ago,
    complete_site,
    json_option,
    note,
    open_client,
    plain,
    print_table,
    show_time,
)
from flowengine.cli.groups import Group
from flowengine.cli.limit import parse_rate, show_rate
from flowengine.errors import Exit, UsageError
from flowengine.plan.explain import format_bits

if TYPE_CHECKING:
    from flowengine.api.links import Link

__all__ = ["link"]

_SOURCE = click.argument("source", metavar="SOURCE", shell_complete=complete_site)
_TARGET = click.argument("target", metavar="TARGET", shell_complete=complete_site)


@click.group(cls=Group)
def link() -> None:
    """Links between sites: what they carry, measured and declared.

    A link has a direction: what goes from SOURCE to TARGET. Transfers measure it as they go; a probe does when it is
    idle.
    """


def _carries(found: Link) -> str:
    if found.rate_bits_per_s is None:
        return "?"
    return f"{format_bits(found.rate_bits_per_s)} ±{100 * (found.spread or 0):.0f} %"


@link.command("ls")
@json_option
def ls(as_json: bool) -> int:
    """List the links that something is known of."""
    from flowengine.cli.output import print_json

    with open_client() as client:
        links = client.links()
    if as_json:
        print_json({"links": plain(links)})
        return Exit.DONE
    rows = [
        (
            f"{one.source} > {one.target}",
            _carries(one),
            ago(one.measured),
            "-" if one.capacity_bits_per_s is None else show_rate(one.capacity_bits_per_s),
            "-" if one.rtt_ms is None else f"{one.rtt_ms:g} ms",
            "-" if one.loss is None else f"{100 * one.loss:.3g} %",
            f"{one.cost_per_gb:g}",
        )
        for one in links
    ]
    print_table(("LINK", "CARRIES", "MEASURED", "DECLARED", "RTT", "LOSS", "USD/GB"), rows)
    return Exit.DONE


@link.command("show")
@_SOURCE
@_TARGET
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many looks at most."
)
@json_option
def show(source: str, target: str, limit: int, as_json: bool) -> int:
    """Show what is known of the link from SOURCE to TARGET, and the looks behind it."""
    from flowengine.cli.output import print_json

    with open_client() as client:
        found = client.link(source, target)
        looks = client.link_looks(source, target, limit)
    if as_json:
        print_json(plain(found) | {"looks": plain(looks)})
        return Exit.DONE
    print(f"{source} > {target}")
    _print(found)
    rows = [
        (
            show_time(look.at),
            look.kind,
            "-" if look.rate_bits_per_s is None else format_bits(look.rate_bits_per_s),
            "at least" if look.at_least else "",
            "-" if look.rtt_ms is None else f"{look.rtt_ms:g} ms",
        )
        for look in looks
    ]
    if rows:
        print_table(("AT", "BY", "RATE", "", "RTT"), rows)
    return Exit.DONE


def _print(found: Link) -> None:
    print(f"  carries   {_carries(found)}, measured {ago(found.measured)}")
    if found.rtt_ms is not None:
        print(f"  rtt       {found.rtt_ms:g} ms")
    if found.loss is not None:
        print(f"  loss      {100 * found.loss:.3g} %")
    if found.as_of is not None:
        rate = "no rate" if found.capacity_bits_per_s is None else show_rate(found.capacity_bits_per_s)
        print(f"  declared  {rate}, {found.cost_per_gb:g} USD/GB, by {found.source_of_values}")


@link.command("probe")
@_SOURCE
@_TARGET
@click.option("--size", default="64MiB", show_default=True, metavar="SIZE", help="Most that is sent.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, 30, min_open=True),
    default=2.0,
    show_default=True,
    help="Longest that it is sent for.",
)
@json_option
def probe(source: str, target: str, size: str, seconds: float, as_json: bool) -> int:
    """Measure the link from SOURCE to TARGET now, by a sealed burst that TARGET's agent throws away.

    Refused while a transfer uses the link: that measures it anyway.
    """
    from flowengine.api.links import ProbeRequest
    from flowengine.cli.output import print_json
    from flowengine.units import parse_bytes

    with open_client() as client:
        request = ProbeRequest(size_bytes=parse_bytes(size), seconds=seconds)
        found = client.probe_link(source, target, request)
    if as_json:
        print_json(plain(found))
    else:
        print(f"{source} > {target}")
        _print(found)
    return Exit.DONE


@link.command("set")
@_SOURCE
@_TARGET
@click.option("--capacity", metavar="RATE", help="What it carries, as long as nobody has measured it.")
@click.option("--rtt-ms", type=click.FloatRange(min=0), default=None, metavar="MS", help="Round-trip time.")
@click.option(
    "--usd-per-gb", type=click.FloatRange(min=0), default=0.0, show_default=True, help="What 10^9 bytes cost."
)
@json_option
def set_(
    source: str, target: str, capacity: str | None, rtt_ms: float | None, usd_per_gb: float, as_json: bool
) -> int:
    """Declare what the link from SOURCE to TARGET carries and costs.

    What is measured beats a declared capacity; a bound that must hold is a limit (flow limit set).
    """
    from flowengine.api.links import LinkRequest
    from flowengine.cli.output import print_json

    bits = parse_rate(capacity) if capacity else None
    if capacity and not bits:
        raise UsageError(f"--capacity {capacity!r} is no rate", hint="write one like 10Gbit/s")
    request = LinkRequest(capacity_bits_per_s=bits, rtt_ms=rtt_ms, cost_per_gb=usd_per_gb)
    with open_client() as client:
        found = client.set_link(source, target, request)
    if as_json:
        print_json(plain(found))
    else:
        note(f"{source} > {target}: declared")
    return Exit.DONE


@link.command("rm")
@_SOURCE
@_TARGET
def rm(source: str, target: str) -> int:
    """Forget what was declared and measured of a link."""
    with open_client() as client:
        client.remove_link(source, target)
    note(f"{source} > {target}: nothing is known any more")
    return Exit.DONE
