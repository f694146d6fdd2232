"""What agreements say of a transfer, whose word counts, and what is forged or can never count."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from liars import PolicyKeys

from flowengine.errors import AuthenticationError, PolicyInvalid, UsageError
from flowengine.policy import load, resolve
from flowengine.policy.agreements import Agreement, agreement_statements
from flowengine.policy.asking import Place
from flowengine.trust.agreement import AgreementStatement, sign_agreement, verify_agreement
from flowengine_agent.policies import Policies

NOW = 1_800_000_000
KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw()
PIN = "ab" * 32
FILES = {
    "open.toml": b'[policy]\nid = "open"\nversion = "1"\ntitle = "t"\nowner = "o"\napplies_to = []\n'
    b"effective = 2020-01-01\nreview_by = 2099-01-01\n[[rule]]\nid = 'r'\neffect = 'permit'\n"
    b"on = ['land']\nwhen = []\nwhy = 'w'\n",
    "authorities.toml": f"[authority.counsel]\nkey = '{PUBLIC.hex()}'\nroots = ['paris:/data']\n"
    "facts = ['agreement.*', 'controller.ciio']\n".encode(),
    "sites.toml": f"[site.boston]\ncountry = 'US'\nkey = '{PIN}'\n".encode(),
}
POLICIES = load(FILES)
BOSTON = Place("boston", PIN)


def statement(**changes: object) -> AgreementStatement:
    fields: dict[str, object] = {
        "authority": "counsel", "id": "ag-552", "number": 1, "issued": NOW - 10, "roots": ["paris:/data/cohort"],
        "recipients": ["boston"], "facts": {"agreement.mechanism": "scc-2021"}, "expires": NOW + 100,
    }  # fmt: skip
    return AgreementStatement(**(fields | changes))  # type: ignore[arg-type]


def agreed(**changes: object) -> Agreement:
    return verify_agreement(sign_agreement(statement(**changes), KEY), POLICIES.authorities)


def known(
    *agreements: Agreement, path: str = "/data/cohort/x", to: Place = BOSTON, now: int = NOW
) -> dict[str, object]:
    said = agreement_statements(POLICIES, agreements, ("paris", path), to, now)
    return dict(resolve(POLICIES, said, now).facts)


def test_what_was_agreed_is_known_for_whom_and_what_it_covers() -> None:
    both = {"agreement.mechanism": "scc-2021", "agreement.expires": NOW + 100}
    assert known(agreed()) == known(agreed(), path="/data/cohort") == both
    assert known(agreed(roots=["*:/data"])) == both
    assert known(agreed(), path="/data/cohort2") == {}
    assert known(agreed(), path="/data") == {}, "what moves is more than it covers"
    assert known(agreed(), to=Place("berlin", PIN)) == {}
    assert known(agreed(), to=Place("boston", "cd" * 32)) == {}, "another key is another party"
    ends = NOW + 50
    assert known(agreed(facts={"agreement.expires": ends})) == {"agreement.expires": ends}


def test_it_counts_from_and_until_and_not_once_it_was_taken_back() -> None:
    assert known(agreed(), now=NOW + 100) == known(agreed(), now=NOW - 11) == {}
    assert known(agreed(withdrawn=True)) == {}


def test_only_an_authority_says_only_what_it_may_of_only_its_data() -> None:
    assert known(agreed(facts={"controller.ciio": False, "controller.country": "FR"}, recipients=["*"])) == {
        "controller.ciio": False
    }
    assert known(agreed(roots=["*:/"]), path="/home") == {}
    assert known(replace(agreed(), key=bytes(32))) == {}, "signed with a key that is none any more"


def test_agreements_that_contradict_each_other_leave_it_unknown() -> None:
    other = agreed(id="ag-553", facts={"agreement.mechanism": "none"}, expires=None)
    assert known(agreed(), other) == {"agreement.expires": NOW + 100}
    sets = [agreed(id=name, facts={"agreement.kinds": [name]}, expires=None) for name in ("dpa", "nda")]
    assert known(*sets) == {}


def test_a_forged_agreement_is_none() -> None:
    good = sign_agreement(statement(), KEY)
    for wrong, reason in (
        (good[:-1], "agreement-forged"),
        (good.replace(b"scc-2021", b"scc-2010"), "agreement-forged"),
        (sign_agreement(statement(), Ed25519PrivateKey.generate()), "agreement-forged"),
        (sign_agreement(statement(authority="mallory"), KEY), "agreement-unknown-authority"),
    ):
        with pytest.raises(AuthenticationError) as caught:
            verify_agreement(wrong, POLICIES.authorities)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": ""}, {"number": 0}, {"roots": []}, {"roots": ["paris"]}, {"roots": ["paris:/data/../x"]},
        {"recipients": []}, {"recipients": ["no site"]}, {"roots": ["paris:/x"] * 101},
    ],
)  # fmt: skip
def test_what_nobody_would_accept_is_not_signed(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        sign_agreement(statement(**wrong), KEY)


def test_authorities_are_declared_strictly() -> None:
    wrong = (
        f"[authority.a]\nkey = '{PUBLIC.hex()}'\nroots = ['paris']\nfacts = ['data.labels']\n"
        f"[authority.b]\nkey = '{PUBLIC.hex()}'\nroots = ['paris:/']\nfacts = ['agreement.mechanism']\n"
    )
    with pytest.raises(PolicyInvalid) as caught:
        load({"authorities.toml": wrong.encode()})
    text = str(caught.value)
    assert "no root" in text
    assert "'data.labels'" in text
    assert "same key" in text


def test_an_agents_agreements_never_go_back_and_stay_over_a_restart(tmp_path: Path) -> None:
    keys, now = PolicyKeys(), int(time.time())
    trusted = {role: [key.public_key()] for role, key in keys.roles.items()}
    files = {name: text.decode() for name, text in FILES.items()}

    def said(number: int, **changes: object) -> bytes:
        return sign_agreement(statement(number=number, issued=now - 1, expires=now + 100, **changes), KEY)

    agent = Policies(str(tmp_path / "p"), trusted)
    assert agent.take_statements([(1, said(1))])[0].reason == "agreement-unknown-authority"
    agent.take(keys.bundle(files, 1), now)
    assert agent.take_statements(
        [(1, said(2)), (2, said(1, withdrawn=True)), (3, said(9).replace(b"scc-2021", b"scc-2010"))]
    )[0].reason == ("agreement-forged")
    source = ("paris", "/data/cohort")
    assert [one.by for one in agent.agreed(source, BOSTON, now)] == ["agreement:ag-552"] * 2
    agent.close()
    again = Policies(str(tmp_path / "p"), trusted)
    assert again.take_statements([(1, said(1, withdrawn=True))]) == []
    assert len(again.agreed(source, BOSTON, now)) == 2
    assert again.take_statements([(2, said(3, withdrawn=True))]) == []
    assert again.agreed(source, BOSTON, now) == []
    again.close()
