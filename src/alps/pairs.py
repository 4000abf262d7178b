"""Whether a dense model and a pruned one belong together."""

from __future__ import annotations

from torch import nn

from alps.errors import ConfigError
from alps.loaded import Loaded
from alps.models.blocks import find_blocks


def check_pair(dense: Loaded, pruned: Loaded) -> None:
    """Refuse two models that differ in more than the values of their weights, or a second one that is not pruned.

    Raises:
        ConfigError: naming the first difference in class, parameters, shapes or vocabulary, or when `pruned` has no
            more zeros in its linear layers than `dense`.
        UnsupportedModel: when decoder blocks cannot be found.
    """
    difference = _model_difference(dense.model, pruned.model) or _vocabulary_difference(dense, pruned)
    if difference:
        raise ConfigError(
            f"'{dense.name}' and '{pruned.name}' do not belong together, {difference}: "
            "give the dense model from which the pruned one was made."
        )
    if count_zeros(pruned.model) <= count_zeros(dense.model):
        raise ConfigError(
            f"Nothing is pruned in '{pruned.name}': its linear layers have no more zeros than those of "
            f"'{dense.name}'; give DENSE first, then PRUNED."
        )


def count_zeros(model: nn.Module) -> int:
    """Zeros of all sites."""
    return sum(int((site.read() == 0).sum()) for block in find_blocks(model) for site in block.sites)


def _model_difference(dense: nn.Module, pruned: nn.Module) -> str | None:
    if type(dense) is not type(pruned):
        return f"one is a {type(dense).__name__}, the other a {type(pruned).__name__}"
    own = {name: tuple(parameter.shape) for name, parameter in dense.named_parameters()}
    other = {name: tuple(parameter.shape) for name, parameter in pruned.named_parameters()}
    for name in [*own, *other]:
        if name not in own or name not in other:
            return f"only one of them has {name}"
        if own[name] != other[name]:
            return f"{name} is {own[name]} in one and {other[name]} in the other"
    return None


def _vocabulary_difference(dense: Loaded, pruned: Loaded) -> str | None:
    if dense.tokenizer is None or pruned.tokenizer is None:
        return None
    own, other = dense.tokenizer.get_vocab(), pruned.tokenizer.get_vocab()
    different = [word for word in [*own, *other] if own.get(word) != other.get(word)]
    if not different:
        return None
    return f"their tokenizers differ in {different[0]!r}"
