"""What outlives a coordinator: kill -9, a restored old backup, stop and start; and who may not start."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from coordinators import Coordinator, Lab, beat, copy_request, counters, running

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]


async def test_after_a_restored_backup_fences_and_epochs_go_up_and_tasks_go_on(tmp_path: Path) -> None:
    database = tmp_path / "coordinator.sqlite"
    coordinator = Coordinator(f"sqlite:///{database}", tmp_path / "secrets")
    with running(coordinator):
        lab = Lab([coordinator], tmp_path)
        admin = lab.admin()
        agents = {}
        for site in "ab":
            agents[site] = lab.client(certificate=await lab.enrol(admin, site))
            await agents[site]("POST", "/v1/agent/heartbeat", beat())
        made = await admin("POST", "/v1/transfers", copy_request("a:/d/x", "b:/d/y"))
        words = [sys.executable, "-m", "flowengine.cli.main", "coordinator", "backup"]
        words += [str(tmp_path / "backup"), "--state", coordinator.state]
        subprocess.run(words, check=True)
        assert stat.S_IMODE((tmp_path / "backup").stat().st_mode) == 0o600
        (task,) = (await agents["b"]("POST", "/v1/agent/claim", {"boot": "boot", "count": 1}))["tasks"]
        epoch = (await admin("GET", "/v1/health"))["epoch"]
        coordinator.kill()
        for left in tmp_path.glob("coordinator.sqlite*"):
            left.unlink()
        os.replace(tmp_path / "backup", database)
        coordinator.start()
        assert (await admin("GET", "/v1/health"))["epoch"] > epoch
        assert (await admin("GET", f"/v1/transfers/{made['id']}"))["tasks"][0]["state"] == "waiting"
        held = {"holding": {task["task"]: task["fence"]}, "seen_fence": task["fence"]}
        await agents["b"]("POST", "/v1/agent/heartbeat", beat(**held))
        said = {"fence": task["fence"], "seq": 9, "state": "running", "counters": counters(10, 5)}
        path = f"/v1/agent/tasks/{task['task']}/reports"
        assert (await agents["b"]("POST", path, said))["directive"] == "go"
        shown = (await admin("GET", f"/v1/transfers/{made['id']}"))["tasks"][0]
        assert (shown["state"], shown["fence"], shown["holder"]) == ("running", task["fence"], "b")
        await agents["b"]("POST", path, said | {"seq": 10, "state": "done", "counters": counters(10, 10)})
        await admin("POST", "/v1/transfers", copy_request("a:/d/x", "b:/d/z"))
        (after,) = (await agents["b"]("POST", "/v1/agent/claim", {"boot": "boot", "count": 1}))["tasks"]
        assert after["fence"] > task["fence"]
        kinds = [event["type"] for event in (await admin("GET", "/v1/events?types=task."))["items"]]
        assert kinds == ["task.adopted", "task.done", "task.claimed"]
        await lab.aclose()


async def test_an_agent_that_restarted_without_its_task_gives_it_back_at_once(tmp_path: Path) -> None:
    coordinator = Coordinator(f"sqlite:///{tmp_path / 'c.sqlite'}", tmp_path / "secrets")
    with running(coordinator):
        lab = Lab([coordinator], tmp_path)
        admin = lab.admin()
        for site in "ab":
            agent = lab.client(certificate=await lab.enrol(admin, site))
            await agent("POST", "/v1/agent/heartbeat", beat())
        await admin("POST", "/v1/transfers", copy_request("a:/d/x", "b:/d/y"))
        (task,) = (await agent("POST", "/v1/agent/claim", {"boot": "boot", "count": 1}))["tasks"]
        await agent("POST", "/v1/agent/heartbeat", beat())  # the answer to the claim may still be under way
        assert (await agent("POST", "/v1/agent/claim", {"boot": "boot", "count": 1}))["tasks"] == []
        await agent("POST", "/v1/agent/heartbeat", beat("another"))
        (again,) = (await agent("POST", "/v1/agent/claim", {"boot": "another", "count": 1}))["tasks"]
        assert again["fence"] > task["fence"]
        await lab.aclose()


async def test_secrets_are_for_their_owner_and_those_of_another_federation_are_refused(
    tmp_path: Path,
) -> None:
    coordinator = Coordinator(f"sqlite:///{tmp_path / 'c.sqlite'}", tmp_path / "secrets")
    with running(coordinator):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in coordinator.secrets.iterdir()}
        assert coordinator.stop() == 0
    assert {"ca.key", "grant.key", "server.key", "epoch", "admin-login"} <= set(modes)
    assert set(modes.values()) == {0o600}
    words = [sys.executable, "-m", "flowengine.cli.main", "coordinator", "run", "--state", coordinator.state]
    words += ["--secrets", str(tmp_path / "others"), "--listen", "127.0.0.1:0"]
    refused = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert "the secrets are not those of the federation in this database" in refused.stderr


async def test_policies_decide_requests_and_plans_say_so_before(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    from flowengine.cli.demo_data import write_policies

    write_policies(tmp_path / "policies", datetime.now(UTC).date())
    options = ("--policies", str(tmp_path / "policies"))
    coordinator = Coordinator(f"sqlite:///{tmp_path / 'c.sqlite'}", tmp_path / "secrets", options=options)
    with running(coordinator):
        lab = Lab([coordinator], tmp_path)
        admin = lab.admin()
        for site, country in {"a": "DE", "b": "FR", "c": "US"}.items():
            fact = {"value": country, "source": "registry", "as_of": "2026-01-01T00:00:00Z"}
            await admin("POST", "/v1/sites", {"name": site, "facts": {"country": fact}})
        inside = copy_request("a:/d/x", "b:/d/y", labels=["patients"])
        outside = copy_request("a:/d/x", "b:/d/z", "c:/d/z", labels=["patients"])
        made = await admin("POST", "/v1/transfers", inside)
        verdicts = [(found["use"], found["site"], found["verdict"]) for found in made["decisions"]]
        assert verdicts == [("release", "a", "permit"), ("land", "b", "permit")]
        plan = await admin("POST", "/v1/plans", {"request": outside})
        assert (plan["permitted"], [found["verdict"] for found in plan["decisions"]]) == (
            False,
            ["permit", "permit", "deny"],
        )
        refused = await admin("POST", "/v1/transfers", outside, expect=403)
        assert refused["reason"] == "denied"
        assert refused["context"]["decisions"][-1]["site"] == "c"
        assert len((await admin("GET", "/v1/transfers"))["items"]) == 1
        kinds = [event["type"] for event in (await admin("GET", "/v1/events?types=transfer."))["items"]]
        assert kinds == ["transfer.requested", "transfer.denied"]
        await lab.aclose()
