"""`flow completion`: the shell's TAB for commands, options, sites and files."""

from __future__ import annotations

import click

from flowengine.errors import Exit

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print what makes SHELL complete `flow`: add `eval "$(flow completion bash)"` to ~/.bashrc.

    Names of sites come from the last answer of the coordinator; it is asked in the background, so TAB never waits.
    """
    from click.shell_completion import get_completion_class

    from flowengine.cli.main import command

    kind = get_completion_class(shell)
    assert kind is not None
    if shell == "bash":
        print("COMP_WORDBREAKS=${COMP_WORDBREAKS//:/}  # SITE:/PATH is one word")
    print(kind(command(), {}, "flow", "_FLOW_COMPLETE").source())
    return Exit.DONE
