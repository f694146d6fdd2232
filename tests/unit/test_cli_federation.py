"""What the commands of a federation make of words: limits, windows, deadlines, federation files, site names."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from support import Flow

from flowengine.api.links import LimitWindow, LinkRequest
from flowengine.api.people import TenantRequest
from flowengine.cli.doctor import look_at_accounts
from flowengine.cli.federation import parse_deadline
from flowengine.cli.federation_file import read_federation
from flowengine.cli.limit import parse_rate, parse_window, show_rate
from flowengine.cli.locations import all_at_sites
from flowengine.errors import NotFound, UsageError


@pytest.mark.parametrize(
    ("text", "days", "start", "end", "zone", "rate"),
    [
        ("08:00-18:00=50Mbit/s", [], "08:00", "18:00", "UTC", 50_000_000),
        ("sat,sun 0:00-24:00 = 1Gbit/s", ["sat", "sun"], "00:00", "24:00", "UTC", 10**9),
        (
            "fri-mon 22:00-06:00 Asia/Shanghai=0",
            ["mon", "fri", "sat", "sun"],
            "22:00",
            "06:00",
            "Asia/Shanghai",
            0,
        ),
    ],
)
def test_windows(text: str, days: list[str], start: str, end: str, zone: str, rate: int) -> None:
    window = parse_window(text)
    assert window == LimitWindow(rate_bits_per_s=rate, start=start, end=end, days=days, zone=zone)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "08:00-18:00",
        "mon=5Mbit/s",
        "08:00-18:00 Mars/Base=5Mbit/s",
        "mon-xyz 1:00-2:00=1Mbit/s",
        "1:00-2:00=none",
    ],
)
def test_what_is_no_window(text: str) -> None:
    with pytest.raises(UsageError, match="--window"):
        parse_window(text)


@pytest.mark.parametrize("rate", [None, 0, 1, 1500, 200_000_000, 2_500_000_000])
def test_rates_are_shown_as_they_may_be_written(rate: int | None) -> None:
    shown = {"no limit": "none", "nothing": "0"}.get(show_rate(rate), show_rate(rate))
    assert parse_rate(shown.replace(" ", "")) == rate


def test_deadlines() -> None:
    assert parse_deadline("90min") == timedelta(minutes=90)
    assert parse_deadline("2026-12-01T18:00+01:00") == datetime.fromisoformat("2026-12-01T18:00+01:00")
    local = parse_deadline("2026-12-01")
    assert isinstance(local, datetime)
    assert local.tzinfo is not None
    with pytest.raises(UsageError, match="--deadline"):
        parse_deadline("tomorrow")


def test_places_at_sites_and_local_paths_are_told_apart() -> None:
    assert all_at_sites(["hpc-a:/x", "b:/"])
    assert not all_at_sites(["hpc-a:x", "./hpc-a:/x", "C:/x", "/a:/x", "flow:x"])
    with pytest.raises(UsageError, match="not at a site"):
        all_at_sites(["hpc-a:/x", "y"])


FILE = """
[coordinator]
state = "postgresql://db/flow"
policies = "rules"

[[site]]
name  = "a"
facts = { country = "DE", certs = ["iso27001"] }
root  = [{ path = "data", budget = "2TB" }]

[[site]]
name = "b"
listen = ""
root = [{ path = "/srv/b", name = "/b", access = "read" }]

[[link]]
source = "a"
target = "b"
capacity = "1Gbit/s"

[[limit]]
scope = "link:a>b"
rate = "200Mbit/s"
windows = ["mon-fri 08:00-18:00=50Mbit/s"]

[[tenant]]
name = "lab"
weight = 2.0
"""


def test_a_federation_file(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text(FILE)
    found = read_federation(path)
    assert (found.coordinator.state, found.coordinator.policies) == (
        "postgresql://db/flow",
        str(tmp_path / "rules"),
    )
    assert [(s.name, s.listen, [(r.path, r.name, r.access) for r in s.root]) for s in found.sites] == [
        ("a", "127.0.0.1:0", [(str(tmp_path / "data"), "/data", "read-write")]),
        ("b", "", [("/srv/b", "/b", "read")]),
    ]
    fact = found.site_request(found.sites[0]).facts["country"]
    assert fact is not None
    assert (fact.value, fact.source) == ("DE", "f.toml")
    assert found.links == [("a", "b", LinkRequest(capacity_bits_per_s=10**9))]
    assert [(scope, rate, len(windows)) for scope, rate, windows in found.limits] == [
        ("link:a>b", 200_000_000, 1)
    ]
    assert found.tenants == [TenantRequest(name="lab", weight=2.0)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("weight", "wait"), "wait"),
        (('name = "b"\nlisten', 'name = "a"\nlisten'), "twice"),
        (('target = "b"', 'target = "c"'), "'c'"),
        (("200Mbit/s", "200"), "200"),
        (('name = "lab"', 'name = "Lab"'), "lower-case letters"),
        (("[[site]]", "[[site"), "f.toml"),
    ],
)
def test_a_federation_file_that_cannot_be_meant(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    path = tmp_path / "f.toml"
    path.write_text(FILE.replace(*change))
    with pytest.raises(UsageError, match=says):
        read_federation(path)


def test_a_federation_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="flow demo"):
        read_federation(tmp_path / "none.toml")


@pytest.mark.slow
def test_commands_without_a_coordinator_say_what_to_do(flow: Flow, tmp_path: Path) -> None:
    flow.env["FLOW_CONFIG_DIR"] = str(tmp_path / "config")
    for words in (["site", "ls"], ["cp", "a:/x", "b:/x"], ["whoami"], ["ls", "a:/x"]):
        assert "flow login" in flow(*words, code=4).stderr
    assert "--against" in flow("verify", "a:/x", code=3).stderr
    assert "not at a site" in flow("cp", "a:/x", "x", code=2).stderr
    assert "--label is for transfers between sites" in flow("cp", "--label", "x", "a", "b", code=2).stderr
    assert (
        "--threads is not for transfers between sites"
        in flow("cp", "--threads", "2", "a:/x", "b:/x", code=2).stderr
    )
    assert "nobody is logged in" in flow("logout", code=3).stderr
    said = flow("login", "flowl_nonsense", code=2).stderr
    assert "history" in said
    assert "no login string" in said
    findings = {row["check"]: row["verdict"] for row in flow("doctor", "--json").data["findings"]}
    assert findings["chunker"] == "ok"
    assert findings["coordinator"] == "ok"
    assert "_FLOW_COMPLETE" in flow("completion", "bash").stdout


@pytest.mark.slow
def test_completion_knows_sites_without_asking(flow: Flow, tmp_path: Path) -> None:
    flow.env["FLOW_CONFIG_DIR"] = str(tmp_path)
    (tmp_path / "site-names.json").write_text('{"hpc-a": ["/data", "/scratch"], "cloud-b": []}')
    complete = {"_FLOW_COMPLETE": "bash_complete", "FLOW_COORDINATOR": "https://127.0.0.1:9"}
    flow.env |= complete | {"COMP_WORDS": "flow cp hpc-a:/s", "COMP_CWORD": "2"}
    assert "plain,hpc-a:/scratch" in flow(code=None).stdout.split()
    flow.env |= {"COMP_WORDS": "flow site show h", "COMP_CWORD": "3"}
    assert flow(code=None).stdout.split() == ["plain,hpc-a"]


def test_doctor_says_when_accounts_are_mapped_and_nobody_can_act_as_them(tmp_path: Path) -> None:
    config, status = tmp_path / "site.toml", tmp_path / "proc/123/status"
    status.parent.mkdir(parents=True)

    def said(text: str) -> list[str]:
        config.write_text(text)
        return [found.verdict for found in look_at_accounts(str(config), str(tmp_path / "proc"))]

    assert said('site = "a"') == []
    assert said("[accounts.map]\nalice = 'alice'") == ["warning"]
    status.write_text("Name:\tflow-spawner\nCapEff:\t0000000000000040\n")
    assert said("[accounts.map]\nalice = 'alice'") == ["warning"]
    status.write_text("Name:\tflow-spawner\nCapEff:\t00000000000000c0\n")
    assert said("[accounts.map]\nalice = 'alice'") == ["ok"]
    assert list(look_at_accounts(str(tmp_path / "none"))) == []
