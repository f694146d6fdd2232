"""What `flow demo` moves: weather tables and logs that change from one round to the next, a cohort that must not travel."""

from __future__ import annotations

import random
import textwrap
from datetime import date
from pathlib import Path
from typing import Any, Final

__all__ = ["FEDERATION", "has_parquet", "make_cohort", "make_weather", "next_day", "write_policies"]

ROWS: Final = 1_000_000
STATIONS: Final = ("north", "east", "south", "west")
LOG_LINES: Final = 60_000
DAYS: Final = 4

FEDERATION: Final = """\
# Three sites on this machine. `flow up FILE` runs them; docs/reference/federation-file.md describes the file.

[coordinator]
state    = "{state}"
policies = "policies"

[[site]]
name  = "hpc-a"
facts = {{ country = "DE", operator = "university", operator_countries = ["DE"] }}
root  = [{{ path = "hpc-a", name = "/data" }}]

[[site]]
name  = "cloud-b"
facts = {{ country = "FR", operator = "cloud", operator_countries = ["FR"] }}
root  = [{{ path = "cloud-b", name = "/data" }}]

[[site]]
name  = "edge-c"
facts = {{ country = "US", operator = "lab", operator_countries = ["US"] }}
root  = [{{ path = "edge-c", name = "/data" }}]
"""

_POLICY: Final = """\
[policy]
id         = "cohort"
version    = "1"
title      = "Patients' data stays in the EU"
owner      = "dpo@example.org"
applies_to = ["data.labels includes 'patients'"]
unlisted   = "deny"
effective  = {effective}
review_by  = {review_by}

[[rule]]
id     = "in-the-eu"
effect = "permit"
on     = ["release", "land", "process"]
when   = ["site.country in @eu"]
why    = "The ethics board allows sites in the EU"
"""

_OPEN_POLICY: Final = """\
[policy]
id         = "open"
version    = "1"
title      = "What is not about patients may go anywhere"
owner      = "dpo@example.org"
applies_to = ["data.labels excludes 'patients'"]
unlisted   = "deny"
effective  = {effective}
review_by  = {review_by}

[[rule]]
id     = "anywhere"
effect = "permit"
on     = ["release", "land", "process"]
when   = ["data.labels excludes 'patients'"]
why    = "Weather is public"
"""

_LISTS: Final = """\
[list.eu]
title     = "EU member states with a site of ours"
domain    = "country"
as_of     = {effective}
source    = "ethics board"
review_by = {review_by}
reviewed  = true
members   = ["DE", "FR", "NL"]
"""


def has_parquet() -> bool:
    """Whether pyarrow is here to write Parquet with."""
    import importlib.util

    return importlib.util.find_spec("pyarrow") is not None


def write_policies(folder: Path, today: date) -> None:
    """The demo's policies, their label and their list."""
    (folder / "lists").mkdir(parents=True, exist_ok=True)
    dates = {
        "effective": today.replace(month=1, day=1),
        "review_by": today.replace(year=today.year + 1, month=1, day=1),
    }
    (folder / "cohort.toml").write_text(_POLICY.format(**dates), encoding="utf-8")
    (folder / "open.toml").write_text(_OPEN_POLICY.format(**dates), encoding="utf-8")
    (folder / "labels.toml").write_text('[label.patients]\ntitle = "Data about patients"\n', encoding="utf-8")
    (folder / "lists" / "eu.toml").write_text(_LISTS.format(**dates), encoding="utf-8")


def make_weather(folder: Path, seed: int = 1) -> None:
    """Readings of four stations, and a log for each day."""
    rng = random.Random(seed)  # noqa: S311 - made-up data
    for number, station in enumerate(STATIONS):
        _write_table(folder / "readings" / station, _readings(seed + number, ROWS))
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    for day in range(1, DAYS + 1):
        _write_log(folder / "logs" / f"day-{day}.log", rng, LOG_LINES, "w")


def next_day(folder: Path, seed: int = 99) -> str:
    """Change what people change: correct rows, append, rename, add. Says what was done."""
    rng = random.Random(seed)  # noqa: S311 - made-up data
    table = _readings(1, ROWS)
    at = ROWS // 3
    table["temperature"][at : at + 500] += 0.5
    _write_table(folder / "readings" / STATIONS[0], table)
    longer = _readings(2, ROWS)
    more = _readings(seed, ROWS // 50)
    import numpy as np

    _write_table(
        folder / "readings" / STATIONS[1],
        {name: np.concatenate([longer[name], more[name]]) for name in longer},
    )
    _write_log(folder / "logs" / f"day-{DAYS}.log", rng, LOG_LINES // 100, "a")
    _write_log(folder / "logs" / f"day-{DAYS + 1}.log", rng, LOG_LINES // 4, "w")
    (folder / "archive").mkdir()
    (folder / "logs" / "day-1.log").rename(folder / "archive" / "first-day.log")
    return f"500 rows corrected, {ROWS // 50:,} appended, a log grew, one is new, one was moved and renamed"


def make_cohort(folder: Path) -> None:
    """A small table about nobody."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(7)  # noqa: S311 - made-up data
    lines = [f"p{number:05d},{rng.randint(18, 95)},{rng.choice('ABC')}" for number in range(5000)]
    (folder / "patients.csv").write_text("id,age,group\n" + "\n".join(lines) + "\n", encoding="utf-8")


def _readings(seed: int, rows: int) -> dict[str, Any]:
    import numpy as np

    rng = np.random.default_rng(seed)
    return {
        "second": np.arange(rows, dtype=np.int64) * 60,
        "temperature": np.round(
            15 + rng.standard_normal(rows).cumsum() * 0.01 + rng.standard_normal(rows), 2
        ),
        "pressure": np.round(1013 + rng.standard_normal(rows).cumsum() * 0.02, 1),
        "wind": np.round(rng.weibull(2.0, rows) * 8, 2),
        "station": rng.integers(0, 40, rows),
    }


def _write_table(path: Path, columns: dict[str, Any]) -> None:
    """Parquet whose pages are cut where the content says so, so that an edit changes few of them; CSV without pyarrow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if has_parquet():
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(
            pa.table(columns),
            path.with_suffix(".parquet"),
            compression="zstd",
            use_content_defined_chunking=True,
        )
        return
    import numpy as np

    rows = np.column_stack(list(columns.values()))
    np.savetxt(path.with_suffix(".csv"), rows, fmt="%g", delimiter=",", header=",".join(columns), comments="")


def _write_log(path: Path, rng: random.Random, lines: int, mode: str) -> None:
    words = textwrap.dedent("""\
        sensor read ok|battery low|link up|link lost, waiting|calibrated|queue drained|clock set""").split(
        "|"
    )
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(
            f"{rng.randrange(86400):05d} station={rng.choice(STATIONS)} node={rng.randrange(400):03d} "
            f"{rng.choice(words)} v={rng.random():.6f}\n"
            for _ in range(lines)
        )
