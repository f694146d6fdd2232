"""The running coordinator against its own OpenAPI document: no 500, no undocumented status, answers as their schemas.

A 500 is documented for no route, so it counts as an undocumented status.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from coordinators import Coordinator, Lab, beat, copy_request, running

CHECKS = "status_code_conformance,content_type_conformance,response_schema_conformance"


async def populate(coordinator: Coordinator, folder: Path) -> str:
    """Two sites, one transfer, so that requests find something; the transfer's id."""
    lab = Lab([coordinator], folder)
    admin = lab.admin()
    for site in "ab":
        agent = lab.client(certificate=await lab.enrol(admin, site))
        await agent("POST", "/v1/agent/heartbeat", beat())
    made = await admin("POST", "/v1/transfers", copy_request("a:/d/x", "b:/d/y"))
    await lab.aclose()
    return str(made["id"])


def fuzz(coordinator: Coordinator, folder: Path, examples: int, *options: str, config: str = "") -> None:
    """Run schemathesis on the coordinator; fails with what it found."""
    token = coordinator.login().token.format_secret()
    program = "from schemathesis.cli import schemathesis; schemathesis()"
    (folder / "schemathesis.toml").write_text(config, encoding="utf-8")
    words = [sys.executable, "-c", program, "run", f"{coordinator.url}/v1/openapi.json"]
    words += [
        "--header",
        f"Authorization: Bearer {token}",
        "--tls-verify",
        str(coordinator.secrets / "ca.pem"),
    ]
    words += ["--checks", CHECKS, "--phases", "fuzzing", "--max-examples", str(examples), "--seed", "1"]
    words += ["--generation-database", "none", "--no-color", "--warnings", "off", *options]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Traceback" not in coordinator.log, coordinator.log[-4000:]


def fuzz_all(coordinator: Coordinator, folder: Path, examples: int) -> None:
    """All routes with made-up names, then those below a transfer or a site, and the agents', with names that are there."""
    transfer = asyncio.run(populate(coordinator, folder))
    # The token in use is not to be revoked by a lucky guess; a stream has no end.
    fuzz(
        coordinator,
        folder,
        examples,
        "--exclude-path",
        "/v1/tokens/{token}",
        "--exclude-path",
        "/v1/agent/events",
    )
    names = {"path.transfer": transfer, "path.task": f"{transfer}.1", "path.site": "a", "path.user": "admin"}
    names |= {"path.tenant": "default", "query.wait_s": "0"}
    config = "[parameters]\n" + "".join(f'"{name}" = "{value}"\n' for name, value in names.items())
    known = "/transfers/|/users/|/tenants/|/agent/(claim|heartbeat|tasks|answers|renew)|/sites/{site}$"
    certificate = ["--request-cert", str(folder / "b.pem")]
    options = ["--include-path-regex", known, "--exclude-method", "DELETE", *certificate]
    fuzz(coordinator, folder, examples, *options, config=config)


@pytest.mark.slow
def test_a_sample_of_requests_made_from_the_document(tmp_path: Path) -> None:
    coordinator = Coordinator(f"sqlite:///{tmp_path / 'c.sqlite'}", tmp_path / "secrets")
    with running(coordinator):
        fuzz_all(coordinator, tmp_path, 5)


@pytest.mark.slow
@pytest.mark.full
def test_many_requests_made_from_the_document(state: str, tmp_path: Path) -> None:
    coordinator = Coordinator(state, tmp_path / "secrets")
    with running(coordinator):
        fuzz_all(coordinator, tmp_path, 100)
