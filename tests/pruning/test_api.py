"""Pruning from Python: in memory and by directory, what is written, and what failing leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import alps
from alps.core.errors import AlpsError, CheckpointError, ConfigError, SolveFailed
from alps.core.progress import NoProgress
from alps.data.loaded_model import load
from alps.pruning import run as running
from alps.pruning.config import PruneConfig, load_prune_config
from alps.pruning.job import prune_checkpoint
from alps.pruning.layer_solver import LayerProblem
from alps.reporting.run_report import RunReport
from alps.solvers.base import Solution
from alps.solvers.patterns import parse_pattern
from alps.solvers.wanda import Wanda

_FILES = {"config.json", "model.safetensors", "tokenizer.json", "report.json", "README.md"}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def _same(one: nn.Module, other: nn.Module) -> bool:
    return all(
        a == b and torch.equal(_bits(x), _bits(y))
        for (a, x), (b, y) in zip(one.named_parameters(), other.named_parameters(), strict=True)
    )


def _tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def checkpoint(tiny_model: Callable[..., Any], word_tokenizer: Any, tmp_path_factory: Any) -> Path:
    """A tiny LLaMA with its tokenizer on disk."""
    folder: Path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("pattern", [0.6, "2:4"])
def test_a_pruned_directory_is_the_model_pruned_in_memory(
    stories: Path, english_file: Path, tmp_path: Path, dtype: str, pattern: str | float
) -> None:
    settings: dict[str, Any] = {"calibration": english_file, "samples": 6, "seqlen": 48, "seed": 5}
    report = alps.prune(
        stories, pattern=parse_pattern(str(pattern)), method="alps", out=tmp_path / "out", dtype=dtype, **settings
    )
    loaded = load(str(stories), dtype)
    in_memory = alps.prune(
        loaded.model, pattern=parse_pattern(str(pattern)), method="alps", tokenizer=loaded.tokenizer, **settings
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype is (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert _same(again, loaded.model) and not _same(again, load(str(stories), dtype).model)
    assert [r.error for r in report.layers] == [r.error for r in in_memory.layers]

    assert set(_tree(tmp_path / "out")) >= _FILES and _tree(tmp_path) == sorted(
        ["out", *(f"out/{name}" for name in _tree(tmp_path / "out"))]
    )
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for record in report.layers:
        weight = stored[f"{record.name}.weight"]
        expected = weight.numel() // 2 if pattern == "2:4" else round(0.6 * weight.numel())
        assert int((_bits(weight) == 0).sum()) == int((weight == 0).sum()) == expected == record.zeros
    assert report.zeros == sum(record.zeros for record in report.layers)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("once upon a time").input_ids == loaded.tokenizer("once upon a time").input_ids


def test_the_report_and_the_card_tell_what_was_done(checkpoint: Path, english_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = alps.prune(
        checkpoint, pattern="2:4", method="wanda", calibration=english_file, samples=4, seqlen=32, seed=9, out=out
    )
    assert RunReport.read(out) == report
    assert (report.architecture, report.method, report.pattern) == ("LlamaForCausalLM", "wanda", "2:4")
    assert report.sparsity == 0.5 and report.entries == 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 44 * 32)
    used = report.calibration
    assert used is not None
    assert (used.source, used.windows, used.seqlen, used.tokens, used.seed) == ("english.txt", 4, 32, 128, 9)
    phases = {"load", "capture", "forward", "gram", "prepare", "solve", "measure_error", "save", "total"}
    assert phases <= set(report.seconds)
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert {row.name: row.reason for row in report.dense} == {
        "model.embed_tokens.weight": "embedding or output head",
        "lm_head.weight": "embedding or output head",
    }
    card = (out / "README.md").read_text()
    assert f"{report.zeros:,} of {report.entries:,} weights (50.00 %) in 21 linear layers" in card
    assert f"| {report.mean_error:.4f} |" in card and used.sha256[:12] in card
    assert (
        "library_name: transformers" in card.split("---")[1]
        and "quantization_config" not in (out / "config.json").read_text()
    )


def test_settings_are_saved_and_reproduce_the_run(checkpoint: Path, english_file: Path, tmp_path: Path) -> None:
    settings = PruneConfig(
        model=str(checkpoint), sparsity=0.6, calibration=str(english_file), samples=4, seqlen=32, refit=True
    )
    first = prune_checkpoint(settings, tmp_path / "a", NoProgress())
    saved = load_prune_config(tmp_path / "a" / "alps.yaml", {})
    assert saved == settings
    second = prune_checkpoint(saved, tmp_path / "b", NoProgress())
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(_bits(tensor), _bits(two[name])) for name, tensor in one.items())
    assert [r.model_dump(exclude={"solve"}) for r in first.layers] == [
        r.model_dump(exclude={"solve"}) for r in second.layers
    ]


@pytest.mark.parametrize("content", ["[1]", "{", '"x"', "3", '{"summary": {}}', '{"model": 1}', "\0"])
def test_another_programs_report_is_refused(tmp_path: Path, content: str) -> None:
    assert RunReport.read(tmp_path) is None
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"report\.json' is not a report of this program"):
        RunReport.read(tmp_path)


def test_no_calibration_is_needed_where_nothing_is_read(checkpoint: Path, tmp_path: Path) -> None:
    report = alps.prune(checkpoint, sparsity=0.5, method="magnitude", measure_error=False, out=tmp_path / "out")
    assert report.calibration is None and report.mean_error is None and report.sparsity == 0.5
    assert "mean relative reconstruction error" not in (tmp_path / "out" / "README.md").read_text()


def test_token_ids_calibrate_too(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("gpt2").train()
    report = alps.prune(model, pattern=alps.SemiStructured(2, 4), method=alps.Wanda(), calibration=ids)
    assert model.training, "the mode of a model in memory is the caller's"
    assert report.calibration is not None and report.calibration.seed is None
    assert (report.calibration.windows, report.calibration.seqlen) == tuple(ids.shape)


def test_a_site_without_inputs_stays_dense_and_is_listed(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.spare = nn.Linear(32, 32)
    spare = model.model.layers[1].spare.weight.detach().clone()
    report = alps.prune(model, sparsity=0.6, method="alps", calibration=ids)
    listed = {row.name: row.reason for row in report.dense if "spare" in row.name}
    reason = "not a linear map that received calibration inputs"
    assert listed == {f"model.layers.{i}.spare.weight": reason for i in range(3)}
    assert torch.equal(model.model.layers[1].spare.weight, spare) and len(report.layers) == 21


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"samples": 5000}, ConfigError, "5000 are needed"),
        ({"seqlen": 129}, ConfigError, "longer than the 128 this model takes"),
        ({"calibration": "absent.txt"}, ConfigError, "is neither a file nor"),
        ({"pattern": "2:4"}, ConfigError, "either --sparsity"),
        ({"pattern": alps.SemiStructured(2, 4)}, ConfigError, "either a sparsity or a pattern"),
        ({"method": alps.Wanda(), "effort": "high"}, ConfigError, "set them on the method object"),
        ({"sparsity": None, "pattern": "4:8"}, ConfigError, r"does not divide .*down_proj \(44\)"),
        ({"method": "apls"}, ConfigError, "Did you mean 'alps'"),
        ({"device": "gpu"}, ConfigError, "Device 'gpu'"),
        ({"dtype": "int8"}, ConfigError, "Dtype 'int8' is unknown"),
        ({"out": None}, ConfigError, "needs `out`"),
        ({"samples": 0}, ConfigError, "samples"),
        ({"seqlen": 0}, ConfigError, "seqlen"),
    ],
    ids=str,
)
def test_a_run_that_cannot_be_leaves_nothing_behind(
    checkpoint: Path,
    english_file: Path,
    tmp_path: Path,
    change: dict[str, Any],
    error: type[AlpsError],
    complaint: str,
) -> None:
    arguments = {"sparsity": 0.6, "calibration": english_file, "samples": 4, "seqlen": 32, "out": tmp_path / "a" / "b"}
    with pytest.raises(error, match=complaint):
        alps.prune(checkpoint, **{**arguments, **change})
    assert _tree(tmp_path) == []


def test_a_checkpoint_that_is_broken_leaves_nothing_behind(
    tiny_model: Callable[..., Any], word_tokenizer: Any, english_file: Path, tmp_path: Path
) -> None:
    model = tiny_model("opt")
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    word_tokenizer.save_pretrained(tmp_path / "nan")
    before = _tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.fc1\.weight of .* holds NaN"):
        alps.prune(tmp_path / "nan", sparsity=0.5, calibration=english_file, samples=4, seqlen=32, out=tmp_path / "out")
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("place", ["full", "file", "/proc/alps/out"])
@pytest.mark.parametrize("given", ["a name", "settings", "a model"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    checkpoint: Path,
    tiny_model: Callable[..., Any],
    ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    given: str,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    before, out, model = _tree(tmp_path), tmp_path / place, tiny_model("llama")

    def too_early(*_: Any) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("alps.pruning.job.open_model", too_early)
    with pytest.raises(CheckpointError, match=r"not empty|is a file|cannot be created"):
        if given == "a name":
            alps.prune(checkpoint, sparsity=0.5, out=out)
        elif given == "settings":
            settings = PruneConfig(model=str(checkpoint), sparsity=0.5)
            prune_checkpoint(settings, out, NoProgress())
        else:
            alps.prune(model, sparsity=0.5, calibration=ids, out=out)
    assert _tree(tmp_path) == before
    assert _same(model, tiny_model("llama")), "a model in memory was pruned for nothing"


@pytest.mark.parametrize(
    "bad",
    [
        torch.full((2, 16), 64),
        torch.full((2, 16), -1),
        torch.zeros(16, dtype=torch.int64),
        torch.zeros(0, 16, dtype=torch.int64),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(2, 16),
        torch.zeros(1, 129, dtype=torch.int64),
    ],
    ids=["vocabulary", "negative", "one window flat", "no windows", "no tokens", "floats", "too long"],
)
def test_token_ids_that_cannot_be_are_refused_and_the_model_is_untouched(
    tiny_model: Callable[..., Any], bad: Tensor
) -> None:
    model = tiny_model("opt").train()
    with pytest.raises(ConfigError):
        alps.prune(model, sparsity=0.5, calibration=bad)
    assert model.training and _same(model, tiny_model("opt"))


def test_the_mode_of_a_model_outlives_a_failure(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_model("llama").train()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(1e38)  # whose outputs overflow
    with pytest.raises(SolveFailed):
        alps.prune(model, sparsity=0.5, calibration=ids)
    assert model.training


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_model_in_memory_with_nan_is_refused_before_anything_is_pruned(
    tiny_model: Callable[..., Any], ids: Tensor, name: str
) -> None:
    model, before = tiny_model("llama"), tiny_model("llama")
    for one in (model, before):
        with torch.no_grad():
            one.get_parameter(name).view(-1)[-1] = torch.nan
    with pytest.raises(CheckpointError, match=rf"^Tensor {name} of 'LlamaForCausalLM' holds NaN"):
        alps.prune(model, sparsity=0.5, calibration=ids)
    assert _same(model, before)


@pytest.mark.parametrize("place", ["lm_head.weight", "model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_no_nan_reaches_a_checkpoint(
    tiny_model: Callable[..., Any], ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Whatever breaks a result after the last site was solved."""
    model, prune_model = tiny_model("llama"), running.prune_model

    def broken(*arguments: Any, **options: Any) -> RunReport:
        report = prune_model(*arguments, **options)
        with torch.no_grad():
            model.get_parameter(place).view(-1)[3] = torch.inf
        return report

    monkeypatch.setattr("alps.pruning.api.prune_model", broken)
    with pytest.raises(
        CheckpointError, match=f"Tensor {place} for '.*out' has become NaN or infinite and is not written"
    ):
        alps.prune(model, sparsity=0.5, method="wanda", calibration=ids, out=tmp_path / "out")
    assert _tree(tmp_path) == []


def test_no_nan_reaches_the_journal(
    checkpoint: Path, english_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = Wanda.solve

    def broken(self: Wanda, *arguments: Any) -> Any:
        solution = solve(self, *arguments)
        solution.weight[0, 0] = torch.nan
        return solution

    def unchecked(problem: LayerProblem, solution: Solution) -> Tensor:
        return problem.site.write(solution.weight)

    monkeypatch.setattr(LayerProblem, "commit", unchecked)
    monkeypatch.setattr(LayerProblem, "errors", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(Wanda, "solve", broken)
    settings = PruneConfig(
        model=str(checkpoint), sparsity=0.6, method="wanda", calibration=str(english_file), samples=4, seqlen=32
    )
    with pytest.raises(CheckpointError, match=r"Tensor .*weight for '.*out\.partial' has become NaN"):
        prune_checkpoint(settings, tmp_path / "out", NoProgress())
    assert _tree(tmp_path) == []


def test_a_text_without_a_tokenizer_is_refused(tiny_model: Callable[..., Any], english_file: Path) -> None:
    with pytest.raises(ConfigError, match="needs the model's tokenizer: pass"):
        alps.prune(tiny_model("llama"), sparsity=0.5, calibration=english_file, seqlen=32)
