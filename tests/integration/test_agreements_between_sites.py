"""Agreements and what controllers are, in a federation under the policies that come with the project.

A real coordinator and real agents. Shanghai has persons' data; Paris may have them only as cn-export.toml says, which asks
for facts that nobody but an authority may say.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from liars import PolicyKeys, evidence_of
from sites import Federation, federation
from support import Flow, wait_until

from flowengine.errors import Denied, FlowError, UsageError
from flowengine.trust.agreement import AgreementStatement, sign_agreement
from flowengine.trust.tokens import Login

pytestmark = pytest.mark.slow

SHIPPED = Path(__file__).parents[2] / "policies"
COUNTRIES = {"shanghai": "CN", "paris": "FR"}


@dataclass
class World:
    federation: Federation
    keys: PolicyKeys
    authority: Ed25519PrivateKey
    files: dict[str, str]

    def agreed(self, number: int, name: str = "filing-7", **changes: object) -> bytes:
        """The authority's word."""
        fields: dict[str, object] = {
            "authority": "counsel", "issued": int(time.time()) - 1, "roots": ["shanghai:/data"], "recipients": ["paris"],
        }  # fmt: skip
        said = AgreementStatement(id=name, number=number, **(fields | changes))  # type: ignore[arg-type]
        return sign_agreement(said, self.authority)

    def set(self, document: bytes) -> None:
        """Hand it in, and wait until all agents have it."""
        serial = self.federation.client.set_agreement(document).serial
        wait_until(
            lambda: all(self.federation.client.site(site).policy.labels >= serial for site in COUNTRIES),
            "the agreement at all sites",
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("federation")
    keys, authority = PolicyKeys(), Ed25519PrivateKey.generate()
    shipped = {
        path.relative_to(SHIPPED).as_posix(): path.read_text(encoding="utf-8")
        for path in SHIPPED.rglob("*.toml")
        if "packs" not in path.parts and not path.name.endswith(".test.toml") and path.name != "datasets.toml"
    }
    with federation(base, options=keys.options(base)) as running:
        for site in COUNTRIES:
            running.add(site, lines=keys.site_lines)
        pins = ""
        for site, country in COUNTRIES.items():
            certificate = running.client.site(site).certificate
            assert certificate is not None
            pins += f'[site.{site}]\ncountry = "{country}"\noperator_countries = ["{country}"]\n'
            pins += f'operator = "{site}"\nkey = "{certificate.key_sha256}"\n'
        public = authority.public_key().public_bytes_raw().hex()
        more = {
            "sites.toml": pins,
            "owners.toml": f"[owner.hospital]\nkey = '{keys.owner_public}'\nroots = ['shanghai:/data/cohort']\n",
            "authorities.toml": f"[authority.counsel]\nkey = '{public}'\nroots = ['shanghai:/data']\n"
            "facts = ['agreement.*', 'controller.ciio']\n",
        }
        running.client.activate_bundle(keys.bundle(shipped | more, 1))
        facts = {"data.persons": 60, "data.controller": "hospital", "data.collected_in": ["CN"]}
        running.client.set_label(keys.statement("shanghai:/data/cohort", "personal.cn", facts=facts))
        cohort = running["shanghai"].data / "cohort"
        cohort.mkdir()
        (cohort / "rows").write_bytes(b"row\n" * 5000)
        wait_until(
            lambda: all(running.client.site(site).policy.labels == 1 for site in COUNTRIES),
            "the label at all sites",
        )
        yield World(running, keys, authority, shipped | more)


def test_a_controllers_facts_permit_while_they_stand_and_stop_when_they_are_taken_back(world: World) -> None:
    client = world.federation.client
    with pytest.raises(Denied) as refused:
        client.copy("shanghai:/data/cohort/", "paris:/data/none/")
    assert "critical infrastructure (CIIO)" in str(refused.value)
    world.set(world.agreed(1, "controller", recipients=["*"], facts={"controller.ciio": False}))
    client.copy("shanghai:/data/cohort/", "paris:/data/small/").wait(60)
    assert (world.federation["paris"].data / "small" / "rows").stat().st_size == 20_000
    for site in COUNTRIES:
        sources = {
            fact["by"] for record in evidence_of(world.federation[site]) for fact in record.get("facts", ())
            if fact["attr"] == "controller.ciio"
        }  # fmt: skip
        assert sources == {"agreement:controller"}, "each site decided by the word that it holds itself"
    world.set(world.agreed(2, "controller", recipients=["*"], withdrawn=True))
    with pytest.raises(Denied):
        client.copy("shanghai:/data/cohort/", "paris:/data/again/")


def test_an_agreement_permits_those_whom_it_names_until_it_ends(world: World) -> None:
    client = world.federation.client
    facts: dict[str, object] = {
        "agreement.mechanism": "cac-security-assessment",
        "agreement.covers_data": True,
    }
    with pytest.raises(Denied):
        client.copy("shanghai:/data/cohort/", "paris:/data/assessed/")
    world.set(world.agreed(1, facts=facts, expires=int(time.time()) + 3600))
    plan = client.copy("shanghai:/data/cohort/", "paris:/data/assessed/")
    plan.wait(60)
    # Another agreement that contradicts it leaves it unknown what was agreed.
    world.set(world.agreed(1, "other", facts={"agreement.mechanism": "none"}))
    with pytest.raises(Denied):
        client.copy("shanghai:/data/cohort/", "paris:/data/unclear/")
    world.set(world.agreed(2, "other", withdrawn=True))
    ends = time.time() + 1
    world.set(world.agreed(2, facts=facts, expires=int(ends)))
    wait_until(lambda: time.time() > ends + 1, "its end")
    with pytest.raises(Denied):
        client.copy("shanghai:/data/cohort/", "paris:/data/ended/")


def test_what_could_never_count_is_refused_when_it_is_handed_in(world: World) -> None:
    client = world.federation.client
    stranger = replace(world, authority=Ed25519PrivateKey.generate())
    with pytest.raises(UsageError, match="not signed"):
        client.set_agreement(stranger.agreed(9))
    for wrong in (
        {"facts": {"controller.country": "CN"}},
        {"roots": ["paris:/data"]},
        {"recipients": ["nobody"]},
    ):
        with pytest.raises(UsageError):
            client.set_agreement(world.agreed(9, "wrong", **wrong))


def test_agreements_from_the_command_line(world: World, tmp_path: Path) -> None:
    secrets = world.federation.coordinator.folder / "secrets"
    token = Login.parse((secrets / "admin-login").read_text()).token.format_secret()
    flow = Flow(
        tmp_path,
        env={
            "FLOW_CONFIG_DIR": str(tmp_path / "config"), "FLOW_COORDINATOR": world.federation.coordinator.url,
            "FLOW_TOKEN": token, "FLOW_CA_FILE": str(secrets / "ca.pem"),
        },
    )  # fmt: skip
    key, file = tmp_path / "counsel.pem", tmp_path / "said"
    key.touch(0o600)
    key.write_bytes(world.authority.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    sign = ["agreement", "sign", "dpa-3", "--as", "counsel", "--key", key, "--number", 1, "-o", file]
    made = flow(
        *sign, "--data", "shanghai:/data/", "--to", "paris", "--expires", "2099-01-01",
        "--fact", "mechanism=scc-2021", "--fact", "tia_done=true", "--fact", "kinds=dpa,nda", "--json",
    ).data  # fmt: skip
    assert made["facts"] == {
        "agreement.mechanism": "scc-2021", "agreement.tia_done": True, "agreement.kinds": ["dpa", "nda"],
    }  # fmt: skip
    assert flow(*sign, "--data", "shanghai:/data", "--fact", "data.persons=3", code=2)
    flow("agreement", "set", file)
    assert "not later than 1" in flow("agreement", "set", file, code=1).stderr
    rows = {row["id"]: row for row in flow("agreement", "ls", "--json").data["agreements"]}
    assert (rows["dpa-3"]["roots"], rows["dpa-3"]["recipients"]) == (["shanghai:/data"], ["paris"])
    assert "scc-2021" in flow("agreement", "ls").stdout


def test_a_bundle_of_several_mebibytes_reaches_all_sites_in_parts(world: World) -> None:
    client = world.federation.client
    members = ", ".join(f'"ror:{number:09d}"' for number in range(100_000))
    listed = (
        f'[list.many]\nas_of = 2026-01-01\nsource = "test"\nreview_by = 2100-01-01\nmembers = [{members}]\n'
    )
    half = listed.replace("list.many", "list.more")
    content = world.keys.bundle(world.files | {"lists/many.toml": listed, "lists/more.toml": half}, 2)
    assert 3 << 20 < len(content) < 16 << 20
    client.activate_bundle(content)
    wait_until(
        lambda: all(client.site(site).policy.version == 2 for site in COUNTRIES),
        "the bundle at all sites",
        60,
    )
    assert client.bundle(2).content == content
    assert (world.federation["paris"].state / "policy" / "bundle").read_bytes() == content
    assert [one.version for one in client.bundles()] == [2, 1]


def test_what_is_larger_is_refused_and_many_at_once_take_the_memory_of_one(world: World) -> None:
    process = world.federation.coordinator.process
    assert process is not None
    pid = process.popen.pid

    def peak_mib() -> int:
        (line,) = (
            line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")
        )
        return int(line.split()[1]) // 1024

    client = world.federation.client
    with pytest.raises(FlowError) as refused:
        client.activate_bundle(bytes(17 << 20))
    assert refused.value.reason == "too-large"
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = peak_mib()
    content = bytes(15 << 20)
    with ThreadPoolExecutor(5) as pool:
        for one in [pool.submit(client.activate_bundle, content) for _ in range(5)]:
            with pytest.raises(UsageError, match="bundle"):
                one.result()
    assert peak_mib() - before < 150, (
        "five at once would hold 5 times 20 MiB of JSON, and what is read from them"
    )
