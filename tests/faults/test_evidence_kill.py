"""An agent that is killed while it records: what it was told to be durable is there, and the chain goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chains import verified

from flowengine.store.chain_files import ChainFiles
from flowengine.store.evidence_folder import read_evidence_folder

pytestmark = pytest.mark.slow

WRITER = """
import sys, trio
from flowengine.evidence.bodies import stop_body
from flowengine_agent.evidence import EvidenceLog

async def one(log, number):
    while True:
        record = await log.record("stop", stop_body("drain", "denied " + "x" * 500, transfer=f"tr-{number}"))
        print(record.hash, flush=True)

async def main():
    log = EvidenceLog(sys.argv[1], "beta", lambda: (b"", b""))
    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(one, log, number)

trio.run(main)
"""


def test_a_killed_agents_chain_goes_on_and_holds_all_it_promised(tmp_path: Path) -> None:
    promised: list[str] = []
    for promises in (1, 23, 60, 7):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        promised += [writer.stdout.readline().strip() for _ in range(promises)]
        os.kill(writer.pid, signal.SIGKILL)
        promised += writer.stdout.read().split("\n")[:-1]
        writer.stdout.close()
        writer.wait()
    files = ChainFiles(str(tmp_path), "site:beta")
    files.close()
    evidence, torn = read_evidence_folder(str(tmp_path))
    verdict = verified(evidence)
    assert (verdict.findings, torn) == ([], 0)
    text = b"\n".join(evidence.lines).decode()
    assert len(promised) >= 91
    for name in promised:
        assert f'"hash":"{name}"' in text
