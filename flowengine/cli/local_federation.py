"""A federation on this machine: the coordinator and the agents of a `Federation` as processes, and a login for the CLI."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from flowengine.cli import local_policies
from flowengine.cli.federation_file import Federation, SiteEntry
from flowengine.cli.processes import Child, Children
from flowengine.errors import LocalError, NotFound, TemporaryError

if TYPE_CHECKING:
    from flowengine.client import Client
    from flowengine.client.access import Access

__all__ = ["Running", "run_federation"]

COORDINATOR_READY_S: Final = 30.0
AGENT_READY_S: Final = 30.0
ONLINE_S: Final = 15.0


@dataclass
class Running:
    """A federation that serves.

    Attributes:
        config: what FLOW_CONFIG_DIR must be for the `flow` command.
        ports: each site's data port as its agent said it.
    """

    federation: Federation
    folder: Path
    config: Path
    url: str
    ports: dict[str, str]
    children: Children

    def environment(self) -> dict[str, str]:
        """The environment of commands that use this federation; this `flow` is the first on their path."""
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
        return _clean_environment() | {"FLOW_CONFIG_DIR": str(self.config), "PATH": path}


@contextmanager
def run_federation(federation: Federation, folder: Path) -> Iterator[Running]:
    """Start everything that is described, state in `folder`; stop it at the end of the block.

    What was there before goes on: sites keep their certificates, transfers their state.

    Raises:
        LocalError: it already runs, or the folder cannot be used.
        FlowError: a process ended instead of becoming ready.
    """
    with _only_one(folder) as held, Children() as children:
        coordinator = children.start(
            "coordinator",
            _coordinator_command(federation, folder),
            # Not among the arguments, which everybody on the machine can read: it may hold a password.
            _clean_environment() | {"FLOW_COORDINATOR_STATE": _state_url(federation, folder)},
            folder / "log" / "coordinator.log",
        )
        url = coordinator.wait_ready(COORDINATOR_READY_S)
        access = _log_in(folder, url)
        from flowengine.client import Client

        with Client(access, retry_for_s=5.0) as client:
            _declare(federation, client)
            agents: dict[str, Child] = {}
            for site in federation.sites:
                command = _agent_command(federation, site, folder, client)
                environment = _clean_environment() | {
                    "FLOW_STATE_DIR": str(folder / "agents" / site.name / "cache")
                }
                agents[site.name] = children.start(
                    f"agent of {site.name}", command, environment, folder / "log" / f"{site.name}.log"
                )
            ports = {name: agent.wait_ready(AGENT_READY_S) for name, agent in agents.items()}
            _wait_online(client, federation)
            local_policies.hand_out(federation, folder, client)
        for site in federation.sites:  # used once, and of no use any more
            (folder / "agents" / site.name / "join-token").unlink(missing_ok=True)
        held.truncate(0)
        json.dump(
            {"coordinator": coordinator.process.pid, **{n: a.process.pid for n, a in agents.items()}}, held
        )
        held.flush()
        yield Running(federation, folder, folder / "config", url, ports, children)


@contextmanager
def _only_one(folder: Path) -> Iterator[IO[str]]:
    """Hold the folder; the lock ends with this process."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = open(folder / "running.json", "a+", encoding="utf-8")  # noqa: SIM115 - held by the block below
    except OSError as error:
        raise LocalError(
            f"cannot use {folder}: {error.strerror}", hint="choose another folder with --state"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalError(
                f"a federation already runs on {folder}",
                hint="use it, stop it with Ctrl-C, or give another --state",
            ) from None
        try:
            yield file
        finally:
            file.truncate(0)


def _clean_environment() -> dict[str, str]:
    """Nothing of a login elsewhere reaches the processes."""
    return {name: value for name, value in os.environ.items() if not name.startswith("FLOW_")}


def _coordinator_command(federation: Federation, folder: Path) -> list[str]:
    entry = federation.coordinator
    home = folder / "coordinator"
    home.mkdir(mode=0o700, exist_ok=True)
    command = [
        *(sys.executable, "-m", "flowengine.cli.main", "coordinator", "run"),
        *("--secrets", str(home / "secrets"), "--listen", entry.listen),
        *("--lease-s", str(entry.lease_s)),
    ]
    return command + local_policies.coordinator_options(federation, folder)


def _state_url(federation: Federation, folder: Path) -> str:
    """Where the coordinator keeps its state."""
    state = federation.coordinator.state
    return f"sqlite:///{folder / 'coordinator' / 'state.sqlite'}" if state == "sqlite" else state


def _log_in(folder: Path, url: str) -> Access:
    """The admin's access, stored for the CLI. The address may be another one than at the first start."""
    from flowengine.client.access import Access, Credentials
    from flowengine.client.pairing import access_of_login
    from flowengine.trust.tokens import Login

    path = folder / "coordinator" / "secrets" / "admin-login"
    try:
        login = Login.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LocalError(
            f"the coordinator wrote no login to {path}: {error.strerror}", hint="remove the state folder"
        ) from None
    access = access_of_login(Login(url, login.ca_sha256, login.token).format_secret())
    stored = Credentials(folder / "config" / "credentials.toml", [])
    stored.put(Access(access.url, access.token, access.ca_pem, "admin"))
    stored.save()
    return access


def _declare(federation: Federation, client: Client) -> None:
    """Bring the coordinator's catalogue to what the file says; what the file does not name stays."""
    import msgspec

    there = {tenant.name for tenant in client.tenants()}
    for tenant in federation.tenants:
        assert tenant.name is not None
        if tenant.name in there:
            client.change_tenant(tenant.name, msgspec.structs.replace(tenant, name=None))
        else:
            client.add_tenant(tenant)
    for site in federation.sites:
        request = federation.site_request(site)
        try:
            client.change_site(site.name, request)
        except NotFound:
            client.add_site(msgspec.structs.replace(request, name=site.name))
    for source, target, link in federation.links:
        client.set_link(source, target, link)
    for scope, rate, windows in federation.limits:
        client.set_limit(scope, rate, windows)


def _agent_command(federation: Federation, site: SiteEntry, folder: Path, client: Client) -> list[str]:
    """Write the agent's configuration; a join token where the site has no certificate yet."""
    home = folder / "agents" / site.name
    state = home / "state"
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps  # JSON's strings are TOML's
    lines = [
        f"site = {text(site.name)}",
        f"coordinator = {text(client.url)}",
        f"state = {text(str(state))}",
        f"listen = {text(site.listen)}",
        f"max_tasks = {site.max_tasks}",
        # Here an agent acts for nobody but who runs this command.
        f"allow_root = {text(os.geteuid() == 0)}",
    ]
    for root in site.root:
        Path(root.path).mkdir(parents=True, exist_ok=True)
        lines += [
            "[[root]]",
            f"path = {text(root.path)}",
            f"name = {text(root.name)}",
            f"access = {text(root.access)}",
        ]
        if root.budget:
            lines.append(f"budget = {text(root.budget)}")
    lines += local_policies.site_lines(federation, folder)
    config = home / "site.toml"
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "flowengine_agent.main", "run", "--config", str(config)]
    if any(state.iterdir()) and client.site(site.name).certificate is not None:
        return command
    token = home / "join-token"
    from flowengine.store.secret_files import write_secret

    write_secret(str(token), f"{client.join_token(site.name).token}\n".encode())
    return [*command, "--join-token-file", str(token)]


def _wait_online(client: Client, federation: Federation) -> None:
    """Until the coordinator has heard of every site."""
    import time

    names = {site.name for site in federation.sites}
    deadline = time.monotonic() + ONLINE_S
    while True:
        missing = names - {site.name for site in client.sites() if site.state == "online"}
        if not missing:
            return
        if time.monotonic() > deadline:
            raise TemporaryError(
                f"{', '.join(sorted(missing))}: ready, but the coordinator has not heard of it",
                hint="look into the logs in the state folder",
            )
        time.sleep(0.02)
