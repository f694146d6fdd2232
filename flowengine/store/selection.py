"""Which paths of the user's command become which names of the transfer.

`SRC/` stands for what is in SRC, `SRC` for the folder or file itself, as in rsync. The result is one virtual root
directory whose children come from one or more real directories.
"""

from __future__ import annotations

import os

import msgspec

from flowengine.errors import NotFound, UsageError
from flowengine.store.filesystem import local_error
from flowengine.units import show_path

__all__ = ["Root", "Selection", "select", "spelling_of"]


class Root(msgspec.Struct, frozen=True):
    """One source path: `name` is what it becomes in the transfer's root; empty for the contents of a directory."""

    path: bytes
    name: bytes


class Selection(msgspec.Struct, frozen=True):
    """What a transfer takes.

    Attributes:
        roots: one per path of the command.
        files_from: relative paths to which each directory root is restricted; None for everything.
    """

    roots: list[Root]
    files_from: list[bytes] | None = None

    @property
    def single_contents(self) -> bool:
        """Whether the root directory is one real directory, whose own mode and mtime then travel too."""
        return len(self.roots) == 1 and not self.roots[0].name

    @property
    def single_file(self) -> bool:
        """Whether just one thing that is not a directory was named."""
        return len(self.roots) == 1 and bool(self.roots[0].name) and not os.path.isdir(self.roots[0].path)

    def renamed(self, name: bytes) -> Selection:
        """The selection with its one file under another name."""
        if not self.single_file:
            raise UsageError("only a single file can get another name at the target")
        return Selection([Root(self.roots[0].path, name)], self.files_from)


def spelling_of(path: bytes) -> str:
    """What to look at where a path of this machine does not exist."""
    hint = "check the spelling; relative paths start at the current folder"
    return f"{hint}, and a place at a site is written SITE:/PATH" if b":" in path else hint


def select(paths: list[bytes], files_from: list[bytes] | None = None) -> Selection:
    """The selection that a command line means.

    Raises:
        NotFound: a path does not exist.
        UsageError: two paths would get the same name at the target, or `SRC/` is no directory.
    """
    roots: list[Root] = []
    seen: dict[bytes, bytes] = {}
    for path in paths:
        try:
            is_dir = os.path.isdir(path)
            if not is_dir:
                os.lstat(path)
        except FileNotFoundError:
            raise NotFound(f"source {show_path(path)} does not exist", hint=spelling_of(path)) from None
        except NotADirectoryError:
            raise UsageError(
                f"{show_path(path)} is not a folder",
                hint="leave out the final slash to copy the file itself",
            ) from None
        except OSError as error:
            raise local_error(error, "cannot look at the source", path) from error
        contents = path.endswith(b"/") or os.path.basename(path) in (b".", b"..", b"")
        if contents:
            if not is_dir:
                raise UsageError(
                    f"{show_path(path)} is not a folder",
                    hint="leave out the final slash to copy the file itself",
                )
            roots.append(Root(path, b""))
            continue
        name = os.path.basename(path)
        if name in seen:
            raise UsageError(
                f"{show_path(seen[name])} and {show_path(path)} would both become {show_path(name)} at the target",
                hint="copy them in two commands, or to two targets",
            )
        seen[name] = path
        roots.append(Root(path, name))
    return Selection(roots, files_from)


def subset_tree(paths: list[bytes] | None) -> dict[bytes, object] | None:
    """`--files-from` as nested names; an empty dict below a name means all of it."""
    if paths is None:
        return None
    tree: dict[bytes, object] = {}
    for path in paths:
        node = tree
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        for part in parts:
            below = node.setdefault(part, {})
            assert isinstance(below, dict)
            node = below
    return tree
