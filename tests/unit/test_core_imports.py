"""What modules load, in a fresh interpreter: core modules no event loop, socket or database, the coordinator no planner."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import flowengine

PACKAGE = Path(flowengine.__file__).parent
CORE = ("errors", "units", "wire", "manifest", "policy", "plan", "api", "trust", "evidence")
FORBIDDEN = ("trio", "aiohttp", "sqlite3", "socket")
THROUGH_OTHERS = {"socket": "cryptography.x509 takes email.utils, which takes socket"}
"""What trust loads without ever using it."""


def modules_of(name: str) -> list[str]:
    """The dotted names of a core module or of every module of a core package; found on disk, not imported."""
    package = PACKAGE / name
    if not package.is_dir():
        return [f"flowengine.{name}"]
    paths = sorted(package.rglob("*.py"))
    names = [".".join(("flowengine", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in paths]
    return [name.removesuffix(".__init__") for name in names]


MODULES = ["flowengine", *(module for name in CORE for module in modules_of(name))]
LOADER = """
import json, os, sys
import blake3, datetime, hashlib, highspy, ipaddress, msgspec, numpy, re, tarfile, tomllib, typing, zoneinfo
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.ciphers import aead
modules, forbidden = json.loads(sys.argv[1])
assert not set(forbidden) & set(sys.modules)
assert not [name for name in sys.modules if name.partition(".")[0] == "flowengine"]
for module in modules:
    reading, writing = os.pipe()
    if not os.fork():
        os.dup2(writing, 2)
        __import__(module)
        print(module, *(set(forbidden) & set(sys.modules)), flush=True)
        os._exit(0)
    os.close(writing)
    said = open(reading).read()
    assert (os.wait()[1], said) == (0, ""), (module, said)
"""
"""Each module in a process of its own, which has nothing of this project; what is not, is loaded once for all."""


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """Of what is forbidden, what each module loads."""
    words = [sys.executable, "-c", LOADER, json.dumps([MODULES, FORBIDDEN])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return {words[0]: words[1:] for words in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("module", MODULES)
def test_a_core_module_loads_nothing_that_does_io(loaded: dict[str, list[str]], module: str) -> None:
    allowed = THROUGH_OTHERS if module.startswith(("flowengine.trust.", "flowengine.evidence.")) else {}
    assert set(loaded[module]) <= set(allowed)


@pytest.mark.slow
def test_the_coordinator_loads_nothing_large_that_it_does_not_always_need() -> None:
    large = ("numpy", "highspy", "alembic", "sqlalchemy.orm", "sqlalchemy.dialects.postgresql", "trio")
    code = f"import sys, flowengine.coordinator.run; print(*(set({large!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout.split()) == (0, "", [])
