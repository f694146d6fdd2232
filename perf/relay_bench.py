"""What a relay costs: one large file from site to site on this machine's loopback, straight and through one relay.

Usage: `python -m perf.relay_bench [--mib 2048] [--turns 3] [--out perf/results/relay.jsonl]`. Direct and relayed runs
alternate. Everything lies in memory, as with `perf run`; sites are processes with certificates and grants of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from perf.route_sites import RouteSites, wait_for
from perf.run import commit, machine

RESULTS = Path(__file__).with_name("results") / "relay.jsonl"
WAYS = {"direct": ("t", "s"), "relay": ("t", "r", "s")}


def measure(sites: RouteSites, name: str, size: int) -> dict[str, float]:
    """One pull over one route: rate, processor time of all three sites, and of the relay alone."""
    target, relay = sites["t"], sites["r"]
    shutil.rmtree(target.folder / "in", ignore_errors=True)
    said = len(target.said())
    cpu = {site: sites[site].cpu_s() for site in "str"}
    passed, began = relay.count("passed"), time.monotonic()
    sites.pull("s", "t", WAYS[name])
    wait_for(lambda: "pulled completed" in target.said()[said:], "end of the pull", 300)
    seconds = time.monotonic() - began
    wait_for(lambda: name == "direct" or relay.count("passed") - passed >= size, "count of the relay", 5)
    spent = {site: sites[site].cpu_s() - cpu[site] for site in "str"}
    return {
        "wall_s": seconds,
        "bytes_per_s": size / seconds,
        "cpu_s": sum(spent.values()),
        "relay_cpu_s": spent["r"],
        "relay_peak_rss_bytes": relay.peak_rss_bytes(),
    }


def main() -> None:
    """Measure, print, and append a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="flow-relay-"))
    sites = RouteSites(folder)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    try:
        for name in "str":
            sites.add(name, relays=name == "r")
        with (folder / "s/data/large").open("wb") as file:
            for _ in range(asked.mib):
                file.write(os.urandom(1 << 20))
        for name in WAYS:  # unmeasured: the scan cache, and the memory behind the target's pages
            measure(sites, name, asked.mib << 20)
        for turn in range(asked.turns):
            for name in list(WAYS)[:: 1 if turn % 2 == 0 else -1]:
                runs[name].append(measure(sites, name, asked.mib << 20))
    finally:
        sites.end()
        shutil.rmtree(folder)
    medians = {name: statistics.median(run["bytes_per_s"] for run in found) for name, found in runs.items()}
    record = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "mib": asked.mib,
        "runs": runs,
        "median_bytes_per_s": medians,
        "relayed_share": medians["relay"] / medians["direct"],
        "relay_peak_rss_bytes": max(run["relay_peak_rss_bytes"] for run in runs["relay"]),
    }
    with asked.out.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")
    for name, found in runs.items():
        rates = ", ".join(f"{run['bytes_per_s'] / 1e6:.0f}" for run in found)
        sys.stdout.write(f"{name:7} {medians[name] / 1e6:6.0f} MB/s ({rates})\n")
    sys.stdout.write(
        f"relayed: {record['relayed_share']:.0%} of direct; relay: {record['relay_peak_rss_bytes'] / 1e6:.0f} MB\n"
    )


if __name__ == "__main__":
    main()
