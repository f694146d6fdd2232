"""Whoever comes with a wrong certificate or grant is refused by the other site itself, which logs the reason.

The site that refuses is a process of its own; whoever dials checks nothing, as an attacker would not. A refused visit
leaves nothing behind, and whoever has the right is let in right after it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from attackers import Attacker, meet
from parties import Federation, SiteHost

from flowengine.errors import AuthenticationError, FlowError
from flowengine.store.grants import GrantLedger
from flowengine.store.selection import Root, Selection
from flowengine.transfer.passes import TransferSettings
from flowengine.transfer.run import pull, push
from flowengine.transfer.sites import SiteIdentity, SitePeer, SiteTrust
from flowengine.trust.grant import GrantKey, Party

pytestmark = pytest.mark.slow
SETTINGS = TransferSettings(use_cache=False, retry_for_s=0)


class Scene:
    """Site a serves; site b has the right to pull from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.federation = Federation()
        self.b = self.federation.identity("b")
        self.data = os.urandom(200_000)

    def host(self, **more: Any) -> Any:
        (self.folder / "a/data").mkdir(parents=True)
        (self.folder / "a/data/file").write_bytes(self.data)
        return self.federation.hosting("a", self.folder / "a", **more)

    def come(
        self, host: SiteHost, own: SiteIdentity | None = None, *, path: bytes = b"data/", key: GrantKey | None = None,
        bare: bool = False, **changes: Any,
    ) -> str:  # fmt: skip
        """Try to pull; the reason of the refusal, empty for none."""
        grant = self.federation.grant(host.identity, self.b, **changes)
        document = (key or self.federation.grant_key).sign(grant)
        attacker = Attacker(host.port, own or self.b, document, grant.secret, bare=bare)
        return self.reason(lambda: trio.run(pull, attacker, path, os.fsencode(self.folder / "in"), SETTINGS))

    def reason(self, act: Callable[[], object]) -> str:
        try:
            act()
        except FlowError as error:
            return error.reason
        return ""

    def assert_nothing_came(self) -> None:
        assert not (self.folder / "in/file").exists()

    def assert_the_right_one_gets_in(self, host: SiteHost, **changes: Any) -> None:
        assert self.come(host, **changes) == ""
        assert (self.folder / "in/file").read_bytes() == self.data


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))
    return Scene(tmp_path)


def assert_logged(host: SiteHost, *reasons: str) -> None:
    """The site's own log has one line for each refusal, with its reason in full."""
    assert [line.partition("(")[2].partition(")")[0] for line in host.log] == list(reasons), host.log
    assert all("refused" in line for line in host.log)


def test_a_revoked_certificate_is_refused(scene: Scene) -> None:
    with scene.host(revoked=[scene.b.facts.serial]) as host:
        assert scene.come(host) == "certificate-revoked"
        scene.assert_nothing_came()
        scene.b = scene.federation.identity("b")  # it joined again
        scene.assert_the_right_one_gets_in(host)
    assert_logged(host, "certificate-revoked")


def test_an_expired_grant_and_one_from_the_future_are_refused(scene: Scene) -> None:
    now = int(time.time())
    with scene.host() as host:
        assert scene.come(host, issued=now - 1000, expires=now - 100) == "grant-expired"
        assert scene.come(host, issued=now + 1000, expires=now + 1300) == "grant-not-yet-valid"
        scene.assert_nothing_came()
        # Clocks may differ by a minute.
        scene.assert_the_right_one_gets_in(host, issued=now - 400, expires=now - 30)
    assert_logged(host, "grant-expired", "grant-not-yet-valid")


def test_another_path_than_the_grants_is_refused(scene: Scene) -> None:
    with scene.host() as host:
        for path in (b"", b"state/", b"data", b"data/../state/", b"data/file", b"key.pem"):
            assert scene.come(host, path=path) == "grant-other-path"
        scene.assert_nothing_came()
        scene.assert_the_right_one_gets_in(host)
    assert_logged(host, *["grant-other-path"] * 6)


def test_a_grant_in_other_hands_is_refused(scene: Scene) -> None:
    with scene.host() as host:
        assert scene.come(host, scene.federation.identity("c")) == "grant-other-party"
        # The same name is not enough: the grant names the key.
        assert scene.come(host, scene.federation.identity("b")) == "grant-other-party"
        # Nor is a grant for another source any use here, or one by which this side dials.
        other = Party("z", "0" * 64)
        assert scene.come(host, source=other, route=["z", "b"]) == "grant-other-party"
        assert scene.come(host, dial="source") == "grant-other-party"
        scene.assert_nothing_came()
        scene.assert_the_right_one_gets_in(host)
    assert_logged(host, *["grant-other-party"] * 4)


def test_a_spent_and_a_superseded_grant_are_refused(scene: Scene) -> None:
    with scene.host() as host:
        assert scene.come(host, fence=2_000) == ""
        (scene.folder / "in/file").unlink()
        assert scene.come(host, fence=1_999) == "grant-superseded"
        with GrantLedger(str(host.folder / "grants.sqlite")) as ledger:
            ledger.spend(scene.federation.grant(host.identity, scene.b, fence=2_000))
        assert scene.come(host, fence=2_000) == "grant-replayed"
        scene.assert_nothing_came()
        scene.assert_the_right_one_gets_in(host, fence=2_001)
    assert_logged(host, "grant-superseded", "grant-replayed")


def test_what_was_spent_stays_so_after_a_restart(scene: Scene) -> None:
    with scene.host() as host:
        assert scene.come(host, fence=2_000) == ""
        with GrantLedger(str(host.folder / "grants.sqlite")) as ledger:
            ledger.spend(scene.federation.grant(host.identity, scene.b, fence=2_000))
    (scene.folder / "in/file").unlink()
    with scene.federation.hosting("a", scene.folder / "a") as host:
        assert scene.come(host, fence=2_000) == "grant-replayed"
        assert scene.come(host, fence=1_000) == "grant-superseded"
        scene.assert_nothing_came()
        scene.assert_the_right_one_gets_in(host, fence=2_001)
    assert_logged(host, "grant-replayed", "grant-superseded")


def test_a_forged_coordinator_is_refused(scene: Scene) -> None:
    other = Federation()
    with scene.host() as host:
        assert scene.come(host, key=other.grant_key) == "grant-forged"
        # With the right key's id and another's signature.
        impostor = GrantKey.make(os.urandom)
        impostor.id = scene.federation.grant_key.id
        assert scene.come(host, key=impostor) == "grant-forged"
        # A certificate that another CA signed; none at all; and one of the coordinator's own kind is no site.
        assert scene.come(host, other.identity("b")) == "certificate-unknown"
        assert scene.come(host, bare=True) == "certificate-unknown"
        scene.assert_nothing_came()
        scene.assert_the_right_one_gets_in(host)
    assert_logged(host, "grant-forged", "grant-forged", "certificate-unknown", "certificate-unknown")


def test_an_expired_certificate_is_refused(scene: Scene) -> None:
    expired = scene.federation.identity("b", now=time.time() - 7200, valid_s=3600)
    with scene.host() as host:
        assert scene.come(host, expired) == "certificate-expired"
        scene.assert_nothing_came()
        scene.assert_the_right_one_gets_in(host)
    assert_logged(host, "certificate-expired")


def test_a_changed_grant_is_refused(scene: Scene) -> None:
    """Whatever bit of a signed grant is changed."""
    with scene.host() as host:
        grant = scene.federation.grant(host.identity, scene.b)
        document = scene.federation.grant_key.sign(grant)
        position = document.index(b"/data/")
        for changed in (
            document[:position] + b"/etcc/" + document[position + 6 :],
            document[:-1],
            b"",
            b"\xc1" * 100,
        ):
            attacker = Attacker(host.port, scene.b, changed, grant.secret)
            assert scene.reason(lambda attacker=attacker: meet(attacker)) == "grant-forged"
        # Somebody who only saw the signed grant's outside, and not its secret, proves nothing.
        attacker = Attacker(host.port, scene.b, document, b"x" * 32)
        assert scene.reason(lambda: meet(attacker)) == "authentication"
        scene.assert_nothing_came()
        scene.assert_the_right_one_gets_in(host)
    assert [line.partition("(")[2].partition(")")[0] for line in host.log[:4]] == ["grant-forged"] * 4


def test_a_pushing_site_may_write_to_its_path_alone(scene: Scene) -> None:
    """The site that serves is the target here; an attacker with a good grant for /in asks for more."""
    source = scene.folder / "source"
    source.mkdir()
    (source / "file").write_bytes(scene.data)
    selection = Selection([Root(os.fsencode(source) + b"/", b"")])
    with scene.host() as host:
        grant = scene.federation.grant(scene.b, host.identity, dial="source")
        document = scene.federation.grant_key.sign(grant)
        attacker = Attacker(host.port, scene.b, document, grant.secret)
        for path in (b"", b"data", b"in/../data", b"in/below"):
            assert scene.reason(lambda path=path: trio.run(push, selection, attacker, path, SETTINGS)) == (
                "grant-other-path"
            )
        assert scene.reason(
            lambda: trio.run(pull, attacker, b"in", os.fsencode(scene.folder / "in"), SETTINGS)
        ) == ("grant-other-party")
        assert (host.folder / "data/file").read_bytes() == scene.data
        assert not (host.folder / "in").exists()
        report = trio.run(push, selection, attacker, b"in", SETTINGS)
        assert report.state == "completed"
        assert (host.folder / "in/file").read_bytes() == scene.data
    assert_logged(host, *["grant-other-path"] * 4, "grant-other-party")


def test_the_site_that_dials_checks_as_well(scene: Scene) -> None:
    """Whoever listens may be the attacker; the dialler says nothing to it."""
    other = Federation()
    b = scene.federation.site("b")
    with scene.host() as host, other.hosting("a", scene.folder / "impostor") as impostor:
        document = scene.federation.signed(host.identity, b)

        def visit(port: int, trust: SiteTrust = b, shown: bytes = document) -> str:
            peer = SitePeer("127.0.0.1", port, trust, shown)
            return scene.reason(lambda: meet(peer))

        assert visit(impostor.port) == "certificate-unknown"
        revoked = msgspec.structs.replace(b, revoked=frozenset([host.identity.facts.serial]))
        assert visit(host.port, revoked) == "certificate-revoked"
        elsewhere = scene.federation.signed(scene.federation.identity("c"), b)
        assert visit(host.port, b, elsewhere) == "grant-other-party"
        expired = scene.federation.signed(host.identity, b, issued=1_000, expires=2_000)
        assert visit(host.port, b, expired) == "grant-expired"
        assert visit(host.port) == ""
        with pytest.raises(AuthenticationError):
            meet(SitePeer("127.0.0.1", host.port, b, other.signed(host.identity, b)))
    assert not [line for line in host.log if "grant" in line], host.log
