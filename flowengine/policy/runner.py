"""Running test files: every case, every fact removed in turn, coverage of rules and lines.

The free mutation test: a deny must stay a deny when any one fact is taken away. A rule needs a case where it
decides and one where it does not; a line should have been seen true, false and unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flowengine.policy.cases import Case, Matrix, NeverCase, TestFile
from flowengine.policy.evaluate import Decision, Engine
from flowengine.policy.model import FALSE, TRUTH_NAMES, Policy, PolicySet, Value
from flowengine.policy.outcomes import where
from flowengine.policy.reasons import Reasons, reasons

__all__ = ["Coverage", "Report", "Result", "run"]


@dataclass(frozen=True, slots=True)
class Result:
    """One test: what it is called and what was wrong, nothing if it passed."""

    file: str
    line: int
    name: str
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems


@dataclass
class Coverage:
    """What the cases made of each rule and line."""

    decided: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    truths: dict[tuple[str, str], set[int]] = field(default_factory=dict)

    def see(self, decision: Decision, why: Reasons | None) -> None:
        """Note a decision; with `why`, also which rules decided."""
        for trace in decision.traces:
            for line, truth in zip(trace.compiled.scope_lines, trace.scope_truths, strict=True):
                if line.left.name != "time.now":  # the dates of the header are not what tests are for
                    self.truths.setdefault((trace.policy.id, line.text), set()).add(truth)
            for rule in trace.rules:
                for line, truth in zip(rule.compiled.lines, rule.truths, strict=True):
                    self.truths.setdefault((rule.rule.name, line.text), set()).add(truth)
                if why is not None and not rule.fires:
                    self.silent.add(rule.rule.name)
            if trace.scope == FALSE and why is not None:
                self.silent |= {rule.rule.name for rule in trace.compiled.rules}
        for name in why.because if why is not None else ():
            self.decided |= {rule for rule in self._named(decision) if rule in name.split(" ")}

    @staticmethod
    def _named(decision: Decision) -> Iterable[str]:
        return [rule.rule.name for trace in decision.traces for rule in trace.rules]


@dataclass
class Report:
    """What came out of running test files."""

    results: list[Result] = field(default_factory=list)
    removals: int = 0
    coverage: Coverage = field(default_factory=Coverage)
    untested: list[str] = field(default_factory=list)
    unseen_lines: list[tuple[str, str, str]] = field(default_factory=list)
    lines: int = 0

    @property
    def failed(self) -> list[Result]:
        """The tests that did not pass."""
        return [result for result in self.results if not result.passed]


def run(policies: PolicySet, files: Sequence[TestFile], at: int | None = None) -> Report:
    """Run test files.

    Args:
        policies: All policies; a file's `policies` are evaluated as enforced, whatever their mode.
        files: The files.
        at: Another time than the files' own, to find out what expires.
    """
    report = Report()
    named: dict[str, None] = {}
    for file in files:
        engine = Engine(policies, enforce=file.policies)
        named |= dict.fromkeys(file.policies)
        for case in file.cases:
            report.results.append(_run_case(engine, file, case, at, report))
        for never in file.never:
            report.results.append(_run_never(engine, file, never, at))
        for matrix in file.matrices:
            report.results.append(_run_matrix(engine, file, matrix, at))
    _cover(report, [policy for policy in policies.policies if policy.id in named])
    return report


def _run_case(engine: Engine, file: TestFile, case: Case, at: int | None, report: Report) -> Result:
    now = at if at is not None else case.now if case.now is not None else file.now
    facts: dict[str, Value] = {"time.now": now, **case.facts}
    if at is not None:
        facts["time.now"] = at
    decision = engine.decide(case.use, facts, case.can)
    why = reasons(decision)
    report.coverage.see(decision, why)
    problems = _compare(case, decision, why)
    for name in facts:
        without = {key: value for key, value in facts.items() if key != name}
        mutant = engine.decide(case.use, without, case.can)
        report.removals += 1
        report.coverage.see(mutant, None)
        if mutant.permit and not decision.permit:
            problems.append(
                f"without the fact {name} the deny becomes a permit by {', '.join(reasons(mutant).because)}"
            )
    return Result(file.path, case.line, case.name, tuple(problems))


def _compare(case: Case, decision: Decision, why: Reasons) -> list[str]:
    found = "permit" if decision.permit else "deny"
    problems = []
    if found != case.expect:
        detail = f"because {', '.join(why.because)}"
        detail += f"; failing: {'; '.join(why.failing)}" if why.failing else ""
        detail += f"; missing: {', '.join(why.missing)}" if why.missing else ""
        return [f"expected {case.expect}, found {found} ({why.kind}) {detail}"]
    duties = [duty.type for duty in decision.duties]
    for what, expected, actual in (
        ("because", case.because, why.because),
        ("obliges", case.obliges, duties),
        ("failing", case.failing, why.failing),
        ("missing", case.missing, why.missing),
    ):
        found = ", ".join(actual) or "nothing"
        problems += [
            f"{what}: expected {item!r}, found {found}"
            for item in expected
            if not any(item == other or (" " in item and item in other) for other in actual)
        ]
    if case.expect == "permit" and case.obliges:
        problems += [f"obliges: {duty!r} was not expected" for duty in duties if duty not in case.obliges]
    return problems


def _run_never(engine: Engine, file: TestFile, never: NeverCase, at: int | None) -> Result:
    problems = []
    facts = dict(never.facts)
    if at is not None:
        facts["time.now"] = at
    if not never.sites:
        problems.append("no site fits the constraints, so nothing was checked")
    for name, site in never.sites.items():
        found = where(engine, never.use, {**facts, **site}, None, never.partial)
        if found.kind != "never":
            detail = ", ".join(found.rules) or " and ".join(
                " or ".join("; ".join(way) for way in need.alternatives) for need in found.needs
            )
            problems.append(f"{name}: {found.kind}: {detail}")
    shown = [*problems[:3], f"and {len(problems) - 3} more sites"] if len(problems) > 4 else problems
    return Result(file.path, never.line, never.name, tuple(shown))


def _run_matrix(engine: Engine, file: TestFile, matrix: Matrix, at: int | None) -> Result:
    problems = []
    now = file.now if at is None else at
    for row, golden in zip(matrix.rows, matrix.table, strict=True):
        for col, expected in zip(matrix.cols, golden, strict=True):
            site = file.sites[col]
            facts = {"time.now": now, **file.data[row], **site.facts}
            found = where(engine, matrix.use, facts, site.can).kind
            if found != expected:
                problems.append(f"{row} at {col}: expected {expected}, found {found}")
    return Result(file.path, matrix.line, matrix.name, tuple(problems))


def _cover(report: Report, policies: Sequence[Policy]) -> None:
    coverage = report.coverage
    for policy in policies:
        for rule in policy.rules:
            if rule.name not in coverage.decided:
                report.untested.append(f"{rule.name}: no test where it decides")
            if rule.name not in coverage.silent:
                report.untested.append(f"{rule.name}: no test where it does not fire")
    for (owner, text), seen in coverage.truths.items():
        report.lines += 1
        report.unseen_lines += [
            (owner, text, name) for truth, name in enumerate(TRUTH_NAMES) if truth not in seen
        ]
