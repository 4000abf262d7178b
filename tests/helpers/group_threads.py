"""Print the threads of gloo that outlive a process group during which torch's own users of it were imported."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from alps.core.distributed import process_group


def main() -> None:
    """Import a module of torch inside a group that has not been imported before, leave the group, and print."""
    for name in [name for name in sys.modules if name.startswith("torch.distributed.nn")]:
        del sys.modules[name]
    with process_group() as group:
        group.barrier()
        importlib.import_module("torch.distributed.nn.functional")
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    print([name for name in names if "gloo" in name])
