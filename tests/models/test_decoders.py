"""Tests of every architecture of the table.

The blocks run one by one give the model's outputs, and all linear maps are pruned, those of every expert included.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import alps
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.input_statistics import observe
from alps.calibration.moe_statistics import LayerInput
from alps.core.statistics import Needs
from alps.evaluation.inspect import inspect
from alps.models.blocks import find_blocks
from alps.models.dense_parameters import dense_parameters
from alps.reporting.run_report import RunReport
from helpers.architectures import examine
from helpers.decoders import DENSE, HYBRID, MOE, RECENT, check_walk, decoder
from helpers.vision import VISION

# GPT-BigCode of transformers 5.0 scripts a function, which torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
_CPU = torch.device("cpu")
_QUICK = ("mixtral", "gpt_oss")


@pytest.mark.parametrize("kind", [*DENSE, *MOE, *HYBRID, *RECENT])
def test_walking_the_blocks_gives_the_logits_of_the_model(kind: str, ids: Tensor) -> None:
    model = decoder(kind)
    check_walk(model, find_blocks(model), ids)


@pytest.mark.parametrize("kind", DENSE)
def test_sums_do_not_depend_on_the_batches(kind: str) -> None:
    """To the bit, so that it is the same how many processes share the windows; OPT lays them in one row before fc1."""
    model = decoder(kind)
    ids = torch.randint(2, 60, (5, 24), generator=torch.Generator().manual_seed(5))
    result: list[list[LayerInput]] = []
    for size in (5, 2):
        blocks = find_blocks(model)
        inputs = capture_block_inputs(model, blocks, ids, size)
        result.append([])
        for block in blocks:
            result[-1] += observe(block, inputs, Needs.GRAM, _CPU).shared
            inputs.advance(block.index, block.module, _CPU)
    assert sum(len(item.sites) for item in result[0]) == sum(len(block.sites) for block in blocks)
    for item, other in zip(*result, strict=True):
        assert item.name == other.name and item.tokens == other.tokens == ids.numel(), item.name
        assert torch.equal(item.stats.gram(), other.stats.gram()) and bool(item.stats.gram().any()), item.name


@pytest.mark.parametrize("kind", [*DENSE, *MOE])
def test_all_linear_maps_are_pruned_exactly_and_the_rest_is_told(kind: str, ids: Tensor) -> None:
    model = decoder(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = alps.prune(model, sparsity=0.6, calibration=ids)
    maps = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    inside = tuple(f"{block.name}." for block in find_blocks(model))
    pruned = {site.name for site in report.layers}
    told = {row.name: row.reason for row in report.dense}
    counted = 0
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in pruned and name.endswith(".weight"):
            assert int((parameter == 0).sum()) == round(0.6 * parameter.numel()), name
            counted += 1
        elif parameter.ndim == 3:
            # One matrix for every expert, each pruned for itself.
            for expert, matrix in enumerate(parameter):
                assert f"{name.removesuffix('.weight')}.{expert}" in pruned
                assert int((matrix == 0).sum()) == round(0.6 * matrix.numel()), name
                counted += 1
        else:
            assert torch.equal(parameter, before[name]), name
            if name.startswith(inside) and parameter.ndim > 1:
                assert told[name] == "router of a mixture of experts" or (owner not in maps and "bias" in name), name
    assert counted == len(report.layers)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert bool(torch.isfinite(logits).all())
    assert report.mean_error is not None and 0 < report.mean_error < 0.2
    assert not math.isclose(float(logits.abs().max()), 0)


@pytest.mark.parametrize(
    "kind", [*_QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MOE if kind not in _QUICK)]
)
def test_the_best_preset_runs_on_mixtures_of_experts(kind: str, ids: Tensor) -> None:
    model = decoder(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = alps.prune(
        model,
        sparsity=0.6,
        calibration=ids,
        true_sequential=True,
        dense_target=0.4,
        reconstruct_epochs=1,
        allocation="sensitivity",
    )
    assert report.zeros == sum(round(0.6 * site.entries) for site in report.layers)
    zeros = {site.name: site.zeros for site in report.layers}
    sites = [site for block in find_blocks(model) for site in block.sites]
    assert {site.name: int((site.read() == 0).sum()) for site in sites} == zeros
    routers = [name for name in before if "router" in name or ".gate." in name]
    assert routers and all(torch.equal(model.get_parameter(name), before[name]) for name in routers)
    assert len(report.notes) == 1 and "experts were pruned without the dense target" in report.notes[0]


@pytest.mark.parametrize("kind", MOE)
def test_mixtures_of_experts_come_back_from_a_directory_to_the_bit(kind: str, ids: Tensor, tmp_path: Path) -> None:
    """On disk some keep every expert apart; transformers fuses them again."""
    model, out = decoder(kind), tmp_path / "pruned"
    report = alps.prune(model, pattern="2:4", method="wanda", calibration=ids, out=out)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert dict(again.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    findings = inspect(str(out))
    assert {site.name: site.zeros for site in findings.layers} == {site.name: site.zeros for site in report.layers}
    assert [(check.pattern, check.violations) for check in findings.checks] == [("2:4", 0)]
    assert not any(row.reason == "no zeros in it" for row in findings.dense)
    read = RunReport.read(out)
    assert read is not None and [(s.tokens, s.pooled_tokens) for s in read.layers] == [
        (s.tokens, s.pooled_tokens) for s in report.layers
    ]


@pytest.mark.parametrize("kind", MOE)
def test_routers_stay_dense(kind: str) -> None:
    model = decoder(kind)
    rows = {row.name: row.reason for row in dense_parameters(model, set())}
    routers = [name for name, reason in rows.items() if reason == "router of a mixture of experts"]
    assert routers and all("gate" in name or "router" in name for name in routers), rows
    assert not any(name.endswith(("gate_proj.weight", "gate_up_proj")) for name in routers)


def test_the_page_of_architectures_has_them_all() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "reference" / "models.md").read_text()
    rows = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in page.splitlines() if line[:2] == "| "]
    result = {row[0]: row for row in rows if row[0] != "architecture"}
    assert list(result) == [*DENSE, *MOE, *HYBRID, *RECENT, *VISION]
    assert all(float(row[4]) < 1e-5 for row in result.values())
    for kind in ("llama", "gpt2", "opt-projected", "deepseek_v3", "jamba", "gemma4", "llava", "smolvlm"):
        assert result[kind][:4] == examine(kind).reproducible
