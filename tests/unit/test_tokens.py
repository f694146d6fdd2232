"""Tokens and login strings: what is stored proves nothing, what is shown hides the secret."""

from __future__ import annotations

import random

import pytest

from flowengine.errors import UsageError
from flowengine.trust.tokens import JoinSecret, Login, UserToken, make_join_secret, make_user_token

RNG = random.Random(4).randbytes
USER = make_user_token(RNG)
JOIN = make_join_secret("https://flow.example.org:8443", b"F" * 32, "berlin", RNG)
LOGIN = Login("https://[::1]:8443", b"F" * 32, USER)


def test_they_survive_being_pasted() -> None:
    assert UserToken.parse(f"  {USER.format_secret()}\n") == USER
    assert JoinSecret.parse(f"{JOIN.format_secret()}\n") == JOIN
    assert Login.parse(f"\t{LOGIN.format_secret()}") == LOGIN
    assert USER.format_secret().startswith(f"flowt_{USER.id}_")
    assert (JOIN.format_secret()[:6], LOGIN.format_secret()[:6]) == ("flowj_", "flowl_")


def test_only_the_right_one_matches_what_is_stored() -> None:
    assert USER.matches(USER.digest())
    assert JOIN.matches(JOIN.digest())
    assert not USER.matches(make_user_token(RNG).digest())
    assert not JOIN.matches(make_join_secret(JOIN.url, JOIN.ca_sha256, JOIN.site, RNG).digest())
    # The same secret under another site's name is another token.
    other = JoinSecret(JOIN.url, JOIN.ca_sha256, "paris", JOIN.id, JOIN._secret)
    assert not other.matches(JOIN.digest())
    assert not USER.matches("")


def test_what_is_stored_or_shown_is_not_the_secret() -> None:
    secret = USER.format_secret().rpartition("_")[2]
    for shown in (repr(USER), repr(LOGIN), f"{USER}", USER.digest()):
        assert secret not in shown
    assert repr(JOIN._secret)[2:-1] not in repr(JOIN)
    assert JOIN._secret.hex() not in JOIN.digest()


BAD = [
    "",
    "flowt_",
    USER.format_secret()[:-1],
    USER.format_secret() + "x",
    USER.format_secret().replace("flowt_", "flowj_"),
    USER.format_secret().upper(),
    JOIN.format_secret()[:-4],
    JOIN.format_secret() + "AAAA",
    LOGIN.format_secret()[:20],
    "flowj_" + "A" * 5000,
    "flowl_é",
    "flowj_AQ==",
    make_join_secret("http://plain.example.org", b"F" * 32, "berlin", RNG).format_secret(),
    make_join_secret("https://x/\n", b"F" * 32, "berlin", RNG).format_secret(),
    make_join_secret("https://x", b"F" * 31, "berlin", RNG).format_secret(),
    make_join_secret("https://x", b"F" * 32, "Berlin", RNG).format_secret(),
    Login("https://x", b"F", USER).format_secret(),
    Login("file:///etc/passwd", b"F" * 32, USER).format_secret(),
]


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize("kind", [UserToken, JoinSecret, Login])
def test_what_is_none_is_refused_and_not_repeated(
    kind: type[UserToken | JoinSecret | Login], text: str
) -> None:
    with pytest.raises(UsageError) as raised:
        kind.parse(text)
    assert len(text) < 10 or text not in str(raised.value)
    assert raised.value.hint
