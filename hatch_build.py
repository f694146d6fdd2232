"""Compiles flowengine/store/_many.c where there is a C compiler; without it the package does the same in Python."""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE, LIBRARY = "flowengine/store/_many.c", "flowengine/store/_many.so"


class CompileHook(BuildHookInterface[Any]):
    """Adds the library to the wheel, which is one for this platform then; an editable install finds it in place."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the wheel is put together."""
        source, library = (os.path.join(self.root, path) for path in (SOURCE, LIBRARY))
        compiler = shlex.split(os.environ.get("CC") or "cc")
        command = [*compiler, "-O2", "-fPIC", "-shared", "-o", f"{library}.part", source]
        try:
            subprocess.run(command, check=True, capture_output=True)
            os.replace(f"{library}.part", library)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"{SOURCE} was not compiled, small files will take longer: {error}")
            return
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
