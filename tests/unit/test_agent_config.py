"""site.toml: what is right becomes typed values, what is wrong is told all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowengine.errors import NotFound, UsageError
from flowengine_agent.config import load_config, split_address

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
