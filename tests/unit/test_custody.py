"""Where the keys of sealed data are kept: by whom, in which country, and what a coordinator makes of `hold`."""

from __future__ import annotations

import pytest

from flowengine.errors import Denied
from flowengine.policy import Engine, load
from flowengine.policy.asking import Matter, Place, ask
from flowengine.policy.facts import Statement
from flowengine.trust.grant_checks import arrival_use
from flowengine.trust.release import Sealed
from flowengine_agent.sealing import check_custody

NOW = 1_780_000_000
POLICIES = load(
    {
        "home.toml": b"""
[policy]
id = "home"
version = "1"
title = "Keys stay in the Union"
owner = "dpo@example.org"
applies_to = ["data.labels includes 'secret'"]
effective = 2026-01-01
review_by = 2100-01-01
[[rule]]
id = "backup"
effect = "permit"
on = ["hold"]
when = ["site.country is 'US'"]
then = [{encrypt = {at = ["rest"], keys_in = ["FR", "DE"]}}]
why = "sealed"
""",
        "labels.toml": b"[label.secret]\n",
        "sites.toml": b'[site.boston]\ncountry = "US"\n[site.paris]\ncountry = "FR"\n[site.denver]\ncountry = "US"\n',
    }
)


def key(site: str) -> Sealed:
    return Sealed("aes-256-gcm", "00" * 16, site)


def test_keys_are_kept_where_the_duty_says() -> None:
    boston = Place("boston")
    matter = Matter((Statement("data.labels", frozenset(["secret"]), "label:x", NOW),), boston)
    judged = ask(Engine(POLICIES), "hold", boston, matter, NOW)
    assert judged.decision.permit
    assert not ask(Engine(POLICIES), "land", boston, matter, NOW).decision.permit
    check_custody(POLICIES, [judged], [key("paris")])
    for site, why in (("denver", "is in US"), ("nowhere", "pinned to no country")):
        with pytest.raises(Denied, match=why):
            check_custody(POLICIES, [judged], [key("paris"), key(site)])


def test_a_grants_condition_names_the_use() -> None:
    assert (arrival_use([]), arrival_use(["hold"])) == ("land", "hold")
