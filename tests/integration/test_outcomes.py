"""What a person or a script is told at the end: JSON for errors too, right words, and nothing where none were wanted."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path

import pytest
from support import Flow, touched_files

pytestmark = pytest.mark.slow


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    root.mkdir()
    (root / "a").write_bytes(b"hello")
    (root / "b").write_bytes(b"world")
    return root


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["cp", "nowhere", "target"], 3, "not-found"),
        (["cp", "only-one"], 2, "usage"),
        (["cp", "--no-such-option", "a", "b"], 2, "usage"),
        (["sync", "--compress", "20", "a", "b"], 2, "usage"),
        (["ls", "nowhere"], 3, "not-found"),
        (["verify", "nowhere"], 3, "not-found"),
        (["diff", "flow:///x", "flow:///y"], 2, "usage"),
    ],
)
def test_an_error_is_one_json_object_where_json_was_asked_for(
    flow: Flow, words: list[str], code: int, reason: str
) -> None:
    told = flow(*words, "--json", code=code)
    (line,) = told.stdout.splitlines()
    problem = json.loads(line)
    assert (problem["state"], problem["reason"], problem["exit_code"]) == ("failed", reason, code)
    assert {"message", "hint", "retryable", "context"} < problem.keys()
    assert problem["message"] in told.stderr
    assert flow(*words, code=code).stdout == ""


def test_what_is_missing_is_said_to_be_missing(flow: Flow, tmp_path: Path) -> None:
    told = flow("verify", tmp_path / "nowhere", code=3)
    assert "nowhere does not exist" in told.stderr


def test_another_time_alone_is_nothing_wrong(flow: Flow, source: Path, tmp_path: Path) -> None:
    flow("cp", f"{source}/", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "a", ns=(5, 5))
    told = flow("verify", tmp_path / "copy")
    assert told.stdout == "touched a\n"
    assert told.stderr.endswith("verified 2 objects: all as it should be, 1 touched\n")
    report = flow("verify", "--json", tmp_path / "copy").data
    assert (report["state"], report["touched"], report["metadata"]) == ("verified", ["a"], [])
    (tmp_path / "copy" / "a").chmod(0o600)
    told = flow("verify", tmp_path / "copy", code=6)
    assert told.stdout == "metadata a\n"
    assert "1 object is NOT as it should be" in told.stderr


def test_one_object_is_one_object(flow: Flow, source: Path, tmp_path: Path) -> None:
    assert "done: 1 object landed" in flow("cp", source / "a", tmp_path / "copy").stderr
    assert "done: 2 objects landed" in flow("cp", source, tmp_path / "copies").stderr


def test_no_progress_means_no_summary(flow: Flow, source: Path, tmp_path: Path) -> None:
    for words in (["--dry-run"], [], []):
        told = flow("cp", "--progress", "none", *words, f"{source}/", tmp_path / "copy")
        assert (told.stdout, told.stderr) == ("", "")
    told = flow("verify", "--progress", "none", tmp_path / "copy")
    assert (told.stdout, told.stderr) == ("", "")


def test_excluded_special_files_do_no_harm(flow: Flow, source: Path, tmp_path: Path) -> None:
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(source / "socket"))
    left_out = ["--exclude", "pipe", "--exclude", "socket"]
    report = flow("cp", "--json", *left_out, f"{source}/", tmp_path / "copy").data
    assert (report["state"], report["objects"]) == ("completed", 2)
    listed = tmp_path / "list"
    listed.write_bytes(b"a\n")
    flow("cp", "--files-from", listed, f"{source}/", tmp_path / "listed")
    report = flow("cp", "--json", "--exclude", "pipe", f"{source}/", tmp_path / "copy", code=7).data
    assert [(row["path"], row["reason"]) for row in report["failures"]] == [("socket", "special-file")]


def test_set_id_bits_travel_only_with_their_owner(flow: Flow, source: Path, tmp_path: Path) -> None:
    (source / "a").chmod(0o6755)
    flow("cp", f"{source}/", tmp_path / "copy")
    assert stat.S_IMODE((tmp_path / "copy" / "a").stat().st_mode) == 0o755
    flow("verify", tmp_path / "copy")
    flow("cp", "--owner", f"{source}/", tmp_path / "owned")
    assert stat.S_IMODE((tmp_path / "owned" / "a").stat().st_mode) == 0o6755
    flow("verify", tmp_path / "owned")
    with flow.serving(source) as ticket:
        flow("cp", ticket.format_secret_url(), tmp_path / "pulled")
    assert stat.S_IMODE((tmp_path / "pulled" / "a").stat().st_mode) == 0o755


def test_a_refused_link_comes_with_what_to_do(flow: Flow, source: Path, tmp_path: Path) -> None:
    (source / "out").symlink_to("/etc/passwd")
    told = flow("cp", "--links", "inside", f"{source}/", tmp_path / "copy", code=7)
    assert "--links keep" in told.stderr
    flow("cp", "--links", "keep", f"{source}/", tmp_path / "copy")
    assert os.readlink(tmp_path / "copy" / "out") == "/etc/passwd"


@pytest.mark.parametrize("pull", [True, False], ids=["pull", "push"])
def test_no_cache_holds_on_both_sides(flow: Flow, source: Path, tmp_path: Path, pull: bool) -> None:
    there = source if pull else tmp_path / "theirs"
    there.mkdir(exist_ok=True)
    with Flow(tmp_path / "server-state").serving(there) as ticket:
        place = ticket.format_secret_url()
        words = [place, tmp_path / "ours"] if pull else [f"{source}/", place]
        flow("cp", *words)
        with touched_files(there) as remembered:
            flow("cp", *words)
        with touched_files(there) as anew:
            flow("cp", "--no-cache", *words)
    assert remembered.read == set()
    assert anew.read == {os.fsencode(there / "a"), os.fsencode(there / "b")}


def test_a_port_where_nobody_ever_was_is_given_up_soon(flow: Flow, source: Path, tmp_path: Path) -> None:
    with flow.serving(source) as ticket:
        place = ticket.format_secret_url()
    # Nobody listens there any more. The default would go on for a minute.
    told = flow("cp", "--json", place, tmp_path / "copy", code=75, timeout=30)
    assert "connection refused" in told.stderr
    assert told.stderr.count("trying again") == 1
    assert "next: check that flow serve runs there" in told.stderr
    problem = json.loads(told.stdout)
    assert (problem["reason"], problem["retryable"], problem["context"]) == (
        "disconnected",
        True,
        {"refused": True},
    )
