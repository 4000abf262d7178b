"""`alps shrink` on mixtures: plain smaller models of whatever kind, resumed and on two ranks the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import alps
from alps.calibration.activation_store import ActivationStore
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.block_inputs import BlockInputs
from alps.cli.tables import shrink_summary
from alps.core.distributed import SINGLE_PROCESS, ProcessGroup
from alps.core.errors import ConfigError, SolveFailed, UnsupportedModel
from alps.models.blocks import find_blocks
from alps.models.shrink_families import family_of
from alps.models.shrink_layout import Family
from alps.models.shrink_slices import Kept, slice_block
from alps.models.structure import Structure, Target, read_structure
from alps.pruning import expert_choice, shrink_pipeline
from alps.pruning.shrink_experts import ExpertCut, recorded_outputs
from alps.reporting.shrink_report import ShrinkReport
from helpers.cli_process import run_group
from helpers.decoders import MOE, decoder
from helpers.mixtures import GROUPED, find_mixture_blocks, mixture_model
from helpers.shrink_runs import comparable, run_shrink, stop_after, weight_bytes
from helpers.shrinking import distance, mask
from helpers.thread_group import run_in_threads

_CPU = torch.device("cpu")
_CUTS: dict[str, dict[str, Any]] = {
    "experts": {"experts": 0.25},
    "width": {"expert_mlp": 0.3, "align": 8},
    "both": {"experts": 0.25, "expert_mlp_width": 16, "num_heads": 2, "drop_blocks": [1]},
    "all": {"experts": 0.25, "expert_mlp_width": 8, "mlp_width": 24, "drop_blocks": [0], "reconstruct_epochs": 1},
}
_KINDS = [*(kind for kind in MOE if kind != "jetmoe"), "hunyuan_v1_moe", *(f"{kind}-grouped" for kind in GROUPED)]
_QUICK = [("mixtral", "both"), ("glm4_moe", "width")]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the continuations that candidates are compared on."""
    monkeypatch.setattr(expert_choice, "NEW_TOKENS", 3)
    monkeypatch.setattr(expert_choice, "PROMPTS", 2)


@pytest.fixture
def checkpoint(tmp_path: Path, word_tokenizer: Any) -> Path:
    """A tiny mixture on disk."""
    mixture_model("qwen2_moe").save_pretrained(tmp_path / "mixture")
    word_tokenizer.save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def _windows(count: int = 10) -> Tensor:
    return torch.randint(2, 64, (count, 16), generator=torch.Generator().manual_seed(4))


def _record_slices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], Kept]]:
    """Record the refitted weights of every block before it is sliced, and the units that stay."""
    records = list[tuple[dict[str, Tensor], Kept]]()

    def recording(state: Mapping[str, Tensor], family: Family, structure: Structure, kept: Kept) -> dict[str, Tensor]:
        records.append(({name: tensor.clone() for name, tensor in state.items()}, kept))
        return slice_block(state, family, structure, kept)

    monkeypatch.setattr(shrink_pipeline, "slice_block", recording)
    return records


def _model(kind: str) -> Any:
    name, _, grouped = kind.partition("-")
    if grouped:
        return mixture_model(name, 16, grouped=True)
    return mixture_model(name) if name in MOE else decoder(name)


def _settings(cut: str, structure: Structure, family: Family) -> dict[str, Any]:
    """Return the settings of a cut, without what the kind does not have."""
    settings = dict(_CUTS[cut])
    if structure.head_dim is None or family.no_heads:
        settings.pop("num_heads", None)
    if structure.mlp_width is None:
        settings.pop("mlp_width", None)
    return settings | {"calibration": _windows()}


@pytest.mark.parametrize(
    ("kind", "cut"),
    [pytest.param(k, c, marks=() if (k, c) in _QUICK else pytest.mark.slow) for k in _KINDS for c in _CUTS],
)
def test_the_result_is_plain_and_equals_the_masked_full_model(
    kind: str, cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, model = _record_slices(monkeypatch), _model(kind)
    structure = read_structure(model, find_blocks(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = alps.shrink(model, tmp_path / "out", **_settings(cut, structure, family_of(model)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    small, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    smaller = read_structure(small, find_blocks(small))
    if cut != "width":
        count = (structure.experts or 0) * 3 // 4
        assert smaller.experts == count and report.experts is not None
        assert {len(kept) for kept in report.experts.kept.values()} == {count}
    if cut != "experts":
        assert smaller.expert_width is not None and smaller.expert_width < (structure.expert_width or 0)
    ids = _windows(3)
    if cut != "all":  # without reconstruction, which tunes the smaller blocks
        numbers = [block.block for block in report.blocks]
        full, kept = copy.deepcopy(model), [Kept()] * structure.blocks
        for index, (state, units) in zip(numbers, records, strict=True):
            find_blocks(full)[index].module.load_state_dict(state)
            kept[index] = units
        with torch.no_grad():
            masked = mask(full, Target(kept_blocks=tuple(numbers)), kept)(input_ids=ids, use_cache=False).logits
            logits = small(input_ids=ids, use_cache=False).logits
        assert distance(logits, masked) < 2e-6
    refits = [entry for block in report.blocks for entry in block.cuts if entry.unit == "expert"]
    assert refits and all(refit.error <= (refit.error_before or 0) for refit in refits)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = [small.generate(ids[:2], use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*tokens)


def test_an_interrupted_run_resumes_to_the_same_bits(
    checkpoint: Path, english_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "model": str(checkpoint),
        "num_experts": 6,
        "calibration": str(english_file),
        "samples": 4,
        "seqlen": 8,
    }
    expected = run_shrink(settings, tmp_path / "whole")
    with monkeypatch.context() as context:
        stop_after(2, SolveFailed("Stopped."), context)
        with pytest.raises(SolveFailed, match="2 finished blocks are kept"):
            run_shrink(settings, tmp_path / "out")
    notes = json.loads((tmp_path / "out.partial" / "journal.json").read_text())["notes"]
    assert expected.experts is not None and notes["experts"]["chosen"] == expected.experts.chosen

    def fail(*_: object) -> None:
        raise AssertionError("experts were chosen again")

    monkeypatch.setattr(expert_choice.ExpertChooser, "choose", fail)
    resumed = run_shrink(settings, tmp_path / "out", resume=True)
    assert comparable(resumed) == comparable(expected)
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "whole")


def _cut_block(
    model: Any, target: Target, group: ProcessGroup, ids: Tensor
) -> tuple[dict[str, Tensor], Kept, list[Any]]:
    """Return the weights of the second block after a cut, with the units that stay and the records."""
    blocks = find_blocks(model)
    inputs: BlockInputs = capture_block_inputs(model, blocks, group.shard(ids), 1)
    inputs.advance(0, blocks[0].module, _CPU)
    structure, block = read_structure(model, blocks), blocks[1].clone()
    cut = ExpertCut(structure, target.complete(structure), {1: [0, 1, 2, 4, 6, 7]})
    mixture = cut.mixture(block)
    assert mixture is not None
    with recorded_outputs(mixture.module, ActivationStore()) as outputs, torch.no_grad():
        for batch in range(len(inputs.hidden)):
            inputs.run(1, block.module, batch, _CPU)
    kept, records = cut.cut(mixture, block, inputs, outputs, device=_CPU, group=group)
    return block.module.state_dict(), kept, records


def test_two_ranks_refit_on_the_windows_of_both() -> None:
    model, target, ids = mixture_model("glm4_moe"), Target(experts=6, expert_width=16), _windows(7)
    state, kept, records = _cut_block(model, target, SINGLE_PROCESS, ids)
    ranks = run_in_threads(2, lambda group: _cut_block(copy.deepcopy(model), target, group, ids))
    for rank_state, rank_kept, rank_records in ranks:
        assert rank_records == records
        for unit in ("expert_channels", "shared_channels", "experts"):
            assert torch.equal(getattr(rank_kept, unit), getattr(kept, unit))
        for name, tensor in rank_state.items():
            assert torch.equal(tensor, state[name]), name
    assert kept.experts is not None and kept.experts.tolist() == [0, 1, 2, 4, 6, 7]


@pytest.mark.slow
def test_two_processes_write_the_weights_of_one(checkpoint: Path, english_file: Path, tmp_path: Path) -> None:
    options = ["--num-experts", 6, "--calibration", english_file, "--samples", 7, "--seqlen", 16]
    for size in (1, 2):
        ended = run_group(size, "shrink", checkpoint, tmp_path / str(size), *options)
        assert [process.returncode for process in ended] == [0] * size, ended
        assert sum(process.stdout.count("Experts: the set of ") for process in ended) == 1
    reports = [ShrinkReport.read(tmp_path / str(size)) for size in (1, 2)]
    assert reports[0] is not None and reports[1] is not None
    assert reports[0].experts == reports[1].experts
    # Forwards of batches of another size round otherwise.
    one, two = (load_file(tmp_path / str(size) / "model.safetensors") for size in (1, 2))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert distance(two[name], tensor) < 1e-5, name


@pytest.mark.parametrize(
    ("model", "settings", "error", "complaint"),
    [
        (lambda: decoder("llama"), {"experts": 0.5}, ConfigError, "and the model has no experts"),
        (lambda: decoder("jetmoe"), {"experts": 0.5}, UnsupportedModel, "its attention has as many experts as its MLP"),
        (lambda: mixture_model("mixtral"), {"num_experts": 1}, ConfigError, "a token is sent to 2: keep 2 or more"),
        (lambda: mixture_model("mixtral"), {"num_experts": 9}, ConfigError, "9 experts cannot be kept of 8"),
        (lambda: mixture_model("mixtral"), {"experts": 0.05}, ConfigError, "rounds to nothing"),
        (lambda: mixture_model("mixtral"), {"expert_mlp_width": 20}, ConfigError, "choose a multiple of 8"),
        (lambda: mixture_model("mixtral"), {"mlp": 0.5}, ConfigError, "the model has none"),
        (
            lambda: mixture_model("deepseek_v3", 16, grouped=True),
            {"num_experts": 10},
            ConfigError,
            "choose a multiple of 4",
        ),
        (lambda: mixture_model("mixtral"), {"experts": 0.25, "num_experts": 6}, ConfigError, "the same in two ways"),
        (lambda: mixture_model("mixtral"), {"experts": 0.25, "calibration": _windows(1)}, ConfigError, "at least two"),
    ],
)
def test_impossible_cuts_are_refused_before_anything_is_written(
    model: Callable[[], Any], settings: dict[str, Any], error: type[Exception], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as refused:
        alps.shrink(model(), tmp_path / "out", **{"calibration": _windows(), **settings})
    assert complaint in str(refused.value) and str(refused.value).endswith(".")
    assert list(tmp_path.iterdir()) == []


def test_blocks_without_a_mixture_keep_their_channels(tmp_path: Path) -> None:
    model = mixture_model("qwen2_moe")
    sparse = {block.index for block, _ in find_mixture_blocks(model)}
    report = alps.shrink(model, tmp_path / "out", num_experts=6, calibration=_windows(6))
    assert len(sparse) == 2
    for block in report.blocks:
        units = {cut.unit: (len(cut.kept), cut.total) for cut in block.cuts}
        expected = {"expert": (6, 8)} if block.block in sparse else {"channel": (48, 48)}
        assert units == {"head": (4, 4), **expected}
    selection = report.experts
    assert selection is not None and selection.kept.keys() == sparse
    best = min(selection.candidates, key=lambda candidate: candidate.kl)
    summary = str(shrink_summary(report, tmp_path / "out"))
    assert f"Experts: the set of {selection.chosen} was kept." in summary
    assert f"{best.name} {best.kl:.4f} and {best.repetition:.0%}" in summary
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"The experts that stay were chosen by the selection '{selection.chosen}'." in card
    assert ShrinkReport.read(tmp_path / "out") == report
