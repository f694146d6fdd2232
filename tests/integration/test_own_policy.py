"""`--policy` without a federation: the same rules at both ends of a local copy, and at each end between two hosts."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import Flow, random_file

from flowengine.wire.ticket import Ticket

pytestmark = pytest.mark.slow
POLICY = """
[policy]
id = "eu"
version = "1"
title = "Personal data stay in the EU"
owner = "dpo@example.org"
applies_to = ["data.labels includes 'personal'"]
unlisted = "deny"
effective = 2026-01-01
review_by = 2100-01-01
[[rule]]
id = "inside"
effect = "permit"
on = ["release", "land"]
when = ["site.country in @eu"]
why = "Inside the EU"
[[rule]]
id = "with-deletion"
effect = "permit"
on = ["land"]
when = ["site.country is 'GB'"]
then = [{delete_after = "10 days", proof = "certificate"}]
why = "Lent for ten days"
[lists]
eu = ["DE", "FR"]
"""
SECRET = """
[policy]
id = "secret"
version = "1"
title = "Secrets stay in Germany"
owner = "dpo@example.org"
applies_to = ["data.labels includes 'secret'"]
effective = 2026-01-01
review_by = 2100-01-01
[[rule]]
id = "germany"
effect = "permit"
on = ["release", "land"]
when = ["site.country is 'DE'"]
why = "In Germany"
"""
LABEL = ("--label", "personal")


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    (folder / "eu.toml").write_text(POLICY)
    (folder / "secret.toml").write_text(SECRET)
    (folder / "sites.toml").write_text(f'[site.lyon]\ncountry = "FR"\nkey = "{"0" * 64}"\n')
    return folder


def facts(folder: Path, text: str) -> Path:
    path = folder / f"facts{len(list(folder.glob('facts*')))}.toml"
    path.write_text(text)
    return path


def test_both_ends_of_a_local_copy_are_decided(flow: Flow, tmp_path: Path, rules: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    random_file(source / "f", 100_000)
    ask = ["cp", f"{source}/", target, "--progress", "none", "--policy", rules]
    nothing = flow(*ask, *LABEL, code=5)
    assert "release" in str(nothing)
    assert "site.country" in str(nothing)
    for text, said in (
        ('[here]\ncountry = "FR"\n[there]\ncountry = "US"\n', "land these data at there"),
        ('[here]\ncountry = "US"\n[there]\ncountry = "FR"\n', "release these data at here"),
        ('[here]\nname = "lyon"\n[there]\ncountry = "GB"\n', "unsupported"),  # nobody would delete it
    ):
        denied = flow(*ask, *LABEL, "--site-facts", facts(tmp_path, text), code=5)
        assert said in str(denied)
    assert not target.exists()
    assert "no policy permits" in str(
        flow(*ask, code=5)
    )  # without a label nothing is known of it, and nothing permits it
    good = facts(tmp_path, '[here]\nname = "lyon"\n[there]\ncountry = "DE"\n')
    flow(*ask, *LABEL, "--site-facts", good)
    assert (target / "f").stat().st_size == 100_000
    flow("sync", f"{source}/", target, "--policy", rules, *LABEL, "--site-facts", good, "--progress", "none")


def test_each_end_between_two_hosts_decides_its_own_part(flow: Flow, tmp_path: Path, rules: Path) -> None:
    served, here = tmp_path / "served", tmp_path / "here"
    (served / "in").mkdir(parents=True)
    here.mkdir()
    random_file(served / "data", 100_000)
    random_file(here / "mine", 100_000)
    france = facts(tmp_path, '[here]\ncountry = "FR"\n')
    both = facts(tmp_path, '[here]\ncountry = "FR"\n[there]\ncountry = "US"\n')
    germany = facts(tmp_path, '[here]\ncountry = "DE"\n')
    america = facts(tmp_path, '[here]\ncountry = "US"\n')
    own = ("--policy", rules, *LABEL, "--site-facts")

    def at(ticket: Ticket, path: bytes) -> str:
        return Ticket(ticket.host, ticket.port, path, ticket.fingerprint, ticket.secret).format_secret_url()

    def moves(ticket: Ticket, *options: object, code: int) -> str:
        pulled = flow("cp", at(ticket, b"data"), f"{here}/got", "--progress", "none", *options, code=code)
        pushed = flow("cp", here / "mine", at(ticket, b"in"), "--progress", "none", *options, code=code)
        assert (here / "got").exists() is (code == 0)
        assert (served / "in/mine").exists() is (code == 0)
        return f"{pulled}{pushed}"

    with flow.serving(served, *own, america) as ticket:
        said = moves(ticket, code=5)
        assert "release these data at here" in said
        assert "land these data at here" in said
    with flow.serving(served, *own, both) as ticket:  # this end knows that the other may not have them
        assert "land these data at there" in str(
            flow("cp", at(ticket, b"data"), f"{here}/got", "--progress", "none", code=5)
        )
    with flow.serving(served, *own, france) as ticket:
        moves(ticket, *own, america, code=5)
        # What the other end states of the data counts too: the server's own label alone would permit it.
        pushed = flow(
            "cp", here / "mine", at(ticket, b"in"), "--progress", "none", *own, germany, "--label", "secret", code=5
        )  # fmt: skip
        assert "land these data at here" in str(pushed)
        moves(ticket, *own, france, code=0)


def test_options_without_policies_and_facts_that_cannot_be_meant_are_refused(
    flow: Flow, tmp_path: Path, rules: Path
) -> None:
    (tmp_path / "a").mkdir()
    cp = ("cp", tmp_path / "a", tmp_path / "b")
    assert "between sites" in str(flow(*cp, *LABEL, code=2))
    assert "needs --policy" in str(flow(*cp, "--contract", "c", code=2))
    wrong = facts(tmp_path, '[here]\ncountri = "FR"\n[their]\ncountry = "FR"\n')
    said = str(flow(*cp, "--policy", rules, "--site-facts", wrong, code=1))
    assert f"{wrong}:2" in said
    assert "country" in said
    assert "their" in said
    assert not (tmp_path / "b").exists()
