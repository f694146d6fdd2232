"""`flow plan simulate`: days worked out by hand, files that make no sense, and what is printed."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from click.testing import CliRunner

from flowengine.cli.plan import plan as plan_group
from flowengine.cli.plan_file import parse_link_option, parse_scenario
from flowengine.errors import NotFound, UsageError
from flowengine.plan.simulate import simulate

HOUR = 3600.0
FILE = """
[simulation]
start = 2026-03-02T00:00:00Z
length = "10h"

[[site]]
name = "a"

[[site]]
name = "b"

[[link]]
from = "a"
to = "b"
rate = "8Gbit/s"
usd_per_gb = 0.01

[[demand]]
id = "first"
from = "a"
to = "b"
size = "7200GB"
within = "3h"

[[demand]]
id = "second"
from = "a"
to = "b"
size = "7200GB"
at = "1h"
within = "2h"
"""


def scenario(text=FILE):
    import tomllib

    return parse_scenario(tomllib.loads(text), "day.toml")


def play(case):
    return simulate(
        case.overlay, case.arrivals, case.start_s, case.end_s, step_s=case.step_s, limits=case.limits
    )


def test_a_day_worked_out_by_hand():
    case = scenario()
    result = play(case)
    first, second = result.demands
    # 8 Gbit/s move a GB a second: the first alone takes two hours.
    assert first.deadline == "met"
    assert second.deadline == "refused"
    assert max(d.done_s for d in result.demands) - case.start_s == pytest.approx(4 * HOUR, rel=1e-3)
    assert result.moved_bytes == 14_400 * 10**9
    assert result.usd == pytest.approx(144.0, rel=1e-3)
    forward = result.links[0]
    assert forward.mean_utilisation == pytest.approx(0.4, rel=1e-3)
    assert forward.full_s == pytest.approx(4 * HOUR, rel=1e-2)
    assert result.links[1].moved_bytes == 0
    assert play(case) == result


def test_a_second_link_meets_both_deadlines():
    case = scenario()
    links = (*case.overlay.links, *parse_link_option("a:b:8Gbit/s"))
    overlay = type(case.overlay)(sites=case.overlay.sites, links=links)
    result = simulate(overlay, case.arrivals, case.start_s, case.end_s)
    assert result.deadlines() == {"met": 2, "missed": 0, "refused": 0, "open": 0}


@pytest.mark.slow
def test_admitted_deadlines_are_met_when_links_hold():
    text = FILE.replace(
        'id = "second"', 'id = "many"\ncount = 30\nevery = "17min"\njitter = "10min"\ntenant = "t"'
    ).replace('size = "7200GB"\nat', 'size = "900GB"\nat')  # fmt: skip
    case = scenario(
        text.replace(
            'rate = "8Gbit/s"',
            'rate = "8Gbit/s"\ncap_window = [{ rate = "3Gbit/s", zone = "UTC", from = "03:00", until = "05:00" }]',
        )
    )
    result = play(case)
    counts = result.deadlines()
    assert counts["missed"] == 0
    assert counts["met"] > 10


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('rate = "8Gbit/s"', "", "lacks 'rate'"),
        ('rate = "8Gbit/s"', "rate = 8", "'rate' of link 1 of day.toml is 8"),
        ('rate = "8Gbit/s"', 'rate = "8Gbit/s"\nrtae = "1"', "has a key 'rtae' that means nothing"),
        ('id = "second"', 'id = "first"', "more than one demand 'first'"),
        ('within = "2h"', 'priority = "now"', "priority 'now'"),
        ("2026-03-02T00:00:00Z", "2026-03-02T00:00:00", "a time without zone"),
        ('usd_per_gb = 0.01', 'cap_window = [{ rate = "1Gbit/s", zone = "Mars/Phobos" }]', "Mars/Phobos"),
        ('usd_per_gb = 0.01', 'cap_window = [{ rate = "1Gbit/s", zone = "UTC", from = "8" }]', "time of day '8'"),
        ('usd_per_gb = 0.01', 'cap_window = [{ rate = "1Gbit/s", zone = "UTC", weekdays = ["Mo"] }]', "weekday 'Mo'"),
        ("[[site]]\nname = \"b\"", "[[site]]", "lacks 'name'"),
    ],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_refused_with_its_place(old, new, message):
    assert old in FILE
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        scenario(FILE.replace(old, new, 1))


def run(tmp_path: Path, *options: str, text: str = FILE):
    path = tmp_path / "day.toml"
    path.write_text(text, encoding="utf-8")
    return CliRunner().invoke(plan_group, ["simulate", str(path), *options])


@pytest.mark.slow
def test_the_command_compares_and_draws(tmp_path):
    done = run(tmp_path, "--add-link", "a:b:8Gbit/s", "--chart", str(tmp_path / "c.svg"), "--demands")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "Links, as it is (the busiest first)" in lines
    met = next(line for line in lines if line.startswith("deadlines met"))
    assert met.split()[-2:] == ["1", "2"]
    root = ET.fromstring((tmp_path / "c.svg").read_text(encoding="utf-8"))
    assert root.tag.endswith("svg")
    assert "a→b (added)" in "".join(root.itertext())


@pytest.mark.slow
def test_json_is_the_only_thing_on_stdout(tmp_path):
    done = run(tmp_path, "--json")
    answer = json.loads(done.stdout)
    assert [s["name"] for s in answer["simulations"]] == ["as it is"]
    assert answer["simulations"][0]["deadlines"]["refused"] == 1
    assert len(answer["simulations"][0]["demands"]) == 2


def test_a_missing_file_and_a_bad_link_are_said(tmp_path):
    done = CliRunner().invoke(plan_group, ["simulate", str(tmp_path / "none.toml")])
    assert isinstance(done.exception, NotFound)
    assert isinstance(run(tmp_path, "--add-link", "a-b").exception, UsageError)
    assert isinstance(run(tmp_path, text="= 3").exception, UsageError)
