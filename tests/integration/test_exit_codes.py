"""Every exit code by a real command, what --json and --progress json say, and Ctrl-C."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
from pathlib import Path

import pytest
from support import FLOW, MIB, Flow, assert_same, random_file, small_tree, wait_until, written_below

pytestmark = pytest.mark.slow

REPORT_FIELDS = {
    "state", "objects", "bytes", "bytes_sent", "bytes_reused", "bytes_unchanged", "objects_landed", "objects_unchanged",
    "objects_failed", "objects_deleted", "objects_read_at_target", "bytes_to_send", "seconds", "version", "passes",
    "dry_run", "bottleneck", "failures", "extra", "streams", "link_changes",
}  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    small_tree(tmp_path / "source", 10)
    random_file(tmp_path / "source" / "large", 2 * MIB)
    return tmp_path / "source"


def test_0_done(flow: Flow, tree: Path, tmp_path: Path) -> None:
    done = flow("cp", f"{tree}/", tmp_path / "target", "--json")
    assert set(done.data) == REPORT_FIELDS
    assert (done.data["state"], done.data["objects"], done.data["objects_landed"]) == ("completed", 11, 11)
    assert done.data["bytes"] == 10 * 204 + 2 * MIB
    assert done.stderr == ""
    assert len(bytes.fromhex(done.data["version"])) == 32
    assert done.data["bottleneck"]


def test_1_failed(flow: Flow, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_bytes(b"")
    done = flow("cp", f"{tree}/", f"{tmp_path}/a-file/below", code=1)
    assert "a-file" in done.stderr
    assert "next:" in done.stderr
    assert flow("diff", tree, tmp_path / "a-file", code=None).code == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cp"], "Usage"),
        (["copy", "a", "b"], "No such command"),
        (["plan", "a:/x", "b:/y"], "flow plan show a:/x b:/y"),
        (["cp", "--nonsense", "a", "b"], "--nonsense"),
        (["cp", "SOURCE", "SOURCE/inside"], "lies in the source"),
        (["cp", "flow://127.0.0.1:1/x", "there"], "needs a ticket"),
        (["cp", "flow://127.0.0.1:1/x#!!!", "there"], "not a ticket"),
        (["cp", "--compress", "often", "SOURCE", "there"], "--compress"),
        (["cp", "SOURCE/large/", "there"], "not a folder"),
        (["serve", "SOURCE", "--listen", "nonsense"], "HOST:PORT"),
    ],
)
def test_2_usage(flow: Flow, tree: Path, tmp_path: Path, words: list[str], told: str) -> None:
    done = flow(
        *[word.replace("SOURCE", str(tree)).replace("there", str(tmp_path / "t")) for word in words], code=2
    )
    assert told in done.stderr
    assert not (tmp_path / "t").exists()


def test_3_not_found(flow: Flow, tree: Path, tmp_path: Path) -> None:
    for words in (["cp", "nowhere", "x"], ["ls", "nowhere"], ["serve", "nowhere"], ["verify", "SOURCE"]):
        done = flow(*[w.replace("SOURCE", str(tree)) for w in words], code=3)
        assert "next:" in done.stderr
    assert flow("cp", "flow:///x", tmp_path, "--ticket-file", tmp_path / "none", code=3).stderr.startswith(
        "flow: "
    )


def test_4_authentication(flow: Flow, tree: Path, tmp_path: Path) -> None:
    with flow.serving(tree) as ticket:
        url = ticket.format_secret_url()
        wrong = url[:-6] + ("AAAAAA" if not url.endswith("AAAAAA") else "BBBBBB")
        for command in (["cp", wrong, tmp_path / "x"], ["ls", wrong], ["cp", f"{tree}/large", wrong]):
            done = flow(*command, code=4)
            assert "secret" in done.stderr or "proof" in done.stderr
            assert wrong[-20:] not in done.stderr
        with flow.serving(tree) as other:
            mixed = other.format_secret_url().replace(f":{other.port}", f":{ticket.port}")
            assert "another certificate" in flow("cp", mixed, tmp_path / "x", code=4).stderr
    assert not (tmp_path / "x").exists()


def test_5_denied(flow: Flow, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    with flow.serving(tmp_path / "served", "--read-only") as ticket:
        done = flow("cp", f"{tree}/", ticket.format_secret_url(), code=5)
    assert "read-only" in done.stderr
    assert os.listdir(tmp_path / "served") == []


def test_6_integrity(flow: Flow, tree: Path, tmp_path: Path) -> None:
    flow("cp", f"{tree}/", tmp_path / "target")
    assert flow("verify", tmp_path / "target", "--json").data["state"] == "verified"
    (tmp_path / "target" / "large").write_bytes(b"damaged")
    (tmp_path / "target" / "d0000" / "f1").unlink()
    (tmp_path / "target" / "extra").write_bytes(b"")
    done = flow("verify", tmp_path / "target", "--json", code=6).data
    assert (done["wrong"], done["missing"], done["extra"]) == (["large"], ["d0000/f1"], ["extra"])
    assert flow("verify", tmp_path / "target", "--against", tree, "--json", code=6).data["wrong"] == ["large"]


def test_7_some_objects_failed(flow: Flow, tree: Path, tmp_path: Path) -> None:
    os.mkfifo(tree / "pipe")
    done = flow("cp", f"{tree}/", tmp_path / "target", "--json", code=7)
    assert done.data["state"] == "incomplete"
    assert [(row["path"], row["reason"]) for row in done.data["failures"]] == [("pipe", "special-file")]
    assert done.data["objects_landed"] == 11
    assert "pipe" in done.stderr
    assert flow("verify", tmp_path / "target", "--against", tree, "--json", code=7).data["missing"] == []


def test_75_nobody_answers(flow: Flow, tmp_path: Path) -> None:
    with flow.serving(tmp_path) as ticket:
        url = ticket.format_secret_url()
    done = flow("cp", url, tmp_path / "x", "--retry-for", "0.3", code=75)
    assert "cannot reach" in done.stderr
    assert "trying again" in done.stderr


def test_two_writers_to_overlapping_targets_wait_for_each_other(
    flow: Flow, tree: Path, tmp_path: Path
) -> None:
    staging = tmp_path / "target" / ".flow-staging"
    staging.mkdir(parents=True)
    with open(staging / "lock", "w") as lock:
        lock.write("process 4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (
            flow.started("cp", f"{tree}/", tmp_path / "target") as same,
            flow.started("cp", f"{tree}/", tmp_path / "target" / "below") as below,
        ):
            for running in (same, below):
                wait_until(lambda running=running: running.lines, "a word on what it waits for")
                assert "another transfer writes to" in running.lines[0]
                assert "4711" in running.lines[0]
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert (same.finish().code, below.finish().code) == (0, 0)
    assert_same(tree, tmp_path / "target" / "below")


def test_130_interrupted_and_continued(flow: Flow, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    random_file(source / "large", 128 * MIB)
    command = ["cp", f"{source}/", tmp_path / "target", "--json"]
    # So slow that a third is there long before the end.
    with flow.started(*command, "--bwlimit", "800Mbit/s", start_new_session=True) as running:
        wait_until(lambda: written_below(tmp_path / "target", staged=True) > 32 * MIB, "32 MiB in staging")
        os.killpg(running.pid, signal.SIGINT)
        stopped = running.finish()
    assert stopped.code == 130
    assert "interrupted" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "target" / "large").exists()
    again = flow(*command).data
    assert again["bytes_reused"] > 16 * MIB
    assert again["bytes_sent"] < 112 * MIB
    assert_same(source, tmp_path / "target")


def test_progress_as_json_lines(flow: Flow, tmp_path: Path) -> None:
    random_file(tmp_path / "large", 32 * MIB)
    words = ["--progress", "json", "--json", "--bwlimit", "160Mbit/s"]
    done = flow("cp", tmp_path / "large", f"{tmp_path}/target/", *words)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert events
    for event in events:
        assert event["event"] == "progress"
        assert 0 <= event["bytes_done"] <= 32 * MIB
        assert event["objects"] in (0, 1)
    sent = [event["bytes_sent"] for event in events]
    assert sent == sorted(sent)
    assert done.data["state"] == "completed"


def test_secrets_stay_out_of_process_lists_and_messages(flow: Flow, tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "ticket"
    with flow.serving(tree, "--ticket-file", file) as ticket:
        secret = ticket.format_secret_url().partition("#")[2]
        assert oct(file.stat().st_mode & 0o777) == "0o600"
        done = flow("cp", "flow:///", tmp_path / "x", "--ticket-file", file, "--progress", "lines")
        assert secret not in done.stderr + done.stdout
        assert secret not in flow("ls", "flow:///nothing", "--ticket-file", file, code=3).stderr
        file.chmod(0o644)
        assert f"chmod 600 {file}" in flow("ls", "flow:///", "--ticket-file", file, code=1).stderr
    assert_same(tree, tmp_path / "x")


def test_help_names_the_commands_quickly(flow: Flow) -> None:
    shown = flow("--help").stdout
    for name in ("cp", "sync", "serve", "ls", "verify", "manifest", "diff"):
        assert name in shown
    assert FLOW


def test_a_port_that_is_taken(flow: Flow, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = flow("serve", tmp_path, "--listen", f"127.0.0.1:{taken.getsockname()[1]}", code=1)
    assert "cannot listen" in done.stderr
