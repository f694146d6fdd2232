"""The harness's command line: `python -m perf run|list|plot|link`."""

from __future__ import annotations

import argparse
import sys

from perf.link import LinkError
from perf.link import cli as link_cli


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perf", description="Measure flowengine beside its peers."
    )
    verbs = parser.add_subparsers(dest="command", required=True)
    link_cli.add_arguments(verbs.add_parser("link", help="raise, lower and use the emulated link"))
    args = parser.parse_args()
    try:
        return link_cli.main(args)
    except LinkError as error:
        print(f"perf: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
