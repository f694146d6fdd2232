"""The `flow` command: groups that are loaded only when they are used, so that `flow --help` is instant."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import Any, Final

import flowengine

# Many small, short-lived objects and few cycles: looking for garbage rarely costs a tenth less time, and none of it
# arises while modules load.
gc.set_threshold(50_000, 20, 50)

import click  # noqa: E402

__all__ = ["main"]

_COMMANDS: Final = {
    "cp": ("flowengine.cli.copy:cp", "Copy files and folders to another path or site."),
    "sync": ("flowengine.cli.copy:sync", "Make a target equal to a source, moving only what changed."),
    "serve": ("flowengine.cli.serve:serve", "Offer a folder to other hosts; prints a ticket."),
    "ls": ("flowengine.cli.inspect:ls", "List a local or served folder."),
    "verify": ("flowengine.cli.inspect:verify", "Read every byte and name what is wrong, missing or extra."),
    "manifest": ("flowengine.cli.inspect:manifest", "Write the manifest of a folder."),
    "diff": ("flowengine.cli.inspect:diff", "Show what differs between two versions."),
    "policy": ("flowengine.cli.policy:policy", "Check, test and explain residency policies."),
    "plan": ("flowengine.cli.plan:plan", "Plan routes and bandwidth; simulate a federation."),
}


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
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])

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

    SRC/ means what is in SRC, SRC the folder itself. A location is a local path or a ticket that `flow serve`
    printed. Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 authentication, 5 denied, 6 integrity, 7 some
    objects failed, 75 try again, 130 interrupted.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with one of the codes of `flowengine.errors.Exit`."""
    from flowengine.errors import Exit, FlowError, exit_code

    # numpy sorts and searches here; threads for linear algebra would only spin on the cores that move data.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        result: Any = _flow.main(args=args, prog_name="flow", standalone_mode=False)
        code = int(result) if isinstance(result, int) else Exit.DONE
    except click.UsageError as error:
        error.show()
        code = Exit.USAGE
    except click.ClickException as error:
        error.show()
        code = Exit.FAILED
    except (click.exceptions.Abort, KeyboardInterrupt):
        print("flow: interrupted; the same command continues where this one stopped", file=sys.stderr)
        code = Exit.INTERRUPTED
    except BaseExceptionGroup as group:
        code = _grouped(group)
    except FlowError as error:
        _show(error)
        code = exit_code(error)
    except BrokenPipeError:
        code = Exit.FAILED
    if args is None:
        _leave(int(code))
    sys.exit(int(code))


def _leave(code: int) -> None:
    """End the process without taking the interpreter apart, which takes as long as copying a small file."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = code or 1
    os._exit(code)


def _show(error: Exception) -> None:
    from flowengine.errors import FlowError

    if isinstance(error, FlowError):
        print(f"flow: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  next: {error.hint}", file=sys.stderr)


def _grouped(group: BaseExceptionGroup[BaseException]) -> int:
    from flowengine.errors import Exit, exit_code
    from flowengine.transfer.channel import first_flow_error

    if group.subgroup(KeyboardInterrupt) is not None:
        print("flow: interrupted; the same command continues where this one stopped", file=sys.stderr)
        return Exit.INTERRUPTED
    error = first_flow_error(group)
    if error is None:
        raise group
    _show(error)
    return exit_code(error)


if __name__ == "__main__":
    main()
