"""`alps reconstruct` on a real small model: losses fall, zeros and frozen weights stay, and the report grows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alps
from alps.calibration.block_inputs import BlockInputs
from alps.core.errors import ConfigError
from alps.core.progress import NoProgress
from alps.core.settings import ARGUMENTS, make_config
from alps.data import loaded_model as loaded
from alps.data.loaded_model import LoadedModel, load
from alps.data.mixture import CalibrationMix, CalibrationSource, load_calibration
from alps.data.text_sources import SELF, Text
from alps.data.windows import Windows
from alps.finetuning import reconstruct_checkpoint as matched
from alps.finetuning.block_reconstruction import reconstruct_block
from alps.finetuning.reconstruct_checkpoint import reconstruct_directory, reconstruct_model
from alps.finetuning.reconstruct_config import ReconstructConfig
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.models.blocks import Block, find_blocks, on_device
from alps.reporting.model_card import model_card
from alps.reporting.records import ReconstructionRecord, ReconstructionRun
from alps.reporting.run_report import RunReport
from helpers.command_line import contents, run_alps
from helpers.model_comparison import mean_kl, same, weights

# Twenty batches of eight windows, of which the last is held back.
SETTINGS = ReconstructConfig(epochs=2, target=1.0, lr=3e-3, samples=160, seqlen=64, device="cpu")
SMALL = ReconstructConfig(epochs=1, lr=3e-3, samples=8, seqlen=32, device="cpu")


@pytest.fixture(scope="module")
def dense(stories: Path) -> LoadedModel:
    return load(str(stories))


@pytest.fixture(scope="module")
def pruned(dense: LoadedModel) -> LoadedModel:
    model = copy.deepcopy(dense.model)
    alps.prune(model, sparsity=0.6, method="magnitude", measure_error=False)
    return LoadedModel("pruned", model, dense.tokenizer)


@pytest.fixture(scope="module")
def source(english: str) -> CalibrationMix:
    return CalibrationMix((CalibrationSource(Text("first part", [english[:45_000]])),))


def clone(one: LoadedModel) -> LoadedModel:
    return LoadedModel(one.name, copy.deepcopy(one.model), one.tokenizer)


def relative(own: Tensor, wanted: Tensor) -> float:
    own, wanted = own.double(), wanted.double()
    return float(((own - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


def test_every_block_gains_and_nothing_frozen_or_pruned_moves(
    dense: LoadedModel, pruned: LoadedModel, source: CalibrationMix, english: str
) -> None:
    student, teacher = clone(pruned), weights(dense.model)
    before = weights(student.model)
    records, run = reconstruct_model(dense, student, SETTINGS, source, progress=NoProgress())
    after = weights(student.model)
    assert same(weights(dense.model), teacher)
    assert [record.block for record in records] == list(range(5)) and run.blocks == 5
    assert all(record.after < record.before and record.steps == 38 for record in records)

    # The losses are those of whole models: the dense one's states, the matched one's states, the held-back windows.
    windows = student.calibration(source, 160, 64, 0)
    with torch.no_grad():
        own, wanted = (
            model(input_ids=windows.ids[152:], output_hidden_states=True).hidden_states
            for model in (student.model, dense.model)
        )
    for record in records[:-1]:  # the last state has gone through the final norm
        assert record.after == pytest.approx(relative(own[record.block + 1], wanted[record.block + 1]), rel=1e-4)

    held_out = dense.calibration(CalibrationMix((CalibrationSource(Text("rest", [english[45_000:]])),)), 40, 64, 0).ids
    start, end = (mean_kl(dense.model, model, held_out) for model in (pruned.model, student.model))
    assert start > 1 and end < 0.75 * start

    blocks = find_blocks(student.model)
    sites = {site.parameter_name for block in blocks for site in block.sites}
    inside = {f"{block.name}.{name}" for block in blocks for name, _ in block.module.named_parameters()}
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == (name not in inside), name
        if name in sites:
            assert torch.equal(weight.view(torch.int32) == 0, before[name].view(torch.int32) == 0)
            assert int((weight == 0).sum()) == round(0.6 * weight.numel())
    assert run.zeros == sum(int((after[name] == 0).sum()) for name in sites)
    assert (run.calibration.source, run.calibration.sha256) == ("first part", windows.sha256)
    for model in (dense.model, student.model):
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_equal_settings_give_equal_weights_and_another_seed_does_not(
    dense: LoadedModel, pruned: LoadedModel, source: CalibrationMix
) -> None:
    found = []
    for settings in (SMALL, SMALL, SMALL.model_copy(update={"seed": 1}), SMALL.model_copy(update={"offload": True})):
        student = clone(pruned)
        reconstruct_model(dense, student, settings, source, progress=NoProgress())
        found.append(weights(student.model))
    assert same(found[0], found[1]) and same(found[0], found[3]) and not same(found[0], found[2])


def test_few_windows_still_leave_some_to_hold_back(
    dense: LoadedModel, pruned: LoadedModel, source: CalibrationMix, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(
        block: Block, inputs: BlockInputs, targets: list[Tensor], parameters: ReconstructionParameters, **options: Any
    ) -> ReconstructionRecord:
        dense_block = options["dense_block"]
        assert (dense_block.index, dense_block.name) == (block.index, block.name)
        assert dense_block.module is not block.module
        seen.append(([len(target) for target in targets], options["seed"]))
        last = options["output_loss"] is not None
        assert last == (block.index == 4), "the last of five blocks is compared by the predictions"
        return reconstruct_block(block, inputs, targets, parameters, **options)

    monkeypatch.setattr(matched, "reconstruct_block", spy)
    # Eight windows of 32 tokens fit in one batch: they are two, one to train on and one to look at.
    reconstruct_model(dense, clone(pruned), SMALL.model_copy(update={"seed": 5}), source, progress=NoProgress())
    assert seen == [([4, 4], 5)] * 5


def test_every_kind_of_model_keeps_its_zeros(kind: str, tiny_model: Callable[..., Any], word_tokenizer: Any) -> None:
    dense = LoadedModel("dense", tiny_model(kind), word_tokenizer)
    student = LoadedModel("pruned", tiny_model(kind), None)
    alps.prune(student.model, pattern="2:4", method="magnitude", measure_error=False)
    before = weights(student.model)
    text = CalibrationMix((CalibrationSource(Text("letters", ["the quick brown fox, and the lazy dog; " * 60])),))
    records, _ = reconstruct_model(
        dense, student, SMALL.model_copy(update={"epochs": 4, "samples": 40}), text, progress=NoProgress()
    )
    assert all(record.after < record.before for record in records)
    blocks = find_blocks(student.model)
    sites = {site.parameter_name for block in blocks for site in block.sites}
    for name, weight in weights(student.model).items():
        assert name not in sites or torch.equal(weight == 0, before[name] == 0)
        assert torch.equal(weight, before[name]) == (not any(name.startswith(block.name) for block in blocks)), name


def test_one_block_of_each_model_is_on_the_device_at_a_time(
    dense: LoadedModel, pruned: LoadedModel, source: CalibrationMix, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, order = list[tuple[str, int]](), list[str]()

    @contextmanager
    def spy(block: Block, device: torch.device) -> Iterator[None]:
        side = "pruned" if block.module in list(student.model.modules()) else "dense"
        there.append((side, block.index))
        assert there in ([("dense", block.index)], [("dense", block.index), ("pruned", block.index)])
        order.append(side)
        with on_device(block, device):
            yield
        there.pop()

    student = clone(pruned)
    monkeypatch.setattr(matched, "on_device", spy)
    reconstruct_model(dense, student, SMALL, source, progress=NoProgress())
    assert order == ["dense", "pruned"] * 5


def test_windows_of_self_are_sampled_from_the_dense_model(
    dense: LoadedModel, pruned: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def sampled(model: nn.Module, tokenizer: Any, *, samples: int, seqlen: int, **_: Any) -> Windows:
        asked.append(model)
        ids = torch.randint(3, 500, (samples, seqlen), generator=torch.Generator().manual_seed(9))
        return Windows(ids, SELF, samples)

    monkeypatch.setattr(loaded, "generate_windows", sampled)
    _, run = reconstruct_model(dense, clone(pruned), SMALL, load_calibration("self", 8), progress=NoProgress())
    assert asked == [dense.model] and run.calibration.source == "self"


def test_models_that_cannot_be_matched(
    dense: LoadedModel, pruned: LoadedModel, source: CalibrationMix, tiny_model: Callable[..., Any]
) -> None:
    emptied = clone(pruned)
    with torch.no_grad():
        for block in find_blocks(emptied.model):
            for site in block.sites:
                site.parameter.zero_()
    for teacher, student, expected in [
        (dense, emptied, "Nothing is left to tune in 'pruned'"),
        (dense, dense, "Nothing is pruned in"),
        (pruned, dense, "Nothing is pruned in"),
        (LoadedModel("other", tiny_model("gpt2"), None), pruned, "one is a GPT2LMHeadModel"),
    ]:
        before = weights(student.model)
        with pytest.raises(ConfigError) as refused:
            reconstruct_model(teacher, student, SMALL, source, progress=NoProgress())
        assert expected in str(refused.value) and "\n" not in str(refused.value)
        assert same(weights(student.model), before)


def test_the_report_of_the_pruned_directory_is_kept_and_extended(
    dense: LoadedModel, stories: Path, english_file: Path, tmp_path: Path
) -> None:
    first, second, third = (tmp_path / name for name in ("pruned", "matched", "again"))
    earlier = alps.prune(
        stories, pattern="2:4", method="wanda", calibration=english_file, samples=4, seqlen=32, out=first
    )
    given = {"lr": 3e-3, "samples": 8, "seqlen": 32, "calibration": str(english_file)}
    for folder, target, seed in ((first, second, 0), (second, third, 7)):
        settings = make_config(ReconstructConfig, {**given, "seed": seed}, ARGUMENTS)
        reconstruct_directory(str(stories), str(folder), target, settings, NoProgress())
    report = RunReport.read(third)
    assert report is not None
    assert report.model_copy(update={"reconstructions": [], "reconstruction_runs": []}) == earlier
    assert [record.block for record in report.reconstructions] == [*range(5), *range(5)]
    assert [run.calibration.seed for run in report.reconstruction_runs] == [0, 7]
    assert [run.calibration.parts[0].windows for run in report.reconstruction_runs] == [8, 8]
    assert report.calibration is not None and report.calibration.windows == 4
    card = (third / "README.md").read_text()
    assert card == model_card(report, page=True) and "**Blocks reconstructed.**" in card
    assert "pruning left everything else unchanged" in card
    for run, rows in zip(
        report.reconstruction_runs, (report.reconstructions[:5], report.reconstructions[5:]), strict=True
    ):
        before, after = (sum(values) / 5 for values in ([r.before for r in rows], [r.after for r in rows]))
        assert f"sha256 {run.calibration.sha256[:12]} | {before:.4f} | {after:.4f} |" in card
    assert "matched" not in (first / "README.md").read_text()


def test_a_directory_without_a_report_gets_one_of_what_its_weights_show(
    stories: Path, english_file: Path, tmp_path: Path
) -> None:
    alps.prune(stories, pattern="2:4", method="magnitude", measure_error=False, out=tmp_path / "pruned")
    (tmp_path / "pruned" / "report.json").unlink()
    settings = ReconstructConfig(samples=8, seqlen=32, calibration=str(english_file))
    pair = (str(stories), str(tmp_path / "pruned"), tmp_path / "out")
    report = reconstruct_directory(*pair, settings, NoProgress())
    assert RunReport.read(tmp_path / "out") == report
    assert (report.method, report.pattern, report.calibration) == ("unknown", "2:4", None)
    assert report.zeros == report.reconstruction_runs[0].zeros == 226_560 // 2 and len(report.reconstructions) == 5


def test_the_command_end_to_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stories: Path, english_file: Path
) -> None:
    pruned, out = english_file.parent / "pruned", english_file.parent / "matched"
    arguments = ["--sparsity", 0.6, "--method", "magnitude", "--no-measure-error"]
    assert run_alps(monkeypatch, "prune", stories, pruned, *arguments) == 0
    capsys.readouterr()
    sizes = ["--calibration", english_file, "--samples", 40, "--seqlen", 32]
    steps = ["--lr", 0.003, "--epochs", 2, "--target", 0]
    assert run_alps(monkeypatch, "reconstruct", stories, pruned, out, *sizes, *steps) == 0
    printed = capsys.readouterr()
    assert "5 of 5 blocks improved" in printed.out and "135,945 of 226,560 weights are zero" in printed.out
    assert "5/5" in printed.err
    report = json.loads((out / "report.json").read_text())
    assert [ReconstructionRecord.model_validate(row).steps for row in report["reconstructions"]] == [4] * 5
    run = ReconstructionRun.model_validate(report["reconstruction_runs"][0])
    assert (run.epochs, run.target, run.lr) == (2, 0.0, 0.003)
    assert (run.calibration.windows, run.calibration.seqlen) == (40, 32)
    found = []
    for folder in (pruned, out):
        assert run_alps(monkeypatch, "inspect", folder, "--json") == 0
        found.append([(site["name"], site["zeros"]) for site in json.loads(capsys.readouterr().out)["layers"]])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{model}", "{model}", "{tmp}/out"], "Nothing is pruned"),
        (["{model}", "{tmp}/nowhere", "{tmp}/out"], "does not exist"),
        (["{tmp}/nowhere", "{model}", "{tmp}/out"], "does not exist"),
        (["{model}", "{model}", "{tmp}"], "not empty"),
        (["{model}", "{model}", "{tmp}/out", "--epochs", "0"], "Setting 'epochs'"),
        (["{model}", "{model}", "{tmp}/out", "--lr", "0"], "Setting 'lr'"),
        (["{model}", "{model}", "{tmp}/out", "--target", "1.5"], "Setting 'target'"),
        (["{model}", "{model}", "{tmp}/out", "--lr", "nan"], "Setting 'lr'"),
        (["{model}", "{model}", "{tmp}/out", "--samples", "1"], "Setting 'samples'"),
        (["{model}", "{model}", "{tmp}/out", "--device", "quantum"], "cannot be used here"),
        (["{model}", "{model}", "{tmp}/out", "--dtype", "int3"], "is unknown"),
        (["{model}", "{model}", "{tmp}/out", "--calibration", "nowhere.txt"], "neither a file"),
        (["{model}", "{model}", "{tmp}/out", "--calibration", "{text},self:1"], "has no weight"),
        (["{model}", "{pruned}", "{tmp}/out", "--seqlen", "1024"], "longer than the 512"),
        (["{model}", "{pruned}", "{tmp}/out", "--samples", "5000"], "enough for"),
    ],
)
def test_wrong_inputs_are_one_sentence_and_write_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dense: LoadedModel,
    pruned: LoadedModel,
    stories: Path,
    english_file: Path,
    arguments: list[str],
    expected: str,
) -> None:
    tmp = english_file.parent
    if "{pruned}" in arguments:
        pruned.model.save_pretrained(tmp / "pruned")
        dense.tokenizer.save_pretrained(tmp / "pruned")
        capsys.readouterr()
    before = contents(tmp)
    filled = [word.format(model=stories, tmp=tmp, text=english_file, pruned=tmp / "pruned") for word in arguments]
    sizes = ["--calibration", english_file, "--samples", 4, "--seqlen", 32]
    assert run_alps(monkeypatch, "reconstruct", *filled[:3], *sizes, *filled[3:]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and expected in printed.err and printed.err.count("\n") == 1, printed.err
    assert contents(tmp) == before
