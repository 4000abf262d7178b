"""Check that the logits of a model are finite, and search for the first block whose output is not.

A loss or a largest logit shows that something is wrong, at the cost of a few numbers. Only then the model is run once
more, with a hook on every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alps.core.errors import NotFinite
from alps.core.text_format import dtype_name

# Name of the only window, or a function that names a window of a batch by its number.
WindowName = str | Callable[[int], str]


class _Located(Exception):
    """End of a forward behind the first value that is not finite; the place in words."""


def check_losses(
    losses: Tensor, model: nn.Module, ids: Tensor, *, subject: str, where: Callable[[int], str] | str
) -> None:
    """Refuse losses that are NaN or infinite, which they are if the logits are.

    Args:
        losses: of windows, (windows, tokens).
        model: that computed them.
        ids: token ids (windows, tokens).
        subject: the model in words, with which the message begins.
        where: names the window.

    Raises:
        NotFinite: naming the first such window, and the block.
    """
    if not bool(torch.isfinite(losses.sum())):
        rows = torch.nonzero(~torch.isfinite(losses).all(dim=1))
        if len(rows):
            row = int(rows[0])
            refuse_logits(model, ids[row : row + 1], subject, where if isinstance(where, str) else where(row))


def check_logits(
    logits: Tensor, model: nn.Module, ids: Tensor, *, subject: str, where: Callable[[int], str] | str
) -> None:
    """Refuse logits with NaN or positive infinity, and rows without a finite value.

    Negative infinity marks tokens that a model never predicts.

    Args:
        logits: of windows, (windows, ..., vocabulary).
        model: that computed them.
        ids: token ids (windows, tokens).
        subject: the model in words, with which the message begins.
        where: names the window.

    Raises:
        NotFinite: naming the first such window, and the block.
    """
    largest = logits.amax(dim=-1).reshape(len(logits), -1)
    check_losses(largest, model, ids, subject=subject, where=where)


def refuse_logits(model: nn.Module, ids: Tensor, subject: str, where: str) -> NoReturn:
    """Raise the error for a window with logits that are not finite; the model is run on it again.

    Args:
        model: causal language model, or a wrapper of one.
        ids: token ids (1, tokens).
        subject: the model in words, with which the message begins.
        where: name of the window.

    Raises:
        NotFinite: always.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    dtype = next((p.dtype for p in inner.parameters() if p.is_floating_point()), torch.float32)
    advice = (
        "use --dtype bfloat16 or float32"
        if dtype == torch.float16
        else "its weights are damaged, or its config.json is not theirs"
    )
    raise NotFinite(
        f"{subject} computes NaN or infinite logits for {where}, first in {_place(inner, ids)}, "
        f"in {dtype_name(dtype)}: {advice}."
    )


def _place(model: nn.Module, ids: Tensor) -> str:
    """Return in words where the first value that is not finite appears in a forward."""
    try:
        with torch.no_grad(), _checked_blocks(model):
            model(input_ids=ids, use_cache=False)
    except _Located as located:
        return str(located)
    return "what follows the last block"


@contextmanager
def _checked_blocks(model: nn.Module) -> Iterator[None]:
    """Context in which a forward ends behind the first block with a NaN or an infinity in its inputs or outputs."""
    handles = []
    for index, (name, block) in _numbered_blocks(model):
        before = _hook(f"what precedes block {index} ({name})")
        after = _hook(f"block {index} ({name})")
        if index == 0:
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(place: str) -> Callable[..., None]:
    def check(_module: nn.Module, _args: Any, values: Any, *_: Any) -> None:
        states = values.get("hidden_states", _args) if isinstance(values, Mapping) else values
        first = states if torch.is_tensor(states) else next(iter(states), None) if states else None
        if torch.is_tensor(first) and not bool(torch.isfinite(first).all()):
            raise _Located(place)

    return check


def _numbered_blocks(model: nn.Module) -> Sequence[tuple[int, tuple[str, nn.Module]]]:
    """Return the members of the longest list of modules that is inside no other list, with their names."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{other}.") for other in lists):
            lists[name] = module
    name, blocks = max(lists.items(), key=lambda item: len(item[1]), default=("", ()))
    return [(index, (f"{name}.{index}", block)) for index, block in enumerate(blocks)]
