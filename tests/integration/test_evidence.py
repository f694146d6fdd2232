"""A federation under policy leaves evidence at every site and at the coordinator, which anybody can verify afterwards."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chains import POLICY
from federations import Local, local_federation
from sites import Coordinator
from support import Flow, wait_until

from flowengine.errors import Denied
from flowengine.trust.tokens import Login

pytestmark = pytest.mark.slow


@dataclass
class World:
    local: Local
    flow: Flow
    transfer: str

    def evidence(self, site: str) -> Path:
        (found,) = (path for path in (self.local.base / "state").rglob("evidence") if site in path.parts)
        return found

    def verify(self, where: object, *more: object, code: int = 0) -> dict[str, Any]:
        done = self.flow("evidence", "verify", where, *more, "--json", code=code)
        said: dict[str, Any] = json.loads(done.stdout)
        return said


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("federation")
    policies = base / "policies"
    policies.mkdir()
    (policies / "home.toml").write_text(POLICY.replace(', "data.persons < 50_000"', ""), encoding="utf-8")
    (policies / "labels.toml").write_text('[label.secret]\ntitle = "Secret"\n', encoding="utf-8")
    owners = f"[owner.hospital]\nkey = '{'ab' * 32}'\nroots = ['gamma:/data/vault']\n"
    (policies / "owners.toml").write_text(owners, encoding="utf-8")
    (base / "gamma" / "vault").mkdir(parents=True)
    (base / "gamma" / "vault" / "patient-4711").write_bytes(b"x")
    (base / "alpha").mkdir()
    for number in range(3):
        (base / "alpha" / f"object-{number}").write_bytes(bytes([number]) * 50_000)
    sites = {
        name: f'facts = {{ country = "{at}" }}'
        for name, at in (("alpha", "FR"), ("beta", "FR"), ("gamma", "US"))
    }
    with local_federation(base, sites, coordinator='policies = "policies"') as local:
        with local.client() as client:
            moved = client.copy("alpha:/data/", "beta:/data/", labels=["secret"])
            moved.wait(60)
            client.copy("alpha:/data/", "beta:/data/again/", labels=["secret"]).wait(60)
            with pytest.raises(Denied):
                client.copy("alpha:/data/", "gamma:/data/", labels=["secret"])
        flow = Flow(base / "flow", env={"FLOW_CONFIG_DIR": str(local.running.config)})
        yield World(local, flow, moved.id)


def test_both_ends_recorded_what_they_decided_and_hold_each_others_heads(world: World) -> None:
    for site, other in (("alpha", "beta"), ("beta", "alpha")):
        wait_until(lambda site=site: (world.evidence(site) / "chain").is_dir(), what="a chain")
        said = world.verify(world.evidence(site), "--against", world.evidence(other))
        assert said["findings"] == []
        assert said["agent"] == f"site:{site}"
        assert said["held_by"] == [f"site:{other}"]
        assert said["decisions"]["evaluated"] >= 1
        done = world.flow("evidence", "ls", world.evidence(site), "--kind", "chunk-root", "--json")
        record, _ = json.loads(done.stdout)["records"]
        assert (record["direction"], record["objects"], record["transfer"]) == (
            {"alpha": "left", "beta": "landed"}[site], 3, world.transfer,
        )  # fmt: skip


def test_the_coordinator_recorded_what_it_permitted_and_what_it_denied(world: World) -> None:
    said = world.verify("coordinator")
    assert (said["findings"], said["agent"]) == ([], "coordinator")
    assert said["decisions"]["evaluated"] + said["decisions"]["recorded"] == 6
    done = world.flow("evidence", "ls", "coordinator", "--kind", "decision", "--json")
    records = json.loads(done.stdout)["records"]
    denied = [record for record in records if record["decision"] == "deny"]
    assert [record["ask"]["site"] for record in denied] == ["gamma"]
    assert "admin" not in json.dumps([record["facts"] for record in records]), "who asked is a keyed digest"


def test_one_transfers_evidence_travels_alone(world: World, tmp_path: Path) -> None:
    file = tmp_path / "one.evidence"
    world.flow("evidence", "export", world.evidence("beta"), "--transfer", world.transfer, "-o", file)
    said = world.verify(file)
    assert (said["findings"], said["whole"]) == ([], False)
    assert said["records"] >= 4, "when the bundle came into force, two decisions, what landed"


def test_a_proof_of_delivery_is_fetched_and_verified_offline(world: World, tmp_path: Path) -> None:
    file, ca = tmp_path / "delivery.receipt", tmp_path / "ca.pem"
    world.flow("transfer", "receipt", world.transfer, "-o", file)
    ca.write_text(world.local.access().ca_pem)
    stranger = Flow(tmp_path / "elsewhere", env={"FLOW_CONFIG_DIR": str(tmp_path / "nobody")})
    said = json.loads(stranger("evidence", "verify", file, "--ca", ca, "--json").stdout)["receipt"]
    assert (said["site"], said["objects"], said["state"]) == ("beta", 3, "completed")
    assert world.flow("transfer", "receipt", "t-0000000000", "-o", file, code=3)


def test_a_cut_chain_is_found_by_the_coordinators_checkpoints(world: World, tmp_path: Path) -> None:
    """The coordinator hears of checkpoints within a minute; what is cut behind one does not pass."""

    def held() -> int:
        with world.local.client() as client:
            return max((one.seq for one in client.checkpoints("beta")), default=0)

    wait_until(lambda: held() > 0, what="a checkpoint at the coordinator")
    copy = tmp_path / "evidence"
    shutil.copytree(world.evidence("beta"), copy)
    ca = tmp_path / "ca.pem"
    ca.write_text(world.local.access().ca_pem)
    assert world.verify(copy, "--ca", ca, "--online")["findings"] == []
    (path,) = (copy / "chain").iterdir()
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[: held() - 1]))
    said = world.verify(copy, "--ca", ca, "--online", code=6)
    assert {finding["what"] for finding in said["findings"]} == {"truncated"}


def test_of_the_coordinators_chain_only_what_was_removed_is_said_to_be(world: World, tmp_path: Path) -> None:
    """On a second coordinator with a copy of the state: what is gone there is told, and nothing else."""
    (state,) = (path for path in world.local.base.rglob("state.sqlite") if "agents" not in path.parts)
    (secrets,) = (path.parent for path in world.local.base.rglob("grant.key"))
    again = Coordinator(tmp_path / "again")
    again.folder.mkdir()
    shutil.copytree(secrets, again.folder / "secrets")
    with (
        contextlib.closing(sqlite3.connect(state)) as live,
        contextlib.closing(sqlite3.connect(again.folder / "state.sqlite")) as copy,
    ):
        live.backup(copy)
        ((digest, content),) = copy.execute("SELECT digest, content FROM evidence_bundles")
    (tmp_path / "policies.bundle").write_bytes(content)

    def verified(
        coordinator: Coordinator,
        *changes: str,
        more: tuple[object, ...] = (),
        export: Path | None = None,
        code: int,
    ) -> dict[str, Any]:
        with contextlib.closing(sqlite3.connect(coordinator.folder / "state.sqlite")) as database, database:
            for change in changes:
                database.execute(change)
        coordinator.start()
        ca = coordinator.folder / "secrets" / "ca.pem"
        token = Login.parse((ca.parent / "admin-login").read_text()).token.format_secret()
        env = {"FLOW_COORDINATOR": coordinator.url, "FLOW_TOKEN": token, "FLOW_CA_FILE": str(ca)}
        flow = Flow(tmp_path / "flow", env={"FLOW_CONFIG_DIR": str(tmp_path / "none"), **env})
        try:
            said: dict[str, Any] = json.loads(
                flow("evidence", "verify", "coordinator", *more, "--json", code=code).stdout
            )
            if export is not None:
                flow("evidence", "export", "coordinator", *more, "-o", export)
        finally:
            coordinator.stop()
        return said

    said = verified(again, "DELETE FROM evidence_bundles", code=3)
    assert (said["findings"], said["ok"]) == ([], False)
    assert [(one["what"], one["bundle"]) for one in said["unchecked"]] == [("bundle", digest)]
    policies, alone = ("--policies", tmp_path / "policies.bundle"), tmp_path / "with-policies.evidence"
    said = verified(again, more=policies, export=alone, code=0)
    assert (said["unchecked"], said["decisions"]["unchecked"]) == ([], 0)
    assert alone.stat().st_mode & 0o777 == 0o600
    said = world.verify(alone)  # they went with it
    assert (said["findings"], said["unchecked"], said["decisions"]["unchecked"]) == ([], [], 0)
    said = verified(again, "DELETE FROM evidence WHERE seq = 4", code=6)
    assert "removed" in {finding["what"] for finding in said["findings"]}
    said = verified(again, "DELETE FROM evidence", code=6)
    (finding,) = said["findings"]
    assert finding["what"] == "removed"
    assert "was decided by the policies" in finding["text"]
    # One that has no policies has nothing to record, and nothing was removed from it.
    fresh = Coordinator(tmp_path / "fresh")
    fresh.folder.mkdir()
    said = verified(fresh, code=3)
    assert (said["findings"], [one["what"] for one in said["unchecked"]]) == ([], ["chain"])


def test_names_of_labelled_data_are_told_only_after_a_decision(world: World) -> None:
    """Found open: a look at a folder told the coordinator names, whatever policy said of the data."""
    with world.local.client() as client:
        assert {entry.name for entry in client.ls("beta:/data/again/").entries} == {
            f"object-{number}" for number in range(3)
        }
        with pytest.raises(Denied) as refused:
            client.ls("gamma:/data/vault/")
        assert refused.value.reason == "policy-denied"
        assert "patient" not in str(refused.value)
        with pytest.raises(Denied):
            client.ls("gamma:/data/vault/patient-4711")
    for site, verdict in (("beta", "permit"), ("gamma", "deny")):
        done = world.flow("evidence", "ls", world.evidence(site), "--kind", "decision", "--json")
        looks = [record for record in json.loads(done.stdout)["records"] if record["point"] == "look"]
        assert {record["decision"] for record in looks} == {verdict}
        assert world.verify(world.evidence(site))["findings"] == []
