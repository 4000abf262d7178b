"""A model with its tokenizer, and the calibration and evaluation windows made for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alps.calibration.block_probe import probe_blocks
from alps.core.device import pick_device
from alps.core.errors import ConfigError
from alps.core.progress import Progress
from alps.data.mixture import CalibrationMix, CalibrationSource, combine
from alps.data.self_generated import generate_windows
from alps.data.text_sources import Text, load_text
from alps.data.windows import Windows, cut_evaluation_windows, draw_calibration_windows
from alps.inference.load import is_packed, load_packed
from alps.inference.semi_structured import check_device, convert_to_semi_structured
from alps.models.blocks import Block, find_blocks
from alps.models.causality import check_causal
from alps.models.demo_model import resolve_model_path
from alps.models.fingerprint import forward_sha256
from alps.models.hub import checkpoint_directory
from alps.models.lazy_weights import LazyWeights
from alps.models.load import check_checkpoint, load_model, load_tokenizer, parse_dtype
from alps.models.meta_model import open_lazy_model
from alps.models.positions import check_window
from alps.models.save import CheckpointWriter

_LOG = logging.getLogger("alps")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass
class LoadedModel:
    """A causal language model and its tokenizer.

    Attributes:
        name: name of the model as the user gave it.
        model: a transformers model in evaluation mode.
        tokenizer: its tokenizer, or None.
        store: access to weights that are still in their files; None for a model that is in memory.
        directory: of the checkpoint, whose files an output keeps; None for a GGUF file or a model made in memory.
    """

    name: str
    model: Any
    tokenizer: Any
    store: LazyWeights | None = None
    directory: Path | None = None
    _blocks: list[Block] | None = field(default=None, init=False, compare=False)

    def __repr__(self) -> str:
        return f"LoadedModel('{self.name}', {type(self.model).__name__})"

    def blocks(self) -> list[Block]:
        """Return the decoder blocks that a forward on text calls; weights in files are read when a block needs them.

        Raises:
            UnsupportedModel: when there are none, or the model cannot be run.
        """
        if self._blocks is None:
            blocks = find_blocks(self.model)
            self._blocks = probe_blocks(self.model, blocks if self.store is None else self.store.attach_to(blocks))
        return self._blocks

    def check_causal(self) -> None:
        """Refuse a model that looks ahead; see `alps.models.causality.check_causal`.

        Raises:
            UnsupportedModel: when it does.
        """
        check_causal(self.model, None if self.store is None else self.blocks())

    @property
    def writer(self) -> CheckpointWriter:
        """Writer of the model's directory."""
        return CheckpointWriter(self.model, self.tokenizer, self.directory, self.store)

    def identity(self) -> str:
        """Return a hash of what the model computes: of the weights, or of their files, and of the settings."""
        return forward_sha256(self.model) if self.store is None else self.store.identity()

    def calibration(
        self,
        source: Text | CalibrationMix,
        samples: int,
        seqlen: int,
        seed: int,
        device: torch.device | None = None,
        progress: Progress | None = None,
        *,
        bos: bool = False,
    ) -> Windows:
        """Draw calibration windows from a text, from the model itself, or from a mix of such sources.

        Args:
            source: text, or mix of texts and the model.
            samples: number of windows.
            seqlen: tokens per window.
            seed: seed of the draw.
            device: device on which the model samples; None for its own.
            progress: receives the steps of the sampling, and of the count of a large text's tokens.
            bos: begin every window with the BOS token, see `alps.data.windows`.

        Raises:
            ConfigError: for text without a tokenizer, a text that is too short, windows longer than the model takes,
                a model that cannot be sampled, or a tokenizer without the BOS token that `bos` needs.
            UnsupportedModel: for sampling from a model without a key-value cache.
        """
        mix = source if isinstance(source, CalibrationMix) else CalibrationMix((CalibrationSource(source),))
        if samples < 1 or seqlen < 1:
            raise ConfigError(f"{samples} samples of seqlen {seqlen} hold no tokens: give at least 1 of each.")
        if self.tokenizer is None and any(part.text is not None for part in mix.sources):
            raise ConfigError(
                "Calibration by text needs the model's tokenizer: pass it, or token ids as a tensor, or use 'self'."
            )
        self.check_length(seqlen)
        counts, seeds = mix.counts(samples), mix.seeds(seed)
        drawn: dict[int, Windows] = {}
        # Texts first, so that a text that is too short fails before the model samples for minutes.
        for i in sorted(range(len(counts)), key=lambda i: mix.sources[i].text is None):
            if (text := mix.sources[i].text) is not None:
                drawn[i] = draw_calibration_windows(
                    text,
                    self.tokenizer,
                    samples=counts[i],
                    seqlen=seqlen,
                    seed=seeds[i],
                    bos=bos,
                    progress=progress,
                )
            else:
                drawn[i] = generate_windows(
                    self.model,
                    self.tokenizer,
                    samples=counts[i],
                    seqlen=seqlen,
                    seed=seeds[i],
                    bos=bos,
                    device=device,
                    progress=progress,
                )
        return combine(mix, [drawn[i] for i in range(len(counts))], seed)

    def evaluation(self, text: str, seqlen: int, limit: int | None, *, bos: bool = False) -> Windows:
        """Cut a text, given by path or name, into consecutive windows; see `cut_evaluation_windows`.

        Raises:
            ConfigError: for a text that is missing or too short, windows longer than the model takes, or a missing
                tokenizer.
        """
        if self.tokenizer is None:
            raise ConfigError(f"Evaluation on a text needs a tokenizer, and '{self.name}' has none.")
        self.check_length(seqlen)
        windows = cut_evaluation_windows(load_text(text, "evaluation"), self.tokenizer, seqlen, limit, bos=bos)
        self.check_ids(windows)
        return windows

    def check_same(self, windows: Windows, text: str, limit: int | None) -> None:
        """Reject windows that another model's tokenizer cut from a text in another way.

        Raises:
            ConfigError: when this model's own tokenizer cuts other windows.
        """
        if self.tokenizer is None:
            self.check_length(windows.ids.shape[1])
            self.check_ids(windows)
        elif not torch.equal(self.evaluation(text, windows.ids.shape[1], limit, bos=windows.bos).ids, windows.ids):
            raise ConfigError(
                f"The tokenizer of '{self.name}' cuts '{windows.source}' into other tokens than the model's: "
                "give the dense model that this one was pruned from."
            )

    def check_length(self, seqlen: int) -> None:
        """Reject windows that are longer than the model takes."""
        check_window(self.model, self.tokenizer, seqlen)

    def token_ids(self, ids: Tensor) -> Windows:
        """Make calibration windows of token ids.

        Raises:
            ConfigError: unless `ids` are integers of shape (windows, tokens), with at least one window of two tokens.
        """
        if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise ConfigError(
                f"Calibration token ids are {ids.dtype} of shape {tuple(ids.shape)}: "
                "give integers of shape (windows, tokens), at least one window of two tokens."
            )
        self.check_length(ids.shape[1])
        return Windows(ids.to("cpu", torch.int64), "token ids", len(ids))

    def check_ids(self, windows: Windows) -> None:
        """Reject token ids for which the model has no embedding."""
        size = self.model.get_input_embeddings().num_embeddings
        low, high = int(windows.ids.min()), int(windows.ids.max())
        if low < 0 or high >= size:
            raise ConfigError(
                f"Token ids of '{windows.source}' run from {low} to {high}, outside the model's vocabulary of {size}: "
                "the tokenizer does not belong to this model."
            )


def load(name: str | Path, dtype: str = "auto", *, device: str = "cpu", semi_structured: bool = False) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    The packed layers of a directory that `alps pack` wrote stay packed in memory, so that the model can be evaluated
    and can generate, but cannot be changed. Any other model is loaded dense; `alps.pack_linears(model)` packs its
    layers in memory.

    Args:
        name: directory, packed or not, GGUF file, hub name, or `smollm2-135m`.
        dtype: `auto` keeps the checkpoint's; or float32, bfloat16, float16.
        device: `cpu`, `cuda:N`, or `auto` for the first GPU if any.
        semi_structured: convert 2:4 layers of a packed directory to torch's semi-structured tensors, on a GPU.

    Returns:
        The model in evaluation mode; its `tokenizer` is None when a directory holds none.

    Raises:
        CheckpointError: when a file is missing or damaged.
        ConfigError, UnsupportedModel: when transformers cannot make the model, or `semi_structured` has no effect.
    """
    name, target, weights = str(name), pick_device(device), parse_dtype(dtype)
    if semi_structured:
        check_device(target)
    if is_packed(name):
        tokenizer = _find_tokenizer(name)
        model = load_packed(Path(name).expanduser(), weights).to(target)
        if semi_structured:
            convert_to_semi_structured(model)
        return LoadedModel(name, model, tokenizer)
    if semi_structured:
        raise ConfigError(f"'{name}' is not packed, and semi_structured is for packed layers: `alps pack` it first.")
    path = resolve_model_path(name)
    check_checkpoint(path)
    tokenizer = _find_tokenizer(path)  # a broken one is found before the weights are read
    return LoadedModel(name, load_model(path, weights).to(target), tokenizer, directory=checkpoint_directory(path))


def _find_tokenizer(path: str) -> Any:
    """Load the tokenizer of a model; None for a directory without the files of one."""
    directory = Path(path).expanduser()
    if directory.is_dir() and not any((directory / file).is_file() for file in _TOKENIZER_FILES):
        return None
    return load_tokenizer(path)


def open_model(name: str, dtype: str = "auto") -> LoadedModel:
    """Open a model without reading its weights, where its checkpoint allows it; else load it.

    Args:
        name: as for `load`.
        dtype: as for `load`.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: when it cannot be loaded.
    """
    path = resolve_model_path(name)
    check_checkpoint(path)
    opened = open_lazy_model(path, parse_dtype(dtype))
    if isinstance(opened, LazyWeights):
        # Files other than weights are fetched as well.
        directory = checkpoint_directory(path)
        return LoadedModel(name, opened.model, load_tokenizer(path), opened, directory)
    try:
        loaded = load(name, dtype)
    except MemoryError:
        raise ConfigError(f"Model '{name}' does not fit into memory, and has to be loaded whole: {opened}.") from None
    _LOG.warning(f"Model '{name}' is loaded into memory whole: {opened}.")
    return loaded
