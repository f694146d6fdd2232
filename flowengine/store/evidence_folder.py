"""Reading the folder in which an agent keeps its evidence, beside an agent that may be writing to it."""

from __future__ import annotations

import json
import os

from flowengine.errors import IntegrityError, LocalError, NotFound
from flowengine.evidence.archive import Evidence
from flowengine.evidence.private import Kept

__all__ = ["read_evidence_folder"]


def read_evidence_folder(path: str) -> tuple[Evidence, int]:
    """What is in STATE/evidence, and how many bytes of a record that is being written, or was torn, were left out.

    The values of keyed digests are read where they are there; the CA's certificate is not in the folder.

    Raises:
        NotFound: there is no such folder, or no chain in it.
        LocalError: it cannot be read.
        IntegrityError: the file of values is damaged.
    """
    chain = os.path.join(path, "chain")
    try:
        names = sorted(name for name in os.listdir(chain) if name.endswith(".jsonl"))
        if not names:
            raise NotFound(
                f"{path} holds no chain", hint="name STATE/evidence of an agent, or an exported file"
            )
        evidence, torn = Evidence(), 0
        for name in names:
            data = _read(os.path.join(chain, name))
            rows = data.split(b"\n")
            torn = len(rows.pop())
            evidence.lines += rows
            if torn and name != names[-1]:
                evidence.lines.append(data[-torn:])  # no crash leaves that: it is found to be wrong
        for name in _names(os.path.join(path, "bundles")):
            if name.endswith(".bundle"):
                evidence.bundles["sha256:" + name.removesuffix(".bundle")] = _read(
                    os.path.join(path, "bundles", name)
                )
        key, values = os.path.join(path, "digest.key"), os.path.join(path, "values.jsonl")
        if os.path.exists(key) and os.path.exists(values):
            evidence.key = _read(key)
            for row in _read(values).split(b"\n")[:-1]:
                item = json.loads(row)
                kept = Kept(str(item["digest"]), str(item["name"]), item["value"])
                evidence.kept[kept.digest] = kept
    except FileNotFoundError:
        raise NotFound(
            f"{path} holds no evidence", hint="name STATE/evidence of an agent, or an exported file"
        ) from None
    except OSError as error:
        raise LocalError(
            f"cannot read the evidence in {path}: {error.strerror}",
            hint="run this as the agent's account, or as root",
        ) from None
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(
            f"the file of values in {path} is damaged",
            hint="move values.jsonl away: what rests on it is then only recorded",
            reason="evidence",
        ) from None
    return evidence, torn


def _names(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
