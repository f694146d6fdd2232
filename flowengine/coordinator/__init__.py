"""The coordinator: catalogue of sites, users' requests, decisions, grants and leases; no dataset byte passes here.

`rules` decides and does no I/O, `database` keeps, `web` speaks HTTP, `service` joins them. The process runs asyncio;
nothing here may import trio.
"""

from __future__ import annotations
