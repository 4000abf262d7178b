"""Detection of layers whose weight the code of a model reads, and does not use by calling the layer.

Examples are `dt_proj` of Mamba, which is multiplied by hand, and two layers in each block of RWKV, which are rescaled
in place. The model runs once without any values: on the meta device, with witnesses in the places of its layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from alps.core.errors import first_line
from alps.inference.convert import replace_module
from alps.inference.lazy_weight import LazyWeight

_LOG = logging.getLogger("alps")
_META = torch.device("meta")
_TOKENS = 8


def find_read_layers(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the names of the layers whose weight something else than the layer computes with in a forward on text.

    Args:
        model: of transformers, on the meta device; it cannot be used afterwards.
        names: of the layers in question.

    Returns:
        Names of layers; none if the model cannot run without values, which is logged.
    """
    read = set[str]()
    for name in names:
        layer = model.get_submodule(name)
        replace_module(model, layer, _Witness(layer, partial(read.add, name)))
    model.to(_META).eval()
    # All experts at once, because without values no token is sent to any.
    choose: Any = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("batched_mm")
    try:
        with torch.no_grad(), _AnyValue():  # type: ignore[no-untyped-call]
            model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device=_META), use_cache=False)
    except Exception as error:  # code of any model, on values that do not exist
        _LOG.debug("%s does not run without values (%s).", type(model).__name__, first_line(error))
        return set()
    return read


class _Witness(nn.Module):
    """Stand-in for a layer that notes when something else than its own forward computes with its weight."""

    def __init__(self, layer: nn.Module, note: Callable[[], object]) -> None:
        super().__init__()
        self.layer, self._note = layer, note

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        weight = self.layer.get_parameter("weight")
        return LazyWeight(weight.shape, weight, self._read)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def _read(self) -> Tensor:
        self._note()
        return self.layer.get_parameter("weight")


class _AnyValue(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode in which a tensor without values answers a question about one: its numbers are 1, and conditions hold."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and (kwargs or {}).get("device", _META) != _META:
            return torch.ones(args[0].shape, dtype=(kwargs or {}).get("dtype") or args[0].dtype)
        return func(*args, **(kwargs or {}))
