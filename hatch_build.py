"""Build hook of the package: compiles the CPU kernels if it can. The installation succeeds either way."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface[Any]):
    """Runs for wheels and for editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile next to the sources, and put the library into the wheel."""
        spec = importlib.util.spec_from_file_location("build", Path(self.root, "engine/native/build.py"))
        assert spec is not None
        assert spec.loader is not None
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        try:
            native.build(native.LIBRARY)
        except native.BuildError as error:
            self.app.display_warning(f"CPU kernels not built, torch will do their work: {error}")
            return
        if version != "editable":
            build_data["artifacts"].append("engine/native/_kernels.so")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
