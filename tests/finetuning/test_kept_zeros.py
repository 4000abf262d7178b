"""Training by any optimiser and by transformers' Trainer: zeros stay, and all else is as if they were no parameters."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from transformers import AutoModelForCausalLM

import alps
from alps.core.errors import UnsupportedModel
from alps.finetuning.checkpoint_pair import count_zeros
from alps.models.blocks import find_blocks

Optimiser = Callable[[Any], torch.optim.Optimizer]
OPTIMISERS: dict[str, Optimiser] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=3e-3),
}


def pruned(model: Any) -> Any:
    """Set about half of the weights of every layer to zero, except those of one layer."""
    generator = torch.Generator().manual_seed(8)
    for block in find_blocks(model):
        for site in block.sites[1:] if block.index == 0 else block.sites:
            weight = site.read()
            weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def supports(model: nn.Module) -> list[Tensor]:
    return [site.read() != 0 for block in find_blocks(model) for site in block.sites]


def train(
    model: Any, ids: Tensor, optimiser: torch.optim.Optimizer, after_backward: Callable[[], None] = lambda: None
) -> None:
    """Take three steps of two batches each, with clipped gradients."""
    for _ in range(3):
        for batch in torch.split(ids[:4], 2):
            model(input_ids=batch, labels=batch).loss.backward()
        after_backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in OPTIMISERS), ("adamw-fused", torch.bfloat16)]
)
def test_weights_are_those_of_a_loop_that_masks_by_hand(
    name: str, dtype: torch.dtype, tiny_model: Callable[..., Any], ids: Tensor
) -> None:
    model, reference = (pruned(tiny_model("llama", dtype)) for _ in range(2))
    kept = {name: p.detach() != 0 for name, p in reference.named_parameters() if p.ndim == 2 and "layers" in name}

    def mask_gradients() -> None:
        for name, parameter in reference.named_parameters():
            if name in kept:
                parameter.grad = torch.where(kept[name], parameter.grad, torch.zeros_like(parameter))

    before = supports(model)
    with alps.keep_zeros(model) as zeros:
        assert zeros.zeros == count_zeros(model) and zeros.layers == 20
        train(model, ids, OPTIMISERS[name](model.parameters()))
    train(reference, ids, OPTIMISERS[name](reference.parameters()), mask_gradients)
    expected = weights(reference)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    for mask, now in zip(before, supports(model), strict=True):
        assert not (now & ~mask).any()
    assert not torch.equal(expected["model.norm.weight"], weights(tiny_model("llama", dtype))["model.norm.weight"])


def test_zeros_fill_without_it_and_after_it(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = pruned(tiny_model("llama"))
    zeros = count_zeros(model)
    handle = alps.keep_zeros(model)
    assert repr(handle).startswith(f"KeptZeros({zeros:,} zeros of ") and handle.nbytes < handle.entries / 4
    train(model, ids, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert count_zeros(model) == zeros
    handle.remove()
    train(model, ids, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert count_zeros(model) < zeros / 100


class Noise(torch.optim.Optimizer):
    """Add noise to every entry, whatever its gradient: worse than any optimiser that mixes entries."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter += torch.randn_like(parameter)


def test_an_optimiser_that_moves_entries_without_gradients_is_undone(tiny_model: Callable[..., Any]) -> None:
    model, other = pruned(tiny_model("gpt2")), pruned(tiny_model("gpt2"))
    before = supports(model)
    with alps.keep_zeros(model):
        Noise(model.parameters()).step()
        Noise(other.parameters()).step()
        assert all(torch.equal(now, mask) for now, mask in zip(supports(model), before, strict=True))
    assert count_zeros(other) == 0


def test_layers_that_are_frozen_first_and_trained_later_are_masked(tiny_model: Callable[..., Any], ids: Tensor) -> None:
    model = pruned(tiny_model("llama")).requires_grad_(False)
    with alps.keep_zeros(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model.requires_grad_(True)
        model(input_ids=ids, labels=ids).loss.backward()
        for number, site in enumerate(site for block in find_blocks(model) for site in block.sites):
            gradient, mask = site.parameter.grad, site.read() != 0
            assert gradient is not None and not gradient[~mask].any()
            assert gradient[mask].count_nonzero() > 0 and (number > 0) == bool((~mask).any())


def test_weights_changed_by_hand_become_zero_again(tiny_model: Callable[..., Any]) -> None:
    model = pruned(tiny_model("llama"))
    zeros, before = alps.keep_zeros(model), supports(model)
    for call in (zeros.apply, zeros.remove):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1e3
        call()
        assert all(torch.equal(now, mask) for now, mask in zip(supports(model), before, strict=True))


def test_zeros_survive_a_checkpoint(tiny_model: Callable[..., Any], ids: Tensor, tmp_path: Path) -> None:
    model = pruned(tiny_model("llama", torch.bfloat16))
    before = supports(model)
    for number in range(2):
        with alps.keep_zeros(model):
            train(model, ids, torch.optim.AdamW(model.parameters(), lr=3e-3))
        model.save_pretrained(tmp_path / str(number))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(number)).eval()
    assert model.dtype == torch.bfloat16
    assert not any((now & ~mask).any() for now, mask in zip(supports(model), before, strict=True))


def test_nothing_outlives_the_model(tiny_model: Callable[..., Any]) -> None:
    hooks = len(torch_optimizer._global_optimizer_post_hooks)
    model = pruned(tiny_model("llama"))
    alps.keep_zeros(model)
    assert len(torch_optimizer._global_optimizer_post_hooks) == hooks + 1
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None and len(torch_optimizer._global_optimizer_post_hooks) == hooks


def test_models_whose_zeros_cannot_be_kept_are_refused_in_a_sentence(tiny_model: Callable[..., Any]) -> None:
    hooks = len(torch_optimizer._global_optimizer_post_hooks)
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM has no zeros in the linear layers of its blocks"):
        alps.keep_zeros(tiny_model("llama"))
    packed = pruned(tiny_model("llama"))
    alps.pack_linears(packed)
    with pytest.raises(UnsupportedModel, match="are packed: train the unpacked checkpoint"):
        alps.keep_zeros(packed)
    quantized = pruned(tiny_model("llama"))
    quantized.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UnsupportedModel, match=r"is quantized .*bitsandbytes.*: train the unquantized checkpoint"):
        alps.keep_zeros(quantized)
    with pytest.raises(UnsupportedModel, match="is sharded or on the meta device"):
        alps.keep_zeros(pruned(tiny_model("llama")).to("meta"))
    assert len(torch_optimizer._global_optimizer_post_hooks) == hooks


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_trainer_of_transformers_keeps_zeros(
    optim: str, tiny_model: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in ids]
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "bf16": True,
        "gradient_checkpointing": True,
        "use_cpu": True,
        "report_to": "none",
        "save_steps": 3,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(tmp_path), optim=optim, **settings)
    model = pruned(tiny_model("llama"))
    before = supports(model)
    with alps.keep_zeros(model):
        Trainer(model=model, args=arguments, train_dataset=data).train()
    saved = [AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (3, 6)]
    for trained in (model, *saved):
        assert all(torch.equal(now, mask) for now, mask in zip(supports(trained), before, strict=True))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    with alps.keep_zeros(again):
        resumed = Trainer(model=again, args=arguments, train_dataset=data)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for one, two in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)
    plain = pruned(tiny_model("llama"))
    Trainer(model=plain, args=arguments, train_dataset=data).train()
    assert count_zeros(plain) < count_zeros(model) / 100
