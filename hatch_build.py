"""Build hook of the package: compiles the CPU kernels and the cores if it can.

The installation succeeds either way.
"""

from __future__ import annotations

import sys
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeHook(BuildHookInterface[Any]):
    """Runs for wheels and for editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile next to the sources, and put what comes of it into the wheel."""
        sys.path.insert(0, self.root)
        from engine import cores
        from engine.native import build, build_cores

        is_wheel = version != "editable"
        try:
            build.build(build.LIBRARY)
        except build.BuildError as error:
            self.app.display_warning(f"CPU kernels not built, torch will do their work: {error}")
        else:
            if is_wheel:
                platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
                build_data |= {"pure_python": False, "tag": f"py3-none-{platform}"}
                build_data["artifacts"].append("engine/native/_kernels.so")
        try:
            if cores.state() != "compiled":  # a minute ago, say, for another set of extras
                build_cores.build(cores.DIRECTORY)
        except build_cores.BuildError as error:
            self.app.display_warning(f"cores not compiled, Python runs their sources: {error}")
        else:
            if is_wheel:  # for this version of Python
                build_data.pop("tag", None)
                build_data |= {"pure_python": False, "infer_tag": True}
                build_data["artifacts"].append("engine/native/_cores/**")
