"""A run that was killed, stopped or ran out of room goes on after its last finished block, to the same bits."""

from __future__ import annotations

import json
import re
import resource
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

import alps
from alps.checkpoints.journal import Journal, journal_directory
from alps.core.errors import CheckpointError, SolveFailed
from alps.core.progress import NoProgress
from alps.data.loaded_model import load
from alps.data.text_sources import load_text
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.models.load import load_tokenizer
from alps.pruning.config import PruneConfig, load_prune_config
from alps.pruning.job import prune_checkpoint
from alps.pruning.presets import PRESETS
from alps.reporting.run_report import RunReport
from alps.solvers import Method
from alps.solvers.wanda import Wanda
from helpers import cli_process as started
from helpers.decoders import decoder
from helpers.log_messages import log_messages


class _Plain(Method):
    """Wanda, by a class that says nothing of itself."""

    name, needs = Wanda().name, Wanda().needs

    def prepare(self, stats: Any) -> Any:
        return Wanda().prepare(stats)

    def prune_matrix(self, *arguments: Any) -> Any:
        return Wanda().prune_matrix(*arguments)


@pytest.fixture
def settings(stories: Path, english_file: Path) -> dict[str, Any]:
    """A run of a second that goes all ways: both streams, a budget, matching."""
    return {
        "model": str(stories),
        "sparsity": 0.7,
        "method": "sparsegpt",
        "true_sequential": True,
        "dense_target": 0.4,
        "reconstruct_epochs": 1,
        "calibration": str(english_file),
        "samples": 8,
        "seqlen": 32,
    }


def _prune(settings: dict[str, Any], out: Path, **changed: Any) -> RunReport:
    resume = changed.pop("resume", False)
    chosen = PruneConfig.model_validate({**settings, **changed})
    return prune_checkpoint(chosen, out, NoProgress(), resume=resume)


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def _stop_after(blocks: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run fail when it has kept so many blocks."""
    keep = Journal.save_tensors

    def failing(self: Journal, index: int, *rest: Any) -> None:
        if index == blocks:
            raise error
        keep(self, index, *rest)

    monkeypatch.setattr(Journal, "save_tensors", failing)


@pytest.mark.parametrize(
    ("blocks", "changed"),
    [
        (1, {}),
        (3, {"method": "alps", "allocation": "sensitivity"}),
        (4, {"method": "magnitude", "reconstruct_epochs": 0}),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    blocks: int, changed: dict[str, Any], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _prune(settings, tmp_path / "whole", **changed)
    with monkeypatch.context() as patch:
        _stop_after(blocks, KeyboardInterrupt(), patch)
        with pytest.raises(
            KeyboardInterrupt, match=f"Interrupted. {blocks} finished blocks are kept in '.*out.partial'"
        ):
            _prune(settings, tmp_path / "out", **changed)
    assert not (tmp_path / "out").exists()
    report = _prune(settings, tmp_path / "out", **changed, resume=True)
    assert _weights(tmp_path / "out") == _weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    # A solver's record holds the time it took.
    assert [s.model_copy(update={"solve": {}}) for s in report.layers] == [
        s.model_copy(update={"solve": {}}) for s in whole.layers
    ]
    assert report.reconstructions == whole.reconstructions
    assert report.seconds.keys() == whole.seconds.keys()


def test_a_planned_budget_outlives_an_interrupt_before_the_first_block(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"method": "magnitude", "allocation": "sensitivity", "reconstruct_epochs": 0}
    _prune(settings, tmp_path / "whole", **chosen)
    with monkeypatch.context() as patch:
        _stop_after(0, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt, match=r"Interrupted\. The allocation is kept in '.*out\.partial'"):
            _prune(settings, tmp_path / "out", **chosen)
        with pytest.raises(KeyboardInterrupt, match=r"^$"):  # nothing is kept where nothing was planned
            _prune(settings, tmp_path / "uniform", method="magnitude", reconstruct_epochs=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "whole"]
    monkeypatch.setattr("alps.pruning.pipeline.allocate_sparsity", Mock(side_effect=AssertionError("planned again")))
    with log_messages() as messages:
        _prune(settings, tmp_path / "out", **chosen)
    assert f"Resuming after the allocation, kept in '{journal_directory(tmp_path / 'out')}'." in messages
    assert _weights(tmp_path / "out") == _weights(tmp_path / "whole")


@pytest.mark.parametrize("given", ["text", "token ids"])
def test_python_goes_on_after_the_last_finished_block_too(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    model, text, sizes = settings["model"], settings["calibration"], {"samples": 6, "seqlen": 48}
    windows = load(model).calibration(load_text(text, "calibration"), 6, 48, 0).ids
    chosen: dict[str, Any] = {"calibration": windows if given == "token ids" else text, "preset": "best", **sizes}
    # A method that is no dataclass, and so has no words of its own, is known again all the same.
    whole = alps.prune(model, sparsity=0.6, method=_Plain(), out=tmp_path / "whole", **chosen)
    with monkeypatch.context() as patch:
        _stop_after(3, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt, match=r"3 finished blocks are kept in '.*out\.partial'"):
            alps.prune(model, sparsity=0.6, method=_Plain(), out=tmp_path / "out", **chosen)
    with pytest.raises(
        CheckpointError, match=re.escape(f"dense_target was {PRESETS['best']['dense_target']} and is 0.2")
    ):
        alps.prune(model, sparsity=0.6, method=_Plain(), out=tmp_path / "out", **{**chosen, "dense_target": 0.2})
    other = windows.flip(0) if given == "token ids" else text
    if given == "token ids":
        with pytest.raises(CheckpointError, match="calibration_sha256 was"):
            alps.prune(model, sparsity=0.6, method=_Plain(), out=tmp_path / "out", **{**chosen, "calibration": other})
    report = alps.prune(model, sparsity=0.6, method=_Plain(), out=tmp_path / "out", **chosen)
    assert _weights(tmp_path / "out") == _weights(tmp_path / "whole")
    assert report.reconstructions == whole.reconstructions and report.calibration == whole.calibration
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("kind", ["gemma4", "zaya"])
def test_values_that_blocks_hand_on_are_the_same_after_an_interrupt(
    kind: str, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last blocks read keys, values and router states of blocks that an earlier process finished."""
    decoder(kind).save_pretrained(tmp_path / "dense")
    load_tokenizer(str(stories)).save_pretrained(tmp_path / "dense")
    ids = torch.randint(2, 60, (6, 16), generator=torch.Generator().manual_seed(3))
    chosen: dict[str, Any] = {"sparsity": 0.6, "method": "wanda", "preset": "best", "calibration": ids}
    alps.prune(tmp_path / "dense", out=tmp_path / "whole", **chosen)
    with monkeypatch.context() as patch:
        _stop_after(3, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt, match="3 finished blocks are kept"):
            alps.prune(tmp_path / "dense", out=tmp_path / "out", **chosen)
    alps.prune(tmp_path / "dense", out=tmp_path / "out", **chosen, resume=True)
    assert _weights(tmp_path / "out") == _weights(tmp_path / "whole")


def test_finished_blocks_are_not_solved_again(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {**settings, "method": "wanda", "reconstruct_epochs": 0}
    with monkeypatch.context() as patch:
        _stop_after(3, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            _prune(chosen, tmp_path / "out")
    solved = []
    solve = Wanda.solve

    def count(self: Wanda, *rest: Any) -> Any:
        solved.append(rest)
        return solve(self, *rest)

    monkeypatch.setattr(Wanda, "solve", count)
    _prune(chosen, tmp_path / "out")
    assert len(solved) == 2 * 7  # of five blocks


@pytest.mark.parametrize(
    ("constant", "other", "words"),
    [
        (
            "alps.pruning.config.ReconstructionParameters",
            partial(ReconstructionParameters, lr=3e-4),
            r"reconstruct_steps was 0\.001 on 512 tokens and is 0\.0003 on 512 tokens",
        ),
        (
            "alps.pruning.config.ReconstructionParameters",
            partial(ReconstructionParameters, max_distinct_tokens=1024),
            "reconstruct_tokens was 98304 at most, 32768 distinct and is 98304 at most, 1024 distinct",
        ),
        ("alps.pruning.job.PRIOR_TOKENS", 1024, "dense_target_prior_tokens was 16384 and is 1024"),
        ("alps.pruning.job.ROW_WEIGHT_TOKENS", 64, "row_weight_tokens was 4096 and is 64"),
    ],
)
def test_another_versions_constants_are_refused(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: str, other: Any, words: str
) -> None:
    with monkeypatch.context() as patch:
        _stop_after(2, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            _prune(settings, tmp_path / "out", row_weights="block-output")
    monkeypatch.setattr(constant, other)
    with pytest.raises(CheckpointError, match=words):
        _prune(settings, tmp_path / "out", row_weights="block-output")


def test_another_configuration_is_refused(
    settings: dict[str, Any], tmp_path: Path, english: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _stop_after(2, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            _prune(settings, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"sparsity was 0\.7 and is 0\.6, seed was 0 and is 3"):
        _prune(settings, tmp_path / "out", sparsity=0.6, seed=3)
    (tmp_path / "other.txt").write_text(english[::-1])
    with pytest.raises(CheckpointError, match="calibration_sha256 was"):
        _prune(settings, tmp_path / "out", calibration=str(tmp_path / "other.txt"))
    assert len(list(journal_directory(tmp_path / "out").glob("block-*.json"))) == 2
    _prune(settings, tmp_path / "out", offload=True)  # computes the same


def test_a_failed_solve_says_what_is_kept(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_after(2, SolveFailed("Site x: no."), monkeypatch)
    with pytest.raises(SolveFailed, match=r"Site x: no\. 2 finished blocks are kept in .*: the same command"):
        _prune(settings, tmp_path / "out")


def test_a_damaged_block_is_refused(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        _stop_after(2, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            _prune(settings, tmp_path / "out")
    block = journal_directory(tmp_path / "out") / "block-00001.safetensors"
    block.write_bytes(block.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"block-00001\.safetensors' cannot be read"):
        _prune(settings, tmp_path / "out")


@pytest.mark.parametrize("kills", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_nothing(kills: int, settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "runs").mkdir()
    script = Path(__file__).parents[1] / "helpers" / "kill_points.py"
    arguments = (settings["model"], tmp_path / "runs", tmp_path / "settings.yaml", "--kills", kills)
    done = started.run_script(script, *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["equal"] and found["leftovers"] == []
    assert sum(found["kills"].values()) >= kills
    assert found["kills"]["while a file was written"] >= kills // 10
    assert any(key.startswith("after") and key.endswith("blocks") for key in found["kills"])


def _arguments(settings: dict[str, Any], out: Path) -> list[str]:
    options: list[str] = []
    for key, value in settings.items():
        if key != "model":
            options += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return ["prune", settings["model"], str(out), *options]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_run_in_a_sentence(
    number: signal.Signals, code: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    # Some seconds if nothing stops it: the signal must not come after the end.
    chosen = {**settings, "method": "alps", "samples": 32, "reconstruct_epochs": 20}
    running = started.start(*_arguments(chosen, tmp_path / "out"))
    place = journal_directory(tmp_path / "out")
    deadline = time.monotonic() + 120
    while not (place / "block-00000.json").is_file() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(number)
    _, words = running.communicate(timeout=60)
    assert running.returncode == code, words
    last = words.strip().splitlines()[-1]
    assert last.startswith("Interrupted.") and "the same command resumes there" in last
    assert "Traceback" not in words
    assert not (tmp_path / "out").exists() and (place / "block-00000.json").is_file()


def _small_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    _prune(settings, tmp_path / "whole")
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size

    # Blocks fit, the checkpoint does not: as if the disk had filled up on the way.
    done = started.run(*_arguments(settings, tmp_path / "out"), prepare=partial(_small_files, size // 2))
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "cannot be written: File too large. 5 finished blocks are kept in" in last
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "whole"]
    _prune(settings, tmp_path / "out")
    assert _weights(tmp_path / "out") == _weights(tmp_path / "whole")


def test_settings_that_change_nothing_are_not_in_the_fingerprint() -> None:
    base = {"model": "m", "sparsity": 0.5}
    one = load_prune_config(None, base).fingerprint_fields()
    assert load_prune_config(None, {**base, "offload": True, "device": "cpu", "model": "n"}).fingerprint_fields() == one
    assert load_prune_config(None, {**base, "preset": "fast"}).fingerprint_fields() != one
