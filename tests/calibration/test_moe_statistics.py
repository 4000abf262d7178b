"""Input statistics of mixtures of experts, against references that route the tokens themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import alps
from alps.calibration.block_capture import capture_block_inputs
from alps.calibration.input_statistics import observe
from alps.calibration.moe_statistics import MIN_TOKENS_PER_INPUT, LayerInput
from alps.cli.main import app
from alps.cli.tables import prune_summary
from alps.core.progress import NoProgress
from alps.core.settings import ARGUMENTS, make_config
from alps.core.statistics import InputStats, Needs
from alps.data.loaded_model import LoadedModel
from alps.finetuning.distill_config import DistillConfig
from alps.finetuning.distillation import distill_model
from alps.models.blocks import find_blocks
from alps.models.sites import Site
from alps.pruning.sparsity_allocation import allocate_sparsity
from alps.solvers import get_method
from alps.solvers.base import Method
from alps.solvers.patterns import Unstructured, parse_pattern
from helpers.decoders import MOE, decoder
from helpers.runs import make_context, make_recipe

_CPU = torch.device("cpu")
# Kinds whose experts do not take any routing from outside, and those stored as (experts, in, out).
_OWN_ROUTING, _INPUTS_FIRST = ("jetmoe", "llama4"), ("gpt_oss", "llama4")
_CHOSEN = {"llama4": 1}


@pytest.fixture
def many() -> Tensor:
    """24 windows of 16 tokens: of four experts some get enough, and some do not."""
    return torch.randint(2, 64, (24, 16), generator=torch.Generator().manual_seed(5))


def _slices(model: nn.Module) -> dict[str, Site]:
    return {site.name: site for block in find_blocks(model) for site in block.sites if site.expert is not None}


def _seen(model: nn.Module, ids: Tensor, batch_size: int = 7, needs: Needs = Needs.GRAM) -> Iterator[LayerInput]:
    """The inputs of all experts in the dense model."""
    blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, ids, batch_size)
    for block in blocks:
        yield from (
            source for source in observe(block, inputs, needs, _CPU).shared if source.sites[0].expert is not None
        )
        inputs.advance(block.index, block.module, _CPU)


def _routed(model: nn.Module, ids: Tensor, kind: str, all_experts: bool = False) -> dict[str, Tensor]:
    """Inputs of every slice in float64: tokens selected by the expert indices of the call.

    With `all_experts` all tokens go to every expert.
    """
    received: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: Any, args: tuple[Tensor, ...]) -> None:
            hidden, index = args[0].detach().double(), args[1]
            for expert in range(module.num_experts):
                first = module.gate_up_proj[expert].detach().double()
                x = hidden if all_experts else hidden[(index == expert).any(dim=-1)]
                inner = x @ first if kind in _INPUTS_FIRST else x @ first.T
                if module.has_bias:
                    inner = inner + module.gate_up_proj_bias[expert].detach().double()
                received[f"{name}.gate_up_proj.{expert}"] = x
                received[f"{name}.down_proj.{expert}"] = module._apply_gate(inner)

        return keep

    named = [(name, module) for name, module in model.named_modules() if hasattr(module, "gate_up_proj")]
    handles = [
        module.register_forward_pre_hook(hook(name)) for name, module in named if not isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return received


def _sums(x: Tensor, pool: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, sum of squares and Gram of an expert's inputs by the rule, naively in float64."""
    missing = max(MIN_TOKENS_PER_INPUT * x.shape[1] - len(x), 0)
    share = missing / max(len(pool), 1)
    return (
        x.sum(dim=0) + share * pool.sum(dim=0),
        x.square().sum(dim=0) + share * pool.square().sum(dim=0),
        x.T @ x + share * pool.T @ pool,
    )


def _assert_sums(stats: InputStats, expected: tuple[Tensor, Tensor, Tensor]) -> None:
    for got, wanted in zip((stats.total, stats.square, stats.gram()), expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("batch_size", [3, 16])
@pytest.mark.parametrize("kind", [kind for kind in MOE if kind not in _OWN_ROUTING])
def test_the_sums_are_those_of_the_tokens_routed_there_filled_up_by_the_rule(
    kind: str, many: Tensor, batch_size: int
) -> None:
    model, many = decoder(kind), many[:16]
    routed, pools = _routed(model, many, kind), _routed(model, many, kind, all_experts=True)
    sites = _slices(model)
    if kind == "granitemoe" and not routed:
        pytest.skip("this transformers keeps these experts as it does JetMoE's")
    assert routed.keys() == sites.keys() and len(sites) > 0
    undersampled = 0
    for source in _seen(model, many, batch_size):
        (site,) = source.sites
        x, pool = routed[site.name], pools[site.name]
        assert source.tokens == len(x) and len(pool) == many.numel()
        assert source.stats.tokens == max(len(x), MIN_TOKENS_PER_INPUT * site.shape[1])
        _assert_sums(source.stats, _sums(x, pool))
        undersampled += source.pooled_tokens > 0
        sites.pop(site.name)
    assert not sites and undersampled > 0


@pytest.mark.parametrize("kind", MOE)
@pytest.mark.parametrize("batch_size", [1, 24])
def test_every_token_is_counted_with_every_expert_it_was_sent_to(kind: str, many: Tensor, batch_size: int) -> None:
    tokens: dict[str, int] = {}
    for source in _seen(decoder(kind), many, batch_size, Needs.MOMENTS):
        fused = source.sites[0].parameter_name
        tokens[fused] = tokens.get(fused, 0) + source.tokens
    assert len(tokens) >= 4 and set(tokens.values()) == {_CHOSEN.get(kind, 2) * many.numel()}


def test_llama_4_counts_only_tokens_that_were_sent_there(many: Tensor) -> None:
    model = decoder("llama4")
    layer = model.model.layers[1].feed_forward
    entered: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _module, args: entered.append(args[0].double().flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=many)
    handle.remove()
    logits = entered[0] @ layer.router.weight.detach().double().T
    selected = logits.argmax(dim=-1)
    shared = {source.sites[0].name: source for source in _seen(model, many)}
    firsts, seconds = [], []
    for expert in range(4):
        x = (entered[0] * logits[:, expert : expert + 1].sigmoid())[selected == expert]
        gate, up = (x @ layer.experts.gate_up_proj[expert].detach().double()).chunk(2, dim=-1)
        firsts.append(x)
        seconds.append(up * F.silu(gate))
    for name, inputs in (("gate_up_proj", firsts), ("down_proj", seconds)):
        for expert, x in enumerate(inputs):
            source = shared[f"model.layers.1.feed_forward.experts.{name}.{expert}"]
            assert source.tokens == len(x)
            _assert_sums(source.stats, _sums(x, torch.cat(inputs)))


def test_an_expert_without_a_token_gets_the_pool_alone(many: Tensor) -> None:
    model = decoder("gpt_oss")
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[3] = -1e4
    pools = _routed(model, many, "gpt_oss", all_experts=True)
    empty = [source for source in _seen(model, many) if source.tokens == 0]
    prefix = "model.layers.1.mlp.experts"
    assert [source.sites[0].name for source in empty] == [f"{prefix}.gate_up_proj.3", f"{prefix}.down_proj.3"]
    for source in empty:
        pool = pools[source.sites[0].name]
        assert source.stats.tokens == source.pooled_tokens == MIN_TOKENS_PER_INPUT * pool.shape[1]
        _assert_sums(source.stats, _sums(pool[:0], pool))
    report = alps.prune(model, sparsity=0.6, calibration=many, true_sequential=True)
    records = {site.name: site for site in report.layers}
    assert records[f"{prefix}.down_proj.3"].tokens == 0 and all(
        s.zeros == round(0.6 * s.entries) for s in report.layers
    )


def _mixtral_inputs(model: Any, ids: Tensor, layer: int) -> dict[str, Tensor]:
    """Inputs of the slices of one Mixtral layer, by the softmax and top 2 of its gate's own weight; float32."""
    mlp, entered = model.model.layers[layer].mlp, []
    handle = mlp.register_forward_pre_hook(lambda _module, args: entered.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    hidden = entered[0].detach()
    selected = (hidden @ mlp.gate.weight.detach().T).topk(2, dim=-1).indices
    inputs, prefix = {}, f"model.layers.{layer}.mlp.experts"
    for expert in range(4):
        W = mlp.experts.gate_up_proj[expert].detach()
        for name, x in (("routed", hidden[(selected == expert).any(dim=-1)]), ("pool", hidden)):
            gate, up = (x @ W.T).chunk(2, dim=-1)
            inputs[f"{prefix}.gate_up_proj.{expert}/{name}"] = x
            inputs[f"{prefix}.down_proj.{expert}/{name}"] = F.silu(gate) * up
    return inputs


def _reference_stats(inputs: dict[str, Tensor], name: str) -> InputStats:
    x = inputs[f"{name}/routed"]
    total, square, gram = _sums(x.double(), inputs[f"{name}/pool"].double())
    return InputStats(max(len(x), MIN_TOKENS_PER_INPUT * x.shape[1]), total.float(), square.float(), gram.float())


@pytest.mark.parametrize("target", [0.0, 0.5])
@pytest.mark.parametrize("method", ["alps", "sparsegpt", "wanda"])
def test_mixtral_is_pruned_as_each_expert_alone_on_the_tokens_routed_to_it(
    many: Tensor, method: str, target: float
) -> None:
    """With a dense target, too: it holds for the maps of all tokens only."""
    pruned, prefix = decoder("mixtral"), decoder("mixtral")
    report = alps.prune(pruned, sparsity=0.6, method=method, calibration=many, dense_target=target)
    solver: Method = get_method(method)
    records = {site.name: site for site in report.layers}
    answers = {site.name: site.read() for block in find_blocks(pruned) for site in block.sites}
    for block in find_blocks(prefix):
        inputs = _mixtral_inputs(prefix, many, block.index)
        for site in block.sites:
            if site.expert is not None:
                stats = _reference_stats(inputs, site.name)
                W = site.read().clone()
                expected = solver.solve(W, solver.prepare(stats), Unstructured(0.6)).weight
                same = (expected == 0) == (answers[site.name] == 0)
                assert float(same.float().mean()) > 0.99, site.name
                # ALPS moves a few entries with the rounding of the sums.
                distance = stats.energy(expected - answers[site.name]) / stats.energy(W)
                assert distance < (1e-2 if method == "alps" else 1e-5), site.name
                assert records[site.name].tokens == len(inputs[f"{site.name}/routed"])
                wanted = stats.energy(answers[site.name] - W) / stats.energy(W)
                assert records[site.name].error == pytest.approx(wanted, rel=1e-3)
        for site in block.sites:
            site.write(answers[site.name])
    assert (report.notes != []) == (target > 0)


def test_sequential_order_prunes_second_maps_on_what_pruned_first_ones_make(many: Tensor) -> None:
    pruned, prefix = decoder("mixtral"), decoder("mixtral")
    report = alps.prune(pruned, sparsity=0.6, method="magnitude", calibration=many, true_sequential=True)
    records = [site for site in report.layers if site.block == 0 and site.expert is not None]
    assert [site.kind for site in records] == ["experts.gate_up_proj"] * 4 + ["experts.down_proj"] * 4
    answers, dense = _slices(pruned), _slices(prefix)
    before = _mixtral_inputs(prefix, many, 0)
    for block in find_blocks(pruned)[:1]:
        twins = {site.name: site for site in find_blocks(prefix)[0].sites}
        for site in block.sites:
            if site.kind != "experts.down_proj":
                twins[site.name].write(site.read())
    after = _mixtral_inputs(prefix, many, 0)
    for record in records[4:]:
        W, W_hat = dense[record.name].read(), answers[record.name].read()
        errors = []
        for inputs in (before, after):
            stats = _reference_stats(inputs, record.name)
            errors.append(stats.energy(W_hat - W) / stats.energy(W))
        assert record.error == pytest.approx(errors[1], rel=1e-3) != pytest.approx(errors[0], rel=1e-2)


@pytest.mark.parametrize("order", ["block", "sequential"])
def test_experts_that_the_first_batch_misses_are_pruned_with_the_others(
    many: Tensor, order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alps.pruning.first_inputs.batch_tokens", lambda *_: 1)
    model = decoder("qwen3_moe")
    # The first window is one token all along: most experts see none of it.
    many[0] = 7
    first = {
        source.sites[0].name
        for source in _seen(decoder("qwen3_moe"), many[:1], needs=Needs.MOMENTS)
        if not source.tokens
    }
    report = alps.prune(model, sparsity=0.5, method="wanda", calibration=many, true_sequential=order == "sequential")
    records = {site.name: site for site in report.layers}
    assert first and all(records[name].tokens for name in first) and len(report.layers) == 48
    for block in range(4):
        for part in ("gate_up_proj", "down_proj"):
            tokens = [s.tokens or 0 for s in report.layers if s.block == block and s.kind == f"experts.{part}"]
            assert len(tokens) == 4 and sum(tokens) == 2 * many.numel()


@pytest.mark.parametrize("kind", MOE)
def test_magnitude_needs_no_tokens(kind: str) -> None:
    model, dense = decoder(kind), _slices(decoder(kind))
    report = alps.prune(model, sparsity=0.5, method="magnitude", measure_error=False)
    assert all(site.tokens is None and site.pooled_tokens == 0 for site in report.layers)
    for name, site in _slices(model).items():
        before = dense[name].read()
        cut = before.abs().flatten().sort().values[site.entries // 2 - 1]
        assert torch.equal(site.read(), torch.where(before.abs() > cut, before, 0.0)), name


@pytest.mark.parametrize("kind", ["mixtral", *_INPUTS_FIRST, "jetmoe"])
def test_groups_of_a_pattern_run_along_the_inputs_of_every_slice(kind: str, ids: Tensor) -> None:
    model = decoder(kind)
    alps.prune(model, pattern="2:4", calibration=ids)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            weight = parameter.transpose(1, 2) if kind in _INPUTS_FIRST else parameter
            kept = (weight.reshape(-1, 4) != 0).sum(dim=1)
            assert int(kept.min()) == int(kept.max()) == 2, name


@pytest.mark.parametrize("kind", ["mixtral", *_OWN_ROUTING, "gpt_oss"])
def test_matching_tunes_experts_and_leaves_zeros_and_routers_alone(kind: str, many: Tensor) -> None:
    settings: dict[str, Any] = {"calibration": many, "method": "wanda"}
    before, plain, matched = decoder(kind), decoder(kind), decoder(kind)
    alps.prune(plain, sparsity=0.5, **settings)
    report = alps.prune(matched, sparsity=0.5, reconstruct_epochs=1, **settings)
    assert any(row.after < row.before for row in report.reconstructions)
    first = find_blocks(plain)[0].name
    tuned = 0
    for name, parameter in matched.named_parameters():
        if "router" in name or ".gate." in name:
            assert torch.equal(parameter, before.get_parameter(name)), name
        elif parameter.ndim == 3 and name.startswith(first):
            # The first block is pruned alike, before anything is tuned.
            assert torch.equal(parameter == 0, plain.get_parameter(name) == 0), name
            tuned += not torch.equal(parameter, plain.get_parameter(name))
    assert kind == "llama4" or tuned == sum(p.ndim == 3 for p in find_blocks(plain)[0].module.parameters())
    assert all(int((site.read() == 0).sum()) == site.entries // 2 for site in _slices(matched).values())


def test_budgets_read_experts_and_leave_them_as_they_were(many: Tensor) -> None:
    model, before = decoder("mixtral"), decoder("mixtral").state_dict()
    patterns = allocate_sparsity(
        model,
        find_blocks(model),
        many,
        make_recipe("wanda", Unstructured(0.6), allocation="sensitivity"),
        make_context(),
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    sizes = {site.name: site.entries for block in find_blocks(model) for site in block.sites}
    assert patterns.keys() == sizes.keys()
    zeros = {name: pattern.pruned_count(sizes[name]) for name, pattern in patterns.items()}
    assert sum(zeros.values()) == sum(round(0.6 * size) for size in sizes.values())
    slices = [zeros[name] / sizes[name] for name in _slices(model)]
    assert max(slices) - min(slices) > 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["qwen3_moe", *_INPUTS_FIRST])
def test_half_precision_experts_get_exact_zeros(kind: str, dtype: torch.dtype, many: Tensor) -> None:
    model, dense = decoder(kind, dtype), _slices(decoder(kind, dtype))
    report = alps.prune(model, sparsity=0.6, calibration=many, true_sequential=True)
    for name, site in _slices(model).items():
        assert site.dtype == dtype and int((site.read() == 0).sum()) == round(0.6 * site.entries), name
        assert bool(site.read().isfinite().all()) and not torch.equal(site.read(), dense[name].read())
    assert report.mean_error is not None and 0 < report.mean_error < 0.2
    assert any(site.pooled_tokens for site in report.layers)


def test_patterns_that_do_not_divide_a_slice_name_it(ids: Tensor) -> None:
    with pytest.raises(alps.core.errors.ConfigError, match=r"experts\.down_proj\.0 \(48\)"):
        alps.prune(decoder("mixtral"), pattern=parse_pattern("9:32"), calibration=ids)


def test_the_summary_warns_of_experts_with_too_few_tokens(many: Tensor, tmp_path: Path) -> None:
    model = decoder("gpt_oss")
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[3] = -1e4
    report = alps.prune(model, sparsity=0.6, method="wanda", calibration=many, dense_target=0.4)
    lines = prune_summary(report, tmp_path).plain.splitlines()
    (warning,) = [line for line in lines if line.startswith("WARNING")]
    undersampled = {
        (s.block, s.expert)
        for s in report.layers
        if s.tokens is not None and s.tokens < MIN_TOKENS_PER_INPUT * s.shape[1]
    }
    undersampled = {pair for pair in undersampled if pair[1] is not None}
    assert 1 < len(undersampled) < 16
    assert warning.startswith(
        f"WARNING: {len(undersampled)} of 16 experts received too few calibration tokens, the worst 0 "
    )
    assert "0 for 32 inputs (model.layers.1.mlp.experts.gate_up_proj.3)" in warning
    assert any(line.startswith("Note: the experts were pruned without the dense target") for line in lines)
    noted = {
        site.name for site in report.layers if any("were routed to this expert" in note for note in site.solve["notes"])
    }
    assert noted == {site.name for site in report.layers if site.pooled_tokens}

    sufficient = alps.prune(decoder("gpt_oss"), sparsity=0.6, method="wanda", calibration=many.repeat(20, 1))
    assert (
        not any(site.pooled_tokens for site in sufficient.layers)
        and "WARNING" not in prune_summary(sufficient, tmp_path).plain
    )


def test_recovery_trains_experts_and_leaves_zeros_and_routers_alone(word_tokenizer: Any, english_file: Path) -> None:
    dense, model = decoder("gpt_oss"), decoder("gpt_oss")
    alps.prune(model, sparsity=0.5, method="magnitude", measure_error=False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    given = {"calibration": str(english_file), "samples": 16, "seqlen": 32, "batch_tokens": 128, "lr": 2e-3, "steps": 4}
    teacher, student = LoadedModel("dense", dense, word_tokenizer), LoadedModel("pruned", model, word_tokenizer)
    record = distill_model(teacher, student, make_config(DistillConfig, given, ARGUMENTS), NoProgress())
    assert record.kl_after < record.kl_before
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            assert torch.equal(parameter == 0, before[name] == 0) and not torch.equal(parameter, before[name]), name
        elif "router" in name:
            assert torch.equal(parameter, before[name]), name


def test_the_commands_prune_and_inspect_a_mixture(word_tokenizer: Any, english_file: Path, tmp_path: Path) -> None:
    decoder("mixtral").save_pretrained(tmp_path / "dense")
    word_tokenizer.save_pretrained(tmp_path / "dense")
    sizes = ["--samples", "8", "--seqlen", "16", "--calibration", str(english_file)]
    out = str(tmp_path / "pruned")
    done = CliRunner().invoke(
        app, ["prune", str(tmp_path / "dense"), out, "--sparsity", "0.5", *sizes, "--preset", "best"]
    )
    assert done.exit_code == 0 and "WARNING: 16 of 16 experts received too few" in done.output, done.output
    shown = CliRunner().invoke(app, ["inspect", out], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "experts.gate_up" in shown.stdout
    assert "Total sparsity of the linear layers: 50.0000 %" in shown.stdout
