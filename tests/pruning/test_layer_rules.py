"""Rules by name: what they keep stays dense to the bit, is told, and is not counted; what names nothing is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alps
from alps.cli.tables import prune_summary
from alps.core.errors import ConfigError
from alps.core.progress import NoProgress
from alps.data.loaded_model import load
from alps.evaluation.compare_config import method_settings
from alps.evaluation.inspect import inspect
from alps.models.blocks import Block, find_blocks
from alps.pruning.config import PruneConfig, load_prune_config
from alps.pruning.job import estimate_run, prune_checkpoint
from alps.pruning.layer_rules import Rules, matches
from alps.pruning.resume import BlockResult, DiskJournal
from alps.reporting.model_card import model_card
from alps.reporting.run_report import RunReport
from helpers.decoders import decoder

_KEPT = "model.layers.0.*"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def _unchanged(model: nn.Module, dense: nn.Module, name: str) -> bool:
    return torch.equal(_bits(model.get_parameter(name)), _bits(dense.get_parameter(name)))


@pytest.mark.parametrize(
    ("rule", "name", "expected"),
    [
        ("*.down_proj", "model.layers.3.mlp.down_proj", True),
        ("*.down_proj", "model.layers.3.mlp.down_proj.weight", True),
        ("*.down_proj", "model.layers.3.mlp.experts.down_proj.7", True),
        ("*.down_proj.7", "model.layers.3.mlp.experts.down_proj.7", True),
        ("*.down_proj.7", "model.layers.3.mlp.experts.down_proj.70", False),
        ("down_proj", "model.layers.3.mlp.down_proj", False),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        ("model.layers.1*", "model.layers.11.mlp.up_proj", True),
        ("model.layers.[01].*", "model.layers.1.mlp.up_proj", True),
        ("model.layers.[01].*", "model.layers.2.mlp.up_proj", False),
        ("*", "lm_head", True),
        ("LM_HEAD", "lm_head", False),
    ],
)
def test_a_rule_names_what_it_matches_and_all_inside(rule: str, name: str, expected: bool) -> None:
    assert matches(rule, name) is expected


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "alps"},
        {
            "method": "alps",
            "true_sequential": True,
            "dense_target": 0.4,
            "reconstruct_epochs": 2,
            "allocation": "sensitivity",
        },
        {"method": "wanda", "allocation": "owl"},
        {"method": "magnitude", "measure_error": False},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_kept_parts_keep_their_bits_and_are_not_counted(
    tiny_model: Callable[..., Any], ids: Tensor, settings: dict[str, Any]
) -> None:
    dense, model = tiny_model("llama"), tiny_model("llama")
    report = alps.prune(model, sparsity=0.6, calibration=ids, keep_dense=[_KEPT, "*.v_proj"], **settings)
    sites = [site for block in find_blocks(model) for site in block.sites]
    kept = {site.name for site in sites if site.name.startswith("model.layers.0.") or site.kind == "v_proj"}
    assert len(kept) == 9 and {record.name for record in report.layers} == {site.name for site in sites} - kept
    # All of block 0 is named, its norms too, which block matching would tune.
    for name, _ in dense.named_parameters():
        if name.startswith("model.layers.0.") or name.removesuffix(".weight") in kept:
            assert _unchanged(model, dense, name), name
    if "reconstruct_epochs" in settings:
        assert not _unchanged(model, dense, "model.layers.1.input_layernorm.weight")
    assert all(record.zeros == int((site.read() == 0).sum())
               for record in report.layers for site in sites if site.name == record.name)  # fmt: skip
    assert report.zeros == sum(round(0.6 * record.entries) for record in report.layers)
    assert report.entries == sum(site.entries for site in sites if site.name not in kept)

    rows = {row.name: row for row in report.dense}
    first = rows["model.layers.0.self_attn.v_proj.weight"]
    assert (first.rule, first.reason) == (_KEPT, f"kept dense by the rule '{_KEPT}'")
    assert rows["model.layers.1.self_attn.v_proj.weight"].rule == "*.v_proj"
    assert rows["lm_head.weight"].rule is None and rows["lm_head.weight"].reason == "embedding or output head"
    assert {row.name.removesuffix(".weight") for row in report.kept} == kept
    everything = sum(site.entries for site in sites)
    assert report.sparsity_with_kept == pytest.approx(report.zeros / everything) != report.sparsity


def test_what_is_pruned_besides_is_what_it_would_be(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    """Block 0 comes first: whether q is kept there changes nothing in k, which reads the same inputs."""
    models = [tiny_model("llama"), tiny_model("llama")]
    alps.prune(models[0], sparsity=0.6, calibration=ids)
    alps.prune(models[1], sparsity=0.6, calibration=ids, keep_dense="*.q_proj, lm_head")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert _unchanged(models[0], models[1], name)
    assert not _unchanged(models[0], models[1], name.replace("k_proj", "q_proj"))


@pytest.mark.parametrize("kind", ["mixtral", "llama4"])
def test_single_experts_can_be_kept(kind: str) -> None:
    ids = torch.randint(2, 64, (24, 16), generator=torch.Generator().manual_seed(5))
    dense, model = decoder(kind), decoder(kind)
    report = alps.prune(
        model,
        sparsity=0.6,
        calibration=ids,
        reconstruct_epochs=1,
        keep_dense=["*.experts.down_proj.2", "*.gate_up_proj"],
    )
    sites = {site.name: site for block in find_blocks(model) for site in block.sites}
    before = {site.name: site for block in find_blocks(dense) for site in block.sites}
    kept = [name for name in sites if name.endswith("down_proj.2") or ".gate_up_proj." in name]
    assert kept and not {record.name for record in report.layers} & set(kept)
    assert all(torch.equal(sites[name].read(), before[name].read()) for name in kept)
    for record in report.layers:
        assert int((sites[record.name].read() == 0).sum()) == record.zeros == round(0.6 * record.entries)
    rows = {row.name: row for row in report.kept}
    slices = [name for name in rows if name.endswith("experts.down_proj.2")]
    assert slices and all(rows[name].shape == sites[name].shape for name in slices)
    fused = [name for name in rows if name.endswith("experts.gate_up_proj")]
    assert fused and all(rows[name].rule == "*.gate_up_proj" for name in fused) and len(rows) == len(slices + fused)


def test_a_directory_tells_of_its_rules_and_is_inspected_by_them(
    stories: Path, english_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = load_prune_config(
        None,
        {"model": str(stories), "pattern": "2:4", "method": "wanda", "keep_dense": "lm_head, *.o_proj",
         "calibration": str(english_file), "samples": 4, "seqlen": 32},
    )  # fmt: skip
    assert settings.keep_dense == ["lm_head", "*.o_proj"]
    report = prune_checkpoint(settings, out, NoProgress())
    assert load_prune_config(out / "alps.yaml", {}) == settings and RunReport.read(out) == report
    before, after = load(str(stories)).model, load(str(out)).model
    kept = [name for name, _ in before.named_parameters() if "o_proj" in name]
    assert len(kept) == 5 and all(_unchanged(after, before, name) for name in kept)
    entries = sum(after.get_parameter(name).numel() for name in kept)
    share = f"{100 * report.zeros / (report.entries + entries):.2f} %"
    told = f"5 more with {entries:,} weights are kept dense by rules (*.o_proj); with them {share} are zero"
    assert told in model_card(report) and f"({100 * report.sparsity:.2f} %) in 30 linear layers" in model_card(report)
    assert told in str(prune_summary(report, out)) and report.sparsity == 0.5
    summary = json.loads((out / "report.json").read_text())["summary"]
    assert (summary["sparsity"], summary["sparsity_with_kept"]) == (0.5, report.sparsity_with_kept)

    found = inspect(str(out))
    assert [(check.pattern, check.violations) for check in found.checks] == [("2:4", 0)]
    assert found.checks[0].groups == report.entries // 4
    reasons = {row.name: row.reason for row in found.dense}
    assert {reasons[name] for name in kept} == {"kept dense by the rule '*.o_proj'"}


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        (["*.dwn_proj"], r"Rule '\*\.dwn_proj' names nothing in LlamaForCausalLM.* Did you mean '\*\.down_proj'"),
        (["down_proj"], r"Did you mean '\*\.down_proj'"),
        (["lm_head", "model.layer.0"], r"Rule 'model\.layer\.0' .* Did you mean 'model\.layers\.0'"),
        (["*"], r"Nothing is left to prune: every linear layer is kept dense by '\*'"),
        (["*.self_attn", "*.mlp"], r"kept dense by '\*\.self_attn', '\*\.mlp'"),
    ],
)
def test_rules_that_name_nothing_or_everything_are_refused(
    tiny_model: Callable[..., Any], ids: Tensor, rules: list[str], complaint: str
) -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=complaint):
        alps.prune(model, sparsity=0.6, calibration=ids, keep_dense=rules)
    assert all(_unchanged(model, tiny_model("llama"), name) for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_rules_may_name_what_is_dense_anyway(kind: str, ids: Tensor) -> None:
    model = decoder(kind)
    rules = Rules(("lm_head", "*.gate", "*.embed_tokens.weight", "*norm*"))
    blocks = find_blocks(model)
    ruled = rules.apply(model, blocks)
    assert [block.sites for block in ruled.blocks] == [block.sites for block in blocks] and not ruled.kept


def test_names_come_as_a_list_or_with_commas(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\nsparsity: 0.5\nkeep_dense:\n- lm_head\n- '*.o_proj'\n")
    assert load_prune_config(tmp_path / "run.yaml", {}).keep_dense == ["lm_head", "*.o_proj"]
    assert load_prune_config(tmp_path / "run.yaml", {"keep_dense": ",a , b"}).keep_dense == ["a", "b"]
    assert PruneConfig(model="m").rules() == Rules()
    assert method_settings("alps+keep_dense=*.o_proj+true_sequential") == {
        "method": "alps",
        "keep_dense": "*.o_proj",
        "true_sequential": True,
    }
    with pytest.raises(ConfigError, match="Setting 'keep_dense' in the command line is wrong"):
        load_prune_config(None, {"model": "m", **method_settings("alps+keep_dense")})


def _expected(name: str, entries: int, rules: dict[str, float], otherwise: float) -> int:
    shares = [share for rule, share in rules.items() if matches(rule, name)]
    return round((shares[-1] if shares else otherwise) * entries)


@pytest.mark.parametrize("budget", ["uniform", "sensitivity", "error", "owl"])
@pytest.mark.parametrize("method", ["alps", "wanda"])
def test_the_last_override_that_names_a_site_holds(
    tiny_model: Callable[..., Any], ids: Tensor, method: str, budget: Any
) -> None:
    model = tiny_model("llama")
    rules = {"*.down_proj": 0.6, "model.layers.0.*": 0.4, "model.layers.0.mlp.up_proj": 0.9, "*.k_proj": 0}
    report = alps.prune(model, sparsity=0.7, method=method, calibration=ids, overrides=rules, allocation=budget)
    zeros = {site.name: int((site.read() == 0).sum()) for block in find_blocks(model) for site in block.sites}
    ruled = [r for r in report.layers if any(matches(rule, r.name) for rule in rules)]
    free = [r for r in report.layers if r not in ruled]
    assert len(ruled) == 7 + 2 * 2 and len(free) == 10
    for record in ruled if budget != "uniform" else report.layers:
        assert zeros[record.name] == record.zeros == _expected(record.name, record.entries, rules, 0.7)
    # A budget spreads its total over the others.
    assert sum(record.zeros for record in free) == sum(round(0.7 * record.entries) for record in free)
    moved = any(record.zeros != round(0.7 * record.entries) for record in free)
    assert moved == (budget != "uniform")
    patterns = {record.name: record.pattern for record in report.layers}
    assert patterns["model.layers.0.mlp.down_proj"] == "40%" and patterns["model.layers.1.mlp.down_proj"] == "60%"
    assert patterns["model.layers.0.mlp.up_proj"] == "90%" and patterns["model.layers.0.self_attn.k_proj"] == "0%"
    assert report.pattern == "70%" and list(report.overrides) == list(rules)


def test_overrides_from_a_file_reach_weights_report_card_and_inspection(
    stories: Path, english_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model: {stories}\nsparsity: 0.6\nmethod: wanda\ncalibration: {english_file}\nsamples: 4\nseqlen: 32\n"
        "keep_dense: ['*.o_proj']\noverrides:\n  '*.mlp': 2:4\n  '*.v_proj': 1:4\n  model.layers.1.*: 0.25\n"
    )
    settings, out = load_prune_config(tmp_path / "run.yaml", {}), tmp_path / "out"
    report = prune_checkpoint(settings, out, NoProgress())
    assert load_prune_config(out / "alps.yaml", {}) == settings
    expected = {"gate_proj": "2:4", "up_proj": "2:4", "down_proj": "2:4", "v_proj": "1:4"}
    for record in report.layers:
        assert record.pattern == ("25%" if record.block == 1 else expected.get(record.kind, "60%")), record.name
    assert not any("o_proj" in record.name for record in report.layers)
    words = "60% but 2:4 for *.mlp, 1:4 for *.v_proj, 25% for model.layers.1.*"
    assert words in model_card(report) and f"wanda {words}: " in str(prune_summary(report, out))
    checks = {check.pattern: check for check in inspect(str(out)).checks}
    assert {name: check.violations for name, check in checks.items()} == {"2:4": 0, "1:4": 0}
    for name, check in checks.items():
        assert check.groups == sum(record.entries for record in report.layers if record.pattern == name) // 4
    # The same from Python, with patterns as objects.
    loaded = load(str(stories))
    overrides: dict[str, Any] = {"*.mlp": alps.SemiStructured(2, 4), "*.v_proj": "1:4", "model.layers.1.*": 0.25}
    again = alps.prune(
        loaded.model,
        sparsity=0.6,
        method="wanda",
        calibration=english_file,
        tokenizer=loaded.tokenizer,
        samples=4,
        seqlen=32,
        keep_dense="*.o_proj",
        overrides=overrides,
    )
    assert [(r.name, r.zeros, r.error) for r in again.layers] == [(r.name, r.zeros, r.error) for r in report.layers]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"overrides": {"*.dwn_proj": 0.5}}, r"Rule '\*\.dwn_proj' names nothing .* Did you mean '\*\.down_proj'"),
        ({"overrides": {"lm_head": 0.5}}, "Override 'lm_head' applies to no linear layer"),
        ({"overrides": {"*.q_proj": 0.5, "*.self_attn": 0.6}}, r"Override '\*\.q_proj' applies .* later override"),
        ({"overrides": {"*.q_proj": 0.5}, "keep_dense": ["*.q_proj"]}, r"Override '\*\.q_proj' applies .* kept dense"),
        ({"overrides": {"*.q_proj": 1.5}}, r"Override '\*\.q_proj': Sparsity 1\.5 is outside"),
        ({"overrides": {"*.q_proj": "two"}}, r"Override '\*\.q_proj': Pattern 'two' is not understood"),
        ({"overrides": {"*.down_proj": "4:8"}}, r"Pattern 4:8 does not divide .* model\.layers\.0\.mlp\.down_proj"),
        ({"overrides": {"*": 0.5}, "allocation": "sensitivity"}, "Allocation 'sensitivity' has no layers to allocate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_overrides_that_cannot_be_are_refused(
    tiny_model: Callable[..., Any], ids: Tensor, settings: dict[str, Any], complaint: str
) -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=complaint):
        alps.prune(model, sparsity=0.6, calibration=ids, **settings)
    assert all(_unchanged(model, tiny_model("llama"), name) for name, _ in model.named_parameters())


@pytest.mark.parametrize("line", ["overrides: [a]", "overrides: {a: true}", "overrides: {a: [1]}", "overrides: {1: 2}"])
def test_overrides_of_the_wrong_kind_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "run.yaml").write_text(f"model: m\nsparsity: 0.5\n{line}\n")
    with pytest.raises(ConfigError, match="Setting 'overrides"):
        load_prune_config(tmp_path / "run.yaml", {})


def test_a_forecast_knows_the_rules(stories: Path, english_file: Path, tmp_path: Path) -> None:
    settings = PruneConfig(
        model=str(stories), sparsity=0.6, calibration=str(english_file), samples=4, seqlen=32,
        keep_dense=["model.layers.[02].*", "*.o_proj"], overrides={"*.down_proj": "2:4"},
    )  # fmt: skip
    found = estimate_run(settings, tmp_path / "out")
    assert (found.blocks, found.sites) == (5, 3 * 6) and {kind.name for kind in found.kinds} >= {"down_proj"}
    assert dict(found.dense)["model.layers.4.self_attn.o_proj.weight"] == "kept dense by the rule '*.o_proj'"


def test_a_run_with_rules_goes_on_after_its_finished_blocks(
    stories: Path, english_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PruneConfig(
        model=str(stories), sparsity=0.6, calibration=str(english_file), samples=4, seqlen=32, allocation="sensitivity",
        method="wanda", keep_dense=["model.layers.1.*"], overrides={"*.down_proj": 0.3}, keep_zeros=True,
    )  # fmt: skip
    whole = prune_checkpoint(settings, tmp_path / "whole", NoProgress())
    save = DiskJournal.save

    def stop(self: DiskJournal, block: Block, result: BlockResult) -> None:
        save(self, block, result)
        if block.index == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(DiskJournal, "save", stop)
    with pytest.raises(KeyboardInterrupt, match="3 finished blocks are kept"):
        prune_checkpoint(settings, tmp_path / "parts", NoProgress())
    monkeypatch.setattr(DiskJournal, "save", save)
    parts = prune_checkpoint(settings, tmp_path / "parts", NoProgress(), resume=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    assert [(r.name, r.zeros, r.pattern) for r in parts.layers] == [(r.name, r.zeros, r.pattern) for r in whole.layers]
    assert parts.dense == whole.dense
