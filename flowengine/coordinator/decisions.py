"""What residency policy says to a request before anything moves, and what a transfer would be.

The coordinator's answer narrows only: each agent still checks its grant and decides for itself by the same rules and
facts (`flowengine.policy.asking`). What the policies' own `sites.toml` pins of a site beats what the catalogue says.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec
from sqlalchemy import Connection, select

from flowengine.api.transfers import Decision, TransferRequest
from flowengine.coordinator.database.catalogue import decode_facts
from flowengine.coordinator.database.policies import believed_agreements, inherited_by, newest
from flowengine.coordinator.database.tables import AnyRow, bundles, labels
from flowengine.coordinator.knowledge import Known, know
from flowengine.errors import AuthenticationError, NotFound, UsageError
from flowengine.policy import Engine, PolicySet, Statement, load, reasons, resolve
from flowengine.policy.agreements import Agreement, agreement_statements
from flowengine.policy.asking import Judged, Matter, Place, ask
from flowengine.policy.bundle import build_unversioned, open_bundle
from flowengine.policy.duties import Terms
from flowengine.policy.explain import explain
from flowengine.policy.labels import data_statements, overlaps, relevant
from flowengine.policy.model import FALSE, Value
from flowengine.policy.parse import DEFAULT_MAX_OFFLINE_S
from flowengine.policy.vocabulary import SOURCES
from flowengine.trust.labels import verify_labels

__all__ = ["Decider", "Rules", "Verdict"]

MAX_FILES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Rules:
    """Policies to decide by: those in force, or none.

    Attributes:
        digest: of them, hexadecimal.
        not_after: seconds since 1970 from which on nothing starts under them; None: never.
        content, archive: of them, as an archive to be kept with what they decided, and its digest.
    """

    engine: Engine | None = None
    digest: str = ""
    version: int = 0
    not_after: int | None = None
    content: bytes = b""
    archive: str = ""

    def owners(self) -> dict[str, bytes]:
        """Keys of the data owners whom they name."""
        if self.engine is None:
            return {}
        return {name: owner.key for name, owner in self.engine.policies.owners.items()}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What policy says to a request.

    Attributes:
        digest: of the policies; empty without any.
        labels, contracts: of the data, as they were decided on.
        rules: what decided.
        judged: every decision for the record: use and site, and what it rests on; None where it needed no rule.
        about: what is known of it for each recipient: counters, approvals.
        requestable: whether approvals would turn every denial into a permit.
    """

    decisions: list[Decision]
    digest: str = ""
    labels: frozenset[str] = frozenset()
    contracts: frozenset[str] = frozenset()
    rules: Rules = Rules()
    judged: tuple[tuple[str, str, Judged | None], ...] = ()
    about: Mapping[str, Known] = field(default_factory=dict)
    requestable: bool = False


class Decider:
    """Decides requests by the bundle in force, before there is one by the policies of a directory.

    Without any policy nothing is forbidden, and decisions say so.
    """

    def __init__(self, rules: Rules | None = None) -> None:
        self._first = rules or Rules()
        self._compiled: Rules | None = None
        self._agreed: tuple[tuple[int, int], list[Agreement]] = ((-1, -1), [])
        self._offline: dict[int, dict[str, int]] = {}

    @classmethod
    def load(cls, path: str) -> Decider:
        """Decide by the files of a directory or a bundle until a bundle is activated.

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
        content = Path(path).read_bytes() if Path(path).is_file() else build_unversioned(files)
        archive = open_bundle(content).digest
        return cls(Rules(Engine(policies), digest.hexdigest(), content=content, archive=archive))

    def at(self, connection: Connection) -> Rules:
        """The policies in force, as the database has them: any coordinator may have activated them."""
        version, _ = newest(connection)
        if not version:
            return self._first
        if self._compiled is None or self._compiled.version != version:
            row = connection.execute(select(bundles).where(bundles.c.version == version)).one()
            opened = open_bundle(row.content)
            engine = Engine(load(opened.files))
            self._compiled = Rules(
                engine, opened.digest.partition(":")[2], version, opened.not_after, row.content, opened.digest
            )
        return self._compiled

    def max_offline_s(self, connection: Connection, version: int, verdict: Verdict) -> float:
        """For how long a site that decides by a version goes on, without a word from here, with what was decided on.

        Args:
            version: of the bundle that the site has said it decides by.
        """
        known = self._offline.get(version)
        if known is None:
            row = connection.execute(select(bundles.c.content).where(bundles.c.version == version)).first()
            found = load(open_bundle(row.content).files) if row is not None else None
            if found is None and verdict.rules.engine is not None:
                found = verdict.rules.engine.policies
            known = {one.id: one.max_offline_s for one in found.policies} if found is not None else {}
            self._offline[version] = known
        traces = [trace for _, _, on in verdict.judged if on is not None for trace in on.decision.traces]
        applies = {trace.policy.id for trace in traces if trace.scope != FALSE}
        # Those that are new say nothing of a site that has not heard of them.
        return min((known[name] for name in applies if name in known), default=DEFAULT_MAX_OFFLINE_S)

    def decide(
        self,
        connection: Connection,
        request: TransferRequest,
        rows: Mapping[str, AnyRow],
        user: str,
        now: float,
        tasks: Sequence[str] = (),
    ) -> Verdict:
        """The decisions on all uses of the data.

        Args:
            tasks: for each target its task, where it is decided anew: it counts once, whatever of it is in the counters
                already.
        """
        targets = list(dict.fromkeys(target.site for target in request.targets))
        task_at = dict.fromkeys(targets, "")
        task_at |= {target.site: task for target, task in zip(request.targets, tasks, strict=False)}
        asked = [("release", request.source.site, target) for target in targets]
        asked += [("land", target, target) for target in targets]
        rules = self.at(connection)
        if rules.engine is None:
            uses = dict.fromkeys((use, site) for use, site, _ in asked)
            return Verdict([Decision(use=use, site=site, verdict="none") for use, site in uses])
        data = _data(connection, rules, request, int(now))
        decisions: dict[tuple[str, str], Decision] = {}
        judged: list[tuple[str, str, Judged | None]] = []
        about: dict[str, Known] = {}
        requestable = True
        for use, site, recipient in asked:
            if recipient not in about:
                about[recipient] = self._know(
                    connection, rules, rows[recipient], data, request, user, int(now), task_at[recipient]
                )
            found, on, may_be_approved = self._decide(rules, use, rows[site], about[recipient], int(now))
            if use == "land" and found.verdict != "permit" and not may_be_approved:
                # Where it may not be read it may yet be kept, if a rule asks for just that: sealed where it rests.
                held, held_on, held_approvable = self._decide(
                    rules, "hold", rows[site], about[recipient], int(now)
                )
                asks = held_on is not None and Terms.of(held_on.decision.duties).at_rest
                if asks and (held.verdict == "permit" or held_approvable):
                    use, found, on, may_be_approved = "hold", held, held_on, held_approvable
            judged.append((use, site, on))
            requestable = requestable and (found.verdict == "permit" or may_be_approved)
            before = decisions.get((use, site))
            if before is None or before.verdict == "permit":  # what one recipient must not have is denied
                decisions[use, site] = found
        known = resolve(rules.engine.policies, data, int(now)).facts
        labels, contracts = known.get("data.labels"), known.get("data.contracts")
        return Verdict(
            list(decisions.values()),
            rules.digest,
            labels if isinstance(labels, frozenset) else frozenset(request.labels),
            contracts if isinstance(contracts, frozenset) else frozenset(request.contracts),
            rules,
            tuple(judged),
            about,
            requestable,
        )

    def _agreements(self, connection: Connection, policies: PolicySet) -> list[Agreement]:
        """What authorities signed; signatures are checked once for each change of bundle or statements."""
        now = newest(connection)
        if self._agreed[0] != now:
            self._agreed = now, believed_agreements(connection, policies.authorities)
        return self._agreed[1]

    def _know(
        self,
        connection: Connection,
        rules: Rules,
        recipient: AnyRow,
        data: Sequence[Statement],
        request: TransferRequest,
        user: str,
        now: int,
        task: str = "",
    ) -> Known:
        """All that is known of a request for one recipient."""
        assert rules.engine is not None
        place = _place(rules.engine.policies, recipient, now)
        source = (request.source.site, request.source.path)
        policies = rules.engine.policies
        agreed = agreement_statements(policies, self._agreements(connection, policies), source, place, now)
        matter = Matter(tuple(data), place, user, request.purpose, tuple(agreed))
        return know(connection, rules.engine, source, place, matter, now, task)

    def may_relay(
        self,
        connection: Connection,
        request: TransferRequest,
        rows: Mapping[str, AnyRow],
        user: str,
        now: float,
        through: Iterable[str],
    ) -> set[str]:
        """Those of some sites that may pass the data on, sealed, to every target."""
        rules = self.at(connection)
        if rules.engine is None:
            return set(through)
        data = _data(connection, rules, request, int(now))
        targets = {target.site for target in request.targets}
        about = {at: self._know(connection, rules, rows[at], data, request, user, int(now)) for at in targets}
        return {
            site
            for site in through
            if all(
                self._decide(rules, "relay", rows[site], about[at], int(now))[0].verdict == "permit"
                for at in targets
            )
        }

    @staticmethod
    def _decide(
        rules: Rules, use: str, row: AnyRow, about: Known, now: int
    ) -> tuple[Decision, Judged | None, bool]:
        """The decision on a use at a site, what it rests on, and whether approvals would turn a denial into a permit."""
        engine = rules.engine
        assert engine is not None
        if rules.not_after is not None and rules.not_after <= now:
            expired = Decision(
                use=use,
                site=row.name,
                verdict="deny",
                rule="policy-expired",
                text=f"the policies in force, version {rules.version}, have expired",
                policy_digest=rules.digest,
            )
            return expired, None, False
        place = _place(engine.policies, row, now)
        judged = ask(engine, use, place, about.matter, now)
        found = judged.decision
        names = [rule.rule.name for rule in found.chosen] if found.permit else list(reasons(found).because)
        missing = about.missing(found, now)
        may_be_approved = bool(missing)
        if not found.permit and about.plenty is not None:
            may_be_approved = ask(engine, use, place, about.plenty, now).decision.permit
        text = explain(engine, found)
        decision = Decision(
            use=use,
            site=row.name,
            verdict="permit" if found.permit and not missing else "deny",
            rule=", ".join(names),
            text=f"{text} People have to approve it first: {'; '.join(missing)}." if missing else text,
            policy_digest=rules.digest,
            duties=[duty.type for duty in found.duties],
        )
        return decision, judged, may_be_approved


def _data(connection: Connection, rules: Rules, request: TransferRequest, now: int) -> list[Statement]:
    """What is said about the data of a request: by its owners, by what it came from, by who asks."""
    assert rules.engine is not None
    policies, source = rules.engine.policies, request.source
    labellings = []
    owners = rules.owners()
    for row in connection.execute(
        select(labels.c.path, labels.c.document).where(labels.c.site == source.site)
    ):
        if overlaps(row.path, source.path):
            with contextlib.suppress(AuthenticationError):  # of an owner who is none any more
                labellings.append(verify_labels(row.document, owners))
    return data_statements(
        policies,
        relevant(policies, labellings, source.site, source.path, now),
        source.site,
        source.path,
        now,
        added=request.labels,
        contracts=request.contracts,
        inherited=inherited_by(connection, source.site, source.path),
    )


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
    can = None if row.can is None else frozenset(msgspec.json.decode(row.can, type=list[str]))
    return Place(row.name, row.key_sha256 or "", tuple(said), can)


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
