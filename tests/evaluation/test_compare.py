"""Comparisons: the same figures as single runs, nothing done twice or lost, other conditions refused."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from alps.core.errors import AlpsError, CheckpointError, SolveFailed
from alps.core.progress import NoProgress
from alps.data.loaded_model import load
from alps.data.text_sources import load_text
from alps.evaluation.api import evaluate
from alps.evaluation.cached_reference import CachedReferenceModel
from alps.evaluation.compare import run_comparison
from alps.evaluation.compare_config import CompareConfig
from alps.pruning import run as running
from alps.pruning.config import PruneConfig
from alps.pruning.job import prune_checkpoint
from alps.reporting.compare_results import RESULTS_NAME, Result, read_results
from alps.reporting.markdown_tables import TABLE_NAME
from alps.reporting.records import ComparisonRecord
from alps.solvers.sparsegpt import SparseGPT
from helpers.cli_process import run, start
from helpers.log_messages import log_messages


def settings(short_stories: Path, text: Path, **more: Any) -> CompareConfig:
    chosen: dict[str, Any] = {"methods": ["wanda", "alps+true_sequential+dense_target=0.4"], "sparsity": [0.5]}
    sizes = {"samples": 4, "seqlen": 32, "eval_seqlen": 64, "windows": 3}
    files = {"model": str(short_stories), "calibration": str(text), "texts": [str(text)]}
    return CompareConfig.model_validate({**files, **sizes, **chosen, **more})


def go(asked: CompareConfig, out: Path) -> tuple[list[Result], list[str]]:
    with log_messages() as messages:
        return run_comparison(asked, out, NoProgress()), messages


def figures(result: Result) -> dict[str, Any]:
    """Everything but times, memory and dates."""
    return result.model_dump(exclude={"seconds", "peak_host_bytes", "peak_device_bytes", "finished", "versions"})


def test_figures_are_those_of_single_runs_to_the_bit(tmp_path: Path, short_stories: Path, english_file: Path) -> None:
    asked = settings(short_stories, english_file, pattern=["2:4"], seeds=2, prompts=["Once upon a time"])
    results, messages = go(asked, tmp_path / "all")
    names = ["wanda", "alps+true_sequential+dense_target=0.4"]
    keys = [(m, p, s) for s in (0, 1) for p in ("0.5", "2:4") for m in names]
    assert [result.key for result in results] == [("dense", "", None), *keys]
    assert next(line for line in messages if line.startswith("Run")).startswith("Run 1 of 8: wanda 0.5, seed 0 ")
    dense = load(str(short_stories))
    for number, result in enumerate(results[1:]):
        single = prune_checkpoint(PruneConfig.model_validate(result.settings), tmp_path / f"one{number}", NoProgress())
        assert [(s.name, s.error, s.magnitude_error, s.zeros) for s in single.layers] == [
            (s.name, s.error, s.magnitude_error, s.zeros) for s in result.layers
        ]
        assert (single.calibration, single.mean_error) == (result.calibration, result.mean_error)
        loaded = load(str(tmp_path / f"one{number}"))
        found = evaluate(loaded, [str(english_file)], seqlen=64, windows=3, device="cpu", reference=dense)[0]
        (mine,) = result.evaluations
        assert mine.model_dump(exclude={"model"}) == found.model_dump(exclude={"model"})
        assert isinstance(mine, ComparisonRecord) and mine.kl > 0
        assert result.versions["torch"] == torch.__version__
    (first,) = results[0].evaluations
    assert first.loss == evaluate(dense, [str(english_file)], seqlen=64, windows=3)[0].loss
    shas = {r.calibration.sha256 for r in results[1:] if r.calibration}
    assert len(shas) == 2, "every seed draws windows of its own"
    assert all(r.continuations[0].prompt == "Once upon a time" and r.continuations[0].text for r in results)
    prompt = dense.tokenizer("Once upon a time", return_tensors="pt").input_ids
    model: Any = dense.model
    ids = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    assert results[0].continuations[0].text.startswith(dense.tokenizer.decode(ids))
    assert read_results(tmp_path / "all" / RESULTS_NAME) == results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["opt", "opt-postnorm", "gpt2"])
def test_the_dense_model_answers_once_and_figures_are_those_of_single_runs(
    tmp_path: Path,
    tiny_model: Callable[..., Any],
    word_tokenizer: Any,
    english_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: str,
) -> None:
    folder = tmp_path / "tiny"
    tiny_model(kind, getattr(torch, dtype)).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    # 40 windows of 64 tokens are two batches; the kept outputs of both are used by every run.
    asked = settings(folder, english_file, methods=["wanda", "sparsegpt"], windows=40)
    whole: list[int] = []
    real = CachedReferenceModel._run_model

    def counted(self: CachedReferenceModel, ids: torch.Tensor) -> Any:
        whole.append(len(ids))
        return real(self, ids)

    monkeypatch.setattr(CachedReferenceModel, "_run_model", counted)
    first, *results = go(asked, tmp_path / "all")[0]
    assert whole == [32, 8]
    dense = load(str(folder))
    assert first.evaluations[0].loss == evaluate(dense, [str(english_file)], seqlen=64, windows=40)[0].loss
    for number, result in enumerate(results):
        chosen = PruneConfig.model_validate(result.settings)
        prune_checkpoint(chosen, tmp_path / f"one{number}", NoProgress())
        loaded = load(str(tmp_path / f"one{number}"))
        (found,) = evaluate(loaded, [str(english_file)], seqlen=64, windows=40, device="cpu", reference=dense)
        (mine,) = result.evaluations
        assert mine.model_dump(exclude={"model", "reference"}) == found.model_dump(exclude={"model", "reference"})
        assert isinstance(mine, ComparisonRecord) and mine.kl > 0


def test_what_is_done_is_not_done_again_and_a_comparison_may_grow(
    tmp_path: Path, stories: Path, english_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "all"
    first, _ = go(settings(stories, english_file, methods=["wanda"]), out)
    ran: list[str] = []
    real = running.prune_model

    def counted(*arguments: Any, **more: Any) -> Any:
        ran.append(arguments[2].method.name)
        return real(*arguments, **more)

    monkeypatch.setattr("alps.evaluation.compare.prune_model", counted)
    more, messages = go(settings(stories, english_file, methods=["wanda", "magnitude"], sparsity=[0.5, 0.6]), out)
    assert sorted(ran) == ["magnitude", "magnitude", "wanda"] and not any("dense" in line for line in messages)
    assert more[:2] == first and len(more) == 5
    table = (out / TABLE_NAME).read_text()
    loss = {result.key: result.evaluations[0].perplexity for result in more}
    best = min((m for m in ("wanda", "magnitude")), key=lambda m: loss[m, "0.6", 0])
    assert f"**{loss[best, '0.6', 0]:.1f}**" in table and f"dense {loss['dense', '', None]:.2f}" in table


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "samples": ({"samples": 5}, "samples 4, not 5"),
    "eval": ({"eval_seqlen": 32}, "eval_seqlen 64, not 32"),
    "texts": ({"texts": ["python-docs"]}, "not ['python-docs']"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_conditions_are_refused_in_words(
    tmp_path: Path, short_stories: Path, english_file: Path, change: str
) -> None:
    out = tmp_path / "all"
    go(settings(short_stories, english_file, methods=["magnitude"]), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    changes, complaint = CHANGES[change]
    with pytest.raises(CheckpointError) as caught:
        go(settings(short_stories, english_file, methods=["wanda"], **changes), out)
    assert complaint in str(caught.value) and "another OUT" in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_text_or_model_that_changed_under_its_name_is_refused(
    tmp_path: Path, short_stories: Path, english: str
) -> None:
    text, other = tmp_path / "text.txt", tmp_path / "eval.txt"
    text.write_text(english)
    other.write_text(english[::-1] + english)
    asked = settings(short_stories, text, methods=["wanda"], texts=[str(other)])
    go(asked, tmp_path / "all")
    other.write_text(english)
    with pytest.raises(CheckpointError, match=r"another text 'eval\.txt'"):
        go(asked, tmp_path / "all")
    other.write_text(english[::-1] + english)
    text.write_text(english[5000:] + english)
    with pytest.raises(CheckpointError, match=r"another calibration 'text\.txt'"):
        go(asked, tmp_path / "all")
    text.write_text(english)
    path = tmp_path / "all" / RESULTS_NAME
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "model_sha256": "0" * 64}) + "\n" for line in lines))
    with pytest.raises(CheckpointError, match="another model"):
        go(asked, tmp_path / "all")


def test_a_kill_costs_one_run(tmp_path: Path, short_stories: Path, english_file: Path) -> None:
    """Kill -9 at random moments, a new start each time: the same lines in the end as without."""
    asked = settings(short_stories, english_file, methods=["magnitude", "wanda", "sparsegpt"], sparsity=[0.5, 0.6, 0.7])
    config, out = tmp_path / "c.yaml", tmp_path / "killed"
    config.write_text(asked.to_yaml())
    command = ("compare", "--config", config, out)
    environment = {"COLUMNS": "200", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    kept = 0
    for _ in range(3):
        running = start(*command, environment=environment)
        limit = time.monotonic() + 60
        while running.poll() is None and time.monotonic() < limit:
            if (out / RESULTS_NAME).exists() and len((out / RESULTS_NAME).read_text().splitlines()) >= kept + 3:
                break
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        found = read_results(out / RESULTS_NAME)
        assert kept < len(found) < 10
        kept = len(found)
    done = run(*command, environment=environment)
    assert done.returncode == 0, done.stderr
    assert f"Run 1 of {10 - kept}:" in done.stderr and "## Perplexity on" in done.stdout
    expected, _ = go(asked, tmp_path / "whole")
    found = read_results(out / RESULTS_NAME)
    assert [figures(r) for r in found] == [figures(r) for r in expected]
    assert {path.name for path in out.iterdir() if ".partial-" in path.name} == set()


def test_a_run_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, short_stories: Path, english_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise SolveFailed("the Hessian is singular")

    with monkeypatch.context() as patch:
        patch.setattr(SparseGPT, "prepare", broken)
        with (
            log_messages() as messages,
            pytest.raises(SolveFailed, match=r"1 of 3 runs failed, first sparsegpt 0\.5, seed 0: Layer .*singular"),
        ):
            run_comparison(
                settings(short_stories, english_file, methods=["wanda", "sparsegpt", "magnitude"]),
                tmp_path / "all",
                NoProgress(),
            )
    assert any(line.startswith("Failed, and the other runs continue: sparsegpt") for line in messages)
    kept = read_results(tmp_path / "all" / RESULTS_NAME)
    assert [result.method for result in kept] == ["dense", "wanda", "magnitude"]


def test_two_at_once_and_foreign_directories_are_refused(
    tmp_path: Path, short_stories: Path, english_file: Path
) -> None:
    asked = settings(short_stories, english_file, methods=["magnitude"])
    (tmp_path / "busy").mkdir()
    with FileLock(tmp_path / "busy" / ".lock"), pytest.raises(CheckpointError, match="Another process is at work"):
        go(asked, tmp_path / "busy")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="holds something else"):
        go(asked, tmp_path / "mine")
    with pytest.raises(CheckpointError, match="is a file"):
        go(asked, tmp_path / "mine" / "thesis.txt")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no pattern": ({"sparsity": []}, "There is no pattern"),
    "nothing to measure": ({"texts": []}, "nothing to measure"),
    "twice": ({"sparsity": [0.5, 0.5]}, "occurs twice"),
    "method": ({"methods": ["wandaa"]}, "Did you mean 'wanda'"),
    "setting": ({"methods": ["wanda+refitt"]}, "Did you mean 'refit'"),
    "value": ({"methods": ["alps+dense_target=2"]}, "Setting 'dense_target'"),
    "sparsity": ({"sparsity": [1.5]}, "1.5"),
    "pattern": ({"pattern": ["2-4"]}, "2-4"),
    "misfit": ({"pattern": ["2:4", "4:8"]}, "4:8 does not divide the number of inputs of model.layers.0.mlp.down_proj"),
    "budget": ({"methods": ["alps+allocation=owl"], "sparsity": [], "pattern": ["2:4"]}, "Allocation 'owl'"),
    "task data": ({"task_data": "x"}, "--task-data has no effect"),
    "device": ({"device": "cuda:77"}, "cuda:77"),
    "samples": ({"samples": 10**6}, "enough for"),
    "model": ({"model": "./nowhere"}, "nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_one_sentence_and_leave_nothing(
    tmp_path: Path, short_stories: Path, english_file: Path, case: str
) -> None:
    changes, complaint = WRONG[case]
    with pytest.raises(AlpsError) as caught:
        go(settings(short_stories, english_file, **changes), tmp_path / "all")
    assert complaint in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "all").exists()


def test_calibration_text_is_read_once(
    tmp_path: Path, short_stories: Path, english_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(name: str, purpose: str) -> Any:
        read.append(purpose)
        return load_text(name, purpose)  # type: ignore[arg-type]

    for module in ("alps.data.mixture", "alps.data.loaded_model"):
        monkeypatch.setattr(f"{module}.load_text", counted)
    go(settings(short_stories, english_file, seeds=2), tmp_path / "all")
    assert read == ["calibration", "evaluation"]
