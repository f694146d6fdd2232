"""The coordinator's chain in its database: one chain, whoever of several coordinators writes, on both databases."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from chains import NOW, judged, pki

from flowengine.coordinator.database.evidence import Chain, list_records
from flowengine.coordinator.database.migrate import prepare
from flowengine.coordinator.database.transactions import open_database
from flowengine.evidence.replay import Replayer
from flowengine.evidence.verify import verify_chain

pytestmark = pytest.mark.slow
EACH = 12


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_coordinators_write_one_chain(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    url = (
        f"sqlite:///{tmp_path}/state.sqlite"
        if kind == "sqlite"
        else request.getfixturevalue("postgres_server")()
    )
    writers = [open_database(url, lambda: NOW) for _ in range(1 if kind == "sqlite" else 2)]
    chain = Chain(b"k" * 32, os.urandom)
    await prepare(writers[0])
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(EACH):
                for database in writers:
                    body = judged("FR", number)
                    group.create_task(database.write(lambda w, body=body: chain.append(w, "decision", body)))
        await writers[0].write(lambda w: chain.checkpoint(w, pki().signer("")))
        assert await writers[0].write(lambda w: chain.checkpoint(w, pki().signer(""))) == b""
        lines = [line.encode() for line in await writers[-1].read(lambda c: list_records(c, 0, 1000))]
    finally:
        for database in writers:
            await database.aclose()
    verdict = verify_chain(lines, pki().anchors, Replayer({}))
    assert verdict.findings == []
    assert {one["what"] for one in verdict.unchecked} == {"bundle"}, "only the policies are not there"
    assert verdict.records == EACH * len(writers) + 2
    assert verdict.signed_to == verdict.last - 1
