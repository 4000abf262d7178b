"""Windows of tokens: seeded, disjoint for calibration; consecutive for evaluation."""

from __future__ import annotations

import hashlib
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alps.core.errors import ConfigError
from alps.data.text_sources import Text
from alps.data.windows import cut_evaluation_windows, draw_calibration_windows

_START = -1


class _Numbers:
    """Tokenizer of text that consists of numbers; it adds a start token unless special tokens are disabled."""

    def __init__(self, eos: int | None = None, vocabulary: dict[str, int] | None = None) -> None:
        self.eos_token_id, self.vocabulary = eos, vocabulary or {}

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, verbose: bool = True) -> Any:
        assert not verbose, "a text longer than the model takes is no reason to warn"
        start = [_START] if add_special_tokens else []
        rows = [text] if isinstance(text, str) else text
        ids = [start + [int(word) for word in row.split()] for row in rows]
        return SimpleNamespace(input_ids=ids[0] if isinstance(text, str) else ids)


class _WithBos(_Numbers):
    """Tokenizer of numbers with the start token as its BOS token."""

    bos_token_id = _START


def _numbers(first: int, count: int) -> str:
    return " ".join(str(number) for number in range(first, first + count))


def _rows(lengths: list[int]) -> list[str]:
    """Rows of the given lengths, numbered through, so that every token is unique."""
    return [_numbers(sum(lengths[:i]), length) for i, length in enumerate(lengths)]


@settings(max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seqlen=st.integers(1, 30),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
def test_windows_are_disjoint_slices_of_the_stream(lengths: list[int], seqlen: int, share: float, seed: int) -> None:
    total = sum(lengths)
    available = total // seqlen
    samples = max(1, round(share * available))
    text = Text("numbers", _rows(lengths))
    if available == 0:
        with pytest.raises(ConfigError):
            draw_calibration_windows(text, _Numbers(), samples=samples, seqlen=seqlen, seed=seed)
        return
    windows = draw_calibration_windows(text, _Numbers(), samples=samples, seqlen=seqlen, seed=seed)
    assert windows.ids.shape == (samples, seqlen) and windows.ids.dtype is torch.int64
    assert windows.available == available and windows.tokens == samples * seqlen
    starts = windows.ids[:, 0]
    assert torch.equal(windows.ids, starts[:, None] + torch.arange(seqlen))
    assert int(starts.min()) >= 0 and int(windows.ids.max()) < total
    assert len(set(windows.ids.flatten().tolist())) == windows.tokens


def test_one_seed_gives_the_same_windows_and_another_gives_others() -> None:
    text = Text("numbers", [_numbers(0, 1007)])

    def draw(seed: int) -> Any:
        return draw_calibration_windows(text, _Numbers(), samples=8, seqlen=10, seed=seed)

    assert torch.equal(draw(5).ids, draw(5).ids) and draw(5).sha256 == draw(5).sha256
    others = [draw(seed) for seed in range(6)]
    assert len({windows.sha256 for windows in others}) == 6
    assert len({tuple(sorted(windows.ids[:, 0].tolist())) for windows in others}) == 6


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    draw_calibration_windows(Text("numbers", [_numbers(0, 100)]), _Numbers(), samples=2, seqlen=10, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_whole_text_and_its_last_tokens_can_be_reached() -> None:
    # 25 tokens are two windows of 10 with 5 to spare: the offset takes every value from 0 to 5.
    text = Text("numbers", [_numbers(0, 25)])
    starts = {
        int(draw_calibration_windows(text, _Numbers(), samples=1, seqlen=10, seed=seed).ids[0, 0])
        for seed in range(200)
    }
    assert starts == {*range(6), *range(10, 16)}


def test_the_hash_is_that_of_little_endian_int64() -> None:
    windows = draw_calibration_windows(Text("numbers", [_numbers(3, 6)]), _Numbers(), samples=1, seqlen=6, seed=0)
    assert windows.sha256 == hashlib.sha256(struct.pack("<6q", 3, 4, 5, 6, 7, 8)).hexdigest()


@pytest.mark.parametrize(
    ("tokenizer", "separator"),
    [
        (_Numbers(eos=900), [900]),
        (_Numbers(eos=900, vocabulary={"<|endoftext|>": 901}), [901]),
        (_Numbers(eos=900, vocabulary={"<|end_of_text|>": 902}), [902]),
        (_Numbers(), []),
    ],
    ids=["end of sequence", "endoftext", "end_of_text", "none"],
)
def test_documents_end_with_the_separator_of_pretraining(tokenizer: _Numbers, separator: list[int]) -> None:
    stream = [1, 2, *separator, 3, 4, 5, *separator]
    windows = draw_calibration_windows(
        Text("rows", ["1 2", "  \n", "3 4 5"]), tokenizer, samples=1, seqlen=len(stream), seed=0
    )
    assert windows.ids.tolist() == [stream]


def test_a_text_that_is_too_short_is_refused_with_the_counts() -> None:
    with pytest.raises(ConfigError) as caught:
        draw_calibration_windows(Text("short.txt", [_numbers(0, 59)]), _Numbers(), samples=6, seqlen=10, seed=0)
    message = str(caught.value)
    assert "'short.txt' has 59 tokens, enough for 5 windows of 10; 6 are needed" in message
    draw_calibration_windows(Text("short.txt", [_numbers(0, 60)]), _Numbers(), samples=6, seqlen=10, seed=0)


def test_evaluation_windows_are_the_text_in_order_with_its_start_token() -> None:
    text = Text("numbers", [_numbers(0, 6), _numbers(6, 7)])  # 14 tokens with the start
    windows = cut_evaluation_windows(text, _Numbers(eos=900), 4)
    assert windows.ids.tolist() == [[_START, 0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]
    assert windows.available == 3 and windows.source == "numbers"


def test_the_rows_of_an_evaluation_are_joined_by_a_blank_line() -> None:
    seen = []

    class Spy(_Numbers):
        def __call__(self, text: Any, add_special_tokens: bool = True, verbose: bool = True) -> Any:
            seen.append(text)
            return super().__call__(text, add_special_tokens, verbose)

    cut_evaluation_windows(Text("numbers", ["1", "2 3\n", ""]), Spy(), 2)
    assert seen == ["1\n\n2 3\n\n\n"]


def test_a_limit_takes_the_first_windows() -> None:
    text = Text("numbers", [_numbers(0, 40)])
    whole, two = cut_evaluation_windows(text, _Numbers(), 8), cut_evaluation_windows(text, _Numbers(), 8, 2)
    assert torch.equal(two.ids, whole.ids[:2]) and two.available == whole.available == 5
    assert len(cut_evaluation_windows(text, _Numbers(), 8, 100).ids) == 5


def test_a_text_shorter_than_one_window_is_refused_with_the_counts() -> None:
    text = Text("short.txt", [_numbers(0, 9)])
    with pytest.raises(ConfigError, match=r"'short\.txt' has 10 tokens, too few for one window of 11"):
        cut_evaluation_windows(text, _Numbers(), 11)
    assert len(cut_evaluation_windows(text, _Numbers(), 10).ids) == 1


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seqlen=st.integers(2, 30),
    seed=st.integers(0, 2**40),
)
def test_bos_begins_every_window_and_windows_keep_their_length(lengths: list[int], seqlen: int, seed: int) -> None:
    total, text = sum(lengths), Text("numbers", _rows(lengths))
    available = total // (seqlen - 1)
    if available == 0:
        with pytest.raises(ConfigError, match="enough for 0 windows"):
            draw_calibration_windows(text, _WithBos(), samples=1, seqlen=seqlen, seed=seed, bos=True)
        with pytest.raises(ConfigError, match="too few for one window"):
            cut_evaluation_windows(text, _WithBos(), seqlen, bos=True)
        return
    drawn = draw_calibration_windows(text, _WithBos(), samples=available, seqlen=seqlen, seed=seed, bos=True)
    cut = cut_evaluation_windows(Text("numbers", [" ".join(_rows(lengths))]), _WithBos(), seqlen, bos=True)
    for windows in (drawn, cut):
        assert windows.bos and windows.ids.shape == (available, seqlen) and windows.available == available
        assert (windows.ids[:, 0] == _START).all()
    # Without the first column there is nothing but consecutive text.
    assert cut.ids[:, 1:].flatten().tolist() == list(range(available * (seqlen - 1)))
    rows = drawn.ids[:, 1:]
    assert (rows.diff(dim=1) == 1).all() and len(set(rows.flatten().tolist())) == rows.numel()


def test_bos_is_off_unless_it_is_asked_for_and_needs_a_tokenizer_that_has_it() -> None:
    text = Text("numbers", _rows([40]))
    drawn = draw_calibration_windows(text, _WithBos(), samples=4, seqlen=8, seed=0)
    assert not drawn.bos and _START not in drawn.ids
    cut = cut_evaluation_windows(text, _WithBos(), 8)
    assert not cut.bos and (cut.ids == _START).sum() == 1, "the tokenizer's own start token begins the text"
    for tokenizer in (_Numbers(), SimpleNamespace(bos_token_id=None)):
        with pytest.raises(ConfigError, match="has no BOS token to begin windows with: leave --bos out"):
            cut_evaluation_windows(text, tokenizer, 8, bos=True)
        with pytest.raises(ConfigError, match="has no BOS token to begin windows with: leave --bos out"):
            draw_calibration_windows(text, tokenizer, samples=4, seqlen=8, seed=0, bos=True)
