"""Mask of the zeros of one weight, in one bit per entry, and its use on weights, gradients and adapters."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from alps.checkpoints.bitmask_codec import BIT_DTYPES, from_words, to_words
from alps.core.errors import UnsupportedModel


class ZeroMask:
    """Zeros of a parameter at the time of creation; the parameter is held by its module alone.

    Args:
        name: of the parameter inside the model, for messages.
        module: that holds the parameter; not kept alive by the mask.
        attribute: name of the parameter inside the module.

    Attributes:
        name: as given.
        entries: number of entries of the parameter.
        zeros: number of zeros, which are the entries that the mask sets to zero.
    """

    def __init__(self, name: str, module: nn.Module, attribute: str) -> None:
        self.name, self._module, self._attribute = name, weakref.ref(module), attribute
        parameter = module.get_parameter(attribute)
        is_kept = parameter.detach() != 0
        self._shape = is_kept.shape
        self.entries, self.zeros = is_kept.numel(), is_kept.numel() - int(is_kept.sum())
        self._words = to_words(is_kept.flatten(0, -2))

    @property
    def nbytes(self) -> int:
        """Bytes of the mask."""
        return self._words.nbytes

    @property
    def parameter(self) -> Tensor | None:
        """Parameter that the module holds now; None when the module is gone.

        Raises:
            UnsupportedModel: when the module holds no such parameter any more, or one of another shape.
        """
        module = self._module()
        if module is None:
            return None
        parameter = module._parameters.get(self._attribute)
        if parameter is None or parameter.shape != self._shape:
            raise UnsupportedModel(
                f"The zeros of {self.name} cannot be kept, since it was replaced after alps.keep_zeros: shard or "
                "quantize the model after the end of its context."
            )
        return parameter

    def applied_to(self, values: Tensor) -> Tensor:
        """Return a copy of a tensor of the parameter's shape with +0.0 at the zeros; NaN there becomes 0, too."""
        integer = BIT_DTYPES[values.element_size()]
        return values.contiguous().view(integer).bitwise_and(self._bits(values, integer)).view(values.dtype)

    def apply(self) -> None:
        """Set the zeros of the parameter to +0.0 in place; nothing happens when the module is gone."""
        parameter = self.parameter
        if parameter is not None:
            integer = BIT_DTYPES[parameter.element_size()]
            with torch.no_grad():
                parameter.view(integer).bitwise_and_(self._bits(parameter, integer))

    def _bits(self, values: Tensor, integer: torch.dtype) -> Tensor:
        """Return a tensor of the parameter's shape with all bits set where entries are kept, else 0."""
        # The model may have been moved since the mask was made.
        self._words = self._words.to(values.device)
        return from_words(self._words, integer)[:, : self._shape[-1]].reshape(self._shape)
