"""Sites whose plans lead over relays: links as declared and limited, personal data, and policies that name who may relay."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from liars import PolicyKeys, evidence_of
from sites import Federation, SiteAgent
from support import wait_until

from flowengine.api.links import LinkRequest
from flowengine.api.transfers import Transfer

__all__ = ["decided", "enact", "passed_bytes", "say_links", "start"]

Links = Mapping[tuple[str, str], int]

_POLICY = """
[policy]
id = "union"
version = "1"
title = "Personal data stay in the EU"
owner = "dpo@example.org"
applies_to = ["data.labels includes 'personal'"]
unlisted = "deny"
effective = 2026-01-01
review_by = 2100-01-01
[[rule]]
id = "inside"
effect = "permit"
on = ["release", "relay", "hold", "land", "process"]
when = ["site.country in @eu"]
why = "it stays inside"
"""


def enact(made: Federation, keys: PolicyKeys, countries: Mapping[str, str], roots: Sequence[str]) -> None:
    """Put policies in force at all sites under which personal data stay at, and pass through, sites of the Union.

    Args:
        roots: places with personal data.
    """
    pins = ""
    for site, country in countries.items():
        certificate = made.client.site(site).certificate
        assert certificate is not None
        pins += f'[site.{site}]\ncountry = "{country}"\noperator_countries = ["{country}"]\n'
        pins += f'key = "{certificate.key_sha256}"\n'
    files = {
        "union.toml": _POLICY,
        "labels.toml": "[label.personal]\n",
        "lists/eu.toml": '[list.eu]\ndomain = "country"\nas_of = 2026-01-01\nsource = "treaty"\n'
        'review_by = 2100-01-01\nmembers = ["FR", "DE", "NL"]\n',
        "owners.toml": f"[owner.hospital]\nkey = '{keys.owner_public}'\nroots = {list(roots)}\n",
        "sites.toml": pins,
    }
    made.client.activate_bundle(keys.bundle(files, 1))
    for root in roots:
        made.client.set_label(keys.statement(root, "personal"))

    def everywhere() -> bool:
        told = [made.client.site(site).policy for site in made.sites]
        return all((one.version, one.labels) == (1, len(roots)) for one in told)

    wait_until(everywhere, "policies at all sites")


def say_links(made: Federation, links: Links, *, held: bool) -> None:
    """Declare what links carry; where they are `held` senders keep to it, as a wire of that rate would make them."""
    for (source, target), rate in links.items():
        made.client.set_link(source, target, LinkRequest(capacity_bits_per_s=rate))
        if held:
            made.client.set_limit(f"link:{source}>{target}", rate)


def start(made: Federation) -> None:
    """Start all agents that were made, at once."""
    for agent in made.sites.values():
        agent.start(ready=False)
    for agent in made.sites.values():
        agent.wait_ready()


def passed_bytes(relay: SiteAgent, transfer: Transfer) -> int:
    """What a relay has logged of a transfer's passages that are over."""
    log = re.sub(r"\x1b\[[0-9;]*m", "", relay.log)
    ended = [line for line in log.splitlines() if "relay ended" in line and transfer.id in line]
    return sum(int(number) for line in ended for number in re.findall(r"\bbytes=(\d+)", line))


def decided(site: SiteAgent, transfer: Transfer, point: str) -> list[dict[str, Any]]:
    """The decisions at a point that a site has on record for a transfer."""
    return [
        line
        for line in evidence_of(site)
        if line["kind"] == "decision" and line.get("transfer") == transfer.id and line.get("point") == point
    ]
