"""The planner measured: a real grid of clouds against an independent bound, batches, and scale.

    python -m perf.plan_bench grid batches scale groups

Appends one JSON line for each measurement to perf/results/plan.jsonl and draws perf/results/plan.svg. Times are CPU
seconds of this process; each part runs in a fresh process, so that memory is its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import highspy
import msgspec
import numpy as np

from flowengine.plan import Cap, Demand, Estimate, Limits, Link, Overlay, Place, Priority, Site, plan

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "plan.jsonl"
CHART = HERE / "results" / "plan.svg"
VM_GBIT = {"aws": (5.0, 10.0), "gcp": (7.0, 16.0), "azure": (16.0, 16.0)}
PARTS = ("grid", "batches", "scale", "groups")
PLENTY = 10**15


def read_grid():
    """Rows of the grid: source, target, Gbit/s, dollars a GB or None."""
    with (HERE / "data" / "cloud-grid.csv").open(newline="", encoding="utf-8") as file:
        return [
            (r["source"], r["target"], float(r["gbit_per_s"]), float(r["egress_usd_per_gb"] or "nan"))
            for r in csv.DictReader(file)
        ]


def grid_overlay(rows):
    names = sorted({r[0] for r in rows} | {r[1] for r in rows})

    def cap(name, side):
        return (Cap(rate_bits_per_s=VM_GBIT[name.split(":")[0]][side] * 1e9),)

    return Overlay(
        sites=tuple(Site(name=n, caps_out=cap(n, 0), caps_in=cap(n, 1)) for n in names),
        links=tuple(
            Link(
                source=s,
                target=t,
                estimate=Estimate(rate_bits_per_s=g * 1e9),
                usd_per_gb=None if np.isnan(p) else p,
            )
            for s, t, g, p in rows
        ),
    )


def flow_bound(rows, source, target, price_limit=None):
    """Most Gbit/s from source to target over at most one relay: a maximum flow by edges, written apart.

    With `price_limit`, mean dollars a GB are at most that, and links without a known price are left out.
    """
    edges = [
        r
        for r in rows
        if r[0] != r[1] and (r[0] == source or r[1] == target) and r[1] != source and r[0] != target
    ]
    if price_limit is not None:
        edges = [e for e in edges if not np.isnan(e[3])]
    relays = sorted({e[1] for e in edges if e[0] == source and e[1] != target})
    names = [source, target, *relays]
    rows_lower, rows_upper, entries = [], [], []

    def add(lower, upper, coefficients):
        rows_lower.append(lower)
        rows_upper.append(upper)
        entries.append(coefficients)

    for name in names:
        out, into = VM_GBIT[name.split(":")[0]]
        add(-np.inf, out, [(j, 1.0) for j, e in enumerate(edges) if e[0] == name])
        add(-np.inf, into, [(j, 1.0) for j, e in enumerate(edges) if e[1] == name])
    for name in sorted({n for e in edges for n in e[:2]} - {source, target}):
        arrives = [(j, 1.0) for j, e in enumerate(edges) if e[1] == name]
        add(0.0, 0.0, arrives + [(j, -1.0) for j, e in enumerate(edges) if e[0] == name])
    if price_limit is not None:
        money = [(j, e[3] - (price_limit if e[1] == target else 0.0)) for j, e in enumerate(edges)]
        add(-np.inf, 0.0, money)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(edges), len(entries)
    model.col_cost_ = np.array([1.0 if e[1] == target else 0.0 for e in edges])
    model.col_lower_, model.col_upper_ = np.zeros(len(edges)), np.array([e[2] for e in edges])
    model.row_lower_, model.row_upper_ = np.array(rows_lower), np.array(rows_upper)
    model.sense_ = highspy.ObjSense.kMaximize
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.cumsum([0, *[len(e) for e in entries]])
    model.a_matrix_.index_ = np.array([j for e in entries for j, _ in e])
    model.a_matrix_.value_ = np.array([v for e in entries for _, v in e])
    solver = highspy._core._Highs()
    solver.setOptionValue("output_flag", False)
    solver.passModel(model)
    solver.run()
    assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return solver.getInfo().objective_function_value


def demand(number, source, target, **fields):
    return Demand(
        id=f"d{number}", sources=(Place(source),), targets=(Place(target),), remaining_bytes=PLENTY, tenant=f"t{number}",
        **fields,
    )  # fmt: skip


def total_gbit(made):
    return sum(e.rate_bits_per_s for e in made.demands) / 1e9


def run_grid(pairs=500):
    """Relayed against direct for random pairs, alone on the grid, without and with a price limit."""
    rows = read_grid()
    overlay = grid_overlay(rows)
    by_pair = {(s, t): (g, p) for s, t, g, p in rows}
    chosen = random.Random(2023).sample(sorted(by_pair), pairs)
    limits = Limits(max_relays=1)
    for factor in (None, 1.2):
        gains, of_bound, seconds = [], [], []
        for number, (source, target) in enumerate(chosen):
            direct, price = by_pair[source, target]
            if factor is not None and np.isnan(price):
                continue
            out, into = VM_GBIT[source.split(":")[0]][0], VM_GBIT[target.split(":")[0]][1]
            allowed = None if factor is None else factor * price
            money = None if allowed is None else allowed * PLENTY / 1e9
            begun = time.process_time()
            made = plan(
                overlay, (demand(number, source, target, cost_limit_usd=money),), None, 0.0, limits=limits
            )
            seconds.append(time.process_time() - begun)
            rate = total_gbit(made)
            gains.append(rate / min(direct, out, into))
            of_bound.append(rate / flow_bound(rows, source, target, allowed))
        yield {
            "part": "grid",
            "price_factor": factor,
            "pairs": len(gains),
            "gain_median": statistics.median(gains),
            "gain_mean": statistics.fmean(gains),
            "gain_best": max(gains),
            "of_bound_least": min(of_bound),
            "of_bound_mean": statistics.fmean(of_bound),
            "plan_cpu_s_median": statistics.median(seconds),
            "gains": [round(g, 4) for g in sorted(gains)],
        }


def jain(rates):
    return sum(rates) ** 2 / (len(rates) * sum(r * r for r in rates))


def run_batches():
    """Demands of as many tenants at once: throughput, fairness, time."""
    rows = read_grid()
    overlay = grid_overlay(rows)
    pairs = sorted((s, t) for s, t, _, _ in rows)
    for count in (50, 200, 1000):
        chosen = random.Random(count).sample(pairs, count)
        demands = tuple(demand(i, s, t) for i, (s, t) in enumerate(chosen))
        for name, limits in (
            ("direct", Limits(max_relays=0, exact_groups=1000)),
            ("relayed", Limits(max_relays=1)),
            ("relayed, exact", Limits(max_relays=1, exact_groups=1000)),
        ):
            if name == "relayed, exact" and count <= Limits().exact_groups:
                continue
            begun = time.process_time()
            made = plan(overlay, demands, None, 0.0, limits=limits, effort=3_000_000)
            cold = time.process_time() - begun
            begun = time.process_time()
            again = plan(overlay, demands[1:], made, 5.0, limits=limits, effort=3_000_000)
            warm = time.process_time() - begun
            rates = [e.rate_bits_per_s / 1e9 for e in made.demands]
            yield {
                "part": "batches",
                "demands": count,
                "routes": name,
                "method": made.method,
                "again": again.method,
                "total_gbit_per_s": sum(rates),
                "least_gbit_per_s": min(rates),
                "jain": jain(rates),
                "first_cpu_s": cold,
                "warm_cpu_s": warm,
            }


def random_overlay(sites, seed):
    rng = random.Random(seed)
    names = [f"s{i}" for i in range(sites)]

    def cap():
        return (Cap(rate_bits_per_s=rng.choice([10e9, 40e9, 100e9])),)

    pairs = set()
    for i in range(sites):
        for j in [(i + 1) % sites, *(rng.randrange(sites) for _ in range(4))]:
            if i != j:
                pairs |= {(i, j), (j, i)}
    return Overlay(
        sites=tuple(Site(name=n, caps_in=cap(), caps_out=cap()) for n in names),
        links=tuple(
            Link(
                source=names[a],
                target=names[b],
                estimate=Estimate(rate_bits_per_s=rng.uniform(1e9, 20e9), spread=0.1),
                usd_per_gb=rng.choice([0.0, 0.01, 0.02, 0.08]),
            )
            for a, b in sorted(pairs)
        ),
    )


def random_demands(count, sites, tenants, seed, kinds=None):
    rng = random.Random(seed)
    places = [Place(f"s{i}") for i in range(sites)]

    def kind():
        source, target = rng.sample(places, 2)
        return (source,), (target,), rng.choice(list(Priority)), f"t{rng.randrange(tenants)}"

    menu = [kind() for _ in range(kinds)] if kinds else None
    found = []
    for k in range(count):
        sources, targets, priority, tenant = rng.choice(menu) if menu else kind()
        found.append(
            Demand(
                id=f"d{seed}-{k}",
                sources=sources,
                targets=targets,
                remaining_bytes=int(10 ** rng.uniform(9, 13)),
                priority=priority,
                tenant=tenant,
                dataset=f"set-{k // 5}",
            )
        )
    return tuple(found)


def later(overlay, demands, made, seconds, seed, changed):
    """After a few seconds: bytes have moved, a part of all links is another, 1 % of demands has gone, 1 % has come."""
    rng = random.Random(seed)
    new = msgspec.structs.replace
    links = tuple(
        new(x, estimate=new(x.estimate, rate_bits_per_s=x.estimate.rate_bits_per_s * rng.uniform(0.95, 1.05)))
        if rng.random() < changed
        else x
        for x in overlay.links
    )
    left = []
    for entry, one in zip(made.demands, demands, strict=True):
        remaining = one.remaining_bytes - int(entry.rate_bits_per_s / 8 * seconds)
        if remaining > 0 and rng.random() > 0.01:
            left.append(new(one, remaining_bytes=remaining))
    come = random_demands(len(demands) // 100, len(overlay.sites), 40, seed)
    return new(overlay, links=links), (*left, *come)


def peak_mib():
    """The most memory of this process alone: getrusage(2) counts what its parent had when it was started, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def warm_of_fresh(made, fresh, demands):
    """For each class, what tenants' totals are worth in the warm plan, as part of what they are in a fresh one.

    By the fresh plan's own utilities: a tenant's first Gbit/s count most.
    """
    found = {}
    for name, edges in fresh.basis.ladders:
        width = np.append(np.diff(edges, prepend=0.0), 1e6)
        slope = 1.6 ** np.arange(len(width) - 1, -1, -1.0)
        worth = []
        for one in (made, fresh):
            totals: dict[str, float] = {}
            for entry, demand in zip(one.demands, demands, strict=True):
                if demand.priority == name:
                    totals[demand.tenant] = totals.get(demand.tenant, 0.0) + entry.rate_bits_per_s / 1e9
            level = np.array(list(totals.values()))[:, None]
            worth.append(float((np.clip(level - (np.cumsum(width) - width), 0, width) * slope).sum()))
        found[f"warm_of_fresh_{name}"] = worth[0] / worth[1]
    return found


def run_scale(sites=200, count=5000):
    """The first plan, then a chain of re-plans."""
    for tenants, changed in ((40, 0.1), (40, 1.0), (count, 0.1)):
        overlay = random_overlay(sites, 1)
        demands = random_demands(count, sites, tenants, 1)
        begun = time.process_time()
        made = plan(overlay, demands, None, 0.0)
        first = time.process_time() - begun
        warm, methods, churn, spent = [], [], [], []
        now = 0.0
        for step in range(8):
            now += 5.0
            overlay, demands = later(overlay, demands, made, 5.0, 100 + step, changed)
            begun = time.process_time()
            made = plan(overlay, demands, made, now)
            warm.append(time.process_time() - begun)
            methods.append(made.method)
            spent.append(made.effort_spent)
            churn.append(made.moved_share)
        fresh = plan(overlay, demands, None, now)
        yield {
            "part": "scale",
            "sites": sites,
            "links": len(overlay.links),
            "demands": count,
            "tenants": tenants,
            "links_changed": changed,
            "first_cpu_s": first,
            "warm_cpu_s_median": statistics.median(warm),
            "warm_cpu_s_worst": max(warm),
            "warm_effort_most": max(spent),
            "methods": {name: methods.count(name) for name in sorted(set(methods))},
            "moved_share_mean": statistics.fmean(churn),
            **warm_of_fresh(made, fresh, demands),
            "warm_gbit_per_s": total_gbit(made),
            "fresh_gbit_per_s": total_gbit(fresh),
            "peak_mib": peak_mib(),
        }


def run_groups(sites=1000, count=100_000, kinds=4900):
    """Very many demands in at most 5,000 groups."""
    overlay = random_overlay(sites, 2)
    demands = random_demands(count, sites, 40, 2, kinds)
    begun = time.process_time()
    made = plan(overlay, demands, None, 0.0)
    first = time.process_time() - begun
    begun = time.process_time()
    again = plan(overlay, demands[50:], made, 5.0)
    yield {
        "part": "groups",
        "sites": sites,
        "links": len(overlay.links),
        "demands": count,
        "groups": len({e.group for e in made.demands}),
        "first_cpu_s": first,
        "warm_cpu_s": time.process_time() - begun,
        "methods": [made.method, again.method],
        "peak_mib": peak_mib(),
    }


RUNS = {"grid": run_grid, "batches": run_batches, "scale": run_scale, "groups": run_groups}


def frame() -> dict[str, object]:
    """What every record says about where and when it was made."""
    root = HERE.parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    cpu = next(
        (
            x.split(":")[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if x.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "commit": commit.stdout.strip(),
        "at": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "cpu": cpu,
        "python": platform.python_version(),
        "highs": highspy._core._Highs().version(),
    }


def draw(records):
    """Gains of all pairs, sorted, for the newest grid records."""
    newest = {r["price_factor"]: r for r in records if r["part"] == "grid"}
    width, height, left, top = 640, 300, 60, 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 240}" height="{height + 110}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        '<text x="10" y="24" font-size="15">Throughput over the direct path, at most one relay, 63 cloud regions</text>',
    ]
    most = max(max(r["gains"]) for r in newest.values())
    scale = height / np.log2(max(most, 2))
    for tick in (1, 2, 4, 8):
        y = top + height - scale * np.log2(tick)
        lines.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        lines.append(f'<text x="{left - 30}" y="{y + 4:.1f}">{tick}x</text>')
    for (factor, record), colour in zip(newest.items(), ("#0b5cad", "#c2571a"), strict=False):
        gains = record["gains"]
        points = " ".join(
            f"{left + i / max(len(gains) - 1, 1) * width:.1f},{top + height - scale * np.log2(max(g, 1e-3)):.1f}"
            for i, g in enumerate(gains)
        )
        name = "any price" if factor is None else f"at most {factor} x the direct price"
        y = top + 20 + 60 * (factor is not None)
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{left + width + 10}" y="{y}" fill="{colour}">{name}</text>')
        lines.append(
            f'<text x="{left + width + 10}" y="{y + 16}">mean {record["gain_mean"]:.2f}x, median {record["gain_median"]:.2f}x</text>'
        )
        lines.append(f'<text x="{left + width + 10}" y="{y + 32}">best {record["gain_best"]:.1f}x</text>')
    lines.append(f'<text x="{left}" y="{top + height + 30}">random pairs, sorted by gain</text>')
    lines.append("</svg>")
    CHART.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=(*PARTS, []), help="which measurements; all without any")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        for record in RUNS[arguments.parts[0]]():
            print(json.dumps(record), flush=True)
        return
    RESULTS.parent.mkdir(exist_ok=True)
    about = frame()
    for part in arguments.parts or PARTS:
        command = [sys.executable, "-m", "perf.plan_bench", part, "--inside"]
        done = subprocess.run(
            command,
            cwd=HERE.parent,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        with RESULTS.open("a", encoding="utf-8") as file:
            for line in done.stdout.splitlines():
                record = json.loads(line)
                file.write(json.dumps({**about, **record}) + "\n")
                shown = {
                    k: round(v, 4) if isinstance(v, float) else v for k, v in record.items() if k != "gains"
                }
                print(json.dumps(shown), flush=True)
    records = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    if any(r["part"] == "grid" for r in records):
        draw(records)


if __name__ == "__main__":
    main()
