"""Tickets: what is shown, what is not, and what a bad paste says."""

from __future__ import annotations

import copy

import pytest

from flowengine.errors import UsageError
from flowengine.wire.ticket import Ticket

FINGERPRINT, SECRET = bytes(range(32)), b"S" * 24


@pytest.mark.parametrize(
    ("host", "path", "location"),
    [
        ("data.example.org", b"", "flow://data.example.org:7171/"),
        ("10.0.0.1", b"sub/dir", "flow://10.0.0.1:7171/sub/dir"),
        ("::1", b"a b#?%", "flow://[::1]:7171/a%20b%23%3F%25"),
        ("fe80::1%eth0", b"\xff\n", "flow://[fe80::1%25eth0]:7171/%FF%0A"),
        ("node_1.local", "Käse".encode(), "flow://node_1.local:7171/K%C3%A4se"),
    ],
)
def test_a_ticket_comes_back_from_its_url(host: str, path: bytes, location: str) -> None:
    ticket = Ticket(host, 7171, path, FINGERPRINT, SECRET)
    assert ticket.location == location
    url = ticket.format_secret_url()
    assert url.startswith(location + "#")
    assert Ticket.parse(f"  {url}\n") == ticket
    assert hash(Ticket.parse(url)) == hash(ticket)
    assert Ticket.parse(url).secret == SECRET


def test_only_the_explicit_form_shows_the_secret() -> None:
    ticket = Ticket("h", 1, b"", FINGERPRINT, SECRET)
    secret_part = ticket.format_secret_url().partition("#")[2]
    for shown in (repr(ticket), str(ticket), f"{ticket}", repr([ticket]), ticket.location):
        assert "SSSS" not in shown
        assert "#" not in shown
        assert secret_part[8:16] not in shown
    with pytest.raises(TypeError):
        copy.deepcopy(ticket)


def test_tickets_differ_by_secret() -> None:
    one, two = (Ticket("h", 1, b"", FINGERPRINT, s) for s in (SECRET, b"T" * 24))
    assert one != two
    assert one != "flow://h:1/"


def test_people_may_type_a_trailing_slash_and_unescaped_letters() -> None:
    fragment = Ticket("h", 1, b"", FINGERPRINT, SECRET).format_secret_url().partition("#")[2]
    assert Ticket.parse(f"FLOW://h:1/a/b/#{fragment}").path == b"a/b"
    assert Ticket.parse(f"flow://h:1#{fragment}").path == b""
    assert Ticket.parse(f"flow://h:1/ä\udcff#{fragment}").path == "ä".encode() + b"\xff"


GOOD = Ticket("h", 1, b"", FINGERPRINT, SECRET).format_secret_url().partition("#")[2]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "does not begin"),
        ("http://h:1/#" + GOOD, "does not begin"),
        ("flow://h:1/", "secret behind # is missing"),
        ("flow://h:1/#", "secret behind # is missing"),
        ("flow://h/#" + GOOD, "HOST:PORT"),
        ("flow://:1/#" + GOOD, "neither a host name"),
        ("flow://a:b@h:1/#" + GOOD, "HOST:PORT"),
        ("flow://::1:1/#" + GOOD, "HOST:PORT"),
        ("flow://[::g]:1/#" + GOOD, "HOST:PORT"),
        ("flow://[1:2]:1/#" + GOOD, "neither a host name"),
        ("flow://h:0/#" + GOOD, "not a TCP port"),
        ("flow://h:65536/#" + GOOD, "not a TCP port"),
        ("flow://-h:1/#" + GOOD, "neither a host name"),
        ("flow://h:1/../x#" + GOOD, "path cannot be used"),
        ("flow://h:1/a%2F..%2Fb#" + GOOD, "path cannot be used"),
        ("flow://h:1//etc#" + GOOD, "path cannot be used"),
        ("flow://h:1/a%00#" + GOOD, "path cannot be used"),
        ("flow://h:1/a?b#" + GOOD, "question mark"),
        ("flow://h:1/100%#" + GOOD, "percent sign"),
        ("flow://h:1/\ud800#" + GOOD, "half a character"),
        ("flow://h:1/#" + GOOD[:-8], "secret has 18 bytes|too short"),
        ("flow://h:1/#" + GOOD[:5], "not whole"),
        ("flow://h:1/#" + GOOD[:3] + " " + GOOD[3:], "no ticket has"),
        ("flow://h:1/#Ag" + GOOD[2:], "format version 2"),
        ("flow://h:1/#" + GOOD + "A" * 80, "secret has"),
        ("flow://h:1/" + "a" * 20_000 + "#" + GOOD, "characters"),
    ],
)
def test_a_bad_ticket_says_why_and_never_repeats_the_secret(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        Ticket.parse(text)
    assert caught.value.hint
    assert GOOD[4:12] not in str(caught.value)
