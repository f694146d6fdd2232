"""Looks at folders here, asked for by the coordinator: names and sizes are data too, and what is labelled is decided on.

Of what no statement and no inheritance speaks, and no owner of the bundle claims, a look tells as it would without policies:
there is nothing to decide by. Nothing but names, kinds, counts, sizes and times is ever told.
"""

from __future__ import annotations

import os
import time
from typing import Final

from flowengine.api.agents import Answer, LookCommand, MeasureCommand
from flowengine.errors import Denied, FlowError
from flowengine.evidence.decisions import Asked, decision_body
from flowengine.evidence.private import Private
from flowengine.policy.asking import Matter, Place, ask
from flowengine.policy.explain import explain
from flowengine.policy.labels import data_statements, uncovered
from flowengine_agent.site import Site

__all__ = ["look"]

_COUNT_SHARE: Final = 0.8
"""Share of the time for an answer that a count may take."""
ASKER: Final = "coordinator"
"""For whom a look is; a bundle may pin facts of a site of that name."""


async def look(site: Site, asked: LookCommand | MeasureCommand) -> Answer:
    """The answer to a look at a folder, or to a count below it; what is wrong, or denied, is in the answer.

    It is had with the rights of the account that the requester is mapped to.
    """
    try:
        hands = site.acting.hands(asked.requester, asked.tenant)
        await _decide(site, asked.path, hands.account)
    except FlowError as error:
        return Answer(reason=error.reason, message=error.message, complete=False)
    if isinstance(asked, MeasureCommand):
        return await hands.count(asked.path, asked.within_s * _COUNT_SHARE)
    return await hands.look(asked.path)


async def _decide(site: Site, path: str, account: str) -> None:
    """Ask whether what is labelled there may be told.

    Raises:
        Denied: it may not, or that cannot be recorded.
    """
    policies = site.gate.policies
    found = policies.in_force
    if found is None:
        if policies.required or policies.problem:
            raise Denied(
                f"site {site.name} decides by policies and has none that it can use", reason="policy-missing"
            )
        return
    now = int(time.time())
    labellings = policies.labellings(site.name, path, now)
    inherited = policies.inherited(path)
    if not labellings and not inherited and not uncovered(found.policies, labellings, site.name, path):
        return
    if found.is_expired(now):
        raise Denied(f"the policies in force at {site.name} have expired", reason="policy-expired")
    data = data_statements(found.policies, labellings, site.name, path, now, inherited=inherited)
    me = site.gate.me
    here = Place(me.site, me.key_sha256, (), site.gate.can)
    judged = ask(found.engine, "release", here, Matter(tuple(data), Place(ASKER)), now)
    await site.gate.activated(found)
    decision_id = os.urandom(8).hex()
    asked = Asked(
        point="look", phase="before-first-byte", site=site.name, data=f"{site.name}:{path}",
        bundle=found.bundle.digest, recipient=ASKER,
    )  # fmt: skip
    body = decision_body(found.engine, judged.decision, asked, decision_id=decision_id, resolved=judged.known)
    await site.gate.recorder.keep(
        ("decision", body | ({"account": Private("account", account)} if account else {}))
    )
    if not judged.decision.permit:
        raise Denied(
            f"policy at {site.name} does not permit to tell what lies at {path}: "
            f"{explain(found.engine, judged.decision)}",
            hint=f"names are data too; decision {decision_id} is in the evidence of {site.name}",
            reason="policy-denied",
        )
