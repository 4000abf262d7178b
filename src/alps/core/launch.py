"""Start of this process: alone, or as one of several by torchrun."""

from __future__ import annotations

import os

from alps.core.errors import ConfigError


def is_distributed() -> bool:
    """Check if torchrun has started this process as one of several."""
    # The first condition is `torch.distributed.is_torchelastic_launched()`, without the import of torch.
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def require_single_process(command: str) -> None:
    """Refuse to run a command in several processes.

    Raises:
        ConfigError: under torchrun with more than one process.
    """
    if is_distributed():
        raise ConfigError(f"alps {command} runs in one process: start it without torchrun.")
