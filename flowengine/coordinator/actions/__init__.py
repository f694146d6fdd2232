"""What is done in one transaction each: functions of a `Writing`, with the rules' decisions and the events they leave."""

from __future__ import annotations
