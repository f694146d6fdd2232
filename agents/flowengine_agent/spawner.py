"""The one process of an agent that may become another account: it starts movers, and does nothing else.

Goal
    Whoever breaks the agent, which speaks with the network, has no right that the agent's own account has not.
Plan
    Before the agent has read a key or opened a socket it forks the spawner, which keeps CAP_SETUID and CAP_SETGID alone;
    then the agent gives up all capabilities. The agent asks over a pair of sockets that nobody else has: start a mover
    for this user id. The spawner forks; the child becomes the account for good and is a mover.
Invariants
    - Only accounts that stood in site.toml at the start can be asked for.
    - A mover has no capability, gains none, and is killed with the spawner; the spawner ends with the agent.
    - Neither holds a key or certificate of the site: none had been read when it was forked.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from typing import NoReturn

from flowengine.errors import LocalError, UsageError
from flowengine.store import page_cache
from flowengine.transfer.line import line_pair
from flowengine_agent.accounts import AccountRules
from flowengine_agent.config import SiteConfig
from flowengine_agent.privileges import (
    CAP_SETGID,
    CAP_SETUID,
    become,
    capabilities_of,
    end_with_parent,
    keep_only,
    lock_down,
)

__all__ = ["ASK_BYTES", "check_privileges", "start_spawner"]

ASK_BYTES = 16
_NEEDED = frozenset({CAP_SETGID, CAP_SETUID})
_HOW = (
    "give the unit AmbientCapabilities=CAP_SETUID CAP_SETGID and CapabilityBoundingSet=CAP_SETUID CAP_SETGID "
    '(agents/deploy/flowengine-agent.service), or start the agent as root with account = "NAME" in [accounts]'
)


def check_privileges(rules: AccountRules) -> None:
    """Refuse to run where accounts are mapped and cannot be acted as.

    Raises:
        UsageError: what is missing, and how it is given.
    """
    if os.geteuid() == 0:
        if rules.own is None:
            raise UsageError(
                "accounts are mapped and the agent was started as root, but is not told which account to run as itself",
                hint='set account = "flowengine" in [accounts] of site.toml, or start it under that account',
            )
        if rules.own in rules.accounts:
            raise _own_is_mapped(rules.own.name)
        return
    if not capabilities_of("CapPrm") >= _NEEDED:
        raise UsageError(
            "accounts are mapped, and this process may not become another account: it lacks CAP_SETUID or CAP_SETGID",
            hint=_HOW,
        )
    for account in rules.accounts:
        if account.uid == os.geteuid():
            raise _own_is_mapped(account.name)


def _own_is_mapped(name: str) -> UsageError:
    return UsageError(
        f"a requester is mapped to {name}, the agent's own account, whose folder holds the site's key",
        hint='map another account, or leave these requesters to default = "agent"',
    )


def start_spawner(config: SiteConfig, rules: AccountRules) -> socket.socket:
    """Fork the spawner, give up every privilege of this process, and give the line to it.

    Must be called where no event loop and no other thread runs, before any secret is read.

    Raises:
        UsageError: as of `check_privileges`.
        LocalError: a privilege could not be given up, or folders could not be made.
    """
    check_privileges(rules)
    _make_folders(config, rules)
    # Loaded before the fork: every mover then shares the memory of it, and is there in milliseconds.
    from flowengine_agent.mover import run_mover  # noqa: F401

    page_cache.learn()
    agent = os.getpid()
    ours, theirs = line_pair()
    try:
        child = os.fork()
        if child == 0:
            ours.close()
            _run(theirs, config, rules, agent)
        theirs.close()
        if os.geteuid() == 0:
            assert rules.own is not None
            become(rules.own.uid, rules.own.gid, rules.own.groups())
        keep_only(())
        lock_down("flowengine-agent")
    except OSError as error:
        raise LocalError(
            f"the agent could not give up its privileges: {error.strerror}", hint="run flowengine-agent check"
        ) from error
    return ours


def _make_folders(config: SiteConfig, rules: AccountRules) -> None:
    """What accounts keep is out of the agent's reach, and its state out of theirs."""
    made = False
    try:
        if os.geteuid() == 0 and rules.own is not None and not os.path.isdir(config.state):
            os.makedirs(config.state, mode=0o700)
            os.chown(config.state, rules.own.uid, rules.own.gid)
        if not os.path.isdir(rules.state):
            os.makedirs(rules.state)
            made = True
            os.chmod(rules.state, 0o1733)  # noqa: S103 - as /tmp, and nobody may list it
        mode = os.stat(rules.state).st_mode
    except OSError as error:
        raise LocalError(
            f"the folder {rules.state} for what accounts keep cannot be made: {error.strerror}",
            hint=f"make it as root: install -d -m 1733 {rules.state}",
        ) from None
    if not made and mode & 0o1003 != 0o1003:
        raise LocalError(
            f"{rules.state} must let every mapped account make a folder of its own, and remove no other's",
            hint=f"as root: chmod 1733 {rules.state}",
        )


def _run(line: socket.socket, config: SiteConfig, rules: AccountRules, agent: int) -> NoReturn:
    """The spawner's process."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent drains; its end is this one's
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries movers
        keep_only(_NEEDED)
        if os.geteuid() == 0:
            assert rules.own is not None
            become(rules.own.uid, rules.own.gid, rules.own.groups(), keep_capabilities=True)
            keep_only(_NEEDED)
        lock_down("flow-spawner")
        end_with_parent(agent)
        _serve(line, config, rules)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _serve(line: socket.socket, config: SiteConfig, rules: AccountRules) -> None:
    from flowengine_agent.mover import run_mover

    accounts = {account.uid: account for account in rules.accounts}
    line.setblocking(True)
    me = os.getpid()
    while True:
        asked, descriptors, _, _ = socket.recv_fds(line, ASK_BYTES, 1)
        if not asked:
            return
        account = accounts.get(int(asked)) if asked.isdigit() else None
        if account is not None and descriptors:
            try:
                child = os.fork()
            except OSError as error:  # too many processes: the agent sees its line end, and tries again later
                print(f"flow-spawner: no mover can be started: {error.strerror}", file=sys.stderr, flush=True)
                child = -1
            if child == 0:
                line.close()
                run_mover(socket.socket(fileno=descriptors[0]), config, rules, account, me)
        for fd in descriptors:
            os.close(fd)
