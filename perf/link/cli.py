"""`python -m perf link`: raise and lower the emulated link, run programs at its ends."""

from __future__ import annotations

import argparse
import json
import os

from perf.link import Link, LinkSpec, parse_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--name", default="flow", help="name of the link; its namespaces are NAME-a and NAME-b"
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="make both namespaces and the link")
    up.add_argument("--rtt", default="80ms")
    up.add_argument("--rate", default="1gbit")
    up.add_argument("--loss", default="0%", help="of each packet, in each direction")
    up.add_argument("--queue", type=float, default=1.0, help="in bandwidth-delay products")
    up.add_argument("--mtu", type=int, default=9000)
    up.add_argument("--congestion", default="bbr", help="bbr, cubic or reno")
    up.add_argument(
        "--stock", action="store_true", help="leave the limits of TCP buffers as the kernel has them"
    )
    up.add_argument("--seed", type=int, default=1, help="which packets are lost")
    for verb in ("ab", "ba"):
        up.add_argument(f"--rate-{verb}", help="another rate in this direction")
        up.add_argument(f"--loss-{verb}", help="another loss in this direction")
    verbs.add_parser("down", help="remove them; prints what the link carried")
    verbs.add_parser("status", help="say what is up")
    execute = verbs.add_parser("exec", help="run a program at site a (10.81.0.1) or b (10.81.0.2)")
    execute.add_argument("site", choices=["a", "b"])
    execute.add_argument("argv", nargs=argparse.REMAINDER)


def spec_of(args: argparse.Namespace) -> LinkSpec:
    """The link that the arguments describe."""

    def one(rate: str, loss: str) -> LinkSpec:
        return LinkSpec.symmetric(
            parse_spec(args.rtt),
            int(parse_spec(rate)),
            parse_spec(loss),
            args.queue,
            args.mtu,
            args.congestion,
            args.seed,
            not args.stock,
        )

    there = one(args.rate_ab or args.rate, args.loss_ab or args.loss)
    back = one(args.rate_ba or args.rate, args.loss_ba or args.loss)
    return LinkSpec(there.ab, back.ba, args.mtu, args.congestion, args.seed, not args.stock)


def main(args: argparse.Namespace) -> int:
    link = Link(args.name)
    if args.verb == "up":
        link.up(spec_of(args))
    elif args.verb == "down":
        if counters := link.down():
            print(json.dumps(counters))
    elif args.verb == "status":
        print(json.dumps(link.spec()) if link.is_up() else f"the link {args.name!r} is not up")
    else:
        link.spec()
        words = link.command(args.site, *args.argv)
        os.execvp(words[0], words)
    return 0
