"""report.html beside results and checkpoints: made from their JSON, atomically, and never at their cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alps.cli.main import run
from alps.core.progress import NoProgress
from alps.core.settings import ARGUMENTS, make_config
from alps.evaluation.compare import run_comparison
from alps.evaluation.compare_config import CompareConfig
from alps.finetuning.distill_config import DistillConfig
from alps.finetuning.distillation import distill_directory
from alps.finetuning.reconstruct_checkpoint import reconstruct_directory
from alps.finetuning.reconstruct_config import ReconstructConfig
from alps.pruning.config import PruneConfig
from alps.pruning.job import prune_checkpoint
from alps.reporting import publish as published
from alps.reporting.compare_results import RESULTS_NAME, write_results
from alps.reporting.publish import PAGE_NAME, publish, rebuild_page, run_results
from alps.reporting.records import EvaluationRecord
from alps.reporting.run_report import RunReport
from helpers.cli_process import run_code
from helpers.comparisons import comparison
from helpers.log_messages import log_messages

INSTALL = 'pip install "alps-prune[report]"'


def alps(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["alps", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        run()
        sys.exit(0)
    return int(left.value.code or 0)


def prune(stories: Path, text: Path, out: Path) -> RunReport:
    sizes: dict[str, Any] = {"samples": 4, "seqlen": 32, "calibration": str(text)}
    return prune_checkpoint(PruneConfig(model=str(stories), sparsity=0.7, **sizes), out, NoProgress())


def test_compare_leaves_a_page_that_can_be_made_again(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stories: Path,
    english_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "all"
    options = ["--methods", "wanda,alps", "--sparsity", "0.5,0.7", "--samples", 4, "--seqlen", 32, "--windows", 2]
    options += ["--calibration", english_file, "--text", english_file, "--eval-seqlen", 64, "--prompt", "Once <upon"]
    assert alps(monkeypatch, "compare", stories, out, *options) == 0
    assert f"results.jsonl, table.md, {PAGE_NAME}." in capsys.readouterr().err
    first = (out / PAGE_NAME).read_text()
    assert "Once &lt;upon" in first and "english.txt: 2 windows of 64 tokens" in first
    (out / PAGE_NAME).unlink()
    assert alps(monkeypatch, "report", out) == 0
    assert capsys.readouterr().out == f"Written to {out / PAGE_NAME}.\n"
    assert (out / PAGE_NAME).read_text() == first
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "compare.yaml", PAGE_NAME, RESULTS_NAME, "table.md",
    ]  # fmt: skip


def test_checkpoints_have_pages_and_cards_that_name_them(stories: Path, english_file: Path, tmp_path: Path) -> None:
    report = prune(stories, english_file, tmp_path / "pruned")
    page = (tmp_path / "pruned" / PAGE_NAME).read_text()
    assert f"{report.mean_error:.3g}" in page and "Pruned to 70% with alps" in page and "/tmp" not in page
    rebuild_page(tmp_path / "pruned")
    assert (tmp_path / "pruned" / PAGE_NAME).read_text() == page
    sizes = {"samples": 4, "seqlen": 32, "calibration": str(english_file)}
    steps = {
        "match": make_config(ReconstructConfig, sizes, ARGUMENTS),
        "recover": make_config(DistillConfig, {**sizes, "steps": 1}, ARGUMENTS),
    }
    notes = {
        "match": "The blocks were reconstructed after pruning",
        "recover": "Distilled after pruning, so not one-shot",
    }
    for name, job in (("match", reconstruct_directory), ("recover", distill_directory)):
        settings: Any = steps[name]
        with log_messages() as messages:
            job(str(stories), str(tmp_path / "pruned"), tmp_path / name, settings, NoProgress())
        assert notes[name] in (tmp_path / name / PAGE_NAME).read_text() and notes[name] not in page
        assert not any("left out" in line for line in messages)
    for name in ("pruned", "match", "recover"):
        assert "`report.html`" in (tmp_path / name / "README.md").read_text()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_the_packages_everything_but_the_page_is_there(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stories: Path,
    english_file: Path,
    tmp_path: Path,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with log_messages() as messages:
        prune(stories, english_file, tmp_path / "pruned")
    (line,) = [line for line in messages if PAGE_NAME in line]
    assert "left out" in line and INSTALL in line and f"alps report {tmp_path / 'pruned'}" in line
    assert "report.html" not in (tmp_path / "pruned" / "README.md").read_text()
    assert (tmp_path / "pruned" / "model.safetensors").is_file() and not (tmp_path / "pruned" / PAGE_NAME).exists()
    files = {"model": str(stories), "calibration": str(english_file), "texts": [str(english_file)]}
    asked = CompareConfig.model_validate(
        {
            **files,
            "methods": ["magnitude"],
            "sparsity": [0.5],
            "samples": 4,
            "seqlen": 32,
            "eval_seqlen": 64,
            "windows": 1,
        }
    )
    with log_messages() as messages:
        assert len(run_comparison(asked, tmp_path / "all", NoProgress())) == 2
    assert sum(PAGE_NAME in line for line in messages) == 1 and INSTALL in messages[-1]
    assert alps(monkeypatch, "report", tmp_path / "all") == 2
    error = capsys.readouterr().err
    name = {"jinja2": "Jinja2"}.get(package, package)
    assert error == f"Error: {PAGE_NAME} cannot be drawn without {name}: {INSTALL}.\n"


def test_a_minimal_installation_works(stories: Path, tmp_path: Path) -> None:
    # Everything of alps is imported again, without what draws.
    script = (
        "import sys\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] in ('alps', 'matplotlib', 'jinja2')]:\n"
        "    del sys.modules[name]\n"
        "sys.modules['matplotlib'] = sys.modules['jinja2'] = None\n"
        "from alps.cli.main import run\nrun()"
    )
    options = [stories, "out", "--sparsity", 0.5, "--method", "magnitude", "--no-measure-error"]
    done = run_code(script, "prune", *options, cwd=tmp_path, environment={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("report.html is left out") == 1 and INSTALL in done.stderr
    assert "report.json, README.md." in done.stdout


def test_importing_the_package_does_not_import_what_draws() -> None:
    script = (
        "import sys, alps.cli.main\nprint([m for m in sys.modules if m.startswith(('matplotlib', 'alps.reporting'))])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_checkpoint_is_not_lost_to_its_figures(
    monkeypatch: pytest.MonkeyPatch, stories: Path, english_file: Path, tmp_path: Path
) -> None:
    def broken(*_: object) -> str:
        raise ZeroDivisionError("no height")

    monkeypatch.setattr("alps.reporting.html_report.report_page", broken)
    with log_messages() as messages:
        prune(stories, english_file, tmp_path / "pruned")
    assert any("report.html is left out" in line and "ZeroDivisionError: no height" in line for line in messages)
    assert (tmp_path / "pruned" / "model.safetensors").is_file() and not (tmp_path / "pruned" / PAGE_NAME).exists()


def test_a_page_is_replaced_as_a_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = comparison(["wanda"], ["0.5"], 1, 1, [])
    write_results(tmp_path / RESULTS_NAME, results)
    (tmp_path / PAGE_NAME).write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with log_messages() as messages:
            assert not publish(tmp_path, results)
        assert "No space left on device" in messages[0] and (tmp_path / PAGE_NAME).read_text() == "old"
    assert publish(tmp_path, results) and "wanda" in (tmp_path / PAGE_NAME).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [PAGE_NAME, RESULTS_NAME]


WRONG = {
    "nothing": ({}, "has neither results.jsonl nor report.json"),
    "no results": ({RESULTS_NAME: ""}, "is empty"),
    "other lines": ({RESULTS_NAME: '{"a": 1}\n'}, "line 1: not a result"),
    "another report": ({"report.json": "[]"}, "is not a report of this program"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str
) -> None:
    files, complaint = WRONG[case]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert alps(monkeypatch, "report", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and complaint in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == set(files)
    assert alps(monkeypatch, "report", tmp_path / "nowhere") == 2
    assert "nowhere' has neither" in capsys.readouterr().err


def test_dense_rows_of_a_report_are_the_dense_model(stories: Path, english_file: Path, tmp_path: Path) -> None:
    report = prune(stories, english_file, tmp_path / "pruned")
    row: dict[str, Any] = {"text": "t", "windows": 1, "seqlen": 9, "predicted_tokens": 8, "loss": 2.0}
    # The names of the models say nothing about which is dense.
    report.evaluations = [EvaluationRecord(model="x, dense", perplexity=80.25, **row)]
    assert [(result.method, len(result.evaluations)) for result in run_results(report)[0]] == [("alps", 1)]
    report.dense_evaluations = [EvaluationRecord(model="x", perplexity=20.5, **row)]
    (dense, pruned), notes = run_results(report)
    assert (dense.method, dense.evaluations[0].perplexity, pruned.evaluations[0].perplexity) == ("dense", 20.5, 80.25)
    assert notes == [] and len(pruned.layers) == 35 and pruned.layers[0].error == report.layers[0].error
    published.publish_run(tmp_path, report, tmp_path)
    page = (tmp_path / PAGE_NAME).read_text()
    assert "alps has perplexity 80.2 on t; the dense model has 20.5" in page
