"""How answers about policies look on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowengine.policy.evaluate import Decision, Engine
    from flowengine.policy.outcomes import Need, Outcome
    from flowengine.policy.problems import Problem
    from flowengine.policy.runner import Report

__all__ = ["outcome_record", "outcome_text", "show_decision", "show_outcome", "show_problems", "show_report"]

_MARKS: Final = {
    "true": ("✓", "green"),
    "false": ("✗", "red"),
    "unknown": ("?", "yellow"),
    "hidden": ("·", "white"),
}
_COLOURS: Final = {"yes": "green", "duties": "green", "if": "yellow", "never": "red"}
_MAX_UNSEEN: Final = 20


def show_problems(problems: Sequence[Problem]) -> None:
    """Problems by file, errors in red."""
    file = ""
    for problem in sorted(problems):
        if problem.file != file:
            file = problem.file
            click.echo(click.style(file, bold=True))
        colour = "red" if problem.level == "error" else "yellow"
        code = f" [{problem.code}]" if problem.code else ""
        click.echo(f"  {problem.line:>4}  {click.style(problem.level + code, fg=colour)}  {problem.message}")
        if problem.hint:
            click.echo(f"        {problem.hint}")


def show_report(report: Report, verbose: bool) -> None:
    """Failed tests with what was wrong, then the sums; with `verbose` every test and unseen line."""
    file = ""
    for result in report.results:
        if result.passed and not verbose:
            continue
        if result.file != file:
            file = result.file
            click.echo(click.style(file, bold=True))
        mark, colour = ("✓", "green") if result.passed else ("✗", "red")
        click.echo(
            f"  {click.style(mark, fg=colour)} {result.name}"
            + ("" if result.passed else f"  (line {result.line})")
        )
        for problem in result.problems:
            click.echo(f"      {problem}")
    for line in report.untested:
        click.echo(f"  {click.style('untested', fg='yellow')}  {line}")
    failed, count = len(report.failed), len(report.results)
    passed = f"{count - failed} of {count} tests passed"
    seen = 3 * report.lines - len(report.unseen_lines)
    click.echo(
        f"{click.style(passed, fg='red' if failed else 'green')}; {report.removals} facts taken away; "
        f"{len(report.untested)} rules lack a test; {seen} of {3 * report.lines} line truths seen"
    )
    if verbose and report.unseen_lines:
        click.echo("never seen:")
        for owner, text, truth in report.unseen_lines[:_MAX_UNSEEN]:
            click.echo(f"  {truth:<8} {owner}: {text}")
        if (more := len(report.unseen_lines) - _MAX_UNSEEN) > 0:
            click.echo(f"  and {more} more; --json lists all")


def _need_lines(need: Need) -> list[str]:
    return ["; ".join(way) or "(nothing more)" for way in need.alternatives]


def outcome_text(found: Outcome) -> list[str]:
    """Why the outcome is so, in lines."""
    from flowengine.policy.phrases import duty_text

    if found.kind in ("yes", "duties"):
        lines = [", ".join(found.rules)]
        if found.duties:
            lines += [f"with: {duty_text(duty, 'en')}" for duty in found.duties]
        return lines
    if found.kind == "never":
        lines = []
        for never in found.never:
            what = "fails: " if never.because.endswith("no rule permits") else ""
            lines.append(never.because + (f" ({what}{'; '.join(never.lines)})" if never.lines else ""))
        return lines
    lines = []
    for index, need in enumerate(found.needs):
        ways = _need_lines(need)
        start = "" if index == 0 else "and "
        owner = f"   [{need.policy}]" if len(found.needs) > 1 else ""
        lines.append(start + ways[0] + owner)
        lines += [f"or {way}" for way in ways[1:]]
    return lines


def show_outcome(name: str, found: Outcome, width: int) -> None:
    """One row of `where`."""
    lines = outcome_text(found)
    kind = click.style(f"{found.kind:<7}", fg=_COLOURS[found.kind])
    click.echo(f"  {name:<{width}}  {kind} {lines[0] if lines else ''}")
    for line in lines[1:]:
        click.echo(f"  {'':<{width}}          {line}")


def outcome_record(found: Outcome) -> dict[str, object]:
    """An outcome as JSON-able data."""
    from flowengine.policy.explain import duty_record

    return {
        "answer": found.kind,
        "rules": list(found.rules),
        "obligations": [duty_record(duty) for duty in found.duties],
        "needs": [
            {
                "policy": need.policy,
                "rules": list(need.rules),
                "any_of": [list(way) for way in need.alternatives],
            }
            for need in found.needs
        ],
        "never": [
            {"policy": never.policy, "because": never.because, "lines": list(never.lines)}
            for never in found.never
        ],
    }


def show_decision(engine: Engine, decision: Decision, languages: Sequence[str], auditor: bool) -> None:
    """One decision line by line: what was decided, each rule with its lines, what is missing, what would permit.

    With Chinese alone, lines are sentences in Chinese; otherwise they stand as the files have them.
    """
    from flowengine.policy.explain import explain, record

    plain = record(engine, decision, auditor)
    for language in languages:
        click.echo(click.style(explain(engine, decision, language), fg="green" if decision.permit else "red"))
    words = _Words(engine, chinese=tuple(languages) == ("zh",))
    policies = plain["policies"]
    assert isinstance(policies, list)
    silent = []
    for policy in policies:
        if policy["result"] == "not-applicable":
            silent.append(policy["id"])
            continue
        click.echo()
        click.echo(
            f"{click.style(policy['id'], bold=True)} {policy['version']}: {words.of(policy['result'])}"
        )
        for line, truth in policy["scope"]:
            if truth != "true":
                _show_line(words.line(line), truth, f"  {words.of('scope')} ")
        for rule in policy["rules"]:
            fires = words.of("fires" if rule["fires"] else "does not fire")
            click.echo(f"  {words.of(rule['effect'])} {rule['rule'].split('/', 1)[1]}: {fires}")
            for index, (line, truth) in enumerate(rule["lines"]):
                before = f"    {words.of('unless')} " if index >= rule["unless_from"] else "    "
                _show_line(words.line(line), truth, before)
    if silent:
        click.echo(f"\n{words.of('not about this data')}: {', '.join(silent)}")
    _show_rest(engine, plain)


class _Words:
    """Words and lines in the language of the answer."""

    _CHINESE: Final = {
        "permit": "允许", "deny": "拒绝", "forbid": "禁止", "require": "要求", "fires": "触发", "scope": "适用范围",
        "does not fire": "未触发", "unless": "除非", "not about this data": "与该数据无关",
    }  # fmt: skip

    def __init__(self, engine: Engine, chinese: bool) -> None:
        from flowengine.policy.model import leaves

        self._engine = engine
        self._chinese = chinese
        self._lines = {
            line.text: line
            for policy in engine.enforced
            for part in (
                *policy.scope,
                *(part for rule in policy.rules for part in (*rule.when, *rule.unless)),
            )
            for line in leaves(part)
        }

    def of(self, word: str) -> str:
        return self._CHINESE.get(word, word) if self._chinese else word

    def line(self, text: str) -> str:
        from flowengine.policy.phrases import line_text

        found = self._lines.get(text)
        return line_text(found, self._engine.policies, "zh") if self._chinese and found is not None else text


def _show_line(line: str, truth: str, before: str) -> None:
    mark, colour = _MARKS[truth]
    click.echo(f"{before}{click.style(mark, fg=colour)} {line}")


def _show_rest(engine: Engine, plain: dict[str, object]) -> None:
    missing = plain["missing"]
    assert isinstance(missing, list)
    if missing:
        click.echo("\nmissing facts, and who may say them:")
        for name in missing:
            attribute = engine.policies.attributes.get(name)
            who = (
                ", ".join(attribute.by)
                if attribute is not None
                else "ledger"
                if name.startswith("ledger")
                else "approval"
            )
            click.echo(f"  {name}  ({who})")
    would_allow = plain.get("would_allow")
    if isinstance(would_allow, list) and plain["decision"] == "deny":
        if not would_allow:
            click.echo("\nno change of the request, the site or an agreement would permit this")
        for index, remedy in enumerate(would_allow):
            first = (
                "it would be permitted with"
                if remedy["kind"] == "assert"
                else "with another site or request:"
            )
            click.echo(f"\n{first if index == 0 else 'or with'}")
            for line, who in zip(remedy["lines"], remedy["who"], strict=True):
                click.echo(f"  {line}" + (f"  ({', '.join(who)})" if who else ""))
    notes = plain["notes"]
    assert isinstance(notes, list)
    for note in notes:
        click.echo(f"\nnote: {note}")
