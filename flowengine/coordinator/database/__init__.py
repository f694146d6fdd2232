"""What the coordinator keeps: tables, transactions, queries by subject."""

from __future__ import annotations
