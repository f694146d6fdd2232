"""Tables of medians, spread and ratios from the records of runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Row", "base_of", "batches_of", "group", "newest", "print_tables", "rows_of", "table"]

Record = dict[str, object]
GROUP_KEYS = ("scenario", "network", "size", "storage")
COLUMNS = (
    ("contender", "<"),
    ("wall s", ">"),
    ("from-to", ">"),
    ("MB/s", ">"),
    ("ratio", ">"),
    ("wire MB", ">"),
    ("wire/data", ">"),
    ("CPU s", ">"),
    ("CPU s/GB", ">"),
    ("RSS MB", ">"),
    ("+sync s", ">"),
    ("runs", ">"),
    ("encrypts, verifies, syncs", "<"),
)


@dataclass(frozen=True)
class Row:
    """A contender's figures in one group: medians over its good runs, and how many failed."""

    contender: str
    wall_s: float = math.nan
    wall_low_s: float = math.nan
    wall_high_s: float = math.nan
    megabytes_per_s: float = math.nan
    wire_bytes: float = math.nan
    logical_bytes: float = math.nan
    cpu_s: float = math.nan
    rss_bytes: float = math.nan
    sync_s: float = math.nan
    good: int = 0
    failed: int = 0
    error: str = ""


def _median(records: Sequence[Record], key: str) -> float:
    return statistics.median(float(record[key]) for record in records)  # type: ignore[arg-type]


def group(records: Iterable[Record]) -> dict[tuple[str, ...], list[Record]]:
    """Records by scenario, network, size and storage, in the order in which they came."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(str(record[key]) for key in GROUP_KEYS), []).append(record)
    return groups


def batches_of(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by batch (one call of the command)."""
    batches: dict[str, list[Record]] = {}
    for record in records:
        batches.setdefault(str(record["batch"]), []).append(record)
    return batches


def newest(records: Sequence[Record]) -> list[Record]:
    """Of a group's records, for each contender those of the last batch that it was part of."""
    last = {str(record["contender"]): str(record["batch"]) for record in records}
    return [record for record in records if str(record["batch"]) == last[str(record["contender"])]]


def base_of(rows: Sequence[Row]) -> Row:
    """The row that others are compared with: flow's, or the first where flow did not run."""
    return next((row for row in rows if row.contender == "flow" and row.good), rows[0])


def rows_of(records: Sequence[Record]) -> list[Row]:
    """One row for each contender of a group, fastest first; those that never succeeded come last."""
    rows = []
    for name in dict.fromkeys(str(record["contender"]) for record in records):
        mine = [record for record in records if record["contender"] == name]
        good = [record for record in mine if record["ok"]]
        error = next((str(record["error"]) for record in mine if not record["ok"]), "")
        if not good:
            rows.append(Row(name, failed=len(mine), error=error))
            continue
        walls = [float(record["wall_s"]) for record in good]  # type: ignore[arg-type]
        wall, size = statistics.median(walls), _median(good, "logical_bytes")
        rows.append(
            Row(
                name,
                wall,
                min(walls),
                max(walls),
                size / wall / 1e6,
                _median(good, "wire_bytes"),
                size,
                _median(good, "cpu_s"),
                _median(good, "peak_rss_bytes"),
                _median(good, "sync_s"),
                len(good),
                len(mine) - len(good),
                error,
            )
        )
    return sorted(rows, key=lambda row: (row.good == 0, row.wall_s))


def table(rows: Sequence[Row], traits: dict[str, str], local: frozenset[str] = frozenset()) -> str:
    """The rows as text. The ratio is the speed over flow's, or over the fastest's where flow did not run.

    Args:
        traits: What each contender encrypts, verifies and syncs, by its name.
        local: Contenders that use no wire.
    """
    base = base_of(rows)
    lines = [[title for title, _ in COLUMNS]]
    for row in rows:
        about = traits.get(row.contender, "")
        if not row.good:
            lines.append([row.contender, "failed", *[""] * 9, f"0/{row.failed}", about])
            continue
        no_wire = row.contender in local
        lines.append(
            [
                row.contender,
                f"{row.wall_s:.2f}",
                f"{row.wall_low_s:.2f}-{row.wall_high_s:.2f}",
                f"{row.megabytes_per_s:.0f}",
                f"{base.wall_s / row.wall_s:.2f}" if base.good else "",
                "" if no_wire else f"{row.wire_bytes / 1e6:.1f}",
                "" if no_wire else f"{row.wire_bytes / max(row.logical_bytes, 1):.3f}",
                f"{row.cpu_s:.2f}",
                f"{row.cpu_s / max(row.logical_bytes, 1) * 1e9:.2f}",
                f"{row.rss_bytes / 1e6:.0f}",
                f"{row.sync_s:.2f}",
                f"{row.good}/{row.good + row.failed}",
                about,
            ]
        )
    widths = [max(len(line[index]) for line in lines) for index in range(len(COLUMNS))]
    out = []
    for line in lines:
        cells = zip(line, widths, COLUMNS, strict=True)
        out.append("  ".join(f"{cell:{side}{width}}" for cell, width, (_, side) in cells).rstrip())
    out += [f"{row.contender}: {row.error}" for row in rows if row.failed]
    return "\n".join(out)


def print_tables(records: Iterable[Record]) -> None:
    """Print a table for each scenario on each network."""
    from perf.contenders import CONTENDERS
    from perf.scenarios import SCENARIOS

    traits = {n: f"{k.encrypts}; {k.verifies}; {k.syncs}" for n, k in CONTENDERS.items()}
    local = frozenset(name for name, kind in CONTENDERS.items() if kind.local_only)
    for (scenario, network, size, storage), members in group(records).items():
        title = SCENARIOS[scenario].title if scenario in SCENARIOS else ""
        amount = f"{float(members[0]['logical_bytes']) / 1e6:.0f} MB in {members[0]['files']} files"  # type: ignore[arg-type]
        print(f"\n{scenario}: {title}\n{network}, size {size}, {amount}, {storage}")
        print(table(rows_of(members), traits, local))
