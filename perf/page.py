"""The page of the newest figures, docs/perf/README.md: charts, tables, and what they depend on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Final

from perf.contenders import CONTENDERS
from perf.report import Record, Row, base_of, batches_of, group, newest, rows_of
from perf.scenarios import SCENARIOS

__all__ = ["page"]

_HEAD: Final = """# How fast it is

This page is made by `python -m perf plot` from `perf/results/`; what is measured, and how, says
[perf/README.md](../../perf/README.md). Each table shows the newest runs of each contender: medians, the fastest and
the slowest run, and speed relative to `flow`. Figures of different batches (calls of the command) were taken at
different times and are marked; compare within a batch.

`flow` always encrypts, verifies every chunk and syncs. What the others leave out stands in the last column.
"""
_COLUMNS: Final = (
    "contender",
    "wall s",
    "from-to",
    "MB/s",
    "speed over flow",
    "wire/data",
    "CPU s/GB",
    "RSS MB",
    "+sync s",
    "runs",
    "encrypts; verifies; syncs",
)


def page(records: Sequence[Record], charts: dict[tuple[str, ...], str]) -> str:
    """The page as Markdown.

    Args:
        records: all records, oldest batch first.
        charts: file names of charts by group.
    """
    out = [_HEAD]
    groups = group(records)
    for scenario in SCENARIOS.values():
        mine = {key: members for key, members in groups.items() if key[0] == scenario.name}
        if not mine:
            continue
        out.append(f"## {scenario.name}: {scenario.title}\n")
        for key, members in mine.items():
            out += _section(key, newest(members), charts.get(key, ""))
    return "\n".join(out)


def _section(key: tuple[str, ...], records: Sequence[Record], chart: str) -> list[str]:
    scenario, network, size, storage = key
    first = records[-1]
    amount = f"{float(str(first['logical_bytes'])) / 1e6:,.0f} MB in {first['files']} file{'s' * (first['files'] != 1)}"
    out = [f"### {scenario} over {network}, {size}, {storage}\n"]
    if chart:
        out.append(f"![{scenario} over {network}]({chart})\n")
    out += [f"{amount}.\n", *_table(records), ""]
    out += [f"- {row.contender} failed {row.failed} of {row.good + row.failed} times: {row.error}"
            for row in rows_of(records) if row.failed]  # fmt: skip
    out += _left_out(records)
    out += [_batch(batch, members) for batch, members in batches_of(records).items()]
    return [*out, ""]


def _table(records: Sequence[Record]) -> list[str]:
    rows = rows_of(records)
    base = base_of(rows)
    ours = _batch_of(records, base.contender)
    lines = [f"| {' | '.join(_COLUMNS)} |", "| --- | " + "---: | " * (len(_COLUMNS) - 2) + "--- |"]
    for row in rows:
        kind = CONTENDERS.get(row.contender)
        about = f"{kind.encrypts}; {kind.verifies}; {kind.syncs}" if kind else ""
        mark = "" if _batch_of(records, row.contender) == ours else " \\*"
        lines.append(f"| {' | '.join([row.contender + mark, *_cells(row, base, kind), about])} |")
    if any(" \\* |" in line for line in lines):
        lines += ["", f"\\* of another batch than {base.contender}."]
    return lines


def _cells(row: Row, base: Row, kind: object) -> list[str]:
    if not row.good:
        return ["failed", *[""] * 7, f"0/{row.failed}"]
    wireless = bool(getattr(kind, "local_only", False))
    return [
        f"{row.wall_s:.2f}",
        f"{row.wall_low_s:.2f}-{row.wall_high_s:.2f}",
        f"{row.megabytes_per_s:.0f}",
        f"{base.wall_s / row.wall_s:.2f}" if base.good else "",
        "" if wireless else f"{row.wire_bytes / max(row.logical_bytes, 1):.3f}",
        f"{row.cpu_s / max(row.logical_bytes, 1) * 1e9:.2f}",
        f"{row.rss_bytes / 1e6:.0f}",
        f"{row.sync_s:.2f}",
        f"{row.good}/{row.good + row.failed}",
    ]


def _left_out(records: Sequence[Record]) -> list[str]:
    """Which contenders were asked for and could not run, and which nobody asked for."""
    asked: dict[str, str] = {}
    for record in records:
        missing = record.get("left_out")
        if isinstance(missing, dict):
            asked |= missing
    here = {str(record["contender"]) for record in records}
    out = [f"- Not measured: {name} ({why})." for name, why in asked.items() if name not in here]
    others = [name for name in CONTENDERS if name not in here and name not in asked]
    return out + ([f"- Not asked for: {', '.join(others)}."] if others else [])


def _batch(batch: str, records: Sequence[Record]) -> str:
    first = records[0]
    machine, command = first["machine"], first["command"]
    assert isinstance(machine, dict)
    assert isinstance(command, list)
    who = ", ".join(dict.fromkeys(str(record["contender"]) for record in records))
    day = f"{batch[:4]}-{batch[4:6]}-{batch[6:8]}"
    memory = float(machine["memory_bytes"]) / (1 << 30)
    return (
        f"- {who}: {day}, commit {first['commit']}, {machine['cores']} cores of {machine['cpu']}, {memory:.0f} GiB, "
        f"kernel {machine['kernel']}, Python {machine['python']}; `{shlex.join(map(str, command))}`"
    )


def _batch_of(records: Sequence[Record], contender: str) -> str:
    return next(str(record["batch"]) for record in records if record["contender"] == contender)
