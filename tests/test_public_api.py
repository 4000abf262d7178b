"""Functions of the package: names, typed results, short representations, and messages through logging."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from huggingface_hub import constants

import alps
from alps.checkpoints.manifest import Manifest
from alps.core.errors import ConfigError
from alps.evaluation.api import ComparisonResults
from alps.evaluation.inspect import Inspection
from alps.reporting.run_report import RunReport

_SIZES: dict[str, Any] = {"samples": 4, "seqlen": 32}


def test_functions_take_few_positional_arguments_and_are_typed() -> None:
    for name in ("prune", "evaluate", "evaluate_tasks", "compare", "pack", "unpack", "reconstruct", "distill", "load"):
        function = getattr(alps, name)
        parameters = inspect.signature(function).parameters.values()
        assert sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters) <= 3, name
        assert all(parameter.annotation is not parameter.empty for parameter in parameters), name
        assert get_type_hints(function)["return"] is not Any


def test_every_name_is_listed_and_exists() -> None:
    assert set(alps.__all__) <= set(dir(alps))
    assert all(getattr(alps, name) is not None for name in alps.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'recover'"):
        getattr(alps, "recover")  # noqa: B009


def test_a_checkpoint_passes_through_all_functions(stories: Path, english_file: Path, tmp_path: Path) -> None:
    text = {"calibration": english_file, **_SIZES}
    pruned = alps.prune(stories, sparsity=0.7, method="wanda", out=tmp_path / "pruned", **text)
    tuned = alps.reconstruct(stories, tmp_path / "pruned", tmp_path / "tuned", **text)
    distilled = alps.distill(stories, tmp_path / "tuned", tmp_path / "distilled", steps=2, **text)
    assert all(isinstance(report, RunReport) and report.zeros == pruned.zeros for report in (tuned, distilled))
    packed = alps.pack(tmp_path / "distilled", tmp_path / "packed")
    unpacked = alps.unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert isinstance(packed, Manifest) and unpacked == packed
    counts = alps.inspect(tmp_path / "unpacked")
    assert isinstance(counts, Inspection) and counts.sparsity == pruned.sparsity
    texts = [english_file]
    losses = [
        alps.evaluate(model, texts, seqlen=64, windows=2)[0].loss
        for model in (alps.load(tmp_path / "packed"), tmp_path / "packed", alps.load(tmp_path / "unpacked"))
    ]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-4)
    results = alps.compare(
        stories, tmp_path / "all", methods=["magnitude"], sparsity=[0.5], texts=texts, eval_seqlen=64, windows=2, **text
    )
    assert isinstance(results, ComparisonResults) and [result.method for result in results] == ["dense", "magnitude"]

    for result in (pruned, distilled, counts, packed):
        assert repr(result) == str(result) and len(repr(result)) < 1200 and repr(result).count("\n") < 8
    assert "wanda 70%" in repr(pruned) and f"{pruned.zeros:,} of {pruned.entries:,}" in repr(pruned)
    assert "distilled in 2 steps" in repr(distilled) and "70.00% zeros" in repr(counts)
    assert "| magnitude |" in repr(results) and len(repr(results)) < 3000


def test_a_model_without_a_tokenizer_loads_and_is_not_evaluated(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("word " * 200)
    loaded = alps.load(tmp_path / "model")
    assert loaded.tokenizer is None
    with pytest.raises(ConfigError, match=r"needs a tokenizer, and '.*model' has none"):
        alps.evaluate(loaded, [tmp_path / "text.txt"])


def test_the_default_calibration_names_what_is_missing(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path.parent / "empty"))
    with pytest.raises(ConfigError, match=r"'c4' cannot be fetched from the hub \(HF_HUB_OFFLINE is set"):
        alps.prune(stories, sparsity=0.5, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


_SCRIPT = """
import logging, sys
if "info" in sys.argv:
    logging.basicConfig(level=logging.INFO)
import alps
log = logging.getLogger("alps")
assert log.handlers == [] and log.level == logging.NOTSET and log.propagate
from alps.reporting.publish import publish
from pathlib import Path
sys.modules["matplotlib"] = None
publish(Path("."), [])
from alps.data import self_generated
self_generated._LOG.info("sampling")
"""


@pytest.mark.parametrize(("words", "shown"), [([], False), (["info"], True)])
def test_warnings_are_visible_by_default_and_messages_on_request(words: list[str], shown: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SCRIPT, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "report.html is left out, because matplotlib is not installed" in done.stderr
    assert ("sampling" in done.stderr) == shown


def test_a_command_attaches_its_handler_for_its_duration_only(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from alps.cli.console import console_output

    log = logging.getLogger("alps")
    before = (log.level, list(log.handlers))
    with console_output():
        log.info("one [bold]line[/bold]")
    with console_output(quiet=True):
        log.warning("of another rank")
    log.info("after")
    assert capsys.readouterr().err == "one [bold]line[/bold]\n" and (log.level, list(log.handlers)) == before
