"""The running coordinator against its own OpenAPI document: no 500, no undocumented status, answers as their schemas.

A 500 is documented for no route, so it counts as an undocumented status.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from coordinators import Coordinator, Lab, beat, copy_request, running

CHECKS = "status_code_conformance,content_type_conformance,response_schema_conformance"
MANY = 60
"""Requests to each operation, in the long form."""
AT_MOST_S = 900
"""For one of two runs."""


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


def fuzz(
    coordinator: Coordinator, folder: Path, examples: int, *options: str, values: dict[str, str]
) -> tuple[int, int]:
    """Run schemathesis on the coordinator; fails with what it found.

    Args:
        values: what parameters are, by place and name; the others are made up.

    Returns:
        Operations that were asked, and requests.
    """
    token = coordinator.login().token.format_secret()
    program = "from schemathesis.cli import schemathesis; schemathesis()"
    config = "[parameters]\n" + "".join(f'"{name}" = "{value}"\n' for name, value in values.items())
    (folder / "schemathesis.toml").write_text(config, encoding="utf-8")
    words = [sys.executable, "-c", program, "run", f"{coordinator.url}/v1/openapi.json"]
    words += [
        "--header",
        f"Authorization: Bearer {token}",
        "--tls-verify",
        str(coordinator.secrets / "ca.pem"),
    ]
    words += ["--checks", CHECKS, "--phases", "fuzzing", "--max-examples", str(examples), "--seed", "1"]
    words += [
        "--generation-database",
        "none",
        "--no-color",
        "--warnings",
        "off",
    ]
    try:
        done = subprocess.run(
            [*words, *options], cwd=folder, capture_output=True, text=True, timeout=AT_MOST_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"no end after {AT_MOST_S} s; so far: {(error.stdout or b'')[-6000:]!r}")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Traceback" not in coordinator.log, coordinator.log[-4000:]
    selected, tested, requests = (
        int(found[1]) if (found := re.search(form, done.stdout)) else 0
        for form in (r"Selected: (\d+)/", r"Tested: (\d+)", r"(\d+) generated")
    )
    assert tested == selected > 0, f"{tested} of {selected} operations were asked"
    return tested, requests


# The token in use is not to be revoked by a lucky guess; a stream has no end, and a long poll one that is far away.
WITHOUT = ("--exclude-path", "/v1/tokens/{token}", "--exclude-path", "/v1/agent/events")
NO_WAIT = {"query.wait_s": "0"}


def names_that_are_there(transfer: str) -> dict[str, str]:
    """Values of parameters with which requests find something."""
    names = {"path.transfer": transfer, "path.task": f"{transfer}.1", "path.site": "a", "path.user": "admin"}
    return names | {"path.tenant": "default"} | NO_WAIT


def told(what: str, found: tuple[int, int], examples: int) -> None:
    operations, requests = found
    print(f"{what}: {operations} operations, {requests} requests")
    assert requests >= operations * examples // 4  # few operations have fewer cases than that


@pytest.mark.slow
def test_a_sample_of_requests_made_from_the_document(tmp_path: Path) -> None:
    """Names that are there, and a site's certificate besides the token; the site itself stays."""
    coordinator = Coordinator(f"sqlite:///{tmp_path / 'c.sqlite'}", tmp_path / "secrets")
    with running(coordinator):
        names = names_that_are_there(asyncio.run(populate(coordinator, tmp_path)))
        options = ["--request-cert", str(tmp_path / "b.pem"), *WITHOUT]
        # No agent runs that could tell of files; and of the labels' tuples schemathesis makes what it then refuses.
        for operation in ("remove_site", "list_files", "agent_labels"):
            options += ["--exclude-operation-id", operation]
        told("sample", fuzz(coordinator, tmp_path, 2, *options, values=names), 2)


@pytest.mark.slow
@pytest.mark.full
def test_many_requests_made_from_the_document(state: str, tmp_path: Path) -> None:
    """All routes with made-up names, then those below a transfer or a site, and the agents', with names that are there."""
    coordinator = Coordinator(state, tmp_path / "secrets")
    begin = time.monotonic()
    with running(coordinator):
        names = names_that_are_there(asyncio.run(populate(coordinator, tmp_path)))
        told("made-up names", fuzz(coordinator, tmp_path, MANY, *WITHOUT, values=NO_WAIT), MANY)
        known = "/transfers/|/users/|/tenants/|/agent/(claim|heartbeat|tasks|answers|renew)|/sites/{site}$"
        options = ("--include-path-regex", known, "--exclude-method", "DELETE")
        options += ("--request-cert", str(tmp_path / "b.pem"))
        told("names that are there", fuzz(coordinator, tmp_path, MANY, *options, values=names), MANY)
    print(f"{time.monotonic() - begin:.0f} s")
