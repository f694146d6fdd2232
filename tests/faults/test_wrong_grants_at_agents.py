"""A running agent refuses by itself whoever comes with a wrong certificate or grant, and logs the reason.

Coordinator and agents are real processes. The attacker has what no attacker should: the key of site b, and for the
grants that are right but for one thing the coordinator's own key.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from attackers import Attacker
from parties import Federation as Parties
from sites import Federation, federation
from support import wait_until

from flowengine.api.transfers import Endpoint, TransferRequest
from flowengine.errors import FlowError
from flowengine.transfer.passes import TransferSettings
from flowengine.transfer.run import pull
from flowengine.transfer.sites import SiteIdentity
from flowengine.trust.certificates import load_authority
from flowengine.trust.grant import GrantKey, Party

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("federation"), "a", "b") as made:
        (made["a"].data / "set").mkdir()
        (made["a"].data / "set/file").write_bytes(b"x" * 100_000)
        (made["a"].data / "secret").write_bytes(b"not for b")
        yield made


class Scene:
    def __init__(self, sites: Federation, folder: Path) -> None:
        secrets = sites.coordinator.folder / "secrets"
        self.parties = Parties(
            load_authority((secrets / "ca.key").read_bytes(), (secrets / "ca.pem").read_text()),
            GrantKey((secrets / "grant.key").read_bytes()),
        )
        self.a, self.folder = sites["a"], folder
        self.port = int(self.a.listen.rpartition(":")[2])
        self.a_party = Party("a", _identity(sites, "a").facts.key_sha256)
        self.b = _identity(sites, "b")

    def come(
        self, *, own: SiteIdentity | None = None, key: GrantKey | None = None, path: bytes = b"data/set/", **changes: Any
    ) -> str:  # fmt: skip
        """Try to pull; the reason of the refusal, empty for none."""
        fields = {"source": self.a_party, "source_path": "/data/set/", "task": "made-up"} | changes
        grant = _replaced(self.parties.grant(self.b, self.b), self.b, fields)
        document = (key or self.parties.grant_key).sign(grant)
        attacker = Attacker(self.port, own or self.b, document, grant.secret)
        settings = TransferSettings(use_cache=False, retry_for_s=0)
        try:
            trio.run(pull, attacker, path, os.fsencode(self.folder / "stolen"), settings)
        except FlowError as error:
            return error.reason
        return ""

    def assert_refused(self, reason: str, **changes: Any) -> None:
        """It is refused for just this, nothing came, and the agent's log says why."""
        before = self.a.log.count(reason)
        assert self.come(**changes) == reason
        assert not (self.folder / "stolen").exists() or not os.listdir(self.folder / "stolen")
        wait_until(lambda: self.a.log.count(reason) > before, f"{reason} in the log of a")


def _identity(sites: Federation, name: str) -> SiteIdentity:
    folder = sites[name].state / "identity"
    ca = (sites.coordinator.folder / "secrets/ca.pem").read_text()
    return SiteIdentity((folder / "certificate.pem").read_text(), (folder / "key.pem").read_bytes(), ca)


def _replaced(grant: Any, target: SiteIdentity, fields: dict[str, Any]) -> Any:
    import msgspec

    source = fields["source"]
    return msgspec.structs.replace(grant, route=[source.site, grant.target.site], **fields)


@pytest.fixture
def scene(sites: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))
    return Scene(sites, tmp_path)


def test_an_agent_refuses_wrong_grants(scene: Scene) -> None:
    now = int(time.time())
    other = Parties()
    scene.assert_refused("grant-expired", issued=now - 1_000, expires=now - 100)
    scene.assert_refused("grant-other-path", path=b"data/secret")
    scene.assert_refused("grant-other-party", own=scene.parties.identity("c"))
    scene.assert_refused("grant-forged", key=other.grant_key)
    scene.assert_refused("certificate-unknown", own=other.identity("b"))
    # What only looks is not counted: it must not carry a byte. Found open: a source sent all to who asked for it.
    scene.assert_refused("grant-other-path", mode="verify")
    scene.assert_refused("grant-other-path", dry_run=True)
    # All of it was right but for the one thing.
    assert scene.come() == ""
    assert (scene.folder / "stolen/file").exists()


def test_an_agent_refuses_a_grant_whose_task_ended(sites: Federation, scene: Scene) -> None:
    """A transfer runs to its end; then b shows a grant of the very same task and fence again."""
    request = TransferRequest(
        source=Endpoint(site="a", path="/data/set/"), targets=[Endpoint(site="b", path="/data/in")]
    )
    transfer = sites.client.submit(request)
    record = wait_until(lambda: transfer.refresh() if transfer.refresh().ended else None, "the end", 180)
    assert record.state == "completed"
    (task,) = record.tasks
    scene.assert_refused("grant-replayed", task=task.id, fence=task.fence)
    scene.assert_refused("grant-superseded", task=task.id, fence=task.fence - 1)


def test_an_agent_refuses_a_revoked_certificate(sites: Federation, tmp_path: Path, scene: Scene) -> None:
    """Last of this file: site b is gone after it."""
    sites.client.remove_site("b")

    def refused() -> bool:
        return scene.come(fence=2_000) == "certificate-revoked"

    wait_until(refused, "site a to hear of it")
    wait_until(lambda: "certificate-revoked" in scene.a.log, "certificate-revoked in the log of a")
