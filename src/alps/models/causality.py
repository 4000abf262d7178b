"""Check that a model is causal: what it computes for a token must not depend on later tokens."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from alps.core.errors import AlpsError, UnsupportedModel
from alps.models.blocks import Block, non_block_weights, on_device

_LOG = logging.getLogger("alps")
# Two sequences that differ in the last token. Numbers below some 20 are neither padding nor images in most models.
_FIRST, _LAST, _OTHER_LAST = 5, 16, 20
# Largest change relative to the largest value. Rounding differs where experts get other batches, by some 1e-6.
_TOLERANCE = 1e-4


class _BlockOutput(Exception):
    """End of a forward at the output of its first block."""


def check_causal(model: nn.Module, blocks: list[Block] | None = None) -> None:
    """Refuse a model that looks ahead, by two short forwards.

    A model with a key-value cache may look ahead within a prompt and still generate token by token. It is not refused,
    but its perplexity has no meaning, and a warning says so. A model whose forward needs more than token ids is not
    judged.

    Args:
        model: a causal language model.
        blocks: of a model whose weights are still in files, of which only the first is then run; None for a model in
            memory, which is run whole.

    Raises:
        UnsupportedModel: see above.
    """
    training = model.training
    try:
        change = _change_by_last_token(model.eval(), blocks)
    except (AlpsError, MemoryError):
        raise
    except Exception:  # forwards of models raise anything
        return
    finally:
        model.train(training)
    if not change > _TOLERANCE:  # a NaN is no fault of the mask, and whatever measures the model refuses it
        return
    name = type(model).__name__
    if "use_cache" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(
            f"{name} is not causal: what it computes for a token depends on later tokens, and alps takes only causal "
            "language models."
        )
    _LOG.warning(f"{name} looks ahead within a text: its perplexity has no meaning.")


def _change_by_last_token(model: nn.Module, blocks: list[Block] | None) -> float:
    """Return the largest change of what is computed for all tokens but the last, relative to the largest value."""
    sequences = torch.arange(_FIRST, _LAST + 1).repeat(2, 1)
    sequences[1, -1] = _OTHER_LAST
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        results = []
        for ids in torch.split(sequences, 1):
            torch.manual_seed(0)  # some models hash by random projections
            results.append(_logits(model, ids) if blocks is None else _first_states(model, blocks, ids))
    first, second = results
    largest = float(first.abs().max())
    if len(first) != sequences.shape[1] or first.shape != second.shape or not largest:
        return 0.0
    change = float((first - second)[:-1].abs().max()) / largest
    return 0.0 if change < torch.finfo(first.dtype).eps else change


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits of a model in memory for one sequence, (tokens, vocabulary)."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits.squeeze(0)


def _first_states(model: nn.Module, blocks: list[Block], ids: Tensor) -> Tensor:
    """Return the output of the first block for one sequence, (tokens, features)."""
    outputs: list[Tensor] = []

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(output if torch.is_tensor(output) else output[0])
        raise _BlockOutput

    handle = blocks[0].module.register_forward_hook(stop)
    try:
        with non_block_weights(blocks), on_device(blocks[0], torch.device("cpu")):
            model(input_ids=ids, use_cache=False)
    except _BlockOutput:
        pass
    finally:
        handle.remove()
    return outputs[0].squeeze()
