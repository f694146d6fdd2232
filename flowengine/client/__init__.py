"""The Python API of a federation: ask a coordinator from plain Python, asyncio, trio or a notebook.

>>> import flowengine
>>> client = flowengine.connect("https://coordinator.example.org:7440", token="flowt_…", ca_pem="")
>>> client.url
'https://coordinator.example.org:7440'

`connect` is the one entrance. `with connect() as client` and a client used as it is are synchronous; `async with
connect() as client` gives the same methods to `await`. One implementation stands behind both (`asynchronous`); the
synchronous face runs it on a thread of its own, so that it also works where an event loop already runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowengine.client.asynchronous import AsyncClient
    from flowengine.client.synchronous import Client, Transfer, connect
    from flowengine.client.transfers import AsyncTransfer

__all__ = ["AsyncClient", "AsyncTransfer", "Client", "Transfer", "connect"]

# Loaded when named: the shell's completion and the credentials file need no HTTP.
_HOMES = {
    "AsyncClient": "flowengine.client.asynchronous",
    "AsyncTransfer": "flowengine.client.transfers",
    "Client": "flowengine.client.synchronous",
    "Transfer": "flowengine.client.synchronous",
    "connect": "flowengine.client.synchronous",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flowengine.client' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
