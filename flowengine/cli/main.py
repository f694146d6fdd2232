"""The `flow` command: groups that are loaded only when they are used, so that `flow --help` is instant."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import flowengine

# Many small, short-lived objects and few cycles: looking for garbage rarely costs a tenth less time, and none of it
# arises while modules load: no look falls into the start, where it takes 30 ms of the 300 that a small copy has.
gc.set_threshold(100_000, 20, 50)

import click  # noqa: E402

if TYPE_CHECKING:
    from flowengine.errors import FlowError

__all__ = ["command", "main"]

_SECTIONS: Final = {
    "Move data": {
        "cp": ("flowengine.cli.copy:cp", "Copy files and folders to another path or site."),
        "sync": ("flowengine.cli.copy:sync", "Make a target equal to a source, moving only what changed."),
        "verify": (
            "flowengine.cli.inspect:verify",
            "Read every byte and name what is wrong, missing or extra.",
        ),
        "ls": ("flowengine.cli.inspect:ls", "List a folder: local, served, or at a site."),
        "serve": ("flowengine.cli.serve:serve", "Offer a folder to another host; prints a ticket."),
        "manifest": ("flowengine.cli.inspect:manifest", "Write the manifest of a folder."),
        "diff": ("flowengine.cli.inspect:diff", "Show what differs between two versions."),
    },
    "Between sites": {
        "transfer": ("flowengine.cli.transfers:transfer", "List, watch and steer transfers."),
        "why": ("flowengine.cli.transfers:why", "Say what a transfer waits for, or what makes it no faster."),
        "site": ("flowengine.cli.site:site", "The sites: what they offer, how they join and leave."),
        "link": ("flowengine.cli.link:link", "Links between sites: what they carry, measured and declared."),
        "maintain": ("flowengine.cli.maintain:maintain", "Times in which a site or link is not to be used."),
        "limit": ("flowengine.cli.limit:limit", "Bandwidth limits, by link, site, tenant and time of day."),
        "events": ("flowengine.cli.events:events", "Print what happens, as it happens."),
        "policy": ("flowengine.cli.policy:policy", "Check, test and explain residency policies."),
        "evidence": (
            "flowengine.cli.evidence:evidence",
            "What was decided and done: look at it, verify it, export it.",
        ),
        "label": ("flowengine.cli.label:label", "Say what data is, signed by its owner."),
        "agreement": (
            "flowengine.cli.agreement:agreement",
            "Say what was agreed, signed by who has the authority.",
        ),
        "approval": ("flowengine.cli.approval:approval", "What people have to approve, and who has."),
        "approve": ("flowengine.cli.approval:approve", "Sign a yes to exactly what was asked."),
        "plan": ("flowengine.cli.plan:plan", "Plan routes and bandwidth; simulate a federation."),
    },
    "People and machines": {
        "login": ("flowengine.cli.login:login", "Store who you are at a coordinator."),
        "logout": ("flowengine.cli.login:logout", "Forget it."),
        "whoami": ("flowengine.cli.login:whoami", "Say who you are, and where."),
        "user": ("flowengine.cli.people:user", "Who may come in, and as what."),
        "token": ("flowengine.cli.people:token", "API tokens for scripts and more machines."),
        "tenant": ("flowengine.cli.people:tenant", "Parties with a share of the federation."),
        "doctor": ("flowengine.cli.doctor:doctor", "Look for what is wrong here and say what to do."),
        "completion": ("flowengine.cli.completion:completion", "Make the shell complete commands and sites."),
    },
    "Run a federation": {
        "demo": (
            "flowengine.cli.demo:demo",
            "Three sites on this machine, with data and a policy, in a minute.",
        ),
        "up": ("flowengine.cli.up:up", "Run a federation on this machine from one file."),
        "coordinator": ("flowengine.cli.coordinator:coordinator", "Run the coordinator of a federation."),
    },
}
_COMMANDS: Final = {name: entry for section in _SECTIONS.values() for name, entry in section.items()}


class _LazyGroup(click.Group):
    """Imports a command's module when the command runs; its help line stands here."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(name) for name in _COMMANDS)
        for title, section in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), line) for name, (_, line) in section.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            hint = f" Did you mean `flow {close[0]}`?" if close else " `flow --help` lists the commands."
            raise click.UsageError(error.format_message() + hint, ctx) from None


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(flowengine.__version__, prog_name="flow")
def _flow() -> None:
    """Move datasets between compute sites: verified, sealed, resumable, under policy.

    SRC/ means what is in SRC, SRC the folder itself. A place is a local path, SITE:/PATH at a site of the federation,
    or a ticket that `flow serve` printed. Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 authentication, 5 denied, 6 integrity, 7 some
    objects failed, 75 try again, 130 interrupted.
    """


def command() -> click.Command:
    """The whole command, for what describes it."""
    return _flow


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with one of the codes of `flowengine.errors.Exit`."""
    from flowengine.errors import Exit, FlowError, UsageError, exit_code

    # numpy sorts and searches here; threads for linear algebra would only spin on the cores that move data.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    error: FlowError | None = None
    code = int(Exit.DONE)
    try:
        result: Any = _flow.main(args=args, prog_name="flow", standalone_mode=False)
        code = int(result) if isinstance(result, int) else code
    except click.UsageError as raised:
        raised.show()
        error, code = UsageError(raised.format_message()), Exit.USAGE
    except click.ClickException as raised:
        raised.show()
        error, code = FlowError(raised.format_message()), Exit.FAILED
    except (click.exceptions.Abort, KeyboardInterrupt):
        error = _interrupted()
    except BaseExceptionGroup as group:
        error = _of_group(group)
    except FlowError as raised:
        error = raised
    except BrokenPipeError:
        code = Exit.FAILED
    if error is not None:
        if not code:
            _show(error)
            code = exit_code(error)
        if _wants_json(sys.argv[1:] if args is None else args):
            _print_problem(error, int(code))
    if args is None:
        _leave(int(code))
    sys.exit(int(code))


def _wants_json(words: list[str]) -> bool:
    return "--json" in (words[: words.index("--")] if "--" in words else words)


def _print_problem(error: FlowError, code: int) -> None:
    """The one object that `--json` promises, where a command ended by an error."""
    import contextlib
    import json

    problem = {"state": "failed", **error.as_dict(), "exit_code": code}
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(problem, ensure_ascii=False, default=str), flush=True)


def _leave(code: int) -> None:
    """End the process without taking the interpreter apart, which takes as long as copying a small file."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = code or 1
    os._exit(code)


def _show(error: FlowError) -> None:
    print(f"flow: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  next: {error.hint}", file=sys.stderr)


def _interrupted() -> FlowError:
    from flowengine.errors import FlowError

    return FlowError(
        "interrupted", hint="the same command continues where this one stopped", reason="interrupted"
    )


def _of_group(group: BaseExceptionGroup[BaseException]) -> FlowError:
    from flowengine.transfer.channel import first_flow_error

    if group.subgroup(KeyboardInterrupt) is not None:
        return _interrupted()
    error = first_flow_error(group)
    if error is None:
        raise group
    return error


if __name__ == "__main__":
    main()
