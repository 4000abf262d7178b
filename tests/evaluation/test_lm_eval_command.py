"""The command of lm-eval on a packed directory, by transformers, against `alps eval` on the same items."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer, LlamaForCausalLM

pytest.importorskip("lm_eval")

import alps
from helpers.cli_process import run
from helpers.packed_models import prune

pytestmark = [pytest.mark.lm_eval, pytest.mark.filterwarnings("ignore")]

TASKS = {"piqa": "piqa/piqa.yaml", "arc_easy": "arc/arc_easy.yaml"}
ITEMS = 40


@pytest.fixture
def packed(stories: Path, tmp_path: Path) -> Path:
    model = LlamaForCausalLM.from_pretrained(stories)
    prune(model)
    model.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path / "dense")
    alps.pack(tmp_path / "dense", tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Items of two tasks, and lm-eval's own configurations of them, which read these files in place of the hub."""
    import lm_eval.tasks

    source = Path(__file__).parent.parent.parent.parent / "shared" / "data" / "zeroshot"
    if not source.is_dir():
        pytest.skip("needs ../shared/data/zeroshot")
    (tmp_path / "data").mkdir()
    for task, file in TASKS.items():
        items = tmp_path / "data" / f"{task}.jsonl"
        items.write_text("\n".join((source / items.name).read_text().split("\n")[:ITEMS]))
        own = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / file).read_text())
        split = own.get("test_split") or own["validation_split"]
        unused = ("dataset_name", "tag", "training_split", "validation_split", "test_split", "fewshot_split")
        config: dict[str, Any] = {name: value for name, value in own.items() if name not in unused}
        config |= {"task": f"local_{task}", "dataset_path": "json", "test_split": split}
        config["dataset_kwargs"] = {"data_files": {split: str(items)}}
        (tmp_path / "data" / f"local_{task}.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "data"


def run_lm_eval(packed: Path, data: Path, arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    """Run the command `lm_eval`, in whose process nothing has imported alps."""
    command = shutil.which("lm_eval", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert command is not None
    tasks = ",".join(f"local_{task}" for task in TASKS)
    words = [command, "--model", "hf", "--model_args", f"pretrained={packed}{arguments}", "--tasks", tasks]
    words += ["--include_path", str(data), "--device", "cpu", "--batch_size", "8", "--output_path", str(out)]
    caches = {"HF_HOME": str(out / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment = {**os.environ, **caches, "PYTHONPATH": str(Path(alps.__file__).parent.parent)}
    return subprocess.run(words, env=environment, cwd=data, capture_output=True, text=True)


def test_the_numbers_are_those_of_alps_eval(packed: Path, data: Path, tmp_path: Path) -> None:
    done = run_lm_eval(packed, data, ",trust_remote_code=True", tmp_path / "results")
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "results").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    options = ["--tasks", ",".join(TASKS), "--task-data", data, "--batch-size", 8]
    ours = json.loads(run("eval", packed, *options).stdout)
    assert [row["task"] for row in ours] == list(TASKS)
    for row in ours:
        assert row["items"] == ITEMS and 0 < row["metrics"]["acc"]["value"] < 1
        for metric, estimate in row["metrics"].items():
            found = theirs[f"local_{row['task']}"]
            assert (estimate["value"], estimate["stderr"]) == (found[f"{metric},none"], found[f"{metric}_stderr,none"])


def test_without_the_import_nothing_is_scored(packed: Path, data: Path, tmp_path: Path) -> None:
    done = run_lm_eval(packed, data, "", tmp_path / "results")
    assert done.returncode != 0 and "Unknown quantization type, got alps" in done.stderr
    assert not list((tmp_path / "results").rglob("results_*.json"))
