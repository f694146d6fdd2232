"""Whether a source's signed release is to be believed: by what this site itself knows of the data."""

from __future__ import annotations

from collections.abc import Sequence

from flowengine.errors import AuthenticationError, Denied, TemporaryError
from flowengine.policy.labels import Labelling
from flowengine.transfer.sites import SiteTrust
from flowengine.trust.grant import Party
from flowengine.trust.grant_checks import arrival_use
from flowengine.trust.release import Release, check_release
from flowengine_agent.permits import Carried
from flowengine_agent.policies import Policies

__all__ = ["checked_release"]


def checked_release(
    trust: SiteTrust,
    policies: Policies,
    carried: Carried,
    route: Sequence[Party],
    document: bytes,
    here: int,
    now: float,
    *,
    ends: bool,
) -> tuple[Release, list[Labelling]]:
    """The source's release, and the label statements that this site holds on the data.

    Args:
        route: all sites from the source to the target; `here` is this site's place on it.
        document: the release as it came.
        now: Unix seconds.
        ends: whether what began under the release comes to its end: it may have run out meanwhile.

    Raises:
        AuthenticationError: it is missing, forged or another's, or leaves out what this site knows of the data.
        TemporaryError: it names statements that have not arrived here yet.
        Denied: this site may only hold the data, and the source does not seal them.
    """
    me = trust.identity.party
    release, _ = check_release(
        document,
        trust.identity.ca_pem,
        now,
        transfer=carried.transfer,
        task=carried.task,
        fence=carried.fence,
        route=route,
        source_path=carried.source_path,
        target_path=carried.target_path,
        revoked=trust.revoked,
        began=ends,
    )
    labellings = policies.labellings(route[0].site, carried.source_path, now)
    named = {digest.hex() for digest in release.statements}
    known = {one.digest for one in labellings}
    if named - known:
        raise TemporaryError(
            f"{route[0].site} decided by label statements that have not arrived at {me.site} yet",
            hint="it is tried again; flow label ls shows which sites have which",
            reason="policy-behind",
        )
    left_out = [one for one in labellings if one.digest not in named]
    untold = frozenset().union(*(one.labels for one in labellings)) - frozenset(release.labels)
    if left_out or untold:
        what = ", ".join(f"{one.owner}'s on {one.path}" for one in left_out) or ", ".join(sorted(untold))
        raise AuthenticationError(
            f"the release of {route[0].site} leaves out label statements on these data: {what}",
            hint="its agent has not got them, or withholds them: flow label ls",
            reason="release-stripped",
        )
    if arrival_use(carried.required) == "hold" and here == len(route) - 1 and not release.sealed:
        raise Denied(
            f"{me.site} may only hold these data, and {route[0].site} does not say that it seals them",
            hint="its agent has no policies, or is too old: flow policy bundle status",
            reason="not-sealed",
        )
    return release, labellings
