"""flowengine: moves large datasets between compute sites, verified, sealed, resumable, under policy.

Importing this package loads neither trio nor aiohttp; the client is loaded when it is first named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowengine.client import AsyncClient, AsyncTransfer, Client, Transfer, connect
    from flowengine.errors import FlowError

__version__ = "0.1.0"

__all__ = ["AsyncClient", "AsyncTransfer", "Client", "FlowError", "Transfer", "__version__", "connect"]

_LAZY = {
    "AsyncClient": "flowengine.client",
    "AsyncTransfer": "flowengine.client",
    "Client": "flowengine.client",
    "FlowError": "flowengine.errors",
    "Transfer": "flowengine.client",
    "connect": "flowengine.client",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'flowengine' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
