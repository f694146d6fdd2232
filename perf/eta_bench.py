"""What `flow plan` says against how long it takes: mixed copies between real agents on one machine.

    python -m perf.eta_bench

A federation of a coordinator and two agents runs from a temporary folder; copies of other sizes teach the planner, then
30 mixed ones (one file or thousands, with and without a limit on the link) are planned, run, and compared. Appends a
JSON line to perf/results/eta.jsonl.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from perf.plan_bench import frame

RESULTS = Path(__file__).parent / "results" / "eta.jsonl"
LEARNED, MEASURED = 20, 30
LIMITS = (None, 150_000_000, 400_000_000, None, 250_000_000)


def dataset(folder: Path, rng: random.Random) -> tuple[int, int]:
    """Fresh files; how many and how many bytes."""
    folder.mkdir()
    kind = rng.choice(("one", "few", "many"))
    if kind == "one":
        sizes = [int(10 ** rng.uniform(7, 8.4))]
    elif kind == "few":
        sizes = [int(10 ** rng.uniform(6, 7.3)) for _ in range(rng.randrange(5, 20))]
    else:
        sizes = [int(10 ** rng.uniform(2, 4.5)) for _ in range(rng.randrange(1500, 8000))]
    for number, size in enumerate(sizes):
        (folder / f"{number}").write_bytes(os.urandom(size))
    return len(sizes), sum(sizes)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from federations import local_federation

    rng = random.Random(6)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for site in "ab":
            (base / site).mkdir()
        with local_federation(base, {"a": "", "b": ""}) as federation, federation.client() as client:
            client.probe_link("a", "b")
            for number in range(LEARNED + MEASURED):
                limit = LIMITS[number % len(LIMITS)]
                client.set_limit("link:a>b", limit)
                objects, size = dataset(federation.data("a") / f"{number}", rng)
                source, target = f"a:/data/{number}/", f"b:/data/{number}/"
                plan = client.plan(source, target)
                begin = time.perf_counter()
                client.copy(source, target, plan=plan.id).wait(120)
                took = time.perf_counter() - begin
                assert plan.duration_s is not None
                inside = plan.latest is None or took <= (plan.latest - plan.made).total_seconds()
                rows.append(
                    {
                        "objects": objects,
                        "bytes": size,
                        "limit": limit,
                        "said_s": round(plan.duration_s, 3),
                        "took_s": round(took, 3),
                        "before_latest": inside,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    measured = rows[LEARNED:]
    wrong = [abs(row["said_s"] / row["took_s"] - 1) for row in measured]
    record = {
        **frame(),
        "transfers": len(measured),
        "error_median": round(statistics.median(wrong), 4),
        "error_mean": round(statistics.fmean(wrong), 4),
        "error_worst": round(max(wrong), 4),
        "before_latest": sum(row["before_latest"] for row in measured),
        "rows": measured,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "rows"}))


if __name__ == "__main__":
    main()
