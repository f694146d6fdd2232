"""HTTP: the table of routes served by aiohttp, over TLS 1.3."""

from __future__ import annotations
