"""The command line: right inputs end to end on a real small model, wrong inputs in one sentence each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from alps.cli import main as cli
from helpers.cli_process import run_code
from helpers.command_line import contents, run_alps

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. " * 400


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_list_of_commands_says_what_their_own_help_says(name: str) -> None:
    command = cli.import_command(name)
    assert command.name == name
    assert command.help.splitlines()[0] == cli.COMMANDS[name][2]


@pytest.mark.parametrize(("wanted", "code"), [("--help", 0), ("--version", 0), ("prunne", 2)])
def test_torch_is_not_waited_for_where_nothing_runs(wanted: str, code: int) -> None:
    script = (
        "import atexit, sys; from alps.cli.main import run\n"
        "atexit.register(lambda: print({'torch', 'transformers'} & set(sys.modules)))\n"
        "run()"
    )
    done = subprocess.run([sys.executable, "-c", script, wanted], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith("set()\n")


def test_prune_inspect_eval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stories: Path, text: Path
) -> None:
    out = text.parent / "pruned"
    sizes = ["--samples", 8, "--seqlen", 64, "--calibration", text]
    assert run_alps(monkeypatch, "prune", stories, out, "--pattern", "2:4", "--method", "sparsegpt", *sizes) == 0
    printed = capsys.readouterr()
    assert "113,280 of 226,560 weights are zero (50.000 %)" in printed.out
    assert "35/35" in printed.err
    assert {
        "config.json",
        "model.safetensors",
        "report.json",
        "README.md",
        "alps.yaml",
        "tokenizer.json",
    } <= set(contents(out))

    assert run_alps(monkeypatch, "inspect", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sparsity"] == 0.5
    assert found["checks"] == [{"pattern": "2:4", "groups": 56640, "violations": 0}]
    assert [row["name"] for row in found["dense"]] == ["model.embed_tokens.weight"]

    assert run_alps(monkeypatch, "inspect", out) == 0
    assert "Pattern 2:4: holds in all 56,640 groups." in capsys.readouterr().out

    assert run_alps(monkeypatch, "eval", out, "--text", text, "--text", text, "--seqlen", 64, "--windows", 5) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["predicted_tokens"] for row in rows] == [5 * 63, 5 * 63]
    assert rows[0]["perplexity"] == rows[1]["perplexity"] > 1
    assert list(rows[0]) == ["model", "text", "windows", "seqlen", "predicted_tokens", "loss", "perplexity", "sha256"]

    options = ["--text", text, "--seqlen", 64, "--windows", 5]
    assert run_alps(monkeypatch, "eval", out, *options, "--reference", stories) == 0
    printed = capsys.readouterr()
    (compared,) = json.loads(printed.out)
    assert {key: compared[key] for key in rows[0]} == rows[0]
    assert run_alps(monkeypatch, "eval", stories, *options) == 0
    dense = json.loads(capsys.readouterr().out)[0]
    assert compared["reference_perplexity"] == dense["perplexity"]
    assert compared["reference"] == str(stories) and compared["kl"] > 0 and 0 < compared["agreement"] < 1
    for figure in ("perplexity", "reference_perplexity"):
        assert f"{compared[figure]:.3f}" in printed.err
    assert f"{compared['kl']:.5f}" in printed.err and f"{compared['agreement']:.2%}" in printed.err


def test_inspect_counts_broken_groups(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stories: Path, text: Path
) -> None:
    out = text.parent / "pruned"
    arguments = ["--pattern", "2:4", "--method", "magnitude", "--no-measure-error"]
    assert run_alps(monkeypatch, "prune", stories, out, *arguments) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, :4] = 1.0
        weight[5, 8:11] = 1.0
    model.save_pretrained(out)
    assert run_alps(monkeypatch, "inspect", out) == 0
    assert "Pattern 2:4: BROKEN in 2 of 56,640 groups." in capsys.readouterr().out


def test_yaml_settings_are_read_overridden_and_saved(
    monkeypatch: pytest.MonkeyPatch, stories: Path, text: Path
) -> None:
    run = text.parent / "run.yaml"
    run.write_text(
        f"sparsity: 0.5\nmethod: alps\nsamples: 4\nseqlen: 32\ncalibration: {text}\n"
        "options:\n  refit_steps: 3\n  admm:\n    rho: 0.2\n"
    )
    out = text.parent / "pruned"
    assert run_alps(monkeypatch, "prune", stories, out, "--config", run, "--sparsity", 0.6) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["pattern"] == "60%"
    assert report["calibration"]["windows"] == 4
    assert {site["solve"]["refit_steps"] for site in report["layers"]} == {3}
    assert report["layers"][0]["solve"]["trace"][0]["rho"] == 0.2
    again = text.parent / "again"
    assert run_alps(monkeypatch, "prune", stories, again, "--config", out / "alps.yaml") == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


# What is wrong with checkpoints, texts and devices: `tests/helpers/fault_table.py`.
WRONG = {
    "missing path": (["{tmp}/nowhere", "{tmp}/out"], "does not exist"),
    "no path, no hub name": (["nonsense", "{tmp}/out"], "neither an existing directory"),
    "not a model": (["{tmp}/empty", "{tmp}/out"], "no config.json"),
    "a file that is no gguf": (["{text}", "{tmp}/out"], "not a .gguf"),
    "unsupported architecture": (["{tmp}/bert", "{tmp}/out"], "cannot be loaded"),
    "encoder-decoder": (["{tmp}/t5", "{tmp}/out"], "cannot be loaded"),
    "unknown method": (["{model}", "{tmp}/out", "--method", "alsp"], "Did you mean 'alps'?"),
    "sparsity 1.2": (["{model}", "{tmp}/out", "--sparsity", "1.2"], "outside [0, 1)"),
    "pattern 5:4": (["{model}", "{tmp}/out", "--pattern", "5:4", "--sparsity="], "1 <= N < M"),
    "pattern nonsense": (["{model}", "{tmp}/out", "--pattern", "half", "--sparsity="], "not understood"),
    "pattern and sparsity": (["{model}", "{tmp}/out", "--pattern", "2:4"], "not both"),
    "pattern that does not divide": (
        ["{model}", "{tmp}/out", "--pattern", "4:8", "--sparsity="],
        "down_proj (172)",
    ),
    "unknown text": (["{model}", "{tmp}/out", "--calibration", "wikitext"], "Did you mean 'wikitext2'?"),
    "mix without a weight": (["{model}", "{tmp}/out", "--calibration", "{text},self:1"], "has no weight"),
    "mix with a part of none": (
        ["{model}", "{tmp}/out", "--calibration", "{text}:1,self:0.01"],
        "'self' of the calibration mix gets none of 4 windows",
    ),
    "unknown text in a mix": (["{model}", "{tmp}/out", "--calibration", "{text}:1,slef:1"], "Did you mean 'self'?"),
    "OUT not empty": (["{model}", "{tmp}"], "not empty"),
    "OUT a file": (["{model}", "{text}"], "is a file"),
    "OUT read-only": (["{model}", "/proc/alps"], "cannot be created"),
    "unknown device": (["{model}", "{tmp}/out", "--device", "quantum"], "cannot be used here"),
    "unknown dtype": (["{model}", "{tmp}/out", "--dtype", "int3"], "is unknown"),
    "missing yaml": (["{model}", "{tmp}/out", "--config", "{tmp}/no.yaml"], "cannot be read"),
    "unknown key": (["{model}", "{tmp}/out", "--config", "{tmp}/typo.yaml"], "Did you mean 'samples'?"),
    "unknown option": (
        ["{model}", "{tmp}/out", "--config", "{tmp}/option.yaml"],
        "Did you mean 'refit_steps'?",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_one_sentence_and_write_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stories: Path, text: Path, case: str
) -> None:
    folder = text.parent
    _lay_traps(folder, stories)
    before = contents(folder)
    arguments, expected = WRONG[case]
    filled = [word.format(tmp=folder, model=stories, text=text) for word in arguments]
    defaults = ["--sparsity", "0.5", "--calibration", str(text), "--samples", "4", "--seqlen", "64"]
    if "--sparsity=" in filled:
        filled.remove("--sparsity=")
        defaults = defaults[2:]
    # The last occurrence of an option wins, so a case overrides the defaults.
    assert run_alps(monkeypatch, "prune", *filled[:2], *defaults, *filled[2:]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Error: ") and printed.err.count("\n") == 1, printed.err
    assert expected in printed.err
    assert contents(folder) == before


def _lay_traps(folder: Path, stories: Path) -> None:
    for name in ("empty", "bert", "t5"):
        (folder / name).mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    (folder / "t5" / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    (folder / "typo.yaml").write_text("sample: 3\n")
    (folder / "option.yaml").write_text("options:\n  refit_step: 3\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{model}", "--text", "{text}", "--seqlen", "200000"], "longer than the 512"),
        (["{model}", "--text", "{short}", "--seqlen", "256"], "too few for one window"),
        (["{model}", "--text", "nowhere.txt", "--seqlen", "64"], "neither a file nor one of"),
        (["{model}", "--text", "self", "--seqlen", "64"], "one of wikitext2, c4, ptb, python-docs.\n"),
        (["nowhere/at/all", "--text", "{text}"], "neither an existing directory"),
        (["{model}"], "nothing to measure: give --text, --tasks or both"),
        (["{model}", "--text", "{text}", "--seqlen", "64", "--reference", "nowhere/at/all"], "neither an existing"),
        (["{model}", "--tasks", "piqa", "--reference", "{model}"], "--reference has no effect without --text"),
        (["{model}", "--tasks", "piqa", "--windows", "3"], "--windows has no effect without --text"),
        (["{model}", "--text", "{text}", "--limit", "3"], "--limit has no effect without --tasks"),
        (["{model}", "--text", "{text}", "--task-data", "x"], "--task-data has no effect without --tasks"),
        (["{model}", "--text", "{text}", "--batch-size", "2"], "--batch-size has no effect without --tasks"),
        (["{model}", "--tasks", ","], "No task is named"),
        # A model that does not exist: tasks are checked before it is loaded.
        (["nowhere/at/all", "--tasks", "piqa", "--task-data", "{text}"], "is not a directory"),
        (["nowhere/at/all", "--tasks", "piqa,pica", "--task-data", "{tmp}"], "piqa.jsonl', which does not exist"),
        (["nowhere/at/all", "--tasks", "pica", "--task-data", "{tmp}"], "Did you mean 'piqa'?"),
        (["nowhere/at/all", "--tasks", "winogrande", "--task-data", "{tmp}"], "Line 1 of "),
    ],
)
def test_wrong_evaluations(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stories: Path,
    text: Path,
    arguments: list[str],
    expected: str,
) -> None:
    short = text.parent / "short.txt"
    short.write_text("Too short.")
    (text.parent / "winogrande.jsonl").write_text('{"sentence": "a _", "option1": "b"}')
    filled = [word.format(model=stories, text=text, short=short, tmp=text.parent) for word in arguments]
    assert run_alps(monkeypatch, "eval", *filled) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and expected in printed.err and printed.err.count("\n") == 1


def test_as_a_module_in_a_new_process(tmp_path: Path) -> None:
    code = "import runpy; runpy.run_module('alps', run_name='__main__', alter_sys=True)"
    done = run_code(code, "prune", tmp_path / "nowhere", tmp_path / "out", "--sparsity=0.5")
    assert done.returncode == 2
    assert "does not exist" in done.stderr and "Traceback" not in done.stderr


def test_the_demo_replaces_nothing_but_an_earlier_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("ALPS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text("{}")
    before = contents(tmp_path)
    assert run_alps(monkeypatch, "demo", "--out", tmp_path / "mine") == 2
    assert "is not empty" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_inspecting_a_dense_model_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stories: Path
) -> None:
    assert run_alps(monkeypatch, "inspect", stories, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sparsity"] == 0 and found["claimed"] is None and found["checks"] == []
    reasons = [row["reason"] for row in found["dense"]]
    assert reasons == ["embedding or output head"] + ["no zeros in it"] * 35
    assert run_alps(monkeypatch, "inspect", stories) == 0
    assert "Dense: 16 more, see --json" in capsys.readouterr().out


def test_distill_keeps_the_zeros_that_inspect_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stories: Path, text: Path
) -> None:
    pruned, out = text.parent / "pruned", text.parent / "recovered"
    assert (
        run_alps(
            monkeypatch, "prune", stories, pruned, "--sparsity", 0.7, "--method", "magnitude", "--no-measure-error"
        )
        == 0
    )
    sizes = ["--calibration", text, "--samples", 16, "--seqlen", 32, "--batch-tokens", 128, "--lr", 0.002]
    capsys.readouterr()
    assert run_alps(monkeypatch, "distill", stories, pruned, out, "--steps", 12, *sizes) == 0
    printed = capsys.readouterr()
    assert "Distilled, so not one-shot: 12 steps, 1,536 tokens, lr 0.002" in printed.out
    assert "158,600 of 226,560 weights are zero" in printed.out
    assert "12/12" in printed.err
    zeros = []
    for folder in (pruned, out):
        assert run_alps(monkeypatch, "inspect", folder, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        zeros.append([(site["name"], site["zeros"]) for site in found["layers"]])
    assert zeros[0] == zeros[1] and sum(count for _, count in zeros[0]) == 158_600


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{model}", "{model}", "{tmp}/out", "--steps", "2"], "Nothing is pruned"),
        (["{model}", "{model}", "{tmp}/out"], "either --minutes"),
        (["{model}", "{model}", "{tmp}/out", "--steps", "2", "--minutes", "1"], "not both"),
        (["{model}", "{model}", "{tmp}/out", "--minutes", "-3"], "Setting 'minutes'"),
        (["{model}", "{tmp}/nowhere", "{tmp}/out", "--steps", "2"], "does not exist"),
        (["{tmp}/nowhere", "{model}", "{tmp}/out", "--steps", "2"], "does not exist"),
        (["{model}", "{model}", "{tmp}", "--steps", "2"], "not empty"),
        (["{model}", "{model}", "{tmp}/out", "--steps", "2", "--device", "quantum"], "cannot be used here"),
        (["{model}", "{model}", "{tmp}/out", "--steps", "2", "--dtype", "int3"], "is unknown"),
        (["{model}", "{model}", "{tmp}/out", "--steps", "2", "--calibration", "nowhere.txt"], "neither a file"),
    ],
)
def test_wrong_recoveries_are_one_sentence_and_write_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stories: Path,
    text: Path,
    arguments: list[str],
    expected: str,
) -> None:
    before = contents(text.parent)
    filled = [word.format(model=stories, tmp=text.parent) for word in arguments]
    assert run_alps(monkeypatch, "distill", *filled[:3], "--calibration", text, *filled[3:]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and expected in printed.err and printed.err.count("\n") == 1
    assert contents(text.parent) == before


@pytest.mark.parametrize("options", [[], ["--compress"]], ids=["plain", "compressed"])
def test_pack_and_unpack(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stories: Path,
    tmp_path: Path,
    options: list[str],
) -> None:
    pruned, packed, back = (tmp_path / name for name in ("pruned", "packed", "back"))
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            smallest = parameter.detach().abs().float().flatten().argsort(stable=True)
            parameter.data.view(-1)[smallest[: round(0.7 * parameter.numel())]] = 0
    model.save_pretrained(pruned)

    assert run_alps(monkeypatch, "pack", pruned, packed, *options) == 0
    printed = capsys.readouterr().out
    # Offsets are 4 bytes a row of 64 or 172 columns here, which is why it is not 0.363.
    expected = "Packed 35 of 47 tensors: 453,120 -> " + ("111," if options else "177,180 bytes (0.3910).")
    assert expected in printed and "All weights: 520,064 -> " in printed and ", in 1 file; other files" in printed

    assert run_alps(monkeypatch, "unpack", packed, back) == 0
    printed = capsys.readouterr().out
    assert "Unpacked 47 tensors, 520,064 bytes, each with the sha256 recorded at packing." in printed
    assert {path.name: path.read_bytes() for path in back.iterdir()} == {
        path.name: path.read_bytes() for path in pruned.iterdir()
    }

    assert run_alps(monkeypatch, "pack", pruned, packed) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run_alps(monkeypatch, "unpack", pruned, tmp_path / "more") == 2
    assert "is not a packed directory: it has no packed.json" in capsys.readouterr().err
    assert run_alps(monkeypatch, "inspect", packed) == 2
    assert f"is packed: use what `alps unpack {packed} NEW-DIRECTORY` writes" in capsys.readouterr().err
