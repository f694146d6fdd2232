"""The harness's own arithmetic: medians, ratios, charts, and data that is the same every time."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

from perf import data
from perf.plot import load, plot
from perf.report import Record, group, newest, rows_of, table


def record(contender: str, wall_s: float, **more: object) -> Record:
    base: Record = {
        "scenario": "s1-one",
        "network": "loopback",
        "size": "full",
        "storage": "tmpfs",
        "batch": "20260101T000000Z",
        "commit": "abc",
        "machine": {"cpu": "x", "cores": 2, "memory_bytes": 8 << 30, "kernel": "6.1", "python": "3.11.7"},
        "command": ["python", "-m", "perf", "run", "s1-one"],
        "contender": contender,
        "ok": True,
        "error": "",
        "files": 1,
        "logical_bytes": 1_000_000_000,
        "wall_s": wall_s,
        "wire_bytes": 500_000_000,
        "cpu_s": 3.0,
        "peak_rss_bytes": 7_000_000,
        "sync_s": 0.5,
    }
    return base | more


def test_rows_hold_medians_and_the_fastest_comes_first() -> None:
    records = [record("rsync-ssh", wall) for wall in (4.0, 9.0, 5.0)] + [record("flow", 2.0)]
    first, second = rows_of(records)
    assert (first.contender, first.wall_s, first.megabytes_per_s) == ("flow", 2.0, 500.0)
    assert (second.wall_s, second.wall_low_s, second.wall_high_s, second.good) == (5.0, 4.0, 9.0, 3)


def test_a_failed_run_is_counted_shown_and_kept_out_of_the_medians() -> None:
    failed = {"contender": "scp", "ok": False, "error": "no room", "scenario": "s1-one"}
    rows = rows_of([record("flow", 2.0), record("flow", 90.0, ok=False, error="lost"), failed])
    assert [(row.contender, row.good, row.failed) for row in rows] == [("flow", 1, 1), ("scp", 0, 1)]
    text = table(rows, {})
    assert rows[0].wall_s == 2.0
    assert "scp: no room" in text
    assert "flow: lost" in text


def test_ratios_are_of_speed_against_flow() -> None:
    lines = table(rows_of([record("flow", 2.0), record("cp", 1.0), record("scp", 8.0)]), {}).splitlines()
    assert [line.split()[:5] for line in lines[1:]] == [
        ["cp", "1.00", "1.00-1.00", "1000", "2.00"],
        ["flow", "2.00", "2.00-2.00", "500", "1.00"],
        ["scp", "8.00", "8.00-8.00", "125", "0.25"],
    ]


def test_groups_keep_networks_apart() -> None:
    assert len(group([record("flow", 1.0), record("flow", 1.0, network="link")])) == 2


def test_charts_and_page_show_the_newest_run_of_each_contender(tmp_path: Path) -> None:
    new = {"batch": "20260202T000000Z", "commit": "def"}
    records = [
        record("flow", 1.0),
        record("old", 8.0),
        record("flow", 4.0, **new, left_out={"rclone": "rclone is missing; install rclone"}),
        record("a<b", 2.0, **new),
        record("a<b", 3.0, **new, ok=False, error="lost"),
    ]
    (tmp_path / "s1-one.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in reversed(records)))
    (tmp_path / "plan.jsonl").write_text('{"date": "20260101"}\n')
    loaded = load(tmp_path)
    assert [(entry["contender"], entry["wall_s"]) for entry in newest(loaded)] == [
        ("old", 8.0),
        ("a<b", 3.0),
        ("a<b", 2.0),
        ("flow", 4.0),
    ]
    charts = tmp_path / "charts"
    charts.mkdir()
    (charts / "stale.svg").touch()
    chart, page = plot(loaded, charts)
    assert sorted(path.name for path in charts.iterdir()) == ["README.md", "s1-one-loopback.svg"]
    drawn = ET.fromstring(chart.read_text())
    texts = ["".join(node.itertext()) for node in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "a<b" in texts
    assert "250 MB/s3.0 CPU s/GB" in texts
    lines = page.read_text().splitlines()
    assert [line.split("|")[1:6] for line in lines if line.startswith(("| flow", "| old", "| a<b"))] == [
        [" a<b ", " 2.00 ", " 2.00-2.00 ", " 500 ", " 2.00 "],
        [" flow ", " 4.00 ", " 4.00-4.00 ", " 250 ", " 1.00 "],
        [" old \\* ", " 8.00 ", " 8.00-8.00 ", " 125 ", " 0.50 "],
    ]
    assert "- a<b failed 1 of 2 times: lost" in lines
    assert "- Not measured: rclone (rclone is missing; install rclone)." in lines
    assert any(line.startswith("- old: 2026-01-01, commit abc, 2 cores of x, 8 GiB") for line in lines)
    assert any("commit def" in line and "`python -m perf run s1-one`" in line for line in lines)


def test_data_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        data.write_random(tmp_path / name / "large", 100_000, 7)
        data.small_files(tmp_path / name / "small", 120, 7)
        data.edited_copy(tmp_path / name / "large", tmp_path / name / "edited", 7, region=10_000, edits=6)
    assert data.same_tree(tmp_path / "one", tmp_path / "two") == ""
    assert data.total_size(tmp_path / "one")[1] == 122
    assert (tmp_path / "one" / "large").read_bytes() != (tmp_path / "one" / "edited").read_bytes()


def test_a_difference_between_trees_is_named(tmp_path: Path) -> None:
    data.write_random(tmp_path / "one" / "file", 5000, 1)
    assert data.same_tree(tmp_path / "one", tmp_path / "two") == "file is missing"
    data.write_random(tmp_path / "two" / "file", 5000, 2)
    assert data.same_tree(tmp_path / "one", tmp_path / "two") == "file differs before byte 5000"
    data.write_random(tmp_path / "two" / "file", 5001, 1)
    assert data.same_tree(tmp_path / "one", tmp_path / "two") == "file has 5001 bytes, not 5000"


def test_edits_overwrite_insert_and_take_out(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    data.write_random(old, 1_000_000, 3)
    data.edited_copy(old, new, 3, region=100_000, share=0.1, edits=0)
    before, after = old.read_bytes(), new.read_bytes()
    changed = [
        i
        for i in range(10)
        if before[i * 100_000 : (i + 1) * 100_000] != after[i * 100_000 : (i + 1) * 100_000]
    ]
    assert len(after) == len(before)
    assert len(changed) == 1
