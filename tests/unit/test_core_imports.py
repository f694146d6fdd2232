"""What modules load, in a fresh interpreter: core modules no event loop, socket or database, the coordinator no planner."""

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


@pytest.mark.parametrize("module", ["flowengine", *(module for name in CORE for module in modules_of(name))])
def test_a_core_module_loads_nothing_that_does_io(module: str) -> None:
    code = f"import sys, {module}; print(*(set({FORBIDDEN!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    allowed = THROUGH_OTHERS if module.startswith(("flowengine.trust.", "flowengine.evidence.")) else {}
    assert set(done.stdout.split()) <= set(allowed)


@pytest.mark.slow
def test_the_coordinator_loads_nothing_large_that_it_does_not_always_need() -> None:
    large = ("numpy", "highspy", "alembic", "sqlalchemy.orm", "sqlalchemy.dialects.postgresql", "trio")
    code = f"import sys, flowengine.coordinator.run; print(*(set({large!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout.split()) == (0, "", [])
