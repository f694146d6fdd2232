"""What the coordinator puts on the record of its own decisions, in the transaction of what they are about."""

from __future__ import annotations

from flowengine.api.transfers import TransferRequest
from flowengine.coordinator.database.evidence import Chain, keep_bundle, last_activated
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.decisions import Rules, Verdict
from flowengine.evidence.bodies import activate_body, refusal_body
from flowengine.evidence.decisions import Asked, decision_body
from flowengine.policy.bundle import open_bundle

__all__ = ["record_verdict"]


def record_verdict(
    writing: Writing, chain: Chain, verdict: Verdict, request: TransferRequest, transfer: str, user: str
) -> None:
    """Record every decision on a request; nothing where there are no policies."""
    rules = verdict.rules
    if rules.engine is None:
        return
    bundle = _kept(writing, chain, rules)
    data = f"{request.source.site}:{request.source.path}"
    for use, site, judged in verdict.judged:
        decision_id = chain.rng(8).hex()
        if judged is None:
            why = next(one.text for one in verdict.decisions if (one.use, one.site) == (use, site))
            body = refusal_body(
                decision_id, use, site, data, "plan", "plan", "policy-expired", why,
                bundle=bundle, transfer=transfer,
            )  # fmt: skip
        else:
            asked = Asked(
                point="plan", phase="plan", site=site, data=data, bundle=bundle, transfer=transfer,
                purpose=request.purpose, requester=user,
            )  # fmt: skip
            body = decision_body(
                rules.engine, judged.decision, asked, decision_id=decision_id, resolved=judged.known
            )
        chain.append(writing, "decision", body)


def _kept(writing: Writing, chain: Chain, rules: Rules) -> str:
    """The digest of the policies, which are kept and on the record as activated."""
    before = last_activated(writing.connection)
    if before != rules.archive:
        opened = open_bundle(rules.content)
        keep_bundle(writing, rules.content)
        signers = [(role, key) for role, key, _ in opened.signatures]
        body = activate_body(opened.digest, opened.version, opened.not_after, signers, replaces=before)
        chain.append(writing, "policy.activate", body)
    return rules.archive
