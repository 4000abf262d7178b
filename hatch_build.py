"""Compiles the kernel for packed weights into the package; without a C compiler, the rest is installed."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelHook(BuildHookInterface[Any]):
    """Runs for wheels and for editable installs, not for the archive of the sources."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile, and mark the wheel as one for this platform; `version` is `standard` or `editable`."""
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / "src" / "alps" / "inference"
        # By its path: the package itself is not there yet.
        spec = importlib.util.spec_from_file_location("alps_kernel_compile", folder / "build_kernel.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        library = folder / module.LIBRARY_NAME
        library.unlink(missing_ok=True)
        failed = module.compile_library(library)
        if failed:
            self.app.display_warning(f"No kernel for packed weights, torch alone will multiply: {failed}.")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(f"src/alps/inference/{module.LIBRARY_NAME}")
