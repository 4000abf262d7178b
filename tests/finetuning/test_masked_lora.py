"""LoRA of PEFT under the mask: what is trained is what is merged, and every zero stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import alps
from alps.core.errors import UnsupportedModel
from alps.finetuning.checkpoint_pair import count_zeros
from alps.models.blocks import find_blocks

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = ["q_proj", "v_proj", "down_proj"]


def pruned(model: Any) -> Any:
    """Set about half of the weights of every layer to zero."""
    generator = torch.Generator().manual_seed(8)
    for block in find_blocks(model):
        for site in block.sites:
            weight = site.read()
            weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    return model


def supports(model: Any) -> list[Tensor]:
    return [site.read() != 0 for block in find_blocks(model) for site in block.sites]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def adapted(model: Any, targets: list[str], **more: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, **more))


def train(model: Any, ids: Tensor, steps: int = 4) -> None:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=ids).logits
    return result


@pytest.mark.parametrize(
    ("kind", "targets", "safe", "more"),
    [
        ("llama", LINEAR, False, {"lora_dropout": 0.2, "use_rslora": True}),
        ("opt", ["q_proj", "fc2"], True, {"lora_bias": True}),
        ("gpt2", ["c_attn", "c_proj"], False, {"fan_in_fan_out": True}),
    ],
)
def test_the_merged_model_is_the_trained_one_with_every_zero(
    kind: str, targets: list[str], safe: bool, more: dict[str, Any], tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    model = pruned(tiny_model(kind))
    before, dense = supports(model), logits(model, ids)
    model = adapted(model, targets, **more)
    zeros = alps.keep_zeros(model)
    assert f"{zeros.adapters} adapters" in repr(zeros) and zeros.adapters % 3 == 0
    train(model.train(), ids)
    trained = logits(model, ids)
    assert float((trained - dense).norm() / dense.norm()) > 0.1
    # Adapters stay under the mask under which they were trained.
    zeros.remove()
    model.merge_adapter(safe_merge=safe)
    assert torch.allclose(logits(model, ids), trained, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(logits(model, ids), trained, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.allclose(logits(model, ids), dense, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload(safe_merge=safe)
    assert same(supports(merged), before)
    assert torch.allclose(logits(merged, ids), trained, rtol=1e-4, atol=1e-4)


def test_outputs_and_gradients_are_those_of_the_masked_product(tiny_model: Callable[..., Any]) -> None:
    model = adapted(pruned(tiny_model("llama")), LINEAR)
    alps.keep_zeros(model)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        second.normal_()
    weight = layer.base_layer.weight
    inputs = torch.randn(5, weight.shape[1], requires_grad=True)
    expected = F.linear(inputs, weight + (weight != 0) * (second @ first) * 4)
    output = layer(inputs)
    assert torch.allclose(output, expected, rtol=1e-4, atol=1e-4)
    probe = torch.randn_like(output)
    for mine, other in zip(
        torch.autograd.grad(output, [inputs, first, second], probe),
        torch.autograd.grad(expected, [inputs, first, second], probe),
        strict=True,
    ):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-3)


def test_adapters_added_later_are_masked_after_their_merge(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = pruned(tiny_model("llama", torch.bfloat16))
    before = supports(model)
    with alps.keep_zeros(model) as zeros:
        tuned = adapted(model, LINEAR, use_dora=True)
        train(tuned, ids)
        merged = tuned.merge_and_unload()
        assert count_zeros(merged) < 0.8 * zeros.zeros
    assert not any((now & ~mask).any() for now, mask in zip(supports(merged), before, strict=True))


def test_a_saved_adapter_computes_the_same_under_the_mask(
    tiny_model: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    model = adapted(pruned(tiny_model("llama")), LINEAR)
    alps.keep_zeros(model)
    train(model, ids)
    trained = logits(model, ids)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(pruned(tiny_model("llama")), tmp_path)
    assert not torch.allclose(logits(again, ids), trained, rtol=1e-2, atol=1e-2)
    zeros = alps.keep_zeros(again)
    assert zeros.adapters == 9 and torch.equal(logits(again, ids), trained)
    assert count_zeros(again.merge_and_unload()) == zeros.zeros


def test_layers_under_bfloat16_and_autocast_keep_zeros(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = pruned(tiny_model("llama", torch.bfloat16))
    before = supports(model)
    model = adapted(model, LINEAR)
    zeros = alps.keep_zeros(model)
    with torch.autocast("cpu", torch.bfloat16):
        train(model.train(), ids)
    trained = logits(model, ids)
    merged = model.merge_and_unload()
    assert count_zeros(merged) >= zeros.zeros
    assert not any((now & ~mask).any() for now, mask in zip(supports(merged), before, strict=True))
    assert float((logits(merged, ids) - trained).float().norm() / trained.float().norm()) < 0.05


def test_adapters_that_cannot_be_masked_are_refused_in_a_sentence(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.self_attn\.q_proj is a variant of LoRA, such as DoRA"):
        alps.keep_zeros(adapted(pruned(tiny_model("llama")), LINEAR, use_dora=True))
    loha = peft.get_peft_model(pruned(tiny_model("llama")), peft.LoHaConfig(r=2, target_modules=LINEAR))
    with pytest.raises(UnsupportedModel, match=r"q_proj \(Linear\) cannot be trained under the mask"):
        alps.keep_zeros(loha)
    merged = adapted(pruned(tiny_model("llama")), LINEAR)
    merged.merge_adapter()
    with pytest.raises(UnsupportedModel, match=r"is merged, so zeros of the layer are gone"):
        alps.keep_zeros(merged)
