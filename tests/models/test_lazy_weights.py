"""A skeleton that fetches its blocks gives what the loaded model gives, to the bit, whatever its checkpoint's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from alps.checkpoints.journal import open_journal
from alps.checkpoints.safetensors_io import TensorOnDisk
from alps.core.distributed import ProcessGroup
from alps.core.errors import CheckpointError
from alps.data.loaded_model import LoadedModel, load, open_model
from alps.data.windows import Windows
from alps.finetuning.reconstruction_parameters import ReconstructionParameters
from alps.models.lazy_weights import LazyWeights
from alps.pruning.recipe import PruneRecipe
from alps.pruning.resume import DiskJournal
from alps.pruning.run import prune_model
from alps.solvers.patterns import Unstructured
from helpers.decoders import DENSE, HYBRID, MOE, RECENT, decoder
from helpers.runs import make_context, make_recipe

_CPU = torch.device("cpu")
_IDS = torch.randint(2, 60, (4, 12), generator=torch.Generator().manual_seed(5))
_NO_TOKENIZER = "alps.data.loaded_model.load_tokenizer"


@pytest.fixture(autouse=True)
def without_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_NO_TOKENIZER, lambda name: None)


def _recipe(method: str = "wanda", **options: Any) -> PruneRecipe:
    return make_recipe(method, Unstructured(0.5), **options)


def _prune_streamed(directory: Path, out: Path, recipe: PruneRecipe, dtype: str = "auto") -> LoadedModel:
    loaded = open_model(str(directory), dtype)
    assert isinstance(loaded.store, LazyWeights)
    out.mkdir()
    with open_journal(out, {}) as journal:
        context = make_context(journal=DiskJournal(journal, ProcessGroup()))
        prune_model(loaded, Windows(_IDS, "ids", len(_IDS)), recipe, context)
        loaded.writer.write_weights(out, loaded.blocks(), journal)
        loaded.writer.write_side_files(out)
    return loaded


def _prune_loaded(directory: Path, out: Path, recipe: PruneRecipe, dtype: str = "auto") -> None:
    loaded = load(str(directory), dtype)
    prune_model(loaded, Windows(_IDS, "ids", len(_IDS)), recipe, make_context())
    out.mkdir()
    loaded.writer.write_side_files(out)
    loaded.writer.write_weights(out)


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def _check_equal(item: Path, other: Path) -> None:
    first, second = _tensors(item), _tensors(other)
    assert first.keys() == second.keys()
    different = [name for name in first if first[name].dtype != second[name].dtype]
    assert different == []
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# Their checkpoints have other tensor names, so that they are loaded whole.
_WHOLE = {"olmo_hybrid", "deepseek_v4"}


@pytest.mark.parametrize("kind", [kind for kind in (*DENSE, *MOE, *HYBRID, *RECENT) if kind not in _WHOLE])
def test_every_architecture_streams_to_the_bit(kind: str, tmp_path: Path) -> None:
    model = decoder(kind)
    model.save_pretrained(tmp_path / "dense")
    loaded = _prune_streamed(tmp_path / "dense", tmp_path / "streamed", _recipe())
    _prune_loaded(tmp_path / "dense", tmp_path / "loaded", _recipe())
    _check_equal(tmp_path / "streamed", tmp_path / "loaded")
    assert all(parameter.is_meta for parameter in loaded.model.parameters())
    for name in ("config.json", "generation_config.json"):
        files = [tmp_path / folder / name for folder in ("streamed", "loaded")]
        assert files[0].is_file() == files[1].is_file()
        assert not files[0].is_file() or files[0].read_text() == files[1].read_text()


_SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "magnitude": lambda: {"method": "magnitude", "measure_error": False},
    "everything": lambda: {
        "method": "alps",
        "true_sequential": True,
        "dense_target": 0.4,
        "reconstruction": ReconstructionParameters(epochs=1, tokens=24),
        "allocation": "sensitivity",
    },
}


@pytest.mark.parametrize("settings", _SETTINGS)
@pytest.mark.parametrize("kind", ["llama", "opt-postnorm", "gpt2"])
def test_every_way_through_the_walk_streams_to_the_bit(
    kind: str, settings: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_model(kind, torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="6KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 3
    _prune_streamed(tmp_path / "dense", tmp_path / "streamed", _recipe(**_SETTINGS[settings]()))
    _prune_loaded(tmp_path / "dense", tmp_path / "loaded", _recipe(**_SETTINGS[settings]()))
    _check_equal(tmp_path / "streamed", tmp_path / "loaded")
    names = {file.name for file in (tmp_path / "dense").glob("*.safetensors*")}
    assert {file.name for file in (tmp_path / "streamed").glob("*.safetensors*")} == names
    again = load(str(tmp_path / "streamed"))
    assert next(again.model.parameters()).dtype == torch.bfloat16


def test_weights_are_cast_and_tied_ones_stay_tied(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("gpt2", torch.float32)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path / "dense")
    _prune_streamed(tmp_path / "dense", tmp_path / "streamed", _recipe(), "bfloat16")
    _prune_loaded(tmp_path / "dense", tmp_path / "loaded", _recipe(), "bfloat16")
    _check_equal(tmp_path / "streamed", tmp_path / "loaded")
    assert "lm_head.weight" not in _tensors(tmp_path / "streamed")
    again = load(str(tmp_path / "streamed")).model
    assert again.lm_head.weight is again.transformer.wte.weight
    assert again.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_lies_outside_the_blocks_stays_in_the_files(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """While windows are embedded, and afterwards nothing of it is held; tied weights are one."""
    tiny_model("gpt2", torch.float32).save_pretrained(tmp_path / "dense")
    loaded = open_model(str(tmp_path / "dense"), dtype)
    store = loaded.store
    assert isinstance(store, LazyWeights)
    blocks = loaded.blocks()
    mapped: list[str] = []
    real = TensorOnDisk.memory_map

    def spied(stored: TensorOnDisk) -> Tensor:
        mapped.append(stored.name)
        return real(stored)

    monkeypatch.setattr(TensorOnDisk, "memory_map", spied)
    with store.non_block_weights():
        result = {name: p.detach() for name, p in loaded.model.named_parameters() if not p.is_meta}
        assert result.keys() == {name for name in store._slots if not any(b.name + "." in name for b in blocks)}
        assert len(mapped) == len(result) > 0
        for name, stored in _tensors(tmp_path / "dense").items():
            if f"transformer.{name.removeprefix('transformer.')}" in result:
                expected = stored.to(getattr(torch, dtype))
                assert torch.equal(result[f"transformer.{name.removeprefix('transformer.')}"], expected)
        assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight
    assert all(parameter.is_meta for parameter in loaded.model.parameters())


def test_one_block_at_a_time_is_in_memory(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    loaded = open_model(str(tmp_path / "dense"))
    blocks = {block.name for block in loaded.blocks()}
    seen = []
    advance = "alps.calibration.block_inputs.BlockInputs.advance"
    real = __import__("alps.calibration.block_inputs", fromlist=["BlockInputs"]).BlockInputs.advance

    def watch(self: Any, index: int, block: nn.Module, device: torch.device) -> None:
        held = [name for name, parameter in loaded.model.named_parameters() if not parameter.is_meta]
        seen.append({name for name in blocks for item in held if item.startswith(f"{name}.")})
        assert all(any(item.startswith(f"{name}.") for name in blocks) for item in held)
        real(self, index, block, device)

    monkeypatch.setattr(advance, watch)
    with open_journal(tmp_path / "out", {}) as journal:
        context = make_context(journal=DiskJournal(journal, ProcessGroup()))
        prune_model(loaded, Windows(_IDS, "ids", len(_IDS)), _recipe(), context)
    # The check of the replay runs all blocks once before.
    assert seen == [{f"model.layers.{index}"} for index in (0, 1, 2, 0, 1)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_together_check_every_tensor(tiny_model: Callable[..., Any], tmp_path: Path, ranks: int) -> None:
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            value = parameter.flatten()[-1].clone()
            parameter.flatten()[-1].fill_(torch.nan)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            parameter.flatten()[-1].fill_(value)
        store = open_model(str(tmp_path / name)).store
        assert isinstance(store, LazyWeights)
        found = []
        for rank in range(ranks):
            try:
                store.check_finite(rank, ranks)
            except CheckpointError as error:
                found.append(str(error))
        assert len(found) == 1 and name in found[0]


def test_identities_differ_where_weights_do(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1
    model.save_pretrained(tmp_path / "other")
    item, same, other = (open_model(str(tmp_path / name)).identity() for name in ("one", "same", "other"))
    assert item == same != other
