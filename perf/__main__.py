"""The harness's command line: `python -m perf run|check|list|show|plot|link`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Collection
from pathlib import Path

from perf.check import LIMITS, check
from perf.contenders import CONTENDERS
from perf.contenders import flow as flow_contender
from perf.link import LinkError
from perf.link import cli as link_cli
from perf.network import LONG_LINKS
from perf.plot import DOCS, load, plot
from perf.report import group, newest, print_tables
from perf.run import RESULTS, PlaceError, Plan, disk_folder, run
from perf.scenarios import SCENARIOS, SIZES

NETWORKS = ("loopback", *LONG_LINKS)


def names(text: str, known: Collection[str], what: str) -> list[str]:
    """A list of known names from `a,b` or `all`."""
    chosen = list(known) if text == "all" else [word for word in text.split(",") if word]
    for name in chosen:
        if name not in known:
            raise SystemExit(f"perf: unknown {what} {name!r}; choose from {', '.join(known)}")
    return chosen


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m perf", description="Measure flowengine beside its peers.")
    verbs = top.add_subparsers(dest="command", required=True)
    go = verbs.add_parser("run", help="run scenarios, all contenders in turn")
    go.add_argument(
        "scenarios", nargs="+", metavar="SCENARIO", help=f"all, or some of {', '.join(SCENARIOS)}"
    )
    go.add_argument("--against", default="rsync-ssh,rsync-daemon", metavar="PEERS", help="peers, or all")
    go.add_argument("--only", metavar="CONTENDERS", help="just these, instead of flow and --against")
    go.add_argument(
        "--over", default="loopback", metavar="NETWORKS", help=f"all, or some of {', '.join(NETWORKS)}"
    )
    go.add_argument("--size", choices=SIZES, default="small")
    go.add_argument("--repeat", type=int, default=3, metavar="N")
    go.add_argument("--seed", type=int, default=1)
    go.add_argument(
        "--on", default=None, metavar="PLACES", help="memory, disk or both (memory,disk); default memory"
    )
    go.add_argument(
        "--disk", type=Path, metavar="DIR", help="a directory of the disk to use; alone it means --on disk"
    )
    go.add_argument("--limit", type=float, default=1800.0, metavar="S", help="time limit of each command")
    go.add_argument("--no-check", action="store_true", help="do not compare the target with the source")
    go.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where results are appended")
    held = verbs.add_parser("check", help="hold our CPU time against a plain loop; exit code 1 when too slow")
    held.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"some of {', '.join(LIMITS)}")
    held.add_argument("--flow", type=Path, metavar="FILE", help="another flow command to measure")
    verbs.add_parser("list", help="name scenarios, networks and contenders, and say what is missing here")
    for verb, text in (("show", "print the tables of earlier runs"), ("plot", "draw them into docs/perf")):
        late = verbs.add_parser(verb, help=text)
        late.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
        if verb == "plot":
            late.add_argument("--out", type=Path, default=DOCS, metavar="DIR")
    link_cli.add_arguments(verbs.add_parser("link", help="raise, lower and use the emulated link"))
    return top


def show_list() -> None:
    for scenario in SCENARIOS.values():
        print(f"{scenario.name:<12} {scenario.title}")
    print("\nnetworks:", ", ".join(NETWORKS), "\n")
    for name, kind in CONTENDERS.items():
        about = f"encrypts: {kind.encrypts}; verifies: {kind.verifies}; syncs: {kind.syncs}"
        print(f"{name:<15} {kind.missing() or kind.version() or 'here'}\n{'':<15} {about}")


def _without_paths(word: str, args: argparse.Namespace) -> str:
    """A word of the command line as it may stand in a record: without the paths of this machine."""
    name, sign, value = word.rpartition("=")
    return f"{name}{sign}DIR" if value in (str(args.disk), str(args.out)) else word


def _run(args: argparse.Namespace, words: list[str]) -> int:
    peers = (
        names(args.only, CONTENDERS, "contender") if args.only else names(args.against, CONTENDERS, "peer")
    )
    ours = [] if args.only else ["flow", "flow-local"]
    places = names(args.on or ("disk" if args.disk else "memory"), ("memory", "disk"), "place")
    status = 0
    for place in places:
        plan = Plan(
            scenarios=names(",".join(args.scenarios), SCENARIOS, "scenario"),
            contenders=list(dict.fromkeys([*ours, *peers])),
            networks=names(args.over, NETWORKS, "network"),
            size=args.size,
            repeat=args.repeat,
            seed=args.seed,
            disk=(args.disk or disk_folder()) if place == "disk" else None,
            limit_s=args.limit,
            check=not args.no_check,
            out=args.out,
        )
        status |= run(plan, [_without_paths(word, args) for word in words])
    return status


def main() -> int:
    # A polite end takes namespaces, daemons and data away as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    words = sys.argv[1:]
    args = parser().parse_args(words)
    try:
        if args.command == "link":
            return link_cli.main(args)
        if args.command == "list":
            show_list()
        elif args.command == "show":
            for members in group(load(args.results)).values():
                print_tables(newest(members))
        elif args.command == "plot":
            for path in plot(load(args.results), args.out):
                print(path.name)
        elif args.command == "check":
            if args.flow:
                flow_contender.COMMAND = args.flow.absolute()
            chosen = names(",".join(args.scenarios), LIMITS, "scenario") or list(LIMITS)
            return 0 if check(chosen) else 1
        else:
            return _run(args, words)
    except (LinkError, PlaceError) as error:
        print(f"perf: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
