"""Time zones by IANA name.

The one place of this package that touches the machine: the zone database is files. Everything else gets zones
as an argument, so a caller with other data (a test, a bundle with its own database) passes its own function.
"""

from __future__ import annotations

from datetime import tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

__all__ = ["system_zone"]


def system_zone(name: str) -> tzinfo | None:
    """The zone of that IANA name from this machine's database, None where it has none."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None
