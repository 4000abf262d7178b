"""`alps shrink` by name: a plain checkpoint, the same bits whatever happens, and nothing else on the disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alps.checkpoints.journal import journal_directory
from alps.core.errors import CheckpointError, ConfigError
from alps.core.progress import NoProgress
from alps.pruning import shrink_choice, shrink_job
from alps.pruning.shrink_config import ShrinkConfig, load_shrink_config
from alps.pruning.shrink_job import plan_shrink, shrink_checkpoint
from alps.pruning.shrink_pipeline import ShrinkRun, shrink_blocks
from alps.reporting.shrink_report import ShrinkReport
from helpers.log_messages import log_messages
from helpers.shrink_runs import EVERYTHING, comparable, run_shrink, stop_after, weight_bytes


@pytest.fixture(scope="module")
def settings(stories: Path, english: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_text(english)
    return {"model": str(stories), "calibration": str(path), **EVERYTHING}


@pytest.fixture(scope="module")
def runs() -> list[ShrinkRun]:
    """The run behind `whole`, once that is done."""
    return []


@pytest.fixture(scope="module")
def whole(
    settings: dict[str, Any], runs: list[ShrinkRun], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, ShrinkReport]]:
    """An undisturbed run, and its report."""
    folder, original = tmp_path_factory.mktemp("shrunk"), shrink_blocks

    def spy(run: ShrinkRun, windows: Any) -> Any:
        runs.append(run)
        result = original(run, windows)
        assert all(parameter.is_meta for parameter in run.shrunk.model.parameters()), "a block was not freed"
        assert all(parameter.is_meta for block in run.blocks for parameter in block.module.parameters())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shrink_job, "shrink_blocks", spy)
        report = run_shrink(settings, folder / "out")
    assert [path.name for path in folder.iterdir()] == ["out"]
    yield folder / "out", report


def test_the_result_is_a_plain_checkpoint(whole: tuple[Path, ShrinkReport], stories: Path) -> None:
    out, _ = whole
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(3, 40)[None]
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = [model.generate(ids, use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*tokens) and tokens[0].shape == (1, 37 + 12)
    assert AutoTokenizer.from_pretrained(out)("once upon").input_ids
    names = {"config.json", "generation_config.json", "model.safetensors", "shrink.json", "README.md", "alps.yaml"}
    assert {path.name for path in out.iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (stories, out))
    assert before.keys() == after.keys()
    assert {name: value for name, value in after.items() if value != before[name]} == {
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    # Character by character: no other line of the file changes.
    lines = [(folder / "config.json").read_text().splitlines() for folder in (stories, out)]
    assert sum(one != other for one, other in zip(*lines, strict=True)) == 4


def test_weights_that_are_not_cut_keep_their_bits(whole: tuple[Path, ShrinkReport], stories: Path) -> None:
    """Norms are trained by the reconstruction; embeddings and the last norm are not."""
    out, report = whole
    written, dense = load_file(out / "model.safetensors"), load_file(stories / "model.safetensors")
    outside = [name for name in dense if ".layers." not in name]
    assert outside and all(torch.equal(written[name], dense[name]) for name in outside)
    assert written.keys() == {name for name in dense if ".layers.4." not in name}
    assert sum(tensor.numel() for tensor in written.values()) == report.after.parameters
    assert sum(tensor.numel() for tensor in dense.values()) == report.before.parameters


def test_the_report_says_what_was_kept(whole: tuple[Path, ShrinkReport]) -> None:
    out, report = whole
    assert ShrinkReport.read(out) == report
    assert [block.block for block in report.blocks] == [0, 1, 3, 4]
    assert [removal.block for removal in report.removals] == [2] and (report.removals[0].kl or 0) > 0
    for block in report.blocks:
        heads, channels = block.cuts
        assert (heads.unit, len(heads.kept), heads.total) == ("kv_head", 2, 4)
        assert (channels.unit, len(channels.kept), channels.total) == ("channel", 128, 172)
        assert heads.tokens == channels.tokens == 8 * 32
        assert 0 < heads.error < 1 and 0 < channels.error < 1 and 0 < block.error < 1
        assert block.reconstruction is not None and block.reconstruction.after < block.reconstruction.before
    assert report.before.kv_bytes == 2 * 4 * 8 * 5 * 4 and report.after.kv_bytes == 2 * 2 * 8 * 4 * 4
    assert report.calibration.seed == 0 and report.calibration.windows == 8
    assert {"load", "removal", "capture", "cut", "reconstruct", "forward", "journal", "save"} < report.seconds.keys()


def test_no_block_of_either_model_stays_in_memory(whole: tuple[Path, ShrinkReport], runs: list[ShrinkRun]) -> None:
    """The run of `whole` has looked at every parameter when its last block was done."""
    (run,) = runs
    assert len(run.shrunk.blocks) == 4 and len(run.blocks) == 5
    assert not run.model.training


@pytest.mark.parametrize("blocks", [3, *(pytest.param(count, marks=pytest.mark.slow) for count in (0, 1, 2))])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    blocks: int,
    settings: dict[str, Any],
    whole: tuple[Path, ShrinkReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    words = f"{blocks} finished blocks are" if blocks else "The choice of blocks or experts is"
    with monkeypatch.context() as patch:
        stop_after(blocks, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt, match=rf"Interrupted\. {words} kept in '.*out\.partial'"):
            # The first blocks are computed with all activations in files, the others in memory.
            run_shrink(settings, out, activation_memory=0.0, offload=True)
    assert not out.exists()
    monkeypatch.setattr(shrink_choice, "choose_removals", Mock(side_effect=AssertionError("chosen again")))
    with log_messages() as messages:
        report = run_shrink(settings, out, resume=True)
    assert any(message.startswith("Resuming after") for message in messages)
    assert weight_bytes(out) == weight_bytes(whole[0])
    assert comparable(report) == comparable(whole[1])
    assert report.seconds.keys() == whole[1].seconds.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_activations_in_files_give_the_same_bits(
    settings: dict[str, Any], whole: tuple[Path, ShrinkReport], tmp_path: Path
) -> None:
    report = run_shrink(settings, tmp_path / "out", activation_memory=0.0, offload=True)
    assert weight_bytes(tmp_path / "out") == weight_bytes(whole[0])
    assert comparable(report) == comparable(whole[1])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_saved_settings_repeat_the_run(
    whole: tuple[Path, ShrinkReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before its first block was kept, and resumed with the blocks that were chosen."""
    config = load_shrink_config(whole[0] / "alps.yaml", {})
    with monkeypatch.context() as patch:
        stop_after(0, KeyboardInterrupt(), patch)
        with pytest.raises(
            KeyboardInterrupt, match=r"Interrupted\. The choice of blocks or experts is kept in '.*out\.partial'"
        ):
            shrink_checkpoint(config, tmp_path / "out", NoProgress())
    monkeypatch.setattr(shrink_choice, "choose_removals", Mock(side_effect=AssertionError("chosen again")))
    shrink_checkpoint(config, tmp_path / "out", NoProgress())
    assert weight_bytes(tmp_path / "out") == weight_bytes(whole[0])
    # All files but the report, with its times, and the card, with its versions.
    for path in whole[0].iterdir():
        if path.name != "shrink.json":
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_another_run_is_refused_and_the_journal_stays(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {**settings, "reconstruct_epochs": 0, "blocks": None, "num_heads": None, "kv_groups": None}
    with monkeypatch.context() as patch:
        stop_after(1, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            run_shrink(plain, tmp_path / "out")
    for changes, words in (
        ({"mlp": 0.5}, r"mlp was 0\.25 and is 0\.5"),
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"reconstruct_epochs": 1}, "reconstruct_epochs was 0 and is 1"),
        ({"drop_blocks": [2]}, re.escape("drop_blocks was [] and is [2]")),
    ):
        with pytest.raises(CheckpointError, match=words):
            run_shrink(plain, tmp_path / "out", **changes)
    assert len(list(journal_directory(tmp_path / "out").glob("block-*.json"))) == 1
    with pytest.raises(CheckpointError, match="There is nothing to resume"):
        run_shrink(plain, tmp_path / "other", resume=True)


def test_a_dry_run_says_the_same_fields_and_writes_nothing(
    settings: dict[str, Any], whole: tuple[Path, ShrinkReport], tmp_path: Path
) -> None:
    lines = plan_shrink(ShrinkConfig.model_validate(settings), tmp_path / "out")
    report = whole[1]
    fields = ", ".join(f"{name} {report.before.fields[name]} -> {new}" for name, new in report.after.fields.items())
    assert lines[0] == f"Config: {fields}."
    assert f"{report.before.parameters:,} -> {report.after.parameters:,} " in lines[1]
    assert lines[2] == f"Key-value cache: {report.before.kv_bytes:,} -> {report.after.kv_bytes:,} bytes a token."
    assert lines[-1] == "Nothing was shrunk or written." and list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="4096"):
        plan_shrink(ShrinkConfig.model_validate({**settings, "seqlen": 4096}), tmp_path / "out")
