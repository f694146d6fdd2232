"""What is measured: data, what the target has before, and what happens on the way.

A scenario builds its data once under a directory. The `measured` trees are moved in order onto one target;
those in `before` are not measured and are moved by the contender itself, so that it knows what it brought;
what lies in `at_target` is put there behind its back. So indexes and caches are cold unless `before` is used.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from perf import data

__all__ = ["SCENARIOS", "SIZES", "Built", "Scenario"]

MIB, GIB = 1 << 20, 1 << 30
SIZES = ("tiny", "small", "medium", "full")
RELEASES = ["Django==5.1", "Django==5.1.1", "Django==5.2"]
LARGE_RELEASES = ["opencv-python==4.9.0.80", "opencv-python==4.10.0.84", "opencv-python==4.11.0.86"]
"""Successive releases of source trees: 44 MB in 6,800 files, half of what takes time being the start; 204 MB in 7,500."""


@dataclass
class Built:
    """The data of a scenario: trees on disk."""

    measured: list[Path]
    before: list[Path] = field(default_factory=list)
    at_target: Path | None = None


@dataclass(frozen=True)
class Scenario:
    """One question to all contenders."""

    name: str
    title: str
    build: Callable[[Path, str, int], Built]
    kill_at_half: bool = False


def pick(size: str, tiny: int, small: int, full: int, medium: int = 0) -> int:
    """The figure for a size; medium, where not given, is a quarter of full for bytes and a tenth for counts."""
    medium = medium or max(small, full // 4 if full >= MIB else full // 10)
    return {"tiny": tiny, "small": small, "medium": medium, "full": full}[size]


def one_large(root: Path, size: str, seed: int) -> Built:
    data.write_random(root / "source" / "large.bin", pick(size, 8 * MIB, 128 * MIB, 4 * GIB), seed)
    return Built([root / "source"])


def many_large(root: Path, size: str, seed: int) -> Built:
    for number in range(16):
        path = root / "source" / f"part-{number:02d}.bin"
        data.write_random(path, pick(size, MIB // 2, 8 * MIB, 256 * MIB), seed * 1000 + number)
    return Built([root / "source"])


def compressible(root: Path, size: str, seed: int) -> Built:
    data.tables(root / "source", pick(size, 4 * MIB, 64 * MIB, 2 * GIB, medium=GIB), seed)
    return Built([root / "source"])


def many_small(root: Path, size: str, seed: int) -> Built:
    data.small_files(root / "source", pick(size, 300, 4_000, 50_000), seed)
    return Built([root / "source"])


def many_folders(root: Path, size: str, seed: int, share: int = 1) -> Built:
    count = pick(size, 300, 3_900, 39_000) // share
    data.small_files(root / "source", count, seed, high=4096, per_folder=3)
    return Built([root / "source"])


def many_folders_again(root: Path, size: str, seed: int) -> Built:
    tree = many_folders(root, size, seed).measured[0]
    return Built([tree], before=[tree])


def many_folders_beside(root: Path, size: str, seed: int) -> Built:
    others = root / "others"
    others.mkdir(parents=True)
    os.rename(many_folders(root, size, seed + 1, share=10).measured[0], others / "older")
    return Built(many_folders(root, size, seed).measured, at_target=others)


def new_version(root: Path, size: str, seed: int) -> Built:
    old, new = root / "old" / "large.bin", root / "source" / "large.bin"
    data.write_random(old, pick(size, 16 * MIB, 128 * MIB, 4 * GIB), seed)
    data.edited_copy(old, new, seed, edits=pick(size, 4, 12, 200))
    return Built([root / "source"], at_target=root / "old")


def other_names(root: Path, size: str, seed: int) -> Built:
    many = many_large(root, size, seed).measured[0]
    first = root / "first"
    os.rename(many, first)
    second = root / "source"
    second.mkdir()
    for number, path in enumerate(sorted(first.iterdir(), reverse=True)):
        renamed = second / "moved" / f"other-{number:02d}.bin"
        renamed.parent.mkdir(exist_ok=True)
        os.link(path, renamed)
    return Built([second], before=[first])


def other_names_cold(root: Path, size: str, seed: int) -> Built:
    warm = other_names(root, size, seed)
    return Built(warm.measured, at_target=warm.before[0])


def unchanged(root: Path, size: str, seed: int) -> Path:
    tree = root / "source"
    data.small_files(tree, pick(size, 500, 8_000, 200_000), seed, low=256, high=4096)
    return tree


def unchanged_cold(root: Path, size: str, seed: int) -> Built:
    tree = unchanged(root, size, seed)
    return Built([tree], at_target=tree)


def unchanged_again(root: Path, size: str, seed: int) -> Built:
    tree = unchanged(root, size, seed)
    return Built([tree], before=[tree])


def releases(root: Path, size: str, seed: int) -> Built:
    del seed  # the releases are what they are
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowengine-perf"
    names = LARGE_RELEASES if size == "full" else RELEASES[: pick(size, 2, 2, 3, 3)]
    first, *others = data.software_releases(root, names, cache)
    return Built(others, before=[first])


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("s1-one", "one large file of random bytes", one_large),
        Scenario("s1-many", "sixteen large files of random bytes", many_large),
        Scenario("s2", "compressible data: JSON lines, CSV and Parquet", compressible),
        Scenario("s3", "many files of 1 to 32 KiB in folders in folders", many_small),
        Scenario(
            "s3-folders",
            "many folders of three files of 1 to 4 KiB, as trees of sources have them",
            many_folders,
        ),
        Scenario("s3-beside", "the same beside a tree whose names and sizes are alike", many_folders_beside),
        Scenario(
            "s3-folders-again", "nothing changed in them since the contender brought them", many_folders_again
        ),
        Scenario("s4", "a new version of a large file over the old one", new_version),
        Scenario("s5", "known content under other names", other_names),
        Scenario("s5-cold", "the same, brought there by nobody who remembers it", other_names_cold),
        Scenario("s6", "sixteen large files, killed at half and continued", many_large, kill_at_half=True),
        Scenario("s7", "nothing changed, indexes and caches cold", unchanged_cold),
        Scenario("s7-again", "nothing changed since the contender brought it", unchanged_again),
        Scenario("s8", "releases of a source tree, one after the other", releases),
    )
}


def put_at_target(built: Built, target: Path) -> None:
    """Make the target directory as it is before the contender comes."""
    if built.at_target is None:
        target.mkdir()
    else:
        shutil.copytree(built.at_target, target, symlinks=True)
