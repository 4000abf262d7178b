"""Hidden states beyond a limit wait in files, and nothing else changes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alps.calibration.activation_store import ActivationStore
from alps.calibration.block_capture import capture_block_inputs
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.models.blocks import find_blocks
from alps.solvers.patterns import Unstructured
from helpers import runs
from helpers.cli_process import run_code

_CPU = torch.device("cpu")


def _mapped(path: Path) -> int:
    """Files of a folder that are mapped into this process; those without a name are marked as deleted."""
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_what_is_above_the_limit_lies_in_files(tmp_path: Path) -> None:
    kept = ActivationStore(_CPU, limit=100, folder=tmp_path)
    wanted = [torch.full((2, 5), float(n)) for n in range(4)]  # 40 bytes each
    placed = [kept.store(states.clone()) for states in wanted]
    assert kept.held == 80 and list(tmp_path.iterdir()) == []
    assert all(torch.equal(one, other) for one, other in zip(placed, wanted, strict=True))
    assert _mapped(tmp_path) == 2
    del placed[0]
    gc.collect()
    assert kept.held == 40
    placed.append(kept.store(torch.ones(2, 5)))
    assert kept.held == 80 and _mapped(tmp_path) == 2
    del placed[1:3]
    gc.collect()
    assert _mapped(tmp_path) == 0


@pytest.mark.parametrize("limit", [0, 3000])
def test_a_walk_with_files_prunes_to_the_same_bits(
    limit: int, tiny_model: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    found, most = [], []
    for bytes_kept in (None, limit):
        model = tiny_model("llama")

        class Watch:
            def start(self, title: str, total: int) -> None: ...
            def step(self, detail: str) -> None:
                most.append(_mapped(tmp_path))

            def finish(self) -> None: ...

        runs.prune(
            model,
            ids,
            "sparsegpt",
            Unstructured(0.5),
            true_sequential=True,
            dense_target=0.4,
            reconstruction=ReconstructionParameters(tokens=32),
            activation_bytes=bytes_kept,
            spill_folder=tmp_path,
            progress=Watch(),
        )
        found.append([site.read().clone() for block in find_blocks(model) for site in block.sites])
        assert max(most) == 0 if bytes_kept is None else max(most) > 0
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    gc.collect()
    assert list(tmp_path.iterdir()) == [] and _mapped(tmp_path) == 0


def test_two_walks_over_the_same_inputs_do_not_touch_each_other(
    tiny_model: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, 2, activations=ActivationStore(_CPU, 0, tmp_path))
    before = [hidden.clone() for hidden in inputs.hidden]
    beside = inputs.copy()
    beside.advance(0, blocks[0].module, _CPU)
    assert all(torch.equal(one, other) for one, other in zip(inputs.hidden, before, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(beside.hidden, before, strict=True))


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys, torch\nfrom pathlib import Path\n"
        "from alps.core.errors import CheckpointError\nfrom alps.calibration.activation_store import ActivationStore\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    ActivationStore(None, 0, Path(sys.argv[1])).store(torch.ones(1000))\n"
        "except CheckpointError as error:\n    print(error)\n"
    )
    done = run_code(script, tmp_path)
    assert "(File too large): make room, or raise --activation-memory." in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []
