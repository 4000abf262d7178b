"""Blocks in order: patched gaps, errors that can be measured again, and what reconstruction gains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import alps
from alps.core.errors import SolveFailed
from alps.reporting.shrink_report import ShrinkReport
from helpers.model_comparison import mean_kl, same, weights

Tiny = Callable[..., Any]


@pytest.fixture(scope="module")
def windows(stories: Path, english: str) -> Tensor:
    """Token ids (24, 32) of a text, of which the last 8 windows are for measurements alone."""
    ids = AutoTokenizer.from_pretrained(stories)(english[:8000]).input_ids
    return torch.tensor(ids[: 24 * 32]).view(24, 32)


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _hidden(model: Any, ids: Tensor, block: int) -> Tensor:
    """Hidden states behind a block, before the last norm."""
    seen: list[Tensor] = []
    handle = model.model.layers[block].register_forward_hook(
        lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0]


@pytest.fixture(scope="module")
def patched(stories: Path, windows: Tensor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShrinkReport]:
    """The model of five blocks without the first and the fourth one."""
    out = tmp_path_factory.mktemp("patched") / "out"
    return out, alps.shrink(stories, out, drop_blocks=[3, 0], calibration=windows[:16])


def test_a_patched_gap_is_better_than_an_open_one(
    patched: tuple[Path, ShrinkReport], stories: Path, windows: Tensor
) -> None:
    """On windows that the patch was not fitted to."""
    dense, small, open_gap = _load(stories), _load(patched[0]), _load(stories)
    open_gap.model.layers = nn.ModuleList(open_gap.model.layers[index] for index in (1, 2, 4))
    closed, left = (mean_kl(dense, model, windows[16:]) for model in (small, open_gap))
    assert closed < 0.8 * left
    # Nothing but the output projections has changed.
    state, before = weights(small), weights(open_gap)
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, before[name])}
    assert changed <= {name for name in state if name.endswith(("o_proj.weight", "down_proj.weight"))}
    assert "model.layers.1.mlp.down_proj.weight" in changed


def test_the_errors_are_those_of_the_written_model(
    patched: tuple[Path, ShrinkReport], stories: Path, windows: Tensor
) -> None:
    """Behind a block, and of the dense model behind the removed blocks that follow it."""
    dense, small = _load(stories), _load(patched[0])
    report = patched[1]
    assert [block.block for block in report.blocks] == [1, 2, 4]
    for position, (record, index) in enumerate(zip(report.blocks, (1, 3, 4), strict=True)):
        goal, hidden = _hidden(dense, windows[:16], index), _hidden(small, windows[:16], position)
        error = ((hidden - goal).square().sum(-1) / goal.square().sum(-1)).mean()
        assert record.error == pytest.approx(float(error), rel=1e-3)
        assert all(cut.error < 1e-12 for cut in record.cuts)


@pytest.mark.slow
def test_reconstruction_brings_the_predictions_closer(stories: Path, windows: Tensor, tmp_path: Path) -> None:
    options: dict[str, Any] = {"mlp_width": 96, "calibration": windows[:16]}
    plain = alps.shrink(stories, tmp_path / "plain", **options)
    tuned = alps.shrink(stories, tmp_path / "tuned", **options, reconstruct_epochs=3)
    assert all(block.reconstruction is None for block in plain.blocks)
    records = [block.reconstruction for block in tuned.blocks]
    assert all(record is not None and record.after <= record.before for record in records)
    assert sum(record.after < record.before for record in records if record is not None) >= 3
    dense = _load(stories)
    kls = [mean_kl(dense, _load(tmp_path / name), windows[16:]) for name in ("plain", "tuned")]
    assert kls[1] < kls[0]


@pytest.mark.parametrize("kind", ["opt", "opt-postnorm", "gpt2"])
def test_other_kinds_of_blocks_are_shrunk_and_left_unchanged(
    tiny_model: Tiny, kind: str, ids: Tensor, tmp_path: Path
) -> None:
    model = tiny_model(kind)
    report = alps.shrink(model, tmp_path / "out", mlp_width=40, drop_blocks=[1], calibration=ids, reconstruct_epochs=1)
    assert [block.block for block in report.blocks] == [0, 2] and same(weights(model), weights(tiny_model(kind)))
    small, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        logits = small.eval()(input_ids=ids).logits
    assert bool(logits.isfinite().all())


def test_a_layer_that_cannot_be_solved_is_named(tiny_model: Tiny, ids: Tensor, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data *= 1e30
    with pytest.raises(SolveFailed, match=r"model\.layers\.1: the hidden states behind it are not finite"):
        alps.shrink(model, tmp_path / "out", mlp_width=32, calibration=ids)
    assert not (tmp_path / "out").exists()
