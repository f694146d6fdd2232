"""A static file server for casync's store: `python file_server.py ADDRESS PORT DIRECTORY`.

Python's own `http.server` sends head and body of an answer in two packets and waits between them.
"""

from __future__ import annotations

import functools
import http.server
import sys
from typing import Any


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


def main() -> None:
    address, port, directory = sys.argv[1:]
    handler = functools.partial(Handler, directory=directory)
    with http.server.ThreadingHTTPServer((address, int(port)), handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
