"""What `flow plan` says against how long it takes: mixed copies between real agents on one machine.

    python -m perf.eta_bench
    python -m perf.eta_bench --learned 10 --measured 12     a shorter form
    python -m perf.eta_bench --replay                       the model over the copies recorded last

A federation of a coordinator and two agents runs from a temporary folder; copies of other sizes teach the planner, then
30 mixed ones (one file, a few, or thousands; with and without a limit on the link) are planned, run, and compared.
Appends a JSON line to perf/results/eta.jsonl, with the error of each kind, and writes every copy, those that only taught
among them, to perf/results/eta-copies.jsonl: what was known beforehand, what was said, and how long it took. A replay
plans each of those anew from the ones before it, so a change of the model is judged without running anything.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perf.plan_bench import frame

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "eta.jsonl"
COPIES = HERE / "results" / "eta-copies.jsonl"
LEARNED, MEASURED = 20, 30
LIMITS = (None, 150_000_000, 400_000_000, None, 250_000_000)
KINDS = ("one", "few", "many")
Row = dict[str, Any]


def dataset(folder: Path, kind: str, rng: random.Random) -> tuple[int, int]:
    """Fresh files; how many and how many bytes."""
    folder.mkdir()
    if kind == "one":
        sizes = [int(10 ** rng.uniform(7, 8.4))]
    elif kind == "few":
        sizes = [int(10 ** rng.uniform(6, 7.3)) for _ in range(rng.randrange(5, 20))]
    else:
        sizes = [int(10 ** rng.uniform(2, 4.5)) for _ in range(rng.randrange(1500, 8000))]
    for number, size in enumerate(sizes):
        (folder / f"{number}").write_bytes(os.urandom(size))
    return len(sizes), sum(sizes)


def copies(count: int) -> Iterator[Row]:
    """Plan and run mixed copies one after another; what was known, said and seen of each."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from federations import local_federation

    rng = random.Random(6)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for site in "ab":
            (base / site).mkdir()
        with local_federation(base, {"a": "", "b": ""}) as federation, federation.client() as client:
            client.probe_link("a", "b")
            for number in range(count):
                limit = LIMITS[number % len(LIMITS)]
                client.set_limit("link:a>b", limit)
                kind = rng.choice(KINDS)
                objects, size = dataset(federation.data("a") / f"{number}", kind, rng)
                source, target = f"a:/data/{number}/", f"b:/data/{number}/"
                plan = client.plan(source, target)
                begin = time.perf_counter()
                done = client.copy(source, target, plan=plan.id).wait(120)
                took = time.perf_counter() - begin
                assert plan.duration_s is not None
                assert done.ended is not None
                yield {
                    "kind": kind,
                    "objects": objects,
                    "bytes": size,
                    "limit": limit,
                    "way_bits_per_s": plan.rate_bits_per_s,
                    "said_s": round(plan.duration_s, 3),
                    "took_s": round(took, 3),
                    "inside_s": round((done.ended - done.created).total_seconds(), 3),
                    "before_latest": plan.latest is None or took <= (plan.latest - plan.made).total_seconds(),
                }


def error_of(row: Row) -> float:
    """How far off what was said is, as a part of what it took."""
    return float(abs(row["said_s"] / row["took_s"] - 1))


def by_kind(rows: list[Row]) -> Row:
    """Median errors of kinds of copies, with and without a limit, and whether too much or too little was said."""
    found = {}
    for kind in KINDS:
        for name, limited in (("limited", True), ("free", False)):
            some = [row for row in rows if row["kind"] == kind and (row["limit"] is not None) == limited]
            if some:
                found[f"{kind}, {name}"] = {
                    "copies": len(some),
                    "error_median": round(statistics.median(map(error_of, some)), 3),
                    "said_of_took_median": round(
                        statistics.median(row["said_s"] / row["took_s"] for row in some), 3
                    ),
                }
    return found


def summary(rows: list[Row]) -> Row:
    """The whole, and each kind."""
    wrong = [error_of(row) for row in rows]
    return {
        "transfers": len(rows),
        "error_median": round(statistics.median(wrong), 4),
        "error_mean": round(statistics.fmean(wrong), 4),
        "error_worst": round(max(wrong), 4),
        "before_latest": sum(row["before_latest"] for row in rows),
        "kinds": by_kind(rows),
    }


def replayed(rows: list[Row], learned: int) -> list[Row]:
    """What the model says now of each copy after the first `learned`, from those before it."""
    from flowengine.plan.learning import learn
    from flowengine.plan.pace import Seen, expect_s

    seen = [
        Seen(
            objects=row["objects"],
            size_bytes=row["bytes"],
            seconds=row["inside_s"],
            rate_bits_per_s=float(row["way_bits_per_s"] or 0.0),
        )
        for row in rows
    ]
    found = []
    for at in range(learned, len(rows)):
        row, pace = rows[at], learn(seen[max(0, at - 60) : at][::-1])
        said = expect_s(pace, row["objects"], row["bytes"], row["way_bits_per_s"])
        inside = row["took_s"] <= said * (1 + 1.6449 * pace.spread)
        found.append({**row, "said_s": round(said, 3), "before_latest": inside})
    return found


def main() -> None:
    """Run it, or replay what ran."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--learned", type=int, default=LEARNED, help="copies that only teach")
    parser.add_argument("--measured", type=int, default=MEASURED, help="copies that are compared")
    parser.add_argument("--replay", action="store_true", help="plan the recorded copies anew; run nothing")
    arguments = parser.parse_args()
    if arguments.replay:
        rows = [json.loads(line) for line in COPIES.read_text(encoding="utf-8").splitlines()]
        print(json.dumps(summary(replayed(rows, arguments.learned)), indent=1))
        return
    rows = []
    for row in copies(arguments.learned + arguments.measured):
        rows.append(row)
        print(json.dumps(row), flush=True)
    measured = rows[arguments.learned :]
    record = {**frame(), **summary(measured), "rows": measured}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    COPIES.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(json.dumps({k: v for k, v in record.items() if k != "rows"}, indent=1))


if __name__ == "__main__":
    main()
