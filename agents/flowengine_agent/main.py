"""The `flowengine-agent` command."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import click

import flowengine
from flowengine.errors import Exit, FlowError, UsageError, exit_code
from flowengine_agent.config import SiteConfig, load_config
from flowengine_agent.join_token import TOKEN_VARIABLE, read_join_token

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(flowengine.__version__, prog_name="flowengine-agent")
def _agent() -> None:
    """The daemon of a site: offers folders, carries data for transfers, obeys signed grants alone."""


_config_option = click.option(
    "--config", "config_path", required=True, metavar="FILE", type=click.Path(), help="The site's site.toml."
)


@_agent.command()
@_config_option
@click.option(
    "--join-token-file",
    metavar="FILE",
    type=click.Path(),
    help=f"Where the one-time token lies; needed until the site has enrolled. Also ${TOKEN_VARIABLE}.",
)
def run(config_path: str, join_token_file: str | None) -> int:
    """Run the agent until SIGTERM.

    Prints one line, `ready: …`, once the data port answers and the coordinator was reached. SIGTERM ends it in order:
    tasks are given back; a second one ends it at once.
    """
    config = load_config(config_path)
    spawner = None
    if config.accounts is not None:
        from flowengine_agent.spawner import start_spawner

        spawner = start_spawner(config, config.accounts)  # first of all: it and its children hold no secret
    _refuse_root(config)
    gc.disable()  # loading leaves no garbage; to look for it among all that it makes takes 50 ms, now and each time later
    import trio

    from flowengine_agent.daemon import run_agent
    from flowengine_agent.logs import open_log

    gc.freeze()
    gc.enable()
    token = read_join_token(join_token_file or config.join_token_file, required=bool(join_token_file))
    log = open_log(config.log, config.site)

    def ready(line: str) -> None:
        print(f"ready: {line}", flush=True)

    async def body() -> Exit:
        return await run_agent(config, log, join_token=token, ready=ready, spawner=spawner)

    return trio.run(body)


@_agent.command()
@_config_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check(config_path: str, as_json: bool) -> int:
    """Check configuration, folders, clock, port, certificate and disk; says what to do."""
    from flowengine_agent.check import run_checks

    return run_checks(config_path, as_json=as_json)


class _Keys(click.Group):
    """The group `keys`, loaded when it is asked for."""

    def _loaded(self) -> click.Group:
        from flowengine_agent.keys import keys

        return keys

    def list_commands(self, ctx: click.Context) -> list[str]:
        return self._loaded().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self._loaded().get_command(ctx, cmd_name)


_agent.add_command(_Keys("keys", help="Keys of what this site sealed, or may open."))


def _refuse_root(config: SiteConfig) -> None:
    if os.geteuid() == 0 and not config.allow_root:
        raise UsageError(
            "the agent would act with root's rights for everybody",
            hint="run it under an account of its own (agents/deploy has a systemd unit), or set allow_root = true",
        )


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with one of the codes of `flowengine.errors.Exit`."""
    gc.set_threshold(50_000, 20, 50)  # many small, short-lived objects and few cycles
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        result: Any = _agent.main(args=args, prog_name="flowengine-agent", standalone_mode=False)
        code = int(result) if isinstance(result, int) else Exit.DONE
    except click.ClickException as error:
        error.show()
        code = Exit.USAGE if isinstance(error, click.UsageError) else Exit.FAILED
    except (click.exceptions.Abort, KeyboardInterrupt):
        code = Exit.INTERRUPTED
    except FlowError as error:
        code = _told(error)
    except BaseExceptionGroup as group:
        code = _grouped(group)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of a session that was cut may still wait for a disk; nothing that they do is needed any more.
    os._exit(int(code))


def _told(error: FlowError) -> Exit:
    print(f"flowengine-agent: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  next: {error.hint}", file=sys.stderr)
    return exit_code(error)


def _grouped(group: BaseExceptionGroup[BaseException]) -> Exit:
    from flowengine.transfer.channel import first_flow_error

    error = first_flow_error(group)
    if error is None:
        raise group
    return _told(error)


if __name__ == "__main__":
    main()
