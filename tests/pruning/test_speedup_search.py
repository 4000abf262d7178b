"""`alps shrink --speedup`: the best of the measured mixes is made, and an interrupted search goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from alps.cli.tables import shrink_summary
from alps.core.errors import ConfigError
from alps.core.progress import NoProgress
from alps.pruning import shrink_choice, speedup_search
from alps.pruning.shrink_config import ShrinkConfig
from alps.pruning.shrink_job import plan_shrink, shrink_checkpoint
from alps.reporting.shrink_report import ShrinkReport, SpeedupRecord
from helpers.fake_runtime import FakeRuntime
from helpers.log_messages import log_messages
from helpers.shrink_runs import comparable, weight_bytes

_DENSE = (5, 172, 8)
_WANTED = 1.35


@pytest.fixture(scope="module")
def windows(stories: Path, english: str) -> Tensor:
    """Sixteen windows of 32 tokens; a quarter of them is held out."""
    return torch.tensor(AutoTokenizer.from_pretrained(stories)(english).input_ids[: 16 * 32]).view(16, 32)


def _run(stories: Path, windows: Tensor, out: Path, runtime: FakeRuntime, **settings: Any) -> ShrinkReport:
    config = ShrinkConfig.model_validate({"model": str(stories), "speedup": _WANTED, **settings})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shrink_choice, "open_runtime", lambda *_: runtime)
        return shrink_checkpoint(config, out, NoProgress(), token_ids=windows)


@pytest.fixture(scope="module")
def resumed(
    stories: Path, windows: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, ShrinkReport]]:
    """A run that was interrupted before its second candidate, and its report."""
    folder, measure = tmp_path_factory.mktemp("shrunk"), speedup_search._measure_candidate
    calls, runtime = list[Any](), FakeRuntime()

    def interrupted(*args: Any) -> float:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speedup_search, "_measure_candidate", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"The search for a speed is kept in '.*': the same command"):
            _run(stories, windows, folder / "out", FakeRuntime())
        assert [path.name for path in folder.iterdir()] == ["out.partial"]
        report = _run(stories, windows, folder / "out", runtime)
    assert report.speedup is not None
    assert len(calls) == 1 + len(report.speedup.candidates), "a candidate was made again"
    chosen = report.speedup.chosen
    assert set(runtime.calls) == {_DENSE, (chosen.blocks, chosen.mlp_width, chosen.heads)}, "latency was measured again"
    assert [path.name for path in folder.iterdir()] == ["out"]
    yield folder / "out", report


def _search(report: ShrinkReport) -> SpeedupRecord:
    assert report.speedup is not None
    return report.speedup


def test_the_mix_of_the_smallest_divergence_is_made(resumed: tuple[Path, ShrinkReport]) -> None:
    out, report = resumed
    search = _search(report)
    divergences = [candidate.kl for candidate in search.candidates]
    assert len(divergences) >= 3 and all(kl is not None and kl > 0 for kl in divergences)
    assert search.chosen.kl == min(kl for kl in divergences if kl is not None)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    config = model.config
    numbers = (config.num_hidden_layers, config.intermediate_size, config.num_attention_heads)
    assert numbers == (search.chosen.blocks, search.chosen.mlp_width, search.chosen.heads)
    assert [removal.block for removal in report.removals] == [2] * search.chosen.removed
    assert ShrinkReport.read(out) == report
    lines = shrink_summary(report, out).plain.splitlines()
    assert [line for line in lines if line.endswith("(chosen).")] == [f"{search.chosen.describe()} (chosen)."]
    assert search.outcome in lines


def test_speeds_are_those_of_the_runtime(resumed: tuple[Path, ShrinkReport]) -> None:
    """Times are linear in the numbers of units here, so that predictions are exact but for the drift of the clock."""
    search, formula = _search(resumed[1]), FakeRuntime()
    for candidate in search.candidates:
        speed = formula.seconds(*_DENSE) / formula.seconds(candidate.blocks, candidate.mlp_width, candidate.heads)
        assert candidate.predicted == pytest.approx(speed, rel=1e-2)
        assert speed >= _WANTED * 0.99
    chosen = search.chosen
    speed = formula.seconds(*_DENSE) / formula.seconds(chosen.blocks, chosen.mlp_width, chosen.heads)
    assert search.measured == pytest.approx(speed, rel=2e-3)
    assert search.outcome.startswith("Measured: ") and "1.35 wanted" in search.outcome


def test_divergence_is_that_of_the_model_that_a_quick_pass_makes(
    resumed: tuple[Path, ShrinkReport], stories: Path, windows: Tensor, tmp_path: Path
) -> None:
    search = _search(resumed[1])
    assert (search.fitted_tokens, search.held_out_tokens) == (12 * 32, 4 * 32)
    candidate = search.candidates[0]
    config = ShrinkConfig(model=str(stories), mlp_width=candidate.mlp_width, num_heads=candidate.heads)
    assert candidate.removed == 0
    shrink_checkpoint(config, tmp_path / "out", NoProgress(), token_ids=windows[:12])
    with torch.no_grad():
        dense, small = (
            AutoModelForCausalLM.from_pretrained(folder)(windows[12:]).logits.double().log_softmax(dim=-1)
            for folder in (stories, tmp_path / "out")
        )
    divergence = (dense.exp() * (dense - small)).sum(dim=-1).mean()
    assert candidate.kl == pytest.approx(float(divergence), rel=1e-4)


@pytest.mark.slow
def test_an_undisturbed_search_gives_the_same_bits(
    resumed: tuple[Path, ShrinkReport], stories: Path, windows: Tensor, tmp_path: Path
) -> None:
    with log_messages() as messages:
        report = _run(stories, windows, tmp_path / "out", FakeRuntime())
    assert weight_bytes(tmp_path / "out") == weight_bytes(resumed[0])
    first, second = (comparable(one) for one in (report, resumed[1]))
    # The clock of the fake runtime goes on through all calls.
    assert first["speedup"].pop("measured") == pytest.approx(second["speedup"].pop("measured"), rel=1e-3)
    assert first == second
    count = len(_search(report).candidates)
    assert [message for message in messages if message.startswith(f"Candidate {count} of {count}: ")]


class _Mixed(FakeRuntime):
    """Runtime that runs mixes slower than its times of structures with one kind of unit removed promise."""

    def seconds(self, blocks: int, width: int, heads: int) -> float:
        mixed = sum((blocks < 5, width < 172, heads < 8)) > 1
        return super().seconds(blocks, width, heads) * (1.5 if mixed else 1.0)


@pytest.mark.slow
def test_a_missed_speed_is_said(stories: Path, windows: Tensor, tmp_path: Path) -> None:
    report = _run(stories, windows, tmp_path / "out", _Mixed(), speedup=2.0)
    assert _search(report).outcome.startswith("The wanted speed was missed: ")
    assert _search(report).outcome in (tmp_path / "out" / "README.md").read_text()


def test_a_dry_run_lists_the_mixes(stories: Path, english_file: Path, tmp_path: Path) -> None:
    settings = {"model": str(stories), "calibration": str(english_file), "seqlen": 32, "speedup": _WANTED}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shrink_choice, "open_runtime", lambda *_: FakeRuntime())
        lines = plan_shrink(ShrinkConfig.model_validate(settings), tmp_path / "out")
        assert lines[0].startswith("MLP width 64, 8 heads, 5 blocks: predicted 1.8")
        assert lines[-1].endswith("Nothing was shrunk or written.") and list(tmp_path.iterdir()) == []
        with pytest.raises(ConfigError, match=r"--speedup 9 cannot be reached: .* predicted to be \d\.\d\d times"):
            plan_shrink(ShrinkConfig.model_validate({**settings, "speedup": 9.0}), tmp_path / "out")
