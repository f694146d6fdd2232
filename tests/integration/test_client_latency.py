"""How long a small copy between two running agents takes, from the call to the answer that all is durable."""

from __future__ import annotations

import time
from pathlib import Path

import anyio
import pytest
from federations import local_federation

pytestmark = pytest.mark.slow

TRIES = 20
WARM = 5
BOUND_S = 0.3
"""Twice to three times what it takes on two cores that are otherwise idle, for the least of several tries."""


def test_a_one_file_copy_is_soon_done(tmp_path: Path) -> None:
    async def main() -> list[float]:
        took = []
        async with local.client() as client:
            for number in range(WARM + TRIES):
                began = time.perf_counter()
                transfer = await client.copy("a:/data/one", f"b:/data/{number}/")
                assert (await transfer.wait()).counters.objects_done == 1
                took.append(time.perf_counter() - began)
        return took[WARM:]

    with local_federation(tmp_path, {"a": "", "b": ""}) as local:
        (local.data("a") / "one").write_bytes(b"x" * 1000)
        took = anyio.run(main)
    assert min(took) < BOUND_S, [round(seconds, 3) for seconds in sorted(took)]
