"""`from_pretrained` of transformers on packed directories, with alps and without."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, OPTForCausalLM, pipeline
from transformers.quantizers import auto

import alps
from alps.checkpoints.pack import pack_directory
from alps.core.errors import CheckpointError, ConfigError, UnsupportedModel
from alps.data.loaded_model import LoadedModel
from alps.inference.convert import packed_modules
from alps.inference.transformers_quantizer import PackedConfig
from helpers.packed_models import logits, prune
from helpers.packing import make_first_version

_SCRIPT = Path(__file__).parent.parent / "helpers" / "packed_loading.py"
_OLDEST = "transformers==5.0.0"
LAYERS = {"llama": 21, "gpt2": 12}


@pytest.fixture(params=list(LAYERS))
def kind(request: pytest.FixtureRequest) -> str:
    """Kinds whose layers are of different classes."""
    name: str = request.param
    return name


@pytest.fixture
def packed(kind: str, tmp_path: Path, tiny_model: Callable[..., Any]) -> Path:
    model = tiny_model(kind)
    prune(model)
    model.save_pretrained(tmp_path / "dense")
    pack_directory(tmp_path / "dense", tmp_path / "packed")
    return tmp_path / "packed"


def test_a_packed_directory_is_loaded_packed(packed: Path, kind: str, tmp_path: Path, ids: Tensor) -> None:
    expected = alps.load(packed).model
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert (
        type(model) is type(expected)
        and not model.training
        and model.config.quantization_config.to_dict() == {"quant_method": "alps"}
    )
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    inside = [name for name, _ in packed_modules(model) if "layers." in name or ".h." in name]
    assert len(inside) == LAYERS[kind]
    assert torch.equal(logits(model, ids), logits(expected, ids))
    states = model.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    model.generation_config.eos_token_id = expected.generation_config.eos_token_id = None
    outputs = [each.generate(ids[:2], max_new_tokens=5, do_sample=False) for each in (model, expected)]
    assert torch.equal(*outputs)
    model.save_pretrained(tmp_path / "again")
    shard = "packed.safetensors"
    assert (tmp_path / "again" / shard).read_bytes() == (packed / shard).read_bytes()
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "alps"} and "transformers_weights" not in config
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), ids), logits(model, ids))


@pytest.mark.parametrize("kind", ["llama"])
def test_options_of_from_pretrained(packed: Path, ids: Tensor) -> None:
    expected = logits(alps.load(packed).model, ids)
    for device_map in (None, "auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": torch.device("cpu")}):
        model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map)
        assert torch.equal(logits(model, ids).cpu(), expected)
    config = AutoConfig.from_pretrained(packed, num_hidden_layers=3)
    for named in (LlamaForCausalLM.from_pretrained(packed), LlamaForCausalLM.from_pretrained(packed, config=config)):
        assert torch.equal(logits(named, ids), expected)
    eager = AutoModelForCausalLM.from_pretrained(packed, attn_implementation="eager")
    assert {part.config._attn_implementation for part in (eager, eager.model)} == {"eager"}
    half, info = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16, output_loading_info=True)
    assert half.dtype == half.config.dtype == torch.bfloat16
    assert torch.equal(logits(half, ids), logits(alps.load(packed, "bfloat16").model, ids))
    assert not any(info.values())
    with pytest.raises(ConfigError, match="runs on one device, and device_map names cpu, meta: name one"):
        AutoModelForCausalLM.from_pretrained(packed, device_map={"model": "cpu", "lm_head": "meta"})
    with pytest.raises(ConfigError, match="kernels of its own: leave out use_kernels"):
        AutoModelForCausalLM.from_pretrained(packed, use_kernels=True)
    with pytest.raises(ConfigError, match="load what `alps unpack` makes"):
        half.dequantize()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["llama"])
@pytest.mark.parametrize("device_map", ["auto", "cuda", {"": 0}])
def test_a_packed_model_is_loaded_onto_a_gpu(packed: Path, ids: Tensor, device_map: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    torch.testing.assert_close(
        logits(model, ids.cuda()).cpu(), logits(alps.load(packed).model, ids), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["llama"])
def test_other_classes_and_other_directories_are_refused(packed: Path, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(packed)
    assert type(base).__name__ == "LlamaModel" and len(list(packed_modules(base))) == LAYERS["llama"]
    with pytest.raises(CheckpointError, match=r"LlamaModel has no tensor lm_head.weight"):
        base.save_pretrained(tmp_path / "base")
    with pytest.raises((CheckpointError, ConfigError), match="OPTForCausalLM"):
        OPTForCausalLM.from_pretrained(packed)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=PackedConfig())
    (packed / "packed.json").rename(packed / "other.json")
    with pytest.raises(CheckpointError, match=r"it has no packed.json"):
        AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(CheckpointError, match="are packed: use what `alps unpack` makes"):
        alps.load(packed)


@pytest.mark.parametrize("kind", ["llama"])
def test_a_directory_of_the_first_version_is_loaded_by_alps_alone(packed: Path, ids: Tensor) -> None:
    expected = logits(alps.load(packed).model, ids)
    make_first_version(packed)
    assert torch.equal(logits(alps.load(packed).model, ids), expected)
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize("kind", ["llama"])
def test_a_loaded_model_is_evaluated_and_not_pruned(packed: Path, word_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words of a text " * 40)
    results = [
        alps.evaluate(LoadedModel("packed", model, word_tokenizer), [tmp_path / "text.txt"], seqlen=32)[0].loss
        for model in (AutoModelForCausalLM.from_pretrained(packed), alps.load(packed).model)
    ]
    assert results[0] == results[1]
    with pytest.raises(UnsupportedModel, match="packed"):
        alps.prune(AutoModelForCausalLM.from_pretrained(packed), sparsity=0.5, method="magnitude", out=tmp_path / "no")


@pytest.mark.parametrize("kind", ["llama"])
def test_a_hub_model_is_fetched_by_its_name(
    packed: Path, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "cache" / "models--owner--packed"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for name in ("config.json", "alps.safetensors", "generation_config.json"):
        shutil.copy(packed / name, snapshot)
    asked = []

    def cached_file(name: str, file: str, **options: Any) -> None:
        asked.append((name, file, options["revision"], options["subfolder"]))
        assert options["cache_dir"] == tmp_path / "cache"
        shutil.copy(packed / file, snapshot)

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    model = AutoModelForCausalLM.from_pretrained("owner/packed", cache_dir=tmp_path / "cache")
    assert asked == [("owner/packed", file, "abc", "") for file in ("packed.json", "packed.safetensors")]
    assert torch.equal(logits(model, ids), logits(alps.load(packed).model, ids))


@pytest.mark.parametrize("kind", ["llama"])
def test_without_the_quantizer_nothing_is_loaded(
    packed: Path, word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    word_tokenizer.save_pretrained(packed)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "alps")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "alps")
    for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained):
        with pytest.raises(OSError, match=r"no file named model.safetensors"):
            load(packed)
    with pytest.raises((OSError, ValueError), match=r"no file named model.safetensors|Could not load model"):
        pipeline("text-generation", model=str(packed))


def run_script(python: str | Path, *arguments: object, **variables: str) -> dict[str, Any]:
    """Run the script in a new interpreter; alps is this one's, and nothing imports it unless the script does."""
    environment = {**os.environ, "PYTHONPATH": str(Path(alps.__file__).parent.parent), **variables}
    words = [str(python), str(_SCRIPT), *map(str, arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


@pytest.fixture(scope="session")
def oldest_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python with the oldest release that is supported, and with this environment's torch."""
    folder = tmp_path_factory.mktemp("oldest") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    done = subprocess.run([python, "-m", "pip", "install", "-q", _OLDEST], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs {_OLDEST}: {done.stderr.strip().splitlines()[-1:]}")
    # A gigabyte less to install: what the environment lacks is looked up in this one.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    return python


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform == "win32", reason="the environment's layout is another")
@pytest.mark.parametrize("release", ["installed", "oldest"])
def test_in_fresh_processes(
    release: str, packed_stories: tuple[Path, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    python = sys.executable if release == "installed" else request.getfixturevalue("oldest_python")
    dense, packed = packed_stories
    for way, outcome in run_script(python, "without", packed).items():
        assert "model.safetensors" in outcome and "Error" in outcome, (way, outcome)
    for mode in ("before", "after", "module", "trust"):
        outcomes = run_script(python, mode, packed, dense, tmp_path / mode, HF_MODULES_CACHE=str(tmp_path / "modules"))
        assert not any(outcomes.pop("info", {}).values())
        assert outcomes.keys() == {"auto", "pipeline", "named"}
        for way, outcome in outcomes.items():
            assert outcome["layers"] == 35 and outcome["difference"] < 1e-5, (mode, way, outcome)
            assert outcome["as_loaded"] and outcome["as_saved"] and outcome["same_shard"], (mode, way, outcome)
            assert outcome["config"] == {"quant_method": "alps"} and "model.safetensors" not in outcome["files"]
