"""What the coordinator decides, as functions of values: no I/O, no clock, no randomness.

Goal
    Who may run what next, in which state a transfer is and why, what each waiting task waits for.
Plan
    `paths` says which paths overlap, `queue` orders and admits tasks, `states` derives a transfer's state from its
    tasks, `windows` a limit's rate at a time, `commands` what an agent must be told, `waiting` words for people.
Invariants
    Equal inputs give equal answers; times are Unix seconds and always arguments.
"""

from __future__ import annotations
