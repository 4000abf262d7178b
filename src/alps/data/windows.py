"""Windows of tokens, all of the same length: random ones for calibration, consecutive ones for evaluation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alps.core.errors import ConfigError
from alps.core.progress import Progress
from alps.data.joined_documents import JoinedDocuments
from alps.data.text_sources import Origin, Text

# Separators of documents in pre-training text. The EOS token of a chat model may end a turn, not a document.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class Windows:
    """Token ids and their source.

    Attributes:
        ids: int64, shape (windows, seqlen).
        source: name of the text.
        available: number of whole windows in the text.
        parts: name and number of windows of every source of a mix; empty for a single source.
        origins: format and number of documents of every source, None for one that is no text; empty if not known.
        bos: whether every window was begun with the tokenizer's BOS token.
    """

    ids: Tensor
    source: str
    available: int
    parts: tuple[tuple[str, int], ...] = ()
    origins: tuple[Origin | None, ...] = ()
    bos: bool = False

    @property
    def origin(self) -> Origin | None:
        """Format and number of documents of the first source, if known."""
        return self.origins[0] if self.origins else None

    @property
    def sha256(self) -> str:
        """Hash of the ids as little-endian int64; equal hashes are equal calibrations."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows."""
        return self.ids.numel()


def draw_calibration_windows(
    text: Text,
    tokenizer: Any,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    bos: bool = False,
    progress: Progress | None = None,
) -> Windows:
    """Draw random windows without overlap from a text.

    Rows are joined by the tokenizer's document separator and cut into consecutive windows from a random offset on. Some
    of these are drawn by a random permutation.

    Args:
        text: to draw from.
        tokenizer: of the model.
        samples: number of windows.
        seqlen: tokens in a window.
        seed: of offset and permutation.
        bos: begin every window with the BOS token, in place of one token of the text.
        progress: advanced while the tokens of a large text are counted.

    Raises:
        ConfigError: when the text is too short for that many windows, a number is not positive, or there is no BOS
            token.
    """
    if samples < 1 or seqlen < 1:
        raise ConfigError(f"{samples} samples of seqlen {seqlen} hold no tokens: give at least 1 of each.")
    begin = [bos_token(tokenizer)] if bos else []
    documents, width = JoinedDocuments(text, tokenizer, document_separator(tokenizer), progress), seqlen - len(begin)
    available = documents.tokens // width if width else 0
    if available < samples:
        raise ConfigError(
            f"Calibration text '{text.name}' has {documents.tokens} tokens, enough for {available} windows of "
            f"{seqlen}; {samples} are needed: give more text, or lower --samples or --seqlen."
        )
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(documents.tokens - available * width + 1, (1,), generator=generator))
    chosen = torch.randperm(available, generator=generator)[:samples]
    grid = documents.read(offset + chosen * width, width)
    return Windows(_begin(grid, begin), text.name, available, origins=(text.origin,), bos=bos)


def cut_evaluation_windows(
    text: Text, tokenizer: Any, seqlen: int, limit: int | None = None, *, bos: bool = False
) -> Windows:
    """Cut a text into consecutive windows; its rows are joined by a blank line.

    Args:
        text: to cut; tokens after the last whole window are dropped.
        tokenizer: of the model.
        seqlen: tokens in a window.
        limit: number of windows from the beginning; None for all.
        bos: begin every window with the BOS token, in place of one token of the text. The tokenizer's own special
            tokens are then left out.

    Raises:
        ConfigError: when the text is shorter than one window, nothing would be predicted, or there is no BOS token.
    """
    if seqlen < 2 or (limit is not None and limit < 1):
        raise ConfigError(
            f"{limit or 'No'} windows of seqlen {seqlen} predict nothing: give at least 1 window of 2 tokens."
        )
    begin = [bos_token(tokenizer)] if bos else []
    pieces = tokenizer(text.joined, add_special_tokens=not bos, verbose=False).input_ids
    ids, width = torch.tensor(pieces, dtype=torch.int64), seqlen - len(begin)
    available = len(ids) // width
    if available < 1:
        raise ConfigError(
            f"Text '{text.name}' has {len(ids)} tokens, too few for one window of {seqlen}: lower --seqlen."
        )
    windows = ids[: available * width].view(available, width)
    return Windows(_begin(windows[:limit], begin), text.name, available, origins=(text.origin,), bos=bos)


def bos_token(tokenizer: Any) -> int:
    """Return the token that begins a text.

    Raises:
        ConfigError: for a tokenizer without one.
    """
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        raise ConfigError("The model's tokenizer has no BOS token to begin windows with: leave --bos out.")
    return int(token)


def _begin(grid: Tensor, tokens: list[int]) -> Tensor:
    """Return a copy of token ids (windows, width) with the same tokens in front of every window."""
    return torch.cat([torch.tensor(tokens, dtype=torch.int64).expand(len(grid), -1), grid], dim=1)


def document_separator(tokenizer: Any) -> int | None:
    """Return the token between two documents; None for a tokenizer without any."""
    vocabulary = tokenizer.get_vocab()
    for word in _SEPARATORS:
        if word in vocabulary:
            return int(vocabulary[word])
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
