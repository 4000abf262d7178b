"""Recovery on a real small model: it helps, zeros and frozen weights keep their bits, and it ends when it should."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import alps
from alps.core.errors import ConfigError, NotFinite
from alps.core.progress import NoProgress
from alps.core.settings import ARGUMENTS, make_config
from alps.data.loaded_model import LoadedModel, load
from alps.data.text_sources import load_text
from alps.evaluation.inspect import inspect
from alps.finetuning import training_loop as distillation
from alps.finetuning.distill_config import DistillConfig
from alps.finetuning.distillation import distill_directory, distill_model
from alps.finetuning.training_loop import rate_share
from alps.models.blocks import find_blocks
from alps.reporting.model_card import model_card
from alps.reporting.run_report import RunReport
from alps.solvers.patterns import parse_pattern
from helpers.model_comparison import mean_kl, same, weights

Settings = Callable[..., DistillConfig]


@pytest.fixture(scope="module")
def dense(stories: Path) -> LoadedModel:
    return load(str(stories))


@pytest.fixture(scope="module")
def pruned_once(dense: LoadedModel) -> LoadedModel:
    model = copy.deepcopy(dense.model)
    alps.prune(model, sparsity=0.6, method="magnitude", measure_error=False)
    return LoadedModel("pruned", model, dense.tokenizer)


@pytest.fixture
def pruned(pruned_once: LoadedModel) -> LoadedModel:
    return LoadedModel("pruned", copy.deepcopy(pruned_once.model), pruned_once.tokenizer)


@pytest.fixture
def settings(english_file: Path) -> Settings:
    def build(**changes: Any) -> DistillConfig:
        given = {"calibration": str(english_file), "samples": 40, "seqlen": 64, "batch_tokens": 256, "lr": 2e-3}
        return make_config(DistillConfig, {**given, **changes}, ARGUMENTS)

    return build


def test_the_divergence_falls_and_nothing_frozen_or_pruned_moves(
    dense: LoadedModel, pruned: LoadedModel, settings: Settings
) -> None:
    before, teacher = weights(pruned.model), weights(dense.model)
    run = settings(steps=40)
    windows = pruned.calibration(load_text(run.calibration, "calibration"), 40, 64, 0)
    assert (start := mean_kl(dense.model, pruned.model, windows.ids[-5:])) > 0.5
    report = distill_model(dense, pruned, run, NoProgress())
    after = weights(pruned.model)
    assert same(weights(dense.model), teacher)
    assert report.kl_after < 0.7 * report.kl_before
    assert report.kl_before == pytest.approx(start, rel=1e-5)
    assert report.kl_after == pytest.approx(mean_kl(dense.model, pruned.model, windows.ids[-5:]), rel=1e-5)
    assert report.calibration.sha256 == windows.sha256 and report.held_back_windows == 5
    assert (report.steps, report.tokens, report.stopped) == (40, 40 * 256, "budget spent")
    assert [check.step for check in report.checks] == list(range(0, 41, 4))
    sites = {site.parameter_name for block in find_blocks(pruned.model) for site in block.sites}
    for name, weight in after.items():
        if name in sites:
            zero = before[name] == 0
            assert torch.equal(weight == 0, zero) and int(zero.sum()) == round(0.6 * weight.numel())
            assert not bool(torch.signbit(weight[zero]).any())
            assert not torch.equal(weight, before[name])
        elif weight.ndim == 1:
            assert not torch.equal(weight, before[name]), name
        else:
            assert torch.equal(weight, before[name]), name
    assert report.zeros == sum(int((after[name] == 0).sum()) for name in sites)
    kept = sum(int((after[name] != 0).sum()) for name in sites) + sum(w.numel() for w in after.values() if w.ndim == 1)
    assert report.trained_entries == kept
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pruned.model.parameters())


def test_held_back_windows_are_never_trained_on_and_all_others_are(
    dense: LoadedModel, pruned: LoadedModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, ...]] = []
    real = distillation.Distillation._step

    def spy(self: distillation.Distillation, batch: Tensor) -> float:
        trained.extend(map(tuple, batch.tolist()))
        return real(self, batch)

    monkeypatch.setattr(distillation.Distillation, "_step", spy)
    run = settings(steps=6, samples=16, seqlen=16, batch_tokens=64)
    windows = pruned.calibration(load_text(run.calibration, "calibration"), 16, 16, 0)
    distill_model(dense, pruned, run, NoProgress())
    everything = list(map(tuple, windows.ids.tolist()))
    assert len(trained) == 24 and set(trained) <= set(everything[:-2])
    # 14 windows give three batches of four before they are shuffled anew.
    assert len(set(trained[:12])) == len(set(trained[12:])) == 12 and trained[:12] != trained[12:]


def test_equal_settings_give_equal_weights_and_another_seed_does_not(
    dense: LoadedModel, pruned_once: LoadedModel, settings: Settings
) -> None:
    found = []
    for seed in (3, 3, 4):
        student = LoadedModel("pruned", copy.deepcopy(pruned_once.model), pruned_once.tokenizer)
        distill_model(dense, student, settings(steps=4, seed=seed, samples=12), NoProgress())
        found.append(weights(student.model))
    assert same(found[0], found[1]) and not same(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_learn_and_keep_their_dtype(
    dense: LoadedModel, pruned_once: LoadedModel, settings: Settings, dtype: torch.dtype
) -> None:
    student = LoadedModel("pruned", copy.deepcopy(pruned_once.model).to(dtype), pruned_once.tokenizer)
    before = weights(student.model)
    report = distill_model(dense, student, settings(steps=20), NoProgress())
    after = weights(student.model)
    assert report.kl_after < 0.85 * report.kl_before and report.dtype == str(dtype).removeprefix("torch.")
    for name, weight in after.items():
        assert weight.dtype is dtype
        if weight.ndim == 2:
            assert torch.equal(weight == 0, before[name] == 0)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_an_absurd_step_size_leaves_the_pruned_model_as_it_was(
    dense: LoadedModel, pruned: LoadedModel, settings: Settings
) -> None:
    before = weights(pruned.model)
    report = distill_model(dense, pruned, settings(steps=60, lr=3.0), NoProgress())
    assert same(weights(pruned.model), before)
    assert (report.kl_after, report.best_step) == (report.kl_before, 0)
    assert report.stopped == "no improvement in 4 checks" and report.steps == 24
    report = distill_model(dense, pruned, settings(steps=60, lr=1e38), NoProgress())
    assert same(weights(pruned.model), before) and report.kl_after == report.kl_before
    assert report.stopped == "loss or gradient not finite" and report.steps < 10


def test_the_best_state_is_kept_when_later_ones_are_worse(
    dense: LoadedModel, pruned: LoadedModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "rate_share", lambda spent: 1.0 if spent < 0.4 else 1e4)
    run = settings(steps=30)
    report = distill_model(dense, pruned, run, NoProgress())
    values = [check.kl for check in report.checks if check.kl is not None]
    assert 0 < report.best_step < report.steps and report.kl_after == min(values) < values[-1]
    windows = pruned.calibration(load_text(run.calibration, "calibration"), 40, 64, 0)
    assert mean_kl(dense.model, pruned.model, windows.ids[-5:]) == pytest.approx(report.kl_after, rel=1e-5)


def test_an_interrupt_leaves_the_best_state_and_a_usable_model(
    dense: LoadedModel, pruned: LoadedModel, settings: Settings
) -> None:
    class Impatient(NoProgress):
        def step(self, detail: str) -> None:
            raise KeyboardInterrupt

    before = weights(pruned.model)
    with pytest.raises(KeyboardInterrupt):
        distill_model(dense, pruned, settings(steps=50), Impatient())
    assert same(weights(pruned.model), before)
    assert all(parameter.requires_grad for parameter in pruned.model.parameters())


class Ticking:
    """A clock that advances 2 ms at every look, and `step_seconds` in every step."""

    def __init__(self, step_seconds: float) -> None:
        self.now, self.step_seconds = 100.0, step_seconds
        self.shares: list[float] = []

    def monotonic(self) -> float:
        self.now += 0.002
        return self.now

    def rate_share(self, spent: float) -> float:
        self.now += self.step_seconds
        self.shares.append(rate_share(spent))
        return self.shares[-1]


class Counter(NoProgress):
    total = steps = 0

    def start(self, title: str, total: int) -> None:
        self.total = total

    def step(self, detail: str) -> None:
        self.steps += 1


@pytest.mark.parametrize("step_seconds", [0.05, 0.7])
def test_a_time_is_kept_and_the_step_size_falls_to_its_end(
    dense: LoadedModel, pruned: LoadedModel, settings: Settings, monkeypatch: pytest.MonkeyPatch, step_seconds: float
) -> None:
    clock, counter = Ticking(step_seconds), Counter()
    monkeypatch.setattr(distillation, "time", clock)
    monkeypatch.setattr(distillation, "rate_share", clock.rate_share)
    report = distill_model(dense, pruned, settings(minutes=0.05, samples=16, seqlen=32, batch_tokens=64), counter)
    assert 3.0 - 1.5 * step_seconds < report.seconds <= 3.02 and report.minutes == 0.05
    assert report.steps == len(clock.shares) == (4 if step_seconds == 0.7 else report.steps)
    assert report.checks[-1].step == report.steps and len(report.checks) <= 12
    assert counter.total == 100 and counter.steps <= 100
    if step_seconds == 0.05:
        assert 35 < report.steps < 60 and report.kl_after < report.kl_before and counter.steps > 90
        assert max(clock.shares) > 0.95 and clock.shares[-1] < 0.05


def test_every_kind_of_model_keeps_its_zeros(
    kind: str, tiny_model: Callable[..., Any], word_tokenizer: Any, settings: Settings
) -> None:
    dense = LoadedModel("dense", tiny_model(kind), word_tokenizer)
    student = LoadedModel("pruned", tiny_model(kind), word_tokenizer)
    alps.prune(student.model, pattern="2:4", method="magnitude", measure_error=False)
    before = weights(student.model)
    report = distill_model(dense, student, settings(steps=8, seqlen=32), NoProgress())
    assert report.kl_after < report.kl_before
    frozen = {"model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"}
    frozen |= {name for name in before if "embed" in name or "project" in name}
    sites = {site.parameter_name for block in find_blocks(student.model) for site in block.sites}
    for name, weight in weights(student.model).items():
        assert torch.equal(weight, before[name]) == (name in frozen), name
        assert name not in sites or torch.equal(weight == 0, before[name] == 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "either --minutes"),
        ({"minutes": 1.0, "steps": 3}, "either --minutes"),
        ({"steps": 0}, "Setting 'steps'"),
        ({"minutes": -1.0}, "Setting 'minutes'"),
        ({"minutes": math.nan}, "Setting 'minutes'"),
        ({"steps": 1, "lr": 0.0}, "Setting 'lr'"),
        ({"steps": 1, "samples": 1}, "Setting 'samples'"),
        ({"steps": 1, "rate": 1.0}, "Setting 'rate'"),
        ({"steps": 1, "seqlen": 1024}, "longer than the 512"),
        ({"steps": 1, "samples": 4000}, "enough for"),
        ({"minutes": 1e-5}, "The time is too short for a first step"),
    ],
)
def test_settings_that_cannot_be_used(
    dense: LoadedModel, pruned: LoadedModel, settings: Settings, changes: dict[str, Any], expected: str
) -> None:
    before = weights(pruned.model)
    with pytest.raises(ConfigError, match=expected):
        distill_model(dense, pruned, settings(**changes), NoProgress())
    assert same(weights(pruned.model), before)


def test_a_dense_model_with_nan_is_refused(dense: LoadedModel, pruned: LoadedModel, settings: Settings) -> None:
    broken = copy.deepcopy(dense.model)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(NotFinite, match="held-back window 1, first in what follows the last block"):
        distill_model(LoadedModel("broken", broken, None), pruned, settings(steps=1), NoProgress())


def test_the_report_extends_that_of_the_pruned_directory(
    stories: Path, english_file: Path, tmp_path: Path, settings: Settings
) -> None:
    first, second, third = (tmp_path / name for name in ("pruned", "recovered", "again"))
    earlier = alps.prune(
        stories, pattern="2:4", method="wanda", calibration=english_file, samples=4, seqlen=32, out=first
    )
    for source, target in ((first, second), (second, third)):
        distill_directory(str(stories), str(source), target, settings(steps=3, samples=16), NoProgress())
    report = RunReport.read(third)
    assert report is not None and len(report.distillations) == 2
    assert report.model_copy(update={"distillations": []}) == earlier
    assert report.distillations[0].kl_after == pytest.approx(report.distillations[1].kl_before, rel=1e-6)
    assert report.distillations[1].kl_after < report.distillations[1].kl_before
    card = (third / "README.md").read_text()
    assert card == model_card(report, page=True) and "Distilled, not one-shot." in card
    assert f"| {report.distillations[1].kl_before:.4f} | {report.distillations[1].kl_after:.4f} |" in card
    assert "one-shot" not in (first / "README.md").read_text()
    assert [check.violations for check in inspect(str(third)).checks] == [0]
    one, other = (load_file(folder / "model.safetensors") for folder in (first, third))
    assert all(torch.equal(one[name] == 0, other[name] == 0) for name in one if "layers" in name and one[name].ndim > 1)


@pytest.mark.parametrize(("pattern", "claimed"), [("2:4", "2:4"), (0.6, "60%")])
def test_a_directory_without_a_report_gets_one_of_what_its_weights_show(
    dense: LoadedModel, stories: Path, tmp_path: Path, settings: Settings, pattern: str | float, claimed: str
) -> None:
    alps.prune(
        stories, pattern=parse_pattern(str(pattern)), method="magnitude", measure_error=False, out=tmp_path / "pruned"
    )
    (tmp_path / "pruned" / "report.json").unlink()
    report = distill_directory(
        str(stories),
        str(tmp_path / "pruned"),
        tmp_path / "out",
        settings(steps=2, samples=16),
        NoProgress(),
    )
    assert RunReport.read(tmp_path / "out") == report
    assert (report.method, report.pattern, report.mean_error) == ("unknown", claimed, None)
    assert (
        report.zeros
        == report.distillations[0].zeros
        == sum(site.zeros for site in inspect(str(tmp_path / "out")).layers)
    )
    assert [row.name for row in report.dense] == ["model.embed_tokens.weight"]
