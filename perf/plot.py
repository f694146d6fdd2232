"""Charts of results as SVG: horizontal bars, one for each contender, with the spread of its runs; and their page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from perf.page import page
from perf.report import Record, Row, batches_of, group, newest, rows_of

__all__ = ["DOCS", "chart", "load", "plot"]

DOCS = Path(__file__).resolve().parent.parent / "docs" / "perf"
# Where little has to move, the time says more than a rate.
TIMED = ("s4", "s5", "s5-cold", "s6", "s7", "s7-again", "s8")
WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 760, 130, 190, 20, 9, 64
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#24292f}"
    ".t{font-weight:600;font-size:15px}.s{fill:#57606a;font-size:12px}"
    ".f{fill:#0a6cbd}.p{fill:#9aa5b1}.w{stroke:#24292f;stroke-width:1.4}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.s{fill:#9da7b3}.p{fill:#6b7683}.w{stroke:#e6edf3}}"
)


def load(folder: Path) -> list[Record]:
    """All records of scenarios in a folder, in the order of their batches."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    # The benchmarks of planner and policies keep records of another kind beside them.
    records = [record for line in lines if "scenario" in (record := json.loads(line))]
    return sorted(records, key=lambda record: str(record["batch"]))


def chart(title: str, subtitle: str, rows: Sequence[Row], timed: bool) -> str:
    """One chart. A longer bar is a higher rate or, when timed, a longer time; whiskers span the good runs."""
    good = [row for row in rows if row.good]
    size = good[0].logical_bytes if good else 0.0
    spans = [
        (row.wall_s, row.wall_low_s, row.wall_high_s)
        if timed
        else tuple(size / wall / 1e6 for wall in (row.wall_s, row.wall_high_s, row.wall_low_s))
        for row in good
    ]
    most = max((span[2] for span in spans), default=1.0) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / most
    height = TOP + len(good) * (BAR + GAP) + 14
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<text class="t" x="8" y="22">{escape(title)}</text>',
        f'<text class="s" x="8" y="42">{escape(subtitle)}</text>',
    ]
    for index, (row, (middle, low, high)) in enumerate(zip(good, spans, strict=True)):
        y = TOP + index * (BAR + GAP)
        kind = "f" if row.contender.startswith("flow") else "p"
        value = f"{middle:.2f} s" if timed else f"{middle:.0f} MB/s"
        note = (
            f"{row.cpu_s / max(size, 1) * 1e9:.1f} CPU s/GB"
            if not timed
            else f"{row.wire_bytes / 1e6:.1f} MB sent"
        )
        out += [
            f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(row.contender)}</text>',
            f'<rect class="{kind}" x="{LEFT}" y="{y}" rx="2" height="{BAR}"'
            f' width="{max(middle * scale, 1):.1f}"/>',
            f'<line class="w" x1="{LEFT + low * scale:.1f}" x2="{LEFT + high * scale:.1f}"'
            f' y1="{y + BAR / 2}" y2="{y + BAR / 2}"/>',
            f'<text x="{LEFT + high * scale + 8:.1f}" y="{y + 15}">{value}'
            f'<tspan class="s" dx="8">{note}</tspan></text>',
        ]
    return "\n".join([*out, "</svg>", ""])


def plot(records: Iterable[Record], folder: Path) -> list[Path]:
    """Write a chart for each scenario, network, size and storage, and the page; gives the files.

    Charts that no record is behind any more are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = list(records)
    written: list[Path] = []
    charts: dict[tuple[str, ...], str] = {}
    for key, members in group(records).items():
        scenario, network, size, storage = key
        batch = newest(members)
        rows = rows_of(batch)
        if not any(row.good for row in rows):
            continue
        machine = batch[-1]["machine"]
        assert isinstance(machine, dict)
        commits = ", ".join(dict.fromkeys(str(record["commit"]) for record in batch))
        amount = float(batch[0]["logical_bytes"]) / 1e6  # type: ignore[arg-type]
        timed = scenario in TIMED
        subtitle = (
            f"{'seconds, less is better' if timed else 'MB/s of data, more is better'}; "
            f"{amount:,.0f} MB in {batch[0]['files']} files; {storage}; "
            f"{machine['cores']} cores; {commits}{'; of several batches' if len(batches_of(batch)) > 1 else ''}"
        )
        name = "-".join(
            [
                scenario,
                network,
                *([] if size == "full" else [size]),
                *([] if storage == "tmpfs" else [storage]),
            ]
        )
        path = folder / f"{name}.svg"
        path.write_text(chart(f"{scenario} over {network}", subtitle, rows, timed), encoding="utf-8")
        written.append(path)
        charts[key] = path.name
    for path in set(folder.glob("*.svg")) - set(written):
        path.unlink()
    written.append(folder / "README.md")
    written[-1].write_text(page(records, charts), encoding="utf-8")
    return written
