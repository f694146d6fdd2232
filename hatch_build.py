"""Compiles the package's C libraries where there is a C compiler; without them it does the same in Python."""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARIES = {
    "flowengine/chunking/_chunks": (("_cut", "_hash", "_read"), "cutting into chunks and hashing them"),
    "flowengine/store/_many": (("_many",), "small files"),
}
"""Libraries without `.so`; of each the sources without `.c`, beside it, and what takes longer without it."""


class CompileHook(BuildHookInterface[Any]):
    """Adds the libraries to the wheel, which is one for this platform then; an editable install finds them in place."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the wheel is put together."""
        compiler = shlex.split(os.environ.get("CC") or "cc")
        for path, (names, what) in LIBRARIES.items():
            library = os.path.join(self.root, f"{path}.so")
            sources = [os.path.join(os.path.dirname(library), f"{name}.c") for name in names]
            # -O3: what is not unrolled in hashing costs a quarter of its speed.
            command = [*compiler, "-O3", "-fPIC", "-shared", "-o", f"{library}.part", *sources]
            try:
                subprocess.run(command, check=True, capture_output=True)
                os.replace(f"{library}.part", library)
            except (OSError, subprocess.CalledProcessError) as error:
                self.app.display_warning(f"{path}.so was not compiled, {what} will take longer: {error}")
                continue
            build_data["artifacts"].append(f"{path}.so")
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"
