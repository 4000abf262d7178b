"""The command that shrinks: end to end, its dry run, settings from YAML, and inputs that are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alps.cli.main import app
from helpers.cli_process import run_group
from helpers.command_line import contents, run_alps
from helpers.decoders import decoder


def test_shrink_then_eval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], short_stories: Path, text: Path
) -> None:
    out = text.parent / "small"
    sizes = ["--samples", 4, "--seqlen", 32, "--calibration", text]
    assert run_alps(monkeypatch, "shrink", short_stories, out, "--mlp-width", 160, "--dry-run", *sizes) == 0
    dry = capsys.readouterr()
    assert contents(text.parent) == ["text.txt"]
    assert "Config: intermediate_size 172 -> 160." in dry.out and "Nothing was shrunk or written." in dry.out
    assert run_alps(monkeypatch, "shrink", short_stories, out, "--mlp-width", 160, *sizes) == 0
    printed = capsys.readouterr()
    # What is announced before the run is what the dry run says, and what the summary says afterwards.
    for line in dry.out.splitlines()[:-1]:
        assert line in printed.err
    assert "fewer): intermediate_size 172 -> 160." in printed.out and f"Written to {out}" in printed.out
    assert "2/2" in printed.err
    assert run_alps(monkeypatch, "eval", out, "--text", text, "--seqlen", 32, "--reference", short_stories) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert 0 < row["kl"] < 0.1
    assert run_alps(monkeypatch, "inspect", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == 0


def test_yaml_settings_are_read_and_overridden(
    monkeypatch: pytest.MonkeyPatch, short_stories: Path, text: Path
) -> None:
    run = text.parent / "run.yaml"
    run.write_text(f"mlp: 0.25\nsamples: 4\nseqlen: 32\ncalibration: {text}\n")
    assert run_alps(monkeypatch, "shrink", short_stories, text.parent / "a", "--config", run, "--mlp-width", 160) == 0
    report = json.loads((text.parent / "a" / "shrink.json").read_text())
    assert report["after"]["fields"] == {"intermediate_size": 160} and report["calibration"]["windows"] == 4


WRONG: dict[str, tuple[list[str], str]] = {
    "nothing to remove": ([], "Nothing is to be removed"),
    "two ways at once": (["--mlp", "0.25", "--mlp-width", "64"], "--mlp and --mlp-width say the same in two ways"),
    "blocks in two ways": (["--blocks", "1", "--drop-blocks", "2"], "--blocks and --drop-blocks say the same"),
    "a speed and a share": (["--speedup", "1.2", "--mlp", "0.25"], "--speedup chooses what to remove: leave --mlp out"),
    "a speed that is slower": (["--speedup", "0.9"], "'speedup'"),
    "a speed in an unknown runtime": (["--speedup", "1.2", "--runtime", "vllm"], "Runtime 'vllm' is unknown"),
    "everything stays": (["--mlp-width", "172"], "Nothing would be removed"),
    "more width than there is": (["--mlp-width", "200"], "200 MLP channels cannot be kept of 172"),
    "more heads than there are": (["--num-heads", "9"], "9 query heads cannot be kept of 8"),
    "more KV groups than there are": (["--kv-groups", "5"], "5 KV groups cannot be kept of 4"),
    "heads that share unequally": (["--num-heads", "6"], "6 query heads cannot share 4 KV heads equally"),
    "a share that rounds to nothing": (["--mlp", "0.01"], "--mlp 0.01 of 172 rounds to nothing in multiples of 64"),
    "a share of heads that rounds to nothing": (["--heads", "0.1"], "rounds to nothing"),
    "a block out of range": (["--drop-blocks", "5"], "--drop-blocks names block 5, and the model has 5, from 0 on"),
    "a negative block": (["--drop-blocks=-1"], "'drop_blocks"),
    "a block twice": (["--drop-blocks", "2,2"], "--drop-blocks names a block twice"),
    "a word for a block": (["--drop-blocks", "two"], "'drop_blocks"),
    "all blocks": (["--drop-blocks", "0,1,2,3,4"], "cannot be kept"),
    "too many blocks": (["--blocks", "2"], "2 blocks cannot be removed of 5"),
    "experts of a dense model": (["--mlp", "0.25", "--experts", "0.25"], "--experts is for mixtures of experts"),
    "share of 1": (["--mlp", "1"], "'mlp'"),
    "unknown family": (["--mlp", "0.25", "{tmp}/unknown"], "Structure cannot be removed from models of type"),
    "heads that cannot go": (["--num-heads", "2", "{tmp}/gpt2"], "Heads of 'gpt2' models cannot be removed"),
    "missing path": (["--mlp", "0.25", "{tmp}/nowhere"], "does not exist"),
    "OUT not empty": (["--mlp", "0.25", "{model}", "{tmp}"], "not empty"),
    "OUT a file": (["--mlp", "0.25", "{model}", "{text}"], "is a file"),
    "missing text": (["--mlp", "0.25", "--calibration", "{tmp}/no.txt"], "no.txt"),
    "unreadable text": (["--mlp", "0.25", "--calibration", "{tmp}/binary.txt"], "binary.txt"),
    "too little text": (["--mlp", "0.25", "--calibration", "{tmp}/short.txt"], "short"),
    "too long windows": (["--mlp", "0.25", "--seqlen", "4096"], "4096"),
    "one window": (["--mlp", "0.25", "--samples", "1"], "'samples'"),
    "unknown device": (["--mlp", "0.25", "--device", "quantum"], "cannot be used here"),
    "unknown dtype": (["--mlp", "0.25", "--dtype", "int3"], "is unknown"),
    "unknown preset": (["--mlp", "0.25", "--preset", "bset"], "Did you mean 'best'?"),
    "nothing to resume": (["--mlp", "0.25", "--resume"], "There is nothing to resume"),
    "unknown key": (["--mlp", "0.25", "--config", "{tmp}/typo.yaml"], "Did you mean 'samples'?"),
}


@pytest.fixture(scope="module")
def others(tiny_model: Callable[..., Any], word_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of models that cannot lose what is to go."""
    folder = tmp_path_factory.mktemp("others")
    models = {"gpt2": tiny_model("gpt2"), "unknown": decoder("mamba")}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        word_tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_one_sentence_and_write_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stories: Path,
    others: Path,
    text: Path,
    case: str,
) -> None:
    folder = text.parent
    (folder / "typo.yaml").write_text("sample: 3\n")
    (folder / "short.txt").write_text("Once upon a time.")
    (folder / "binary.txt").write_bytes("Il était une fois. ".encode("latin-1") * 400)
    for name in ("gpt2", "unknown"):
        (folder / name).symlink_to(others / name)
    before = contents(folder)
    words, expected = WRONG[case]
    filled = [word.format(tmp=folder, model=stories, text=text) for word in words]
    places = [word for index, word in enumerate(filled) if index and _is_place(filled, index)]
    options = [word for index, word in enumerate(filled) if not (index and _is_place(filled, index))]
    model, out = [*places, *[str(stories), f"{folder}/out"][len(places) :]]
    defaults = ["--calibration", str(text), "--samples", "4", "--seqlen", "64"]
    # The calibration is the first work of a run.
    monkeypatch.setattr("alps.pruning.shrink_job.shrink_blocks", _fail)
    monkeypatch.setattr("alps.pruning.shrink_choice.choose_removals", _fail)
    assert run_alps(monkeypatch, "shrink", model, out, *defaults, *options) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Error: ") and printed.err.count("\n") == 1, printed.err
    assert expected in printed.err
    assert contents(folder) == before


def _is_place(words: list[str], index: int) -> bool:
    """Check if a word is MODEL or OUT: a path that does not follow an option which takes one."""
    return words[index].startswith("/") and words[index - 1] not in ("--calibration", "--config")


def _fail(*_args: object, **_settings: object) -> None:
    raise AssertionError("the run has begun")


def test_help_lists_the_command_and_its_panels() -> None:
    assert "shrink" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    printed = CliRunner().invoke(app, ["shrink", "--help"], env={"COLUMNS": "200"}).output
    panels = ["What to prune", "How", "Calibration", "Resources", "Output"]
    assert [printed.index(f"─ {panel} ─") for panel in panels] == sorted(printed.index(f"─ {p} ─") for p in panels)
    assert all(f"--{name}" in printed for name in ("mlp-width", "kv-groups", "drop-blocks", "align", "dry-run"))


def test_a_dry_run_takes_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("alps.core.launch.is_distributed", lambda: True)
    assert run_alps(monkeypatch, "shrink", "m", "o", "--mlp", 0.25, "--dry-run") == 2
    assert "alps shrink --dry-run runs in one process" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0, 1])
def test_two_processes_write_the_bits_of_one(epochs: int, stories: Path, english_file: Path, tmp_path: Path) -> None:
    options = ["--mlp", 0.25, "--num-heads", 4, "--blocks", 1, "--reconstruct-epochs", epochs]
    sizes = ["--calibration", english_file, "--samples", 16, "--seqlen", 32]
    for size in (1, 2, 3):
        done = run_group(size, "shrink", stories, tmp_path / str(size), *options, *sizes)
        assert [process.returncode for process in done] == [0] * size, done
        assert sum("Written to" in process.stdout for process in done) == 1
    reports = [json.loads((tmp_path / str(size) / "shrink.json").read_text()) for size in (1, 2, 3)]
    kept = [[cut["kept"] for block in report["blocks"] for cut in block["cuts"]] for report in reports]
    assert kept[0] == kept[1] == kept[2]
    weights = [(tmp_path / str(size) / "model.safetensors").read_bytes() for size in (1, 2, 3)]
    if not epochs:
        assert weights[0] == weights[1] == weights[2]
    for report in reports[1:]:
        for block, alone in zip(report["blocks"], reports[0]["blocks"], strict=True):
            assert block["error"] == pytest.approx(alone["error"], rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_at_random_moments_lose_nothing(stories: Path, english_file: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"mlp: 0.25\nnum_heads: 4\nblocks: 1\nreconstruct_epochs: 1\nsamples: 16\nseqlen: 32\n"
        f"calibration: {english_file}\n"
    )
    script = Path(__file__).parents[1] / "helpers" / "kill_points.py"
    command = [sys.executable, script, stories, tmp_path / "runs", settings, "--kills", "12", "--command", "shrink"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["equal"] and outcome["leftovers"] == [] and sum(outcome["kills"].values()) >= 12
    assert outcome["kills"]["while a file was written"] >= 1
    assert any(key.startswith("after") and key.endswith("blocks") for key in outcome["kills"])
