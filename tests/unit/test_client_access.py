"""Where a client finds its coordinator and token, and what it refuses to read."""

import os
from pathlib import Path

import pytest

from flowengine.client.access import Access, Credentials, config_dir, find_access, normal_url
from flowengine.errors import AuthenticationError, LocalError, NotFound, UsageError

A = Access("https://a.example.org:7440", "flowt_a", "CA-A", "ada")
B = Access("https://b.example.org:7440", "flowt_b", "CA-B", "bob")


def stored(folder: Path, *entries: Access) -> dict[str, str]:
    """An environment whose credentials file holds the entries; the last one is the default."""
    credentials = Credentials(folder / "credentials.toml", [])
    for entry in entries:
        credentials.put(entry)
    credentials.save()
    return {"FLOW_CONFIG_DIR": str(folder)}


def test_what_is_stored_is_read_back(tmp_path: Path) -> None:
    odd = Access("https://c.example.org:7440", 'flowt_"\\', "line\nline\n", "é")
    stored(tmp_path / "new", A, odd)
    assert Credentials.load(tmp_path / "new").entries == [odd, A]
    assert (tmp_path / "new/credentials.toml").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_the_last_login_is_the_default_and_others_are_found_by_address(tmp_path: Path) -> None:
    environ = stored(tmp_path, A, B)
    assert find_access(environ=environ) == B
    assert find_access("a.example.org:7440/", environ=environ) == A


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    environ = stored(tmp_path, A)
    os.chmod(tmp_path / "credentials.toml", mode)
    with pytest.raises(AuthenticationError, match="others may read"):
        find_access(environ=environ)


def test_the_environment_goes_before_the_file_and_arguments_before_the_environment(tmp_path: Path) -> None:
    (tmp_path / "token").touch(0o600)
    (tmp_path / "token").write_text("flowt_file\n")
    (tmp_path / "ca").write_text("CA-ENV")
    environ = stored(tmp_path, B, A) | {
        "FLOW_COORDINATOR": B.url, "FLOW_TOKEN_FILE": str(tmp_path / "token"), "FLOW_CA_FILE": str(tmp_path / "ca"),
    }  # fmt: skip
    assert find_access(environ=environ) == Access(B.url, "flowt_file", "CA-ENV")
    assert find_access(environ=environ | {"FLOW_TOKEN": "flowt_env"}).token == "flowt_env"
    assert find_access(A.url, "flowt_argument", "CA", environ=environ) == Access(
        A.url, "flowt_argument", "CA"
    )


def test_a_token_in_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").touch(0o644)
    (tmp_path / "token").write_text("flowt_file\n")
    with pytest.raises(LocalError, match="others can read it") as refused:
        find_access(
            A.url, environ={"FLOW_TOKEN_FILE": str(tmp_path / "token"), "FLOW_CONFIG_DIR": str(tmp_path)}
        )
    assert "chmod 600" in refused.value.hint


def test_a_stored_token_goes_to_no_other_coordinator(tmp_path: Path) -> None:
    environ = stored(tmp_path, A)
    assert find_access("https://other.example.org", environ=environ) == Access("https://other.example.org")


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    environ = {"FLOW_CONFIG_DIR": str(tmp_path)}
    with pytest.raises(AuthenticationError, match="flow login"):
        find_access(environ=environ)
    with pytest.raises(NotFound, match="FLOW_TOKEN_FILE"):
        find_access(A.url, environ=environ | {"FLOW_TOKEN_FILE": str(tmp_path / "none")})
    (tmp_path / "credentials.toml").write_text("[[coordinator]]\nurl = 5")
    os.chmod(tmp_path / "credentials.toml", 0o600)
    (tmp_path / "credentials.toml").write_text("[[coordinator]]\ntoken = 'x'")
    with pytest.raises(LocalError, match="damaged"):
        find_access(environ=environ)


@pytest.mark.parametrize("text", ["http://a", "https://a/b", "https://", "", "https://u@h", "https://:1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        normal_url(text)


def test_config_dir() -> None:
    assert config_dir({"FLOW_CONFIG_DIR": "/c", "HOME": "/h"}) == Path("/c")
    assert config_dir({"XDG_CONFIG_HOME": "/x", "HOME": "/h"}) == Path("/x/flowengine")
    assert config_dir({"HOME": "/h"}) == Path("/h/.config/flowengine")
    assert "flowt_a" not in repr(A)
