"""`flow policy`: check, test, explain and compare residency policies; build and verify bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from flowengine.cli.groups import Group
from flowengine.cli.policy_bundle import bundle
from flowengine.cli.policy_options import at_option, directory_option, json_option, print_json
from flowengine.errors import Exit

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowengine.policy.evaluate import Engine
    from flowengine.policy.model import PolicySet, Site, Value
    from flowengine.policy.outcomes import Outcome
    from flowengine.policy.tables import Change

__all__ = ["policy"]

_USES: Final = ("release", "relay", "hold", "land", "process")
_ARRIVALS: Final = ("relay", "hold", "land", "process")
_MAX_SHOWN: Final = 60


@click.group(cls=Group)
def policy() -> None:
    """Residency policies: what may be where, and why.

    Policies are TOML files in a directory (`policies` unless --policies names another), with their lists, sites and
    tests. Exit codes: 0 yes or done, 1 a test, check or comparison failed, 2 usage, 3 no such thing, 4 a signature
    is missing, 5 denied or never, 6 a damaged bundle.
    """


def _world(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of commands that ask about sites and data."""
    for option in (
        click.option(
            "--with", "also", multiple=True, metavar="POLICY", help="Count this draft as in force too."
        ),
        click.option(
            "--sites", type=click.Path(path_type=Path), help="Sites from this file instead of sites.toml."
        ),
        click.option(
            "--datasets",
            type=click.Path(path_type=Path),
            help="Data sets from this file instead of datasets.toml.",
        ),
        click.option(
            "--fact",
            "facts",
            multiple=True,
            metavar="NAME=VALUE",
            help="A known fact; members of a set by commas.",
        ),
    ):
        command = option(command)
    return at_option(json_option(directory_option(command)))


@policy.command()
@click.option("--strict", is_flag=True, help="Warnings fail too.")
@at_option
@json_option
@directory_option
def check(directory: Path, as_json: bool, at: str | None, strict: bool) -> int:
    """Read every file strictly and look for what is suspicious.

    Errors: whatever cannot be meant (unknown words, lists, labels, units), all at once, with file, line and a
    suggestion. Warnings: rules that never fire or have no test, facts nobody states, lists nobody reviewed, duties no
    agent can do or that never merge.
    """
    from flowengine.cli.policy_files import load_policies, moment, read_tests
    from flowengine.cli.policy_show import show_problems
    from flowengine.errors import PolicyInvalid
    from flowengine.policy.lint import lint
    from flowengine.policy.problems import Problem
    from flowengine.policy.runner import run

    try:
        policies = load_policies(directory)
    except PolicyInvalid as error:
        if not as_json:
            raise
        print_json({"problems": error.context["problems"], "errors": len(list(_rows(error)))})
        return Exit.FAILED
    files, errors = read_tests(policies)
    now = moment(at)
    found: list[Problem] = [*errors, *lint(policies, now, run(policies, files))]
    if as_json:
        print_json({"problems": [problem.as_dict() for problem in sorted(found)], "errors": len(errors)})
    else:
        show_problems(found)
        by_mode = {
            mode: sum(item.mode == mode for item in policies.policies)
            for mode in ("enforce", "shadow", "draft")
        }
        modes = ", ".join(f"{count} in mode {mode}" for mode, count in by_mode.items() if count)
        rules = sum(len(item.rules) for item in policies.policies)
        click.echo(
            f"{len(policies.policies)} policies ({modes}), {rules} rules, {len(policies.lists)} shared lists: "
            f"{len(errors)} errors, {len(found) - len(errors)} warnings"
        )
    return Exit.FAILED if errors or (strict and found) else Exit.DONE


def _rows(error: Any) -> list[object]:
    rows = error.context["problems"]
    assert isinstance(rows, list)
    return rows


@policy.command("test")
@click.argument("files", nargs=-1, metavar="[FILE.test.toml]...")
@click.option("-v", "--verbose", is_flag=True, help="Every test, and line truths never seen.")
@at_option
@json_option
@directory_option
def test_command(
    directory: Path, as_json: bool, at: str | None, verbose: bool, files: tuple[str, ...]
) -> int:
    """Run the test files beside the policies.

    Also takes every fact away in turn: a deny must never become a permit. A rule without a test where it decides and
    one where it does not fails the run, unless only some FILES are run. --at runs the same tests at another date, to
    find out what expires.
    """
    from flowengine.cli.policy_files import load_policies, moment, read_tests, refuse_tests
    from flowengine.cli.policy_show import show_report
    from flowengine.policy.runner import run

    policies = load_policies(directory)
    found, problems = read_tests(policies, files)
    refuse_tests(problems)
    report = run(policies, found, None if at is None else moment(at))
    if files:
        report.untested.clear()
    if as_json:
        print_json(
            {
                "tests": [
                    {"file": item.file, "line": item.line, "name": item.name, "problems": list(item.problems)}
                    for item in report.results
                ],
                "failed": len(report.failed),
                "removals": report.removals,
                "untested": report.untested,
                "unseen_lines": [list(item) for item in report.unseen_lines],
            }
        )
    else:
        show_report(report, verbose)
    return Exit.FAILED if report.failed or report.untested or not report.results else Exit.DONE


@policy.command()
@click.argument("dataset", required=False)
@click.option("--label", "labels", multiple=True, help="Data with this label instead of a data set.")
@click.option("--site", required=True, help="Where the use happens.")
@click.option("--use", type=click.Choice(_USES), required=True, help="What is to be done there.")
@click.option("--lang", type=click.Choice(["en", "zh", "both"]), default="both", show_default=True)
@click.option("--auditor", is_flag=True, help="Show secret facts and lists too.")
@_world
def explain(
    directory: Path, as_json: bool, at: str | None, facts: tuple[str, ...], datasets: Path | None, sites: Path | None,
    also: tuple[str, ...], dataset: str | None, labels: tuple[str, ...], site: str, use: str, lang: str, auditor: bool,
) -> int:  # fmt: skip
    """Decide once and say why, line by line.

    What --fact does not state is unknown. The answer names the facts that are missing and the smallest change that
    would permit. Exit code 5 for a deny.

    \b
    flow policy explain cohort7 --site virginia --use land --fact agreement.mechanism=scc-2021
    """  # noqa: D301
    from flowengine.cli.policy_files import data_facts, engine_of, given_facts, load_policies, moment, site_of
    from flowengine.cli.policy_show import show_decision
    from flowengine.policy.cases import close_labels
    from flowengine.policy.explain import record
    from flowengine.policy.phrases import LANGUAGES

    policies = load_policies(directory, sites, datasets)
    engine = engine_of(policies, also)
    pinned = policies.sites[site_of(policies, site)]
    known = {**data_facts(policies, dataset, labels), **pinned.facts, "time.now": moment(at)}
    known = close_labels(policies, {**known, **given_facts(policies, facts)})
    decision = engine.decide(use, known, pinned.can)
    if as_json:
        ask = {"data": dataset or list(labels), "site": site, "use": use}
        print_json({"ask": ask, **record(engine, decision, auditor)})
    else:
        show_decision(engine, decision, LANGUAGES if lang == "both" else (lang,), auditor)
    return Exit.DONE if decision.permit else Exit.DENIED


@policy.command()
@click.argument("dataset", required=False)
@click.option("--label", "labels", multiple=True, help="Data with this label instead of a data set.")
@click.option("--use", "uses", type=click.Choice(_USES), multiple=True, help="Only this use.")
@click.option("--site", "only", multiple=True, help="Only this site.")
@click.option("--auditor", is_flag=True, help="Show secret facts and lists too.")
@_world
def where(
    directory: Path, as_json: bool, at: str | None, facts: tuple[str, ...], datasets: Path | None, sites: Path | None,
    also: tuple[str, ...], dataset: str | None, labels: tuple[str, ...], uses: tuple[str, ...], only: tuple[str, ...],
    auditor: bool,
) -> int:  # fmt: skip
    """Where may this data be?

    Per use and site: yes, yes with duties, if ..., or never and why. Facts about the request are open unless --fact
    states them. With --label the data is taken to be under no contract.

    \b
    flow policy where --label personal.eu --use land
    """  # noqa: D301
    from flowengine.cli.policy_files import data_facts, engine_of, given_facts, load_policies, moment, site_of
    from flowengine.cli.policy_show import outcome_record, show_outcome
    from flowengine.policy.cases import close_labels
    from flowengine.policy.explain import without_secrets
    from flowengine.policy.outcomes import where as ask

    policies = load_policies(directory, sites, datasets)
    engine = engine_of(policies, also)
    now = moment(at)
    given = given_facts(policies, facts)
    data = data_facts(policies, dataset, labels)
    names = [site_of(policies, name) for name in only] or list(policies.sites)
    answers = {}
    for use in uses or _ARRIVALS:
        for name in names:
            pinned = policies.sites[name]
            known = close_labels(policies, {**data, **pinned.facts, "time.now": now, **given})
            found = ask(engine, use, known, pinned.can)
            answers[use, name] = found if auditor else without_secrets(found, policies)
    if as_json:
        rows = [{"use": use, "site": name, **outcome_record(found)} for (use, name), found in answers.items()]
        print_json({"data": dataset or list(labels), "answers": rows})
        return Exit.DONE
    width = max((len(name) for name in names), default=0)
    for use in uses or _ARRIVALS:
        click.echo(click.style(use, bold=True))
        for name in names:
            show_outcome(name, answers[use, name], width)
    return Exit.DONE


@policy.command("can-reach")
@click.argument("label")
@click.argument("site")
@click.option("--from", "origins", multiple=True, metavar="SITE", help="Where the data may be at first.")
@_world
def can_reach_command(
    directory: Path, as_json: bool, at: str | None, facts: tuple[str, ...], datasets: Path | None, sites: Path | None,
    also: tuple[str, ...], label: str, site: str, origins: tuple[str, ...],
) -> int:  # fmt: skip
    """Can data with LABEL ever reach SITE?

    All facts about requests are open, and the data may carry further labels. `never` is a proof for these policies,
    sites and this date; `possible` may be over-cautious. Exit code 5 when no use can reach it.
    """
    from flowengine.cli.policy_files import data_facts, engine_of, load_policies, moment, site_of
    from flowengine.cli.policy_show import outcome_record, outcome_text
    from flowengine.errors import UsageError
    from flowengine.policy.reach import can_reach

    if facts:
        raise UsageError("can-reach leaves all facts open", hint="ask `flow policy where` with --fact")
    policies = load_policies(directory, sites, datasets)
    engine = engine_of(policies, also)
    wanted = data_facts(policies, None, [label])["data.labels"]
    assert isinstance(wanted, frozenset)
    starts = [site_of(policies, name) for name in origins]
    found = can_reach(engine, wanted, site_of(policies, site), moment(at), starts)
    possible = any(reach.possible for reach in found)
    if as_json:
        rows = [
            {
                "use": reach.use,
                "possible": reach.possible,
                "path": list(reach.path),
                **outcome_record(reach.outcome),
            }
            for reach in found
        ]
        print_json({"label": label, "site": site, "possible": possible, "uses": rows})
        return Exit.DONE if possible else Exit.DENIED
    for reach in found:
        answer = (
            click.style("possible", fg="yellow") if reach.possible else click.style("never   ", fg="green")
        )
        click.echo(f"{reach.use:<8} {answer}")
        if reach.possible:
            click.echo(f"           by {' -> '.join(reach.path)}")
        elif reach.outcome.kind != "never":
            click.echo("           no site that may release it can send it there")
        for line in outcome_text(_about_label(reach.outcome)):
            click.echo(f"           {line}")
    return Exit.DONE if possible else Exit.DENIED


def _about_label(found: Outcome) -> Outcome:
    """Without what only data with further labels or contracts would have to meet."""
    from dataclasses import replace

    def only_data(way: tuple[str, ...]) -> bool:
        return all(line.removeprefix("not: ").startswith("data.") for line in way)

    needs = tuple(need for need in found.needs if not any(only_data(way) for way in need.alternatives))
    return replace(found, needs=needs)


@policy.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--label", "labels", multiple=True, metavar="A,B", help="Only data with these labels.")
@click.option("--with", "also", multiple=True, metavar="POLICY", help="Count this draft as in force too.")
@click.option("--all", "show_all", is_flag=True, help="Show every change, not only what got weaker.")
@at_option
@json_option
def diff(
    old: Path,
    new: Path,
    labels: tuple[str, ...],
    also: tuple[str, ...],
    show_all: bool,
    at: str | None,
    as_json: bool,
) -> int:
    """Compare two directories or bundles: who may do more than before?

    The whole table of label, contract, data set, site and use before and after, for the sites of both. Whatever got weaker needs
    somebody's signature, so it is exit code 1; so are existing copies (datasets.toml) that became unlawful.
    """
    from flowengine.cli.policy_files import engine_of, load_policies, moment
    from flowengine.cli.policy_show import outcome_record
    from flowengine.policy.differences import differences, list_changes
    from flowengine.policy.tables import changes, table

    before, after = load_policies(old), load_policies(new)
    engines = [engine_of(before, [name for name in also if before.policy(name)]), engine_of(after, also)]
    sites = {name: after.sites.get(name) or before.sites[name] for name in {**before.sites, **after.sites}}
    old_sites = {name: before.sites.get(name) or site for name, site in sites.items()}
    request = {"time.now": moment(at)}
    # Each side with its own pins and its own idea of what a label implies: a change of those is a change too.
    data = _label_sets(before, after, labels)
    tables = (
        table(engines[0], data[0], old_sites, request),
        table(engines[1], data[1], sites, request),
    )
    found = list(changes(*tables, list_changes(before, after)))
    declared = differences(before, after)
    unlawful = _unlawful_copies((engines[0], old_sites), (engines[1], sites), request)
    weaker = [change for change in found if change.weaker]
    cells = len(tables[0].data) * len(sites) * len(_USES)
    if as_json:
        print_json(
            {
                "cells": cells,
                "weaker": sum(len(change.sites) for change in weaker),
                "changes": [
                    {
                        "use": change.use,
                        "data": change.data,
                        "sites": list(change.sites),
                        "weaker": change.weaker,
                        "old": outcome_record(change.old),
                        "new": outcome_record(change.new),
                    }
                    for change in found
                ],
                "declarations": [{"what": item.what, "weaker": item.weaker} for item in declared],
                "unlawful_copies": unlawful,
            }
        )
    else:
        for item in declared:
            word = click.style("weaker", fg="red") if item.weaker else click.style("other ", fg="green")
            click.echo(f"{word}  {item.what}")
        _show_changes(found if show_all else weaker)
        for copy in unlawful:
            click.echo(
                f"{click.style('unlawful', fg='red')}  {copy['data']} at {copy['site']} ({copy['use']}): {copy['why']}"
            )
        counts = sum(len(change.sites) for change in found), sum(len(change.sites) for change in weaker)
        click.echo(
            f"{cells} cells: {counts[0]} changed, {counts[1]} got weaker; {len(unlawful)} copies became unlawful"
        )
    loosened = bool(weaker) or any(item.weaker for item in declared)
    return Exit.FAILED if loosened or unlawful else Exit.DONE


def _label_sets(
    before: PolicySet, after: PolicySet, labels: tuple[str, ...]
) -> tuple[dict[str, dict[str, Value]], dict[str, dict[str, Value]]]:
    """What is compared, as each side understands it.

    The sets of labels asked for; or each declared label, no label, each contract that rules name, each data set.
    """
    from flowengine.cli.policy_files import data_facts
    from flowengine.policy.cases import close_labels
    from flowengine.policy.differences import contracts_named

    names = labels or tuple({**before.labels, **after.labels})
    stated: dict[str, dict[str, Value]] = {}
    for name in names:
        if not all(part in after.labels or part in before.labels for part in name.split(",")):
            data_facts(after, None, [name])  # says which label is not declared
        stated[name] = {"data.labels": frozenset(name.split(",")), "data.contracts": frozenset()}
    if not labels:
        stated["(no label)"] = {"data.labels": frozenset(), "data.contracts": frozenset()}
        for contract in dict.fromkeys([*contracts_named(before), *contracts_named(after)]):
            under: dict[str, Value] = {"data.labels": frozenset(), "data.contracts": frozenset([contract])}
            stated[f"under {contract}"] = under
        stated |= {name: dict(facts) for name, facts in {**before.data, **after.data}.items()}
    both = [
        {name: close_labels(policies, dict(facts)) for name, facts in stated.items()}
        for policies in (before, after)
    ]
    return both[0], both[1]


def _unlawful_copies(
    old: tuple[Engine, dict[str, Site]], new: tuple[Engine, dict[str, Site]], request: dict[str, int]
) -> list[dict[str, str]]:
    """Copies that exist, were not excluded before and are now, or were allowed and now lack something."""
    from flowengine.cli.policy_show import outcome_text
    from flowengine.policy.cases import close_labels
    from flowengine.policy.outcomes import where as ask

    known = {**old[0].policies.data, **new[0].policies.data}
    found = []
    for data, site, use in new[0].policies.copies or old[0].policies.copies:
        if data not in known or site not in new[1]:
            continue
        was, now = (
            ask(
                engine,
                use,
                close_labels(engine.policies, {**known[data], **sites[site].facts, **request}),
                sites[site].can,
            )
            for engine, sites in (old, new)
        )
        if was.kind != "never" and now.kind == "never":
            found.append({"data": data, "site": site, "use": use, "why": "; ".join(outcome_text(now))})
        elif was.kind in ("yes", "duties") and now.kind == "if":
            why = "only " + " ".join(outcome_text(now))
            found.append({"data": data, "site": site, "use": use, "why": why})
    return found


def _show_changes(found: list[Change]) -> None:
    from flowengine.cli.policy_show import outcome_text

    for change in found[:_MAX_SHOWN]:
        word = click.style("weaker", fg="red") if change.weaker else click.style("other ", fg="green")
        click.echo(f"{word}  {change.data}: {change.use} at {', '.join(change.sites)}")
        for name, side in (("before", change.old), ("after", change.new)):
            lines = outcome_text(side)
            click.echo(f"        {name:<6} {side.kind}: {'; '.join(lines[:4])}")
    if len(found) > _MAX_SHOWN:
        click.echo(f"and {len(found) - _MAX_SHOWN} more; --json lists all")


@policy.command()
@json_option
@directory_option
def vocabulary(directory: Path, as_json: bool) -> int:
    """What conditions may speak of: facts and who may say them, operators, uses, duties."""
    from flowengine.cli.policy_files import load_policies
    from flowengine.policy.conditions import OPERATORS
    from flowengine.policy.obligations import OBLIGATIONS
    from flowengine.policy.phrases import USE_NAMES
    from flowengine.policy.vocabulary import ATTRIBUTES, COUNTERS, SOURCES

    attributes = load_policies(directory).attributes if directory.exists() else ATTRIBUTES
    if as_json:
        rows = [
            {
                "name": item.name,
                "type": item.type,
                "unit": item.unit,
                "by": list(item.by),
                "en": item.en,
                "zh": item.zh,
            }
            for item in attributes.values()
        ]
        counters = {name: list(item.parameters) for name, item in COUNTERS.items()}
        duties = {name: list(item) for name, item in OBLIGATIONS.items()}
        print_json({"attributes": rows, "counters": counters, "operators": list(OPERATORS), "duties": duties})
        return Exit.DONE
    for item in attributes.values():
        unit = item.unit or item.domain
        kind = f"{item.type} ({unit})" if unit else item.type
        click.echo(f"{item.name:<30} {kind:<18} {item.en}  [{', '.join(item.by)}]")
    for counter in COUNTERS.values():
        click.echo(f"{counter.name}({', '.join(counter.parameters)})  {counter.en}")
    click.echo("operators: " + ", ".join(sorted(OPERATORS)))
    click.echo("uses: " + ", ".join(name for name, _ in USE_NAMES.values()))
    click.echo("duties:")
    for name, parameters in OBLIGATIONS.items():
        click.echo(f"  {name:<16} {', '.join(parameters)}")
    click.echo("sources:")
    for name, what in SOURCES.items():
        click.echo(f"  {name:<16} {what}")
    return Exit.DONE


policy.add_command(bundle)
