"""A site's data port as a process of its own: `python -m tests.site_host FOLDER`, with what it believes in files there.

The folder holds certificate.pem, key.pem, ca.pem, grant-keys (ID HEX lines) and revoked (serials); data/ and in/ are
what it serves. It prints its port, then one line for all that its listener logs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import trio

from flowengine.store.grants import GrantLedger
from flowengine.transfer.listen import Listener
from flowengine.transfer.serve import ServedRoot
from flowengine.transfer.sites import SiteIdentity, SiteTrust


def main(folder: Path) -> None:
    os.environ["FLOW_STATE_DIR"] = str(folder / "state")
    identity = SiteIdentity(
        (folder / "certificate.pem").read_text(),
        (folder / "key.pem").read_bytes(),
        (folder / "ca.pem").read_text(),
    )
    keys = {
        name: bytes.fromhex(key)
        for name, key in (line.split() for line in (folder / "grant-keys").read_text().splitlines())
    }
    revoked = frozenset((folder / "revoked").read_text().split())
    trust = SiteTrust(identity, keys, GrantLedger(str(folder / "grants.sqlite")), revoked)
    listener = Listener("127.0.0.1", 0, identity=trust, log=lambda line: print(line, flush=True))
    listener.bind()
    print(listener.port, flush=True)
    trio.run(listener.serve, ServedRoot(os.fsencode(folder)).handle)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
