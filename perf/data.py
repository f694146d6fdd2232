"""Data to move, the same on every machine for the same seed and size."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np

__all__ = [
    "edited_copy",
    "same_tree",
    "small_files",
    "software_releases",
    "tables",
    "total_size",
    "write_random",
]

PIECE = 16 << 20
OLD_NS, NEW_NS = 1_700_000_000_000_000_000, 1_700_086_400_000_000_000
FILES_PER_FOLDER, FOLDERS_PER_FOLDER = 50, 20


def write_random(path: Path, size: int, seed: int) -> None:
    """A file that no one can compress."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for begin in range(0, size, PIECE):
            file.write(rng.bytes(min(PIECE, size - begin)))
    os.utime(path, ns=(NEW_NS, NEW_NS))


def small_files(
    root: Path,
    count: int,
    seed: int,
    low: int = 1 << 10,
    high: int = 32 << 10,
    *,
    per_folder: int = FILES_PER_FOLDER,
) -> None:
    """Many files of random content, of `low` to `high` bytes each, so many to a folder, in folders in folders."""
    rng = np.random.default_rng(seed)
    pool = rng.bytes(PIECE)
    sizes = rng.integers(low, high, count, endpoint=True)
    starts = rng.integers(0, PIECE - high - 8, count)
    for index in range(count):
        folder = index // per_folder
        where = root / f"d{folder // FOLDERS_PER_FOLDER:03d}" / f"d{folder % FOLDERS_PER_FOLDER:02d}"
        if index % per_folder == 0:
            where.mkdir(parents=True, exist_ok=True)
        # The number makes each file differ from every other, also where their slices of the pool overlap.
        body = index.to_bytes(8, "big") + pool[starts[index] : starts[index] + sizes[index]]
        path = where / f"f{index % per_folder:02d}.bin"
        path.write_bytes(body[: sizes[index]])
        os.utime(path, ns=(NEW_NS, NEW_NS))


def tables(root: Path, size: int, seed: int) -> None:
    """Event records as JSON lines, CSV and Parquet, a third of the bytes each, in files of up to 64 MiB."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.parquet

    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    stations = np.array([f"station-{number:03d}.example.org" for number in range(400)])
    states = np.array(["ok", "ok", "ok", "late", "retry", "lost"])
    target_each, file_size, rows = size // 3, min(64 << 20, max(size // 6, 1 << 16)), 50_000

    def batch(first: int) -> pa.Table:
        return pa.table(
            {
                "id": np.arange(first, first + rows),
                "time": 1_700_000_000_000 + np.cumsum(rng.integers(0, 90, rows)) + first * 45,
                "station": stations[rng.zipf(1.4, rows) % len(stations)],
                "state": states[rng.integers(0, len(states), rows)],
                "value": np.round(rng.normal(20.0, 4.0, rows), 3),
                "count": rng.poisson(3.0, rows),
            }
        )

    def lines(table: pa.Table) -> bytes:
        parts: list[object] = []
        for name in table.column_names:
            quote = '"' if pa.types.is_string(table[name].type) else ""
            parts += [
                ("{" if not parts else ", ") + f'"{name}": {quote}',
                pc.cast(table[name], pa.string()),
                quote,
            ]
        joined = pc.binary_join_element_wise(*parts[:-1], f"{parts[-1]}}}\n", "")
        return "".join(joined.to_pylist()).encode()

    for kind in ("jsonl", "csv", "parquet"):
        written = number = first = 0
        while written < target_each:
            path = root / f"events-{number:04d}.{kind}"
            with path.open("wb") as file:
                parquet = None
                while file.tell() < min(file_size, target_each - written):
                    table = batch(first)
                    first += rows
                    if kind == "jsonl":
                        file.write(lines(table))
                    elif kind == "csv":
                        pyarrow.csv.write_csv(table, file)
                    else:
                        parquet = parquet or pyarrow.parquet.ParquetWriter(file, table.schema)
                        parquet.write_table(table)
                if parquet is not None:
                    parquet.close()
            written += path.stat().st_size
            number += 1
            os.utime(path, ns=(NEW_NS, NEW_NS))


def edited_copy(
    old: Path, new: Path, seed: int, region: int = 1 << 20, share: float = 0.01, edits: int = 200
) -> None:
    """A new version of a file: regions overwritten, `edits` runs inserted or taken out at random places."""
    rng = random.Random(seed)
    size = old.stat().st_size
    regions = max(1, size // region)
    overwritten = rng.sample(range(regions), max(1, round(regions * share)))
    actions: list[tuple[int, str, int]] = [(index * region, "overwrite", region) for index in overwritten]
    for number in range(edits):
        length = rng.randrange(64, 64 << 10)
        actions.append((rng.randrange(size), "insert" if number % 2 else "delete", length))
    new.parent.mkdir(parents=True, exist_ok=True)
    with old.open("rb") as source, new.open("wb") as target:
        for offset, what, length in sorted(actions):
            while (left := offset - source.tell()) > 0:
                target.write(source.read(min(PIECE, left)))
            if what != "insert":
                length = min(length, max(0, size - source.tell()))
                source.seek(length, os.SEEK_CUR)
            if what != "delete":
                target.write(rng.randbytes(length))
        shutil.copyfileobj(source, target, PIECE)
    os.utime(old, ns=(OLD_NS, OLD_NS))
    os.utime(new, ns=(NEW_NS, NEW_NS))


def software_releases(root: Path, names: list[str], cache: Path) -> list[Path]:
    """The unpacked source distributions of releases (`Project==1.0`), brought by pip, in order."""
    cache.mkdir(parents=True, exist_ok=True)
    trees = []
    for name in names:
        project, _, version = name.partition("==")
        archive = cache / f"{project}-{version}.tar.gz"
        if not archive.exists():
            # As source that one alone: pip looks into it, for which it may need what else comes built.
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", project]
            subprocess.run([*command, "-d", str(cache), name], check=True, stdin=subprocess.DEVNULL)
        if not archive.exists():
            raise FileNotFoundError(
                f"pip brought no {archive.name} for {name}; {sorted(os.listdir(cache))} is there"
            )
        tree = root / version
        with tarfile.open(archive) as tar:
            tar.extractall(root / "unpacked", filter="data")
        (root / "unpacked" / f"{project}-{version}").rename(tree)
        trees.append(tree)
    return trees


def total_size(root: Path) -> tuple[int, int]:
    """Bytes and number of the regular files of a tree."""
    size = count = 0
    for folder, _, names in os.walk(root):
        for name in names:
            size += os.lstat(os.path.join(folder, name)).st_size
            count += 1
    return size, count


def same_tree(source: Path, target: Path) -> str:
    """Empty when every file of the source is in the target with the same bytes; else what is wrong first."""
    for folder, _, names in os.walk(source):
        for name in names:
            one = Path(folder, name)
            other = target / one.relative_to(source)
            if one.is_symlink():
                if not other.is_symlink() or os.readlink(one) != os.readlink(other):
                    return f"{other.relative_to(target)} is not the same link"
                continue
            if not other.is_file():
                return f"{other.relative_to(target)} is missing"
            if one.stat().st_size != other.stat().st_size:
                return (
                    f"{other.relative_to(target)} has {other.stat().st_size} bytes, not {one.stat().st_size}"
                )
            with one.open("rb") as left, other.open("rb") as right:
                while piece := left.read(1 << 20):
                    if piece != right.read(1 << 20):
                        return f"{other.relative_to(target)} differs before byte {left.tell()}"
    return ""
