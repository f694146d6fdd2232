"""A small federation's keys, and chains made with them, for tests of evidence."""

from __future__ import annotations

import random
from functools import cache
from itertools import count
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from flowengine.evidence.archive import Evidence
from flowengine.evidence.bodies import activate_body, obligation_body, refusal_body, stop_body
from flowengine.evidence.decisions import Asked, decision_body
from flowengine.evidence.replay import Replayer
from flowengine.evidence.verify import Verdict, verify_chain
from flowengine.policy import Engine, Statement, Value, load, resolve
from flowengine.policy.bundle import build, open_bundle
from flowengine.policy.model import Duty
from flowengine.store.chain_files import ChainFiles
from flowengine.store.evidence_folder import read_evidence_folder
from flowengine.trust.certificates import (
    issue_coordinator,
    issue_site,
    make_authority,
    make_key,
    make_request,
)

__all__ = ["NOW", "Pki", "bundle", "chain_with_decisions", "engine", "judged", "permitted", "pki", "verified"]

NOW = 1_772_452_804.218


class Pki:
    """A CA, and signers of its sites; the same in every run."""

    def __init__(self, seed: int = 11) -> None:
        self._rng = random.Random(seed).randbytes
        self._authority = make_authority(NOW - 1000, self._rng)
        self._signers: dict[str, tuple[bytes, bytes]] = {}
        self.anchors = self._authority.certificate_pem

    def signer(self, site: str) -> tuple[bytes, bytes]:
        """Key (PEM) and certificate (DER) of a site; of the coordinator for an empty name."""
        if site not in self._signers:
            key = make_key(self._rng)
            if site:
                pem = issue_site(self._authority, make_request(key), site, NOW - 1000, self._rng)
            else:
                pem = issue_coordinator(self._authority, key, ["localhost"], NOW - 1000, self._rng)
            der = x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER)
            self._signers[site] = (key, der)
        return self._signers[site]


@cache
def pki(seed: int = 11) -> Pki:
    """The federation of a seed."""
    return Pki(seed)


POLICY = """
[policy]
id = "home"
version = "1"
title = "Stays in France"
owner = "dpo@example.org"
applies_to = ["data.labels includes 'secret'"]
effective = 2026-01-01
review_by = 2027-01-01

[[rule]]
id = "france"
effect = "permit"
on = ["release", "land"]
when = ["site.country is 'FR'", "data.persons < 50_000"]
then = [{delete_after = "180 days", proof = "certificate"}]
why = "Inside France"
why_zh = "位于法国境内"
"""


@cache
def bundle(version: int = 1) -> bytes:
    """A bundle that lets small secrets land in France."""
    labels = b'[label.secret]\ntitle = "Secret"\n'
    return build({"home.toml": POLICY.encode(), "labels.toml": labels}, version, int(NOW) + 86_400)


@cache
def engine() -> Engine:
    """What decides by it."""
    return Engine(load(open_bundle(bundle()).files))


def permitted(country: str = "FR", persons: int = 7) -> list[tuple[str, dict[str, object]]]:
    """The records of a decision on secret data, with the duties that are taken on where it permits."""
    body = judged(country, persons)
    found: list[tuple[str, dict[str, object]]] = [("decision", body)]
    if body["decision"] == "permit":
        duty = Duty("delete_after", (("proof", "certificate"), ("value", 15_552_000)), ("home/france",))
        said = obligation_body(
            duty, "accepted", id="o1", transfer="tr-1", task="tr-1/1", decision_id=str(body["decision_id"])
        )
        found.append(("obligation", said))
    return found


def judged(country: str = "FR", persons: int = 7, **more: Value) -> dict[str, object]:
    """The body of a decision on secret data for a site in a country."""
    at = int(NOW)
    said = [
        Statement("data.labels", frozenset(["secret"]), "label:dpo", at - 10),
        Statement("data.persons", persons, "label:dpo", at - 10),
        Statement("site.country", country, "registry:policies", at),
        Statement("request.requester", "eve@example.org", "request", at),
        Statement("time.now", at, "clock", at),
        *(Statement(name, value, "engine", at) for name, value in more.items()),
    ]
    known = resolve(engine().policies, said, at)
    decision = engine().decide("land", known.facts, frozenset(["delete", "proof.certificate"]))
    asked = Asked(
        point="land", phase="before-first-byte", site="beta", data="alpha:/data/x",
        bundle=open_bundle(bundle()).digest, transfer="tr-1", task="tr-1/1", hop=1, requester="eve@example.org",
    )  # fmt: skip
    return decision_body(engine(), decision, asked, decision_id=f"d-{country}-{persons % 10}", resolved=known)


def chain_with_decisions(folder: Path, site: str = "beta") -> Evidence:
    """A chain with permits, denials, a refusal and two checkpoints, as it lies on the disk."""
    ticks = count(0)
    files = ChainFiles(
        str(folder), f"site:{site}", now=lambda: NOW + next(ticks), rng=random.Random(3).randbytes
    )
    digest = files.keep_bundle(bundle())
    files.append([("policy.activate", activate_body(digest, 1, int(NOW) + 86_400, [("security", "k1")]))])
    files.append([*permitted(), *permitted("US")])
    files.checkpoint(pki().signer(site))
    refusal = refusal_body(
        "d-refused", "land", site, "alpha:/data/x", "land", "before-first-byte", "release-forged", "no release",
        bundle=digest, transfer="tr-2", task="tr-2/1",
    )  # fmt: skip
    files.append([("decision", refusal), ("stop", stop_body("stop-now", "policy-denied", transfer="tr-1"))])
    files.append([*permitted("FR", 49_999), *permitted("FR", 50_000)])
    files.checkpoint(pki().signer(site))
    files.close()
    return read_evidence_folder(str(folder))[0]


def verified(evidence: Evidence, *elsewhere: tuple[str, bytes], origin: bool = True) -> Verdict:
    """The verdict on it; away from the origin without the values of digests."""
    replayer = (
        Replayer(evidence.bundles, evidence.key, evidence.kept) if origin else Replayer(evidence.bundles)
    )
    begun = "a chain of files is made with its first record"
    return verify_chain(evidence.lines, pki().anchors, replayer, elsewhere=elsewhere, begun=begun)
