"""`flow plan`: ask the planner before anything moves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flowengine.cli.groups import Group
from flowengine.cli.plan_transfer import show

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowengine.plan.simulate import Result

__all__ = ["plan"]

BAR = 24
MOST_LINKS = 20


class _Plans(Group):
    """Says which command takes places, to whoever leaves it out."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if ":/" in args[0] and args[0] not in self.commands:
            shown = " ".join(args[:2])
            raise click.UsageError(
                f"No such command {args[0]!r}. Did you mean `flow plan show {shown}`?", ctx
            )
        return super().resolve_command(ctx, args)


@click.group(cls=_Plans)
def plan() -> None:
    """What a transfer would be; a day of demands, simulated."""


plan.add_command(show)


@plan.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--add-link",
    "added",
    multiple=True,
    metavar="FROM:TO:RATE",
    help="Simulate again with this link, in both directions, and compare. May be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--chart", type=click.Path(path_type=Path, dir_okay=False), help="Write how full links are as SVG."
)
@click.option("--demands", "with_demands", is_flag=True, help="List every demand, not only the sums.")
def simulate(
    file: Path, added: tuple[str, ...], as_json: bool, chart: Path | None, with_demands: bool
) -> None:
    """Play a day of demands through the planner.

    FILE describes a federation and its demands as TOML. The answer says how full links are, how long demands
    take, and which deadlines hold. With --add-link it says what one more link would bring.
    """
    from flowengine.cli.plan_chart import draw
    from flowengine.cli.plan_file import parse_link_option, read_scenario
    from flowengine.plan import Overlay
    from flowengine.plan.simulate import simulate as play

    scenario = read_scenario(file)
    more = tuple(link for text in added for link in parse_link_option(text))
    overlay = scenario.overlay
    results = [("as it is", _play(play, scenario, overlay))]
    if more:
        wider = Overlay(
            sites=overlay.sites,
            links=(*overlay.links, *more),
            endpoints=overlay.endpoints,
            tenants=overlay.tenants,
        )
        results.append((f"with {' and '.join(added)}", _play(play, scenario, wider)))
    if chart is not None:
        name, result = results[-1]
        chart.write_text(draw(result, f"{file.name}, {name}: how full links are"), encoding="utf-8")
        print(f"flow: wrote {chart}", file=sys.stderr)
    if as_json:
        _print_json(results)
        return
    for name, result in results:
        _print_links(name, result)
        if with_demands:
            _print_demands(result)
    _print_sums(results)


def _play(play: object, scenario: object, overlay: object) -> Result:
    from flowengine.cli.plan_file import Scenario

    assert callable(play)
    assert isinstance(scenario, Scenario)
    result: Result = play(
        overlay,
        scenario.arrivals,
        scenario.start_s,
        scenario.end_s,
        step_s=scenario.step_s,
        limits=scenario.limits,
    )
    return result


def _print_json(results: list[tuple[str, Result]]) -> None:
    import msgspec

    answer = [
        {"name": name, "deadlines": result.deadlines(), **msgspec.to_builtins(result)}
        for name, result in results
    ]
    print(msgspec.json.encode({"simulations": answer}).decode())


def _print_links(name: str, result: Result) -> None:
    from flowengine.units import format_bytes, format_duration

    print(f"Links, {name} (the busiest first)")
    width = max([len(link.name) for link in result.links] + [4])
    print(f"  {'link':<{width}}  {'mean':>5}  {'peak':>5}  {'full for':>10}  {'moved':>10}")
    busiest = sorted(result.links, key=lambda link: (-link.mean_utilisation, link.name))
    for link in busiest[:MOST_LINKS]:
        filled = round(min(link.mean_utilisation, 1.0) * BAR)
        full = format_duration(link.full_s) if link.full_s else "-"
        print(
            f"  {link.name:<{width}}  {link.mean_utilisation:>5.0%}  {link.peak_utilisation:>5.0%}  {full:>10}"
            f"  {format_bytes(link.moved_bytes):>10}  {'█' * filled}{'░' * (BAR - filled)}"
        )
    if len(busiest) > MOST_LINKS:
        print(f"  and {len(busiest) - MOST_LINKS} more; --json has all")
    print()


def _print_demands(result: Result) -> None:
    from flowengine.units import format_bytes, format_duration

    print("Demands")
    width = max([len(d.id) for d in result.demands] + [6])
    for demand in result.demands:
        took = "not done" if demand.done_s is None else format_duration(demand.done_s - demand.arrived_s)
        deadline = "" if demand.deadline == "none" else f"deadline {demand.deadline}"
        print(f"  {demand.id:<{width}}  {format_bytes(demand.size_bytes):>10}  {took:>12}  {deadline}")
    print()


def _print_sums(results: list[tuple[str, Result]]) -> None:
    from flowengine.units import format_bytes, format_duration

    def took(result: Result, quantile: float) -> str:
        seconds = result.completion_s(quantile)
        return "-" if seconds is None else format_duration(seconds)

    def deadlines(result: Result, name: str) -> str:
        return str(result.deadlines()[name])

    rows: list[tuple[str, Callable[[Result], str]]] = [
        ("moved", lambda r: format_bytes(r.moved_bytes)),
        ("demands ended", lambda r: f"{sum(d.done_s is not None for d in r.demands)} of {len(r.demands)}"),
        ("half of them ended within", lambda r: took(r, 0.5)),
        ("95 of 100 ended within", lambda r: took(r, 0.95)),
        ("deadlines met", lambda r: deadlines(r, "met")),
        ("deadlines refused at once", lambda r: deadlines(r, "refused")),
        ("deadlines promised and missed", lambda r: deadlines(r, "missed")),
        ("deadlines not yet due", lambda r: deadlines(r, "open")),
        ("money", lambda r: f"{r.usd:.2f} USD"),
        ("fairness among tenants (Jain)", lambda r: f"{r.fairness:.3f}"),
        ("traffic that changed its route per plan", lambda r: f"{r.moved_share:.1%}"),
        ("plans made", lambda r: str(r.plans)),
    ]
    columns = [[label for label, _ in rows]] + [[show(result) for _, show in rows] for _, result in results]
    heads = ["", *[name for name, _ in results]]
    widths = [
        max(len(head), *(len(cell) for cell in column)) for head, column in zip(heads, columns, strict=True)
    ]
    for cells in [heads, *zip(*columns, strict=True)]:
        first, *rest = cells
        aligned = [f"{cell:>{w}}" for cell, w in zip(rest, widths[1:], strict=True)]
        print(f"{first:<{widths[0]}}  {'  '.join(aligned)}".rstrip())
