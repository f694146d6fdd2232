"""site.toml: what is right becomes typed values, what is wrong is told all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowengine.errors import Denied, NotFound, UsageError
from flowengine_agent.config import SiteConfig, load_config, split_address

GOOD = """
site = "lake-1"
coordinator = ["https://one.example.org:7440", "https://two.example.org:7440/"]
state = "/var/lib/flowengine-agent"
listen = "0.0.0.0:7443"
advertise = ["data.example.org:7443"]
drain = "5s"
[[root]]
path = "/srv/data/"
name = "/data"
access = "read-write"
budget = "2TB"
[[root]]
path = "/srv/public"
[limits]
site = "10Gbit/s"
"""


def parse(tmp_path: Path, text: str) -> object:
    path = tmp_path / "site.toml"
    path.write_text(text)
    return load_config(str(path))


def test_every_key_becomes_a_value(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(GOOD)
    config = load_config(str(path))
    assert config.site == "lake-1"
    assert config.coordinators == ("https://one.example.org:7440", "https://two.example.org:7440")
    assert config.listen == ("0.0.0.0", 7443)
    assert (config.drain_s, config.site_limit_bits_per_s, config.max_tasks) == (5.0, 10**10, 4)
    data, public = config.roots
    assert (data.path, data.name, data.access, data.budget_bytes) == (
        "/srv/data",
        "/data",
        "read-write",
        2 * 10**12,
    )
    assert (public.name, public.access, public.budget_bytes) == ("/srv/public", "read", None)


def test_a_site_relays_only_where_it_says_so(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(GOOD)
    assert load_config(str(path)).relay_enabled is False
    path.write_text(
        "site = 'r'\nstate = '/s'\nlisten = '0.0.0.0:7443'\n"
        "[relay]\nenabled = true\nmax_streams = 8\nmax_rate = '5Gbit/s'"
    )
    config = load_config(str(path))
    assert (config.relay_enabled, config.relay_max_streams, config.relay_max_bits_per_s) == (
        True,
        8,
        5 * 10**9,
    )
    assert config.roots == ()  # it may do nothing else
    path.write_text("site = 'r'\nstate = '/s'\n[relay]\nenabled = true")
    with pytest.raises(UsageError, match="needs listen"):
        load_config(str(path))


def test_the_example_is_right() -> None:
    example = Path(__file__).resolve().parents[2] / "agents/deploy/site.example.toml"
    assert load_config(str(example)).site == "lake-1"


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        parse(
            tmp_path,
            """
            site = "Lake One"
            listn = "0.0.0.0:7443"
            state = "/srv/data/state"
            max_tasks = 0
            [[root]]
            path = "/srv/data"
            acess = "read"
            [[root]]
            path = "relative"
            access = "all"
            """,
        )
    problems = raised.value.context["problems"]
    assert isinstance(problems, list)
    text = "\n".join(problems)
    for expected in (
        "site 'Lake One' is no site name",
        "'lake-one'",
        "listn is no key here; did you mean 'listen'?",
        "max_tasks 0 must be a whole number from 1 to 1000",
        "root 1.acess is no key here; did you mean 'access'?",
        "root 2.path 'relative' is no absolute path",
        "root 2.access 'all' is none of",
        "state '/srv/data/state' lies in the offered folder",
    ):
        assert expected in text, text
    assert len(problems) == 7, text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "site is missing"),
        ("site = 'a'\nstate = '/s'", "root is missing"),
        (
            "site = 'a'\nstate = '/s'\nlisten = ''\nadvertise = ['h:1']\n[[root]]\npath='/d'",
            "advertise makes no sense",
        ),
        (
            "site = 'a'\nstate = '/s'\ncoordinator = 'http://x'\n[[root]]\npath='/d'",
            "must be an address like",
        ),
        (
            "site = 'a'\nstate = '/s'\n[[root]]\npath='/d'\n[[root]]\npath='/e'\nname='/d'",
            "is taken by another",
        ),
        ("site = 'a'\nstate = '/s'\n[[root]]\npath='/d'\nbudget='2 bananas'", "unknown size unit"),
        ("site = 'a'\nstate = '/s'\n[[root]]\npath='/d'\nname='/a/../b'", "plain names"),
        ("site = ", "is no TOML"),
    ],
)
def test_one_problem_is_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        parse(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no configuration"):
        load_config(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    "text", ["host", "host:", ":1", "host:99999", "::1:80", "[::1]", "host:1x", "[host]:1"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        split_address(text)


# --- accounts -------------------------------------------------------------------------------------------------------

_MAPPED = """
site = "a"
state = "/var/lib/agent"
[[root]]
path = "/srv/data"
name = "/data"
[accounts]
{more}
[accounts.map]
alice = "40001:40001"
{lines}
"""


def _mapped(tmp_path: Path, lines: str = "", more: str = "") -> SiteConfig:
    path = tmp_path / "site.toml"
    path.write_text(_MAPPED.format(lines=lines, more=more))
    return load_config(str(path))


def test_the_closest_rule_names_the_account(tmp_path: Path) -> None:
    rules = _mapped(tmp_path, '"physics/*" = "40002:40002"\n"physics/alice" = "40003:40003"').accounts
    assert rules is not None

    def uid(requester: str, tenant: str) -> int | None:
        account = rules.account(requester, tenant)
        return None if account is None else account.uid

    assert uid("alice", "default") == 40001
    assert uid("alice", "physics") == 40003
    assert uid("bob", "physics") == uid("", "physics") == 40002
    with pytest.raises(Denied, match="'bob' of tenant 'default'") as refused:
        uid("bob", "default")
    assert refused.value.reason == "account-unmapped"
    assert [account.uid for account in rules.accounts] == [40001, 40002, 40003]


def test_whoever_is_not_mapped_may_be_left_to_the_agents_own_account(tmp_path: Path) -> None:
    rules = _mapped(tmp_path, more='default = "agent"').accounts
    assert rules is not None
    assert rules.account("bob", "default") is None
    assert rules.account("alice", "default") is not None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('bob = "root"', "is root"),
        ("bob = 0", "is root"),
        ('bob = "0:5"', "is root"),
        ('bob = "daemon"', "below min_uid 1000"),
        ('bob = "no-such-account"', "is no account of this host"),
        ("bob = 3999999999", "is no user id of this host"),
        ('bob = "65534:65534"', "nobody in particular"),
        ('bob = "40001:0"', "group of root"),
        ("bob = true", "must be the name of an account"),
        ('"*" = "40001:40001"', "for all others set default"),
    ],
)
def test_an_account_that_nobody_may_act_as_is_told_with_its_line(
    tmp_path: Path, line: str, said: str
) -> None:
    with pytest.raises(UsageError) as wrong:
        _mapped(tmp_path, line)
    assert said in wrong.value.message
    assert f"{tmp_path}/site.toml: (line 11)" in wrong.value.message


def test_min_uid_lets_lower_accounts_in_but_never_root(tmp_path: Path) -> None:
    assert _mapped(tmp_path, 'bob = "daemon"', more="min_uid = 1").accounts is not None
    with pytest.raises(UsageError, match="is root"):
        _mapped(tmp_path, 'bob = "root"', more="min_uid = 1")


def test_what_accounts_keep_lies_neither_in_a_root_nor_in_the_agents_state(tmp_path: Path) -> None:
    for folder in ("/srv/data/x", "/var/lib/agent/accounts"):
        with pytest.raises(UsageError, match=r"accounts\.state"):
            _mapped(tmp_path, more=f'state = "{folder}"')
