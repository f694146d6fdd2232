"""The engine on this site's folders: what the agent's process and a mover's do alike, each with its own rights."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Final, Literal

import msgspec
import trio

from flowengine.errors import Denied, IntegrityError
from flowengine.manifest import DIRECTORY, ManifestReader
from flowengine.store.filesystem import local_error
from flowengine.store.landed import LandedManifest
from flowengine.store.quarantine import Quarantine, next_name
from flowengine.store.scan_cache import ScanCache, state_directory
from flowengine.store.sealed_open import Opened, check_held, open_sealed
from flowengine.store.selection import Selection
from flowengine.transfer.admission import Admission, OnlySealed, OnlyVersion
from flowengine.transfer.handing import Landed
from flowengine.transfer.manifests import make_manifest
from flowengine.transfer.session import Counters, Observer, Session
from flowengine.transfer.source import SourceOutcome, run_source
from flowengine.transfer.target import NOWHERE, TargetOutcome, TargetRoot, run_target
from flowengine.trust.sealed import SealingKey
from flowengine.wire.messages import MANIFEST_PART_BYTES
from flowengine.wire.paths import STAGING_NAME
from flowengine_agent.roots import Place

__all__ = [
    "OBJECTS_AT_ONCE",
    "Giving",
    "Rows",
    "Taking",
    "Way",
    "give",
    "hide",
    "purge",
    "take",
    "tell_objects",
    "unseal",
]

Way = Literal["plain", "hold", "open"]
Rows = Callable[[list[tuple[bytes, int]]], object]
"""Told of objects: (path, size)."""
OBJECTS_AT_ONCE: Final = 1000
"""Objects of a version that are told of at once: however many it has, no more are in memory."""
_IN_MEMORY_BYTES: Final = 16 << 20
"""A larger manifest of what is given on is kept in a file meanwhile."""
_INCOMING: Final = STAGING_NAME + b"/sealed"
"""Where sealed objects stand below the folder that they are to be opened into; goes to quarantine with what is staged."""


class Giving(msgspec.Struct, frozen=True):
    """How a place is given.

    Attributes:
        rename: as of `Place.selection`.
        cached: whether the scan cache is used.
        threads: as of `run_source`.
        seal: secret of the key to seal it with; empty: it leaves as it is.
        held: whether it is sealed already, and nothing else may leave.
        version: give this version, whether it is a file or what is in a folder, or nothing; empty: whatever is there.
    """

    rename: bytes = b""
    cached: bool = True
    threads: int = 1
    seal: bytes = b""
    held: bool = False
    version: bytes = b""

    def __repr__(self) -> str:  # it may hold a secret
        return f"<Giving rename={self.rename!r} cached={self.cached}>"


async def give(
    session: Session, place: Place, how: Giving, *, counters: Counters, observe: Observer | None
) -> SourceOutcome:
    """Serve a session from a place; arguments and errors as of `run_source` and `Place.selection`.

    Raises:
        IntegrityError: another version is there, or comes to be there (reason "feed-differs"); nothing of it is offered.
        Denied: something is not sealed and may leave only sealed (reason "sealed-mixed").
    """
    if how.version:
        place = await trio.to_thread.run_sync(_what_came, place, how.rename)
    with contextlib.ExitStack() as stack:
        selection = stack.enter_context(place.selection(how.rename))
        admit: Admission | None = None
        shown: Iterable[bytes] = ()
        if how.version:
            admit, shown = await trio.to_thread.run_sync(_only_version, session, selection, how, stack)
        elif how.held:
            admit = OnlySealed([root.name for root in selection.roots])
        return await run_source(
            session,
            selection,
            cache=ScanCache(session.profile.name) if how.cached else None,
            counters=counters,
            threads=how.threads,
            observe=observe,
            seal=SealingKey(how.seal) if how.seal else None,
            admit=admit,
            shown=shown,
        )


def _what_came(place: Place, rename: bytes) -> Place:
    """What landed at a place, as the source had named it: what is in a folder, a folder by its name, or a file.

    Raises:
        IntegrityError: it cannot be told (reason "feed-differs").
    """
    if place.contents:
        return place
    if not _is_there(place):
        if rename:
            return place
        raise _differs("the file may be called otherwise elsewhere")
    with place.opened() as fd:
        names = [os.fsencode(name) for name in os.listdir(fd)]
    names = [name for name in names if name != STAGING_NAME]
    found = dataclasses.replace(place, path=b"/".join(filter(None, (place.path, names[0] if names else b""))))
    if len(names) != 1 or not _is_there(found):
        raise _differs("a lone folder was expected")
    return found


def _only_version(
    session: Session, selection: Selection, how: Giving, stack: contextlib.ExitStack
) -> tuple[OnlyVersion, Iterator[bytes]]:
    """Read what is there, mostly from the scan cache, and refuse it where it is not the version that landed.

    Gives what lets nothing else leave when it is read again, and the manifest of it, for the target to see.
    """
    folder = state_directory()
    try:
        spool = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, dir=folder)  # noqa: SIM115 - closed by the stack
        file = stack.enter_context(spool)
        found, failures = make_manifest(
            selection,
            file.write,
            profile=session.profile.name,
            options=session.options,
            cache=ScanCache(session.profile.name) if how.cached else None,
            threads=how.threads,
            counters=Counters(),
        )
    except OSError as error:
        raise local_error(error, "cannot keep a manifest in", os.fsencode(folder)) from error
    if found.version_id != how.version or failures:
        raise _differs(f"expected version {how.version.hex()}, found {found.version_id.hex()}")

    def read(offset: int, length: int) -> bytes:
        file.seek(offset)
        return file.read(length)

    size = file.tell()
    parts = (read(at, MANIFEST_PART_BYTES) for at in range(0, size, MANIFEST_PART_BYTES))
    return OnlyVersion(ManifestReader(read, size), partial(_differs, "it was changed meanwhile")), parts


def _differs(why: str) -> IntegrityError:
    return IntegrityError(
        f"what stands at this site is not what the transfer brought here: {why}",
        hint="nothing is to be done: the source itself serves the other target",
        reason="feed-differs",
    )


class Taking(msgspec.Struct, frozen=True):
    """How what comes lands at a place.

    Attributes:
        cached: whether scan cache and chunk index are used.
        way: "hold" lets nothing land but sealed objects; "open" lets them land out of sight, to be opened then.
        version: as of `TargetRoot`.
    """

    cached: bool = True
    way: Way = "plain"
    version: bytes = b""


async def take(
    session: Session,
    place: Place,
    how: Taking,
    *,
    counters: Counters,
    observe: Observer | None,
    landed: Landed,
) -> TargetOutcome:
    """Land a session at a place, made where missing; arguments and errors as of `run_target` and `Place.target`.

    Raises:
        Denied: something came that is not sealed and may only be held (reason "not-sealed").
    """
    dry = session.options.dry_run
    name = session.profile.name
    with place.target(make=not dry) as path:
        root = TargetRoot(path or NOWHERE)
        if path is not None and not dry:
            root = dataclasses.replace(_root(path, how.way, landed), version=how.version)
        return await run_target(
            session,
            root,
            caches=(ScanCache(name), ScanCache(name)) if how.cached else (None, None),
            counters=counters,
            observe=observe,
        )


def _root(path: bytes, way: Way, landed: Landed) -> TargetRoot:
    if way == "open":
        return TargetRoot(os.path.join(path, _INCOMING))

    def look(rows: list[tuple[bytes, int]]) -> None:
        landed(rows)  # first: what is wrong has to go, so it has to be on account
        for name, _ in rows:
            try:
                check_held(path, name)
            except IntegrityError as error:
                why = f"what came is not sealed, and this site may only hold it: {error.message}"
                landed([], why)
                raise Denied(
                    why,
                    hint="look at the source's agent; what had arrived goes to quarantine and will be destroyed",
                    reason="not-sealed",
                    mode="stop-now",
                ) from None

    return TargetRoot(path, LandedManifest(path), landed=look if way == "hold" else landed)


def unseal(
    place: Place,
    secrets: list[bytes],
    *,
    xattrs: bool,
    owner: bool,
    note: Rows,
    named: Rows,
    stopped: Callable[[], bool],
) -> Opened:
    """Open what landed out of sight at a place; for a thread.

    Args:
        secrets: of the keys.
        xattrs, owner, note, named, stopped: as of `open_sealed`.

    Raises:
        FlowError: it cannot be written, or noted.
    """
    keys = {key.id: key for key in map(SealingKey, secrets)}

    def find(key_id: bytes) -> SealingKey:
        if key_id not in keys:
            raise IntegrityError(f"it was sealed with key {key_id.hex()}, which the source did not name")
        return keys[key_id]

    with place.target(make=False) as path:
        incoming = b"" if path is None else os.path.join(path, _INCOMING)
        if path is None or not os.path.isdir(incoming):
            return Opened()
        return open_sealed(
            incoming,
            path,
            find,
            consume=True,
            xattrs=xattrs,
            owner=owner,
            note=note,
            named=named,
            stopped=stopped,
        )


def tell_objects(path: bytes, tell: Rows) -> None:
    """Tell of everything but folders in the version that landed last at a path: (path, size), some at a time; for a thread."""
    with open(LandedManifest(path).path, "rb") as file:

        def read(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        found = (
            (folder + b"/" + entry.name if folder else entry.name, entry.size)
            for folder, entry in ManifestReader(read, os.fstat(file.fileno()).st_size).walk()
            if entry.kind != DIRECTORY
        )
        while part := list(islice(found, OBJECTS_AT_ONCE)):
            tell(part)


def hide(place: Place, task: str, paths: list[bytes], *, staging: bool) -> tuple[int, int]:
    """Take what landed at a place into quarantine there: how many objects it holds then, and their bytes; for a thread.

    The quarantine of an account lies in the folder that it wrote to, for it may be able to write nowhere else; above it
    where that folder was never made.
    """
    above, name = place.parent()
    with contextlib.ExitStack() as stack:
        if _is_there(place):
            quarantine = Quarantine(stack.enter_context(place.opened()), task)
            quarantine.take(b"", paths, staging=staging)
            if staging and name:
                quarantine.take_sibling(stack.enter_context(above.opened()), next_name(name))
        elif name and _is_there(above):
            Quarantine(stack.enter_context(above.opened()), task).take(name, paths, staging=staging)
    found = [one.contents() for one in _quarantines(place, task)]
    return sum(count for count, _ in found), sum(size for _, size in found)


def purge(place: Place, task: str) -> int:
    """Destroy what is in quarantine for a task; bytes of what was under way; for a thread."""
    return sum(one.purge().staged_bytes for one in _quarantines(place, task))


def _quarantines(place: Place, task: str) -> Iterator[Quarantine]:
    above, name = place.parent()
    for folder in (place, above) if name else (place,):
        if _is_there(folder):
            with folder.opened() as fd:
                yield Quarantine(fd, task)


def _is_there(place: Place) -> bool:
    st = place.lstat()
    return st is not None and stat.S_ISDIR(st.st_mode)
