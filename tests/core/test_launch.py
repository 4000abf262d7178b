"""One process or several, as torch sees it."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from alps.core.errors import ConfigError
from alps.core.launch import is_distributed, require_single_process


@pytest.mark.parametrize("run_id", [None, "1"])
@pytest.mark.parametrize("size", [None, "1", "2"])
def test_several_processes_are_those_of_torchrun(
    monkeypatch: pytest.MonkeyPatch, run_id: str | None, size: str | None
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", run_id), ("WORLD_SIZE", size)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert is_distributed() == (dist.is_torchelastic_launched() and size == "2")
    if is_distributed():
        with pytest.raises(ConfigError, match=r"^alps pack runs in one process: start it without torchrun\.$"):
            require_single_process("pack")
    else:
        require_single_process("pack")
