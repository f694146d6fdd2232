"""How fast policies decide: full decisions a second, allowed sets, a comparison of two bundles.

    python perf/policy_bench.py [--quick] [--no-record]

Measures on one core: distinct requests under the 24 rules of the six policies in force, no result kept for another
request, every line's truth kept until the batch ends; the allowed sets of all uses for sites x label sets; the
comparison of two versions of the policies over the same table. Appends one JSON line to perf/results/policy.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from flowengine.policy.evaluate import Decision, Engine
from flowengine.policy.ledger import counters_of
from flowengine.policy.model import USES, PolicySet, Site, Value
from flowengine.policy.obligations import CAPABILITIES
from flowengine.policy.parse import load
from flowengine.policy.tables import changes, table

ROOT = pathlib.Path(__file__).resolve().parents[1]
AT = 1_772_452_800  # 2026-03-02T12:00:00Z
BATCH = 100
COUNTRIES = [
    "FR", "DE", "IE", "FI", "US", "CA", "BR", "JP", "GB", "CH", "CN", "HK", "SG", "RU", "IN", "AU", "AE", "NG",
]  # fmt: skip
OPERATORS = ["hosp-a", "hosp-b", "cloud-us", "ror:02catss52", "ror:013meh722", "uni-x"]


def files() -> dict[str, bytes]:
    root = ROOT / "policies"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.toml"))}


def random_sites(rng: random.Random, count: int) -> dict[str, Site]:
    sites = {}
    for number in range(count):
        country = rng.choice(COUNTRIES)
        facts: dict[str, Value] = {
            "site.id": f"site-{number}",
            "site.country": country,
            "site.operator": rng.choice(OPERATORS),
            "site.operator_countries": frozenset(
                {country, rng.choice(COUNTRIES)} if rng.random() < 0.3 else {country}
            ),
            "site.certs": frozenset(
                rng.sample(["iso27001", "nist-800-171", "cisa-202-security"], rng.randint(0, 3))
            ),
            "site.spill": rng.choice(["memory-only", "encrypted-disk"]),
            "site.has_key": rng.random() < 0.6,
        }
        can = frozenset(word for word in sorted(CAPABILITIES) if rng.random() < 0.97)
        sites[f"site-{number}"] = Site(f"site-{number}", facts, can)
    return sites


def subject_data(rng: random.Random, policies: PolicySet, count: int) -> list[dict[str, Value]]:
    """Data of which each is a subject of one to three of the six policies."""
    labels = ["personal.eu", "personal.cn", "us.genomic", "us.health", "itar", "clinical"]
    found: list[dict[str, Value]] = []
    for _ in range(count):
        chosen = policies.close_labels(frozenset(rng.sample(labels, rng.randint(1, 3))))
        facts: dict[str, Value] = {
            "data.labels": chosen,
            "data.contracts": frozenset(["EGA-DAA-1042"] if rng.random() < 0.2 else []),
            "data.collected_in": frozenset(
                ["CN" if "personal.cn" in chosen else "FR", rng.choice(COUNTRIES)]
            ),
            "data.persons": rng.randrange(200_000),
        }
        found.append(facts)
    return found


def random_data(rng: random.Random, policies: PolicySet, count: int) -> dict[str, dict[str, Value]]:
    """Distinct sets of labels, with contracts, origins and numbers of persons."""
    labels = sorted(policies.labels)
    seen: set[frozenset[str]] = set()
    data: dict[str, dict[str, Value]] = {}
    while len(data) < count:
        chosen = policies.close_labels(frozenset(rng.sample(labels, rng.randint(1, 4))))
        if chosen in seen:
            continue
        seen.add(chosen)
        data[f"data-{len(data)}"] = {
            "data.labels": chosen,
            "data.contracts": frozenset(["EGA-DAA-1042"] if rng.random() < 0.1 else []),
            "data.collected_in": frozenset(rng.sample(COUNTRIES, 2)),
            "data.persons": rng.randrange(200_000),
        }
    return data


def random_request(rng: random.Random, counters: list[str]) -> dict[str, Value]:
    request: dict[str, Value] = {
        "time.now": AT + rng.randrange(86400),
        "recipient.org": rng.choice(OPERATORS),
        "recipient.certifications": frozenset(["eu-us-dpf"] if rng.random() < 0.3 else []),
        "recipient.sector": "commercial",
        "recipient.covered_person": rng.random() < 0.1,
        "recipient.foreign": rng.random() < 0.5,
        "recipient.us_person": rng.random() < 0.5,
        "request.purpose": rng.choice(["research", "care", "operations", "DUO:0000006"]),
        "agreement.mechanism": rng.choice(
            ["scc-2021", "none", "cn-standard-contract", "cac-security-assessment"]
        ),
        "agreement.tia_done": rng.random() < 0.8,
        "agreement.expires": AT + rng.choice([-1, 1]) * 86400 * 30,
        "agreement.covers_data": True,
        "controller.ciio": False,
        "transfer.bytes": rng.randrange(10**12),
        "crypto.end_to_end": True,
        "crypto.strength_bits": 256,
        "crypto.fips140": rng.random() < 0.5,
        "approvals.valid_from_group('dac')": rng.randrange(4),
    }
    for name in counters:
        request[name] = rng.randrange(200_000)
    for name in [name for name in request if rng.random() < 0.05]:
        del request[name]
    return request


def measure_decisions(policies: PolicySet, count: int) -> dict[str, object]:
    """Distinct requests, each merged from the facts of data, site and request and decided in full."""
    rng = random.Random(1)
    engine = Engine(policies)
    sites = list(random_sites(rng, 500).values())
    counters = [reference.name for reference in counters_of(policies)]
    data = subject_data(rng, policies, 500)
    asks: list[tuple[str, dict[str, Value], Site, dict[str, Value]]] = [
        (rng.choice(USES), rng.choice(data), rng.choice(sites), random_request(rng, counters))
        for _ in range(count)
    ]
    gc.collect()
    gc.freeze()
    permits = lines = rules = 0
    seconds = 0.0
    for start in range(0, count, BATCH):
        kept: list[Decision] = []
        began = time.process_time()
        for use, about, site, request in asks[start : start + BATCH]:
            kept.append(engine.decide(use, {**about, **site.facts, **request}, site.can))
        seconds += time.process_time() - began
        permits += sum(decision.permit for decision in kept)
        for decision in kept:
            for trace in decision.traces:
                lines += len(trace.scope_truths) + sum(len(row[1]) for row in trace.rows)
                rules += len(trace.rows)
    gc.unfreeze()
    return {
        "decisions": count,
        "rules": sum(len(policy.rules) for policy in engine.enforced),
        "decisions_per_s": round(count / seconds),
        "permitted": permits,
        "lines_per_decision": round(lines / count, 1),
        "rules_evaluated_per_decision": round(rules / count, 1),
    }


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    began = time.process_time()
    found = work()
    return round(time.process_time() - began, 3), found


def measure_tables(policies: PolicySet, sites: int, label_sets: int) -> dict[str, object]:
    """Allowed sets of every use, requests open; then the same under looser policies, and what changed."""
    rng = random.Random(2)
    looser_files = files()
    text = looser_files["1-eu-personal.toml"].decode()
    looser_files["1-eu-personal.toml"] = text.replace('"agreement.tia_done is true", ', "").encode()
    places, data = random_sites(rng, sites), random_data(rng, policies, label_sets)
    request = {"time.now": AT}
    allowed_s, old = timed(lambda: table(Engine(policies), data, places, request))
    allowed = sum(len(old.allowed(use, name)) for use in USES for name in data)

    def compare() -> tuple[int, int]:
        before = table(Engine(policies), data, places, request)
        after = table(Engine(load(looser_files)), data, places, request)
        found = list(changes(before, after))
        return sum(len(item.sites) for item in found), sum(len(item.sites) for item in found if item.weaker)

    diff_s, (changed, weaker) = timed(compare)
    return {
        "sites": sites,
        "label_sets": label_sets,
        "cells": sites * label_sets * len(USES),
        "allowed_sets_s": allowed_s,
        "cells_allowed": allowed,
        "diff_s": diff_s,
        "cells_changed": changed,
        "cells_weaker": weaker,
    }


def cpu_model() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def commit() -> str:
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure policy decisions, allowed sets and comparisons.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the size, for a look")
    parser.add_argument("--no-record", action="store_true", help="print only, append nothing to perf/results")
    args = parser.parse_args()
    policies = load(files())
    count, size = (20_000, 300) if args.quick else (200_000, 1000)
    row = {
        "benchmark": "policy",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "command": "python perf/policy_bench.py" + (" --quick" if args.quick else ""),
        "decide": measure_decisions(policies, count),
        "table": measure_tables(policies, size, size),
    }
    print(json.dumps(row, indent=1))
    if not args.no_record:
        with (ROOT / "perf" / "results" / "policy.jsonl").open("a") as out:
            out.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
