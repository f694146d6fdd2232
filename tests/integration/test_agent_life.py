"""An agent's life: enrolment, renewal, stopping in order, starting again, being sent away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from gate import gated
from sites import Federation, SiteAgent, federation
from support import MIB, AwakeClock, assert_same, random_file, wait_until

from flowengine.client.tls import client_context
from flowengine.trust.tokens import JoinSecret
from flowengine_agent.coordinator_link import open_link
from flowengine_agent.identity import load_identity, renew

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("federation"), "b") as made:
        yield made


def ended(transfer: Any, seconds: float = 180) -> Any:
    """The transfer's record once it has ended."""
    return wait_until(lambda: transfer.refresh() if transfer.refresh().ended else None, "the end", seconds)


def run_to_end(agent: SiteAgent) -> tuple[int, str]:
    """Start an agent that must end by itself: exit code and log."""
    agent.start(ready=False)
    assert agent.process is not None
    code = agent.process.popen.wait(90)
    return agent.process.end(signal.SIGKILL) or code, agent.log


# --- enrolment --------------------------------------------------------------------------------------------------


def test_a_join_token_is_needed_once(sites: Federation, tmp_path: Path) -> None:
    code, log = run_to_end(SiteAgent("x", tmp_path / "x"))
    assert code == 4
    assert "has not enrolled yet" in log
    assert "flow site token x" in log
    agent = sites.add("once")
    key = agent.state / "identity/key.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    before = key.read_bytes()
    assert agent.stop() == 0
    agent.start()  # without a token
    assert key.read_bytes() == before
    assert agent.stop() == 0


def test_a_token_file_that_others_can_read_is_refused(sites: Federation, tmp_path: Path) -> None:
    agent = sites.make("filed", lines=[f'join_token_file = "{tmp_path}/token"'])
    file = tmp_path / "token"
    file.touch(0o644)
    file.write_text(f"{agent.token}\n")
    agent.token = ""  # not in the environment
    code, log = run_to_end(agent)
    assert code == 1
    assert f"chmod 600 {file}" in log
    assert "0644" in log
    assert not (agent.state / "identity").exists()
    file.chmod(0o600)
    agent.start()
    assert agent.stop() == 0
    file.unlink()
    agent.start()  # once it has joined the file may go
    assert agent.stop() == 0


def test_a_token_for_another_site_or_used_before_is_refused(sites: Federation, tmp_path: Path) -> None:
    token = sites.client.join_token("other").token
    code, log = run_to_end(SiteAgent("x", tmp_path / "x", token=token))
    assert code == 2
    assert "is for site 'other'" in log
    first = SiteAgent("other", tmp_path / "first", token=token)
    first.start()
    assert first.stop() == 0
    code, log = run_to_end(SiteAgent("other", tmp_path / "second", token=token))
    assert code == 4
    assert token not in log


def test_a_coordinator_with_another_ca_hears_nothing(sites: Federation, tmp_path: Path) -> None:
    # The token's fingerprint is of another CA: as if somebody had taken the coordinator's address over.
    true = JoinSecret.parse(sites.client.join_token("y").token)
    other = JoinSecret(true.url, bytes(32), "y", true.id, true._secret).format_secret()
    agent = SiteAgent("y", tmp_path / "y", token=other)
    code, log = run_to_end(agent)
    assert code == 4
    assert "is not the coordinator that made the join token" in log
    # Nothing was told: the token is as good as before.
    agent.token = true.format_secret()
    agent.start()
    assert agent.stop() == 0


def test_a_certificate_is_renewed_for_the_same_key(sites: Federation) -> None:
    identity = load_identity(str(sites["b"].state / "identity"))
    assert identity is not None

    async def main() -> Any:
        context = client_context(identity.ca_pem, cert_file=identity.chain_file, key_file=identity.key_file)
        async with open_link([identity.url], context) as link:
            return await renew(identity, link)

    renewed = trio.run(main)
    assert renewed.facts.key_sha256 == identity.facts.key_sha256
    assert renewed.facts.serial != identity.facts.serial


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try to run it as root")
def test_it_does_not_run_as_root_unless_told(tmp_path: Path) -> None:
    agent = SiteAgent("r", tmp_path / "r")
    path = agent.write_config()
    path.write_text(path.read_text().replace("allow_root = true", ""))
    done = subprocess.run(
        [sys.executable, "-m", "flowengine_agent.main", "run", "--config", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "root" in done.stderr


# --- stopping and starting --------------------------------------------------------------------------------------


def test_a_stopped_agent_gives_its_task_back_and_continues_later(sites: Federation) -> None:
    with gated() as gate:
        source = sites.make("slow", listen=f"127.0.0.1:{gate.behind}")
        source.lines.append(f'advertise = ["127.0.0.1:{gate.port}"]')
        source.data.mkdir(parents=True)
        random_file(source.data / "large", 48 * MIB)
        source.start()
        target = sites["b"]
        target.lines = ['drain = "4s"']
        assert target.stop() == 0
        target.start()
        transfer = sites.client.copy("slow:/data/large", "b:/data/in/")
        gate.wait_reached(16 * MIB)
        with AwakeClock() as clock:
            assert target.stop() == 0
            assert clock.now_s() < 40  # and not after the minutes that a lease has
        (task,) = transfer.refresh().tasks
        assert task.state == "waiting"
        assert task.holder == ""
        gate.open()
        target.start()
        record = ended(transfer)
        assert record.state == "completed"
        assert record.tasks[0].counters.bytes_sent < 40 * MIB  # what was there before is not sent again
        assert_same(source.data, target.data / "in", root_itself=False)
        assert source.stop() == 0


def test_a_second_signal_ends_it_at_once(sites: Federation) -> None:
    with gated() as gate:
        source = sites.make("stuck", listen=f"127.0.0.1:{gate.behind}")
        source.lines.append(f'advertise = ["127.0.0.1:{gate.port}"]')
        source.data.mkdir(parents=True)
        random_file(source.data / "large", 32 * MIB)
        source.start()
        agent = sites.add("hasty", lines=['drain = "60s"'])
        transfer = sites.client.copy("stuck:/data/large", "hasty:/data/")
        gate.wait_reached(8 * MIB)
        assert agent.process is not None
        agent.process.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in agent.log, "the first signal")
        assert agent.stop(40) == 130
        transfer.cancel()
        assert source.stop() == 0


def test_two_transfers_to_one_place_go_one_after_the_other(sites: Federation) -> None:
    with gated() as gate:
        source = sites.make("twice", listen=f"127.0.0.1:{gate.behind}")
        source.lines.append(f'advertise = ["127.0.0.1:{gate.port}"]')
        source.data.mkdir(parents=True)
        random_file(source.data / "one", 8 * MIB)
        random_file(source.data / "two", 8 * MIB, seed=2)
        source.start()
        first = sites.client.copy("twice:/data/one", "b:/data/same/")
        gate.wait_reached(2 * MIB)
        second = sites.client.copy("twice:/data/two", "b:/data/same/")
        why = wait_until(
            lambda: found if "target" in (found := second.why()).line else None, "the wait's name"
        )
        assert first.id in why.line
        gate.open()
        assert ended(first).state == ended(second).state == "completed"
        assert sorted(os.listdir(sites["b"].data / "same")) == ["one", "two"]
        assert source.stop() == 0


def test_a_cancelled_transfer_stops_at_the_agents(sites: Federation) -> None:
    with gated() as gate:
        source = sites.make("cancelled", listen=f"127.0.0.1:{gate.behind}")
        source.lines.append(f'advertise = ["127.0.0.1:{gate.port}"]')
        source.data.mkdir(parents=True)
        random_file(source.data / "large", 32 * MIB)
        source.start()
        transfer = sites.client.copy("cancelled:/data/large", "b:/data/never/")
        gate.wait_reached(8 * MIB)
        transfer.cancel()
        wait_until(lambda: "task given back" in sites["b"].log, "the target to stop")
        gate.open()
        record = ended(transfer)
        assert (record.state, record.reason) == ("terminated", "cancelled")
        assert not (sites["b"].data / "never/large").exists()
        assert source.stop() == 0


def test_a_paused_transfer_goes_on_where_it_was(sites: Federation) -> None:
    with gated() as gate:
        source = sites.make("paused", listen=f"127.0.0.1:{gate.behind}")
        source.lines.append(f'advertise = ["127.0.0.1:{gate.port}"]')
        source.data.mkdir(parents=True)
        random_file(source.data / "large", 48 * MIB)
        source.start()
        transfer = sites.client.copy("paused:/data/large", "b:/data/later/")
        gate.wait_reached(16 * MIB)
        transfer.pause()
        wait_until(lambda: transfer.refresh().tasks[0].state == "waiting", "the target to give it back")
        assert transfer.state == "suspended"
        gate.open()
        transfer.resume()
        record = ended(transfer)
        assert record.state == "completed"
        assert record.tasks[0].counters.bytes_sent < 40 * MIB
        assert source.stop() == 0


# --- being sent away --------------------------------------------------------------------------------------------


def test_a_revoked_site_is_cut_off_by_its_peer(sites: Federation) -> None:
    with gated() as gate:
        source = sites.make("giver", listen=f"127.0.0.1:{gate.behind}")
        source.lines.append(f'advertise = ["127.0.0.1:{gate.port}"]')
        source.data.mkdir(parents=True)
        random_file(source.data / "large", 32 * MIB)
        source.start()
        taker = sites.add("taker")
        sites.client.copy("giver:/data/large", "taker:/data/")
        gate.wait_reached(8 * MIB)
        sites.client.remove_site("taker")
        wait_until(lambda: "certificate-revoked" in source.log, "the giver to cut the taker off")
        gate.open()
        assert taker.process is not None
        assert taker.process.popen.wait(90) == 4
        assert not (taker.data / "large").exists()
        assert source.stop() == 0


def test_a_site_leaves_a_peer_that_it_dialled_and_that_was_revoked(sites: Federation) -> None:
    with gated() as gate:
        source = sites.make("outcast", listen=f"127.0.0.1:{gate.behind}")
        source.lines.append(f'advertise = ["127.0.0.1:{gate.port}"]')
        source.data.mkdir(parents=True)
        random_file(source.data / "large", 32 * MIB)
        source.start()
        taker = sites.add("dialler")
        sites.client.copy("outcast:/data/large", "dialler:/data/")
        gate.wait_reached(8 * MIB)
        sites.client.remove_site("outcast")
        wait_until(lambda: "certificate-revoked" in taker.log, "the dialler to leave the outcast")
        gate.open()
        assert not (taker.data / "large").exists()
        assert taker.stop() == 0


# --- check ------------------------------------------------------------------------------------------------------


def check(agent: SiteAgent, code: int) -> str:
    """What `flowengine-agent check` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "flowengine_agent.main", "check", "--config", str(agent.write_config())],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_check_finds_nothing_wrong_with_an_enrolled_site(sites: Federation) -> None:
    agent = sites.add("fine")
    assert agent.stop() == 0
    text = check(agent, 0)
    for what in ("config", "state", "root", "port", "chunker", "certificate", "coordinator", "clock"):
        assert any(line.split()[1] == what for line in text.splitlines()), text


def test_check_says_what_to_do(sites: Federation, tmp_path: Path) -> None:
    text = check(SiteAgent("new", tmp_path / "new"), 0)
    assert "has not enrolled yet" in text
    assert "flow site token new" in text
    token = tmp_path / "token"
    token.write_text("a token")
    token.chmod(0o644)
    named = SiteAgent("new", tmp_path / "new", lines=[f'join_token_file = "{token}"'])
    text = check(named, 1)
    assert "others can read it" in text
    assert f"chmod 600 {token}" in text
    token.chmod(0o600)
    assert "its join token is there" in check(named, 0)
    text = check(SiteAgent("new", tmp_path / "new", listen=sites["b"].listen), 1)
    assert any(line.split()[:2] == ["wrong", "port"] for line in text.splitlines()), text
