"""What residency policy says to a request before anything moves, and what a transfer would be.

The coordinator's answer narrows only: each agent still checks its grant and decides for itself by the same rules and
facts (`flowengine.policy.asking`). What the policies' own `sites.toml` pins of a site beats what the catalogue says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, select

from flowengine.api.resources import Decision, Plan, PlanRequest, TransferRequest
from flowengine.coordinator.database.catalogue import decode_facts, list_limits
from flowengine.coordinator.database.tables import AnyRow, links, sites
from flowengine.errors import NotFound, UsageError
from flowengine.policy import Engine, PolicySet, Statement, load, reasons
from flowengine.policy.asking import Matter, Place, ask
from flowengine.policy.bundle import open_bundle
from flowengine.policy.explain import explain
from flowengine.policy.labels import data_statements
from flowengine.policy.model import Value
from flowengine.policy.vocabulary import SOURCES
from flowengine.units import format_duration, format_rate

__all__ = ["Decider"]

MAX_FILES: Final = 10_000


class Decider:
    """Decides requests by the policies of a directory; without one nothing is forbidden, and decisions say so."""

    def __init__(self, policies: PolicySet | None = None, digest: str = "") -> None:
        self._engine = None if policies is None else Engine(policies)
        self._digest = digest

    @classmethod
    def load(cls, path: str) -> Decider:
        """Decide by the files of a directory or a bundle.

        Raises:
            NotFound: there is none.
            PolicyInvalid: something in them is wrong; it names every problem.
        """
        files = _read_files(Path(path))
        digest = sha256()
        for name in sorted(files):
            digest.update(sha256(name.encode()).digest() + sha256(files[name]).digest())
        policies = load(files)
        if not policies.policies:
            raise NotFound(
                f"{path} holds no policy", hint="a policy is a .toml file with [policy] and [[rule]]"
            )
        return cls(policies, digest.hexdigest())

    def decide(
        self, request: TransferRequest, rows: Mapping[str, AnyRow], user: str, now: float
    ) -> tuple[list[Decision], str]:
        """The decisions on all uses of the data, and the digest of the policies (hexadecimal)."""
        uses = [("release", request.source.site)]
        uses += [("land", name) for name in dict.fromkeys(target.site for target in request.targets)]
        if self._engine is None:
            return [Decision(use=use, site=site, verdict="none") for use, site in uses], ""
        found = [self._decide(use, request, rows, site, user, int(now)) for use, site in uses]
        return found, self._digest

    def _decide(
        self, use: str, request: TransferRequest, rows: Mapping[str, AnyRow], at: str, user: str, now: int
    ) -> Decision:
        engine = self._engine
        assert engine is not None
        policies = engine.policies
        source, row = request.source, rows[at]
        recipient = at if use == "land" else request.targets[0].site
        matter = Matter(
            tuple(data_statements(policies, (), source.site, source.path, now, added=request.labels)),
            _place(policies, rows[recipient], now),
            user,
            request.purpose,
        )
        judged = ask(engine, use, _place(policies, row, now), matter, now)
        found = judged.decision
        rules = [rule.rule.name for rule in found.chosen] if found.permit else list(reasons(found).because)
        return Decision(
            use=use,
            site=row.name,
            verdict="permit" if found.permit else "deny",
            rule=", ".join(rules),
            text=explain(engine, found),
            policy_digest=self._digest,
            duties=[duty.type for duty in found.duties],
        )

    def plan(self, connection: Connection, asked: PlanRequest, user: str, now: float) -> Plan:
        """Verdict, direct routes, and how long it takes at what is known of the links.

        Raises:
            NotFound: a site is not known.
        """
        request = asked.request
        targets = list(dict.fromkeys(target.site for target in request.targets))
        names = [request.source.site, *targets]
        rows = {row.name: row for row in connection.execute(select(sites).where(sites.c.name.in_(names)))}
        for name in names:
            if name not in rows or rows[name].state == "revoked":
                raise NotFound(f"there is no site {name}", hint="flow site ls lists the sites", site=name)
        decisions, _ = self.decide(request, rows, user, now)
        permitted = not any(decision.verdict == "deny" for decision in decisions)
        rate = _rate(connection, request.source.site, targets, now)
        duration = None
        if rate and asked.size_bytes is not None:
            duration = asked.size_bytes * 8 / rate
        return Plan(
            permitted=permitted,
            decisions=decisions,
            routes=[[request.source.site, target] for target in targets],
            size_bytes=asked.size_bytes,
            rate_bits_per_s=rate,
            duration_s=duration,
            text=_words(permitted, decisions, rate, duration),
        )


def _rate(connection: Connection, source: str, targets: list[str], now: float) -> float | None:
    """What the slowest target gets: its link, or a limit of link or site that holds now; None where nothing is known."""
    known = {
        row.target: float(row.capacity_bits_per_s)
        for row in connection.execute(
            select(links.c.target, links.c.capacity_bits_per_s).where(
                links.c.source == source, links.c.capacity_bits_per_s.is_not(None)
            )
        )
    }
    limits = {
        limit.scope: float(limit.now_bits_per_s)
        for limit in list_limits(connection, now)
        if limit.now_bits_per_s is not None
    }
    leaving = limits.get(f"site:{source}")
    slowest: list[float] = []
    for target in targets:
        shares = [known.get(target), limits.get(f"link:{source}>{target}")]
        if leaving is not None:
            shares.append(leaving / len(targets))
        bounds = [share for share in shares if share is not None]
        if not bounds:
            return None
        slowest.append(min(bounds))
    return min(slowest)


def _words(permitted: bool, decisions: list[Decision], rate: float | None, duration: float | None) -> str:
    if not permitted:
        first = next(decision for decision in decisions if decision.verdict == "deny")
        return f"policy does not permit to {first.use} it at {first.site}: {first.text}"
    if rate is None:
        return "straight to each target; nothing is known yet of a link on the way, so no time can be told"
    if rate == 0:
        return "straight to each target; a limit of 0 holds now, so nothing would move before it changes"
    text = f"straight to each target, at up to {format_rate(rate / 8)}"
    return text + (f": about {format_duration(duration)}" if duration is not None else "")


def _place(policies: PolicySet, row: AnyRow, now: int) -> Place:
    """A site as the catalogue has it."""
    said = []
    for name, fact in decode_facts(row.facts).items():
        attribute = policies.attributes.get(name if "." in name else f"site.{name}")
        if attribute is None or attribute.subject != "site":
            continue
        value: Value
        if isinstance(fact.value, list):
            value = frozenset(fact.value)
        elif attribute.type == "set" and isinstance(fact.value, str):
            value = frozenset([fact.value])
        else:
            value = fact.value
        kind = fact.source.partition(":")[0]
        by = fact.source if kind in SOURCES else f"registry:{fact.source}"
        said.append(Statement(attribute.name, value, by, min(now, int(fact.as_of.timestamp()))))
    return Place(row.name, row.key_sha256 or "", tuple(said))


def _read_files(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return dict(open_bundle(path.read_bytes()).files)
    if not path.is_dir():
        raise NotFound(f"there is no policy directory or bundle at {path}", hint="name one with --policies")
    files: dict[str, bytes] = {}
    for found in sorted(path.rglob("*.toml")):
        relative = found.relative_to(path)
        if found.is_file() and not any(part.startswith(".") for part in relative.parts):
            files[os.fspath(relative)] = found.read_bytes()
        if len(files) > MAX_FILES:
            raise UsageError(
                f"{path} holds more than {MAX_FILES} files", hint="name the policies' own folder"
            )
    return files
