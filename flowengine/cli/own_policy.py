"""Policy without a federation: `--policy`, `--label`, `--site-facts` of `flow cp`, `flow sync` and `flow serve`.

The same evaluator as between sites, over facts that whoever runs the command gives. Each command decides its own end, and
the other one where its facts are given; between two hosts both may do so, each by policies of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click
import msgspec

from flowengine.errors import Denied, NotFound, ProtocolError, UsageError

if TYPE_CHECKING:
    from flowengine.policy.asking import Matter, Place
    from flowengine.policy.evaluate import Engine

__all__ = ["OwnPolicy", "Side", "policy_options", "read_own_policy"]

CAN: Final = frozenset({"encrypt.flight", "encrypt.end-to-end", "suite.aes-256-gcm"})
"""Duties that a command carries out: nothing that would have to be done after it has ended."""
Side = Literal["here", "there"]
_MAX_STATED: Final = 100
_MAX_WORD: Final = 200


def policy_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a command that asks policy by itself."""
    options = [
        click.option("--policy", type=click.Path(), metavar="DIR", help="Ask the policies of DIR, or of a bundle, before anything moves."),
        click.option("--site-facts", type=click.Path(), metavar="FILE", help="With --policy: facts of this host and the other, as [here] and [there] of a TOML file."),
        click.option("--contract", "contracts", multiple=True, metavar="ID", help="With --policy: a contract that the data is under; may be repeated."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


class OwnPolicy(msgspec.Struct, frozen=True):
    """What a command asks before it moves anything.

    Attributes:
        here, there: the two ends; None where nothing is known of the other.
        labels, contracts, purpose: of the data, as they were given.
    """

    engine: Engine
    here: Place
    there: Place | None
    labels: tuple[str, ...]
    contracts: tuple[str, ...]
    purpose: str

    def check(self, source: Side, target: Side, path: str, *, mine: Sequence[Side] = ("here",)) -> None:
        """Refuse to move data from one end to the other unless policy permits it.

        Args:
            path: of the data at the source, absolute.
            mine: the ends that have to be decided here; the other is where its facts are known.

        Raises:
            Denied: policy does not permit it (reason "policy-denied").
        """
        for use, side in (("release", source), ("land", target)):
            place = self.here if side == "here" else self.there
            if place is None and side in mine:
                place = self.here
            if place is not None:
                self._decide(
                    use, place, self._matter(source, target, path, self.there or _else(self.here, mine))
                )

    def stated(self, labels: Sequence[str], contracts: Sequence[str], purpose: str) -> OwnPolicy:
        """The same with what the other end states of its data, which only adds.

        Its purpose counts where none was given here.

        Raises:
            ProtocolError: it states more than anybody would.
        """
        words = [*labels, *contracts, purpose]
        if max(len(labels), len(contracts)) > _MAX_STATED or any(len(word) > _MAX_WORD for word in words):
            raise ProtocolError(
                f"the other end states more than {_MAX_STATED} labels or contracts, or one of more than {_MAX_WORD} letters"
            )
        return msgspec.structs.replace(
            self,
            labels=tuple(dict.fromkeys((*self.labels, *labels))),
            contracts=tuple(dict.fromkeys((*self.contracts, *contracts))),
            purpose=self.purpose or purpose,
        )

    def _matter(self, source: Side, target: Side, path: str, there: Place) -> Matter:
        from flowengine.policy.asking import Matter
        from flowengine.policy.labels import data_statements

        now = int(time.time())
        at = {"here": self.here, "there": there}
        data = data_statements(
            self.engine.policies, (), at[source].name, path, now, added=self.labels, contracts=self.contracts
        )
        return Matter(tuple(data), at[target], _account(), self.purpose)

    def _decide(self, use: str, place: Place, matter: Matter) -> None:
        from flowengine.policy import reasons
        from flowengine.policy.asking import ask
        from flowengine.policy.explain import explain

        decision = ask(self.engine, use, place, matter, int(time.time())).decision
        if decision.permit:
            return
        why = reasons(decision)
        missing = f" Missing: {', '.join(why.missing)}." if why.missing else ""
        raise Denied(
            f"policy does not permit to {use} these data at {place.name}: "
            f"{explain(self.engine, decision)}{missing}",
            hint="flow policy explain says what would make it legal; --label and --site-facts say what is known",
            reason="policy-denied",
            use=use,
            site=place.name,
            rule=list(why.because),
            missing=list(why.missing),
        )


def _else(here: Place, mine: Sequence[Side]) -> Place:
    """The other end where nothing is said of it: this host, where both ends are on it, or nobody that is known."""
    from flowengine.policy.asking import Place

    return here if "there" in mine else Place("")


def _account() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def read_own_policy(
    policy: str | None,
    labels: Sequence[str],
    contracts: Sequence[str],
    purpose: str,
    site_facts: str | None,
) -> OwnPolicy | None:
    """What the options say; None without --policy.

    Raises:
        UsageError: options that need --policy stand without it.
        PolicyInvalid: policies or facts cannot be meant; all of it is told.
    """
    if policy is None:
        if given := [
            name for name, value in (("--site-facts", site_facts), ("--contract", contracts)) if value
        ]:
            raise UsageError(f"{given[0]} needs --policy", hint="name the folder of the policies")
        return None
    from flowengine.cli.policy_files import load_policies
    from flowengine.policy.asking import Place
    from flowengine.policy.evaluate import Engine

    policies = load_policies(Path(policy))
    sites = dict(policies.sites)
    names: dict[str, str] = {}
    for side, site in _read_facts(site_facts, policies).items():
        pinned = policies.sites.get(site.name)
        if pinned is not None:
            site = replace(
                site, facts={**pinned.facts, **site.facts}, recipient={**pinned.recipient, **site.recipient}
            )
        sites[site.name] = site
        names[side] = site.name
    engine = Engine(replace(policies, sites=sites))
    here = Place(names.get("here", "here"), can=CAN)
    there = Place(names["there"], can=CAN) if "there" in names else None
    return OwnPolicy(engine, here, there, tuple(labels), tuple(contracts), purpose)


def _read_facts(file: str | None, policies: Any) -> dict[str, Any]:
    """The sites of --site-facts by side."""
    if file is None:
        return {}
    from flowengine.policy.declarations import subject_facts
    from flowengine.policy.model import Site
    from flowengine.policy.problems import Problem, refuse
    from flowengine.policy.reader import read_source

    try:
        content = Path(file).read_bytes()
    except FileNotFoundError:
        raise NotFound(f"there is no file {file}", hint="--site-facts names a TOML file") from None
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None
    problems: list[Problem] = []
    source = read_source(file, content, problems)
    found: dict[str, Any] = {}
    if source is not None:
        root = source.root(("here", "there"))
        for side in root.data:
            if side not in ("here", "there"):
                continue
            table = root.table(side)
            name = table.text("name", side)
            facts = subject_facts(table, "site", policies.attributes, ("name", "recipient"))
            recipient = subject_facts(table.table("recipient"), "recipient", policies.attributes)
            found[side] = Site(name, {"site.id": name, **facts}, None, "", recipient)
        if "here" in found and "there" in found and found["here"].name == found["there"].name:
            problems.append(Problem(file, 1, "[here] and [there] have one name", "give each its own"))
    refuse(problems)
    return found
