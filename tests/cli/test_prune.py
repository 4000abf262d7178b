"""The command that prunes: end to end on a real small model, settings from YAML, wrong inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.command_line import contents, run_alps


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
    keys = "model text windows seqlen predicted_tokens loss perplexity sha256 format documents bos"
    assert list(rows[0]) == keys.split()

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
    assert f"{compared['kl']:.4f}" in printed.err and f"{compared['agreement']:.2%}" in printed.err


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
    "not a model": (["{tmp}/empty", "{tmp}/out"], "is empty: give the directory of a checkpoint"),
    "a file that is no gguf": (["{text}", "{tmp}/out"], "not a .gguf"),
    "unsupported architecture": (["{tmp}/vit", "{tmp}/out"], "(ViTModel) is not a causal language model"),
    "encoder-decoder": (["{tmp}/t5", "{tmp}/out"], "is an encoder-decoder"),
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
    for name in ("empty", "vit", "t5"):
        (folder / name).mkdir()
    (folder / "vit" / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    (folder / "t5" / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    (folder / "typo.yaml").write_text("sample: 3\n")
    (folder / "option.yaml").write_text("options:\n  refit_step: 3\n")
