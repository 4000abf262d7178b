"""Sampled windows: against a loop without a cache, stream by stream, and at every limit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from alps.core.errors import ConfigError, NotFinite, UnsupportedModel
from alps.data import sampling as generate
from alps.data.sampling import TemperatureSchedule, draw_tokens, sample_windows


class Steps:
    """Progress that records its calls."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.details: list[str] = []
        self.finished = 0

    def start(self, title: str, total: int) -> None:
        """Record the number of steps."""
        self.totals.append(total)

    def step(self, detail: str) -> None:
        """Record the detail."""
        self.details.append(detail)

    def finish(self) -> None:
        """Count the end."""
        self.finished += 1


@pytest.fixture(scope="module")
def story_model(stories: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()


def uniforms(seed: int, window: int, count: int) -> list[float]:
    """The stream of one window, made by hand."""
    digest = hashlib.sha256(f"{seed}/window {window}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") // 2)
    return [float(x) for x in torch.rand(count, generator=generator, dtype=torch.float64)]


def naive(model: Any, first: int, seqlen: int, numbers: list[float], temperatures: list[float]) -> list[int]:
    """One window by whole forwards without a cache, and a walk along the distribution."""
    ids = [first]
    for number, temperature in zip(numbers, temperatures, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        passed, token = 0.0, -1
        probabilities = (logits / temperature).softmax(0).tolist()
        while passed <= number:
            token += 1
            passed += probabilities[token]
        ids.append(token)
    assert len(ids) == seqlen
    return ids


def test_the_cache_changes_nothing(story_model: Any) -> None:
    temperatures = [1.5 - i / 20 for i in range(10)] + [1.0] * 29
    result = sample_windows(story_model, 1, samples=3, seqlen=40, seed=5)
    assert result.dtype == torch.int64
    for window in range(3):
        assert result[window].tolist() == naive(story_model, 1, 40, uniforms(5, window, 39), temperatures)


def test_probabilities_are_those_of_a_whole_forward(story_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
        seen.append(logits.clone())
        return draw_tokens(logits, uniform, temperature)

    monkeypatch.setattr(generate, "draw_tokens", spy)
    ids = sample_windows(story_model, 1, samples=4, seqlen=48, seed=0)
    with torch.no_grad():
        whole = story_model(input_ids=ids, use_cache=False).logits[:, :-1].softmax(-1)
    torch.testing.assert_close(torch.stack(seen, 1).softmax(-1), whole, rtol=1e-3, atol=1e-6)


def test_without_heat_the_most_likely_token_follows(story_model: Any) -> None:
    result = sample_windows(story_model, 1, samples=2, seqlen=60, seed=0, schedule=TemperatureSchedule(1e-4, 1e-4, 1))
    ids = [1]
    for _ in range(59):
        with torch.no_grad():
            ids.append(int(story_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert result.tolist() == [ids, ids]


def test_every_architecture_is_sampled_as_without_a_cache(tiny_model: Callable[..., Any], kind: str) -> None:
    model = tiny_model(kind)
    result = sample_windows(model, 0, samples=2, seqlen=20, seed=1, schedule=TemperatureSchedule(1.0, 1.0, 1))
    expected = [naive(model, 0, 20, uniforms(1, window, 19), [1.0] * 19) for window in range(2)]
    assert result.tolist() == expected


def test_seeds_repeat_and_differ_and_every_window_has_its_own_stream(story_model: Any) -> None:
    item, again, other = (sample_windows(story_model, 1, samples=6, seqlen=32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(item, again)
    rows = {tuple(row) for row in [*item.tolist(), *other.tolist()]}
    assert len(rows) == 12
    assert torch.equal(sample_windows(story_model, 1, samples=2, seqlen=32, seed=0), item[:2])


def test_the_global_random_state_is_neither_read_nor_moved(story_model: Any) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    item = sample_windows(story_model, 1, samples=2, seqlen=16, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(sample_windows(story_model, 1, samples=2, seqlen=16, seed=0), item)


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (5, [5]), (9, [5])])
def test_batches_do_not_change_the_tokens(story_model: Any, size: int, sizes: list[int]) -> None:
    steps = Steps()
    result = sample_windows(story_model, 1, samples=5, seqlen=24, seed=3, batch_size=size, progress=steps)
    assert torch.equal(result, sample_windows(story_model, 1, samples=5, seqlen=24, seed=3, batch_size=4))
    assert steps.details == [f"{count} at once" for count in sizes for _ in range(23)]
    assert steps.totals == [len(sizes) * 23] and steps.finished == 1


def test_batches_keep_the_cache_within_its_limit(story_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        output = story_model(input_ids=torch.ones(1, 24, dtype=torch.int64), use_cache=True)
    cache = output["cache" if "cache" in output else "past_key_values"]
    window = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    for limit, largest in ((2 * window, 2), (3 * window - 1, 2), (3 * window, 3), (1, 1), (100 * window, 64)):
        monkeypatch.setattr(generate, "_CACHE_BYTES", limit)
        assert generate._largest_batch(story_model, 24) == largest
    monkeypatch.setattr(generate, "_CACHE_BYTES", 2 * window)
    steps = Steps()
    sample_windows(story_model, 1, samples=5, seqlen=24, seed=0, progress=steps)
    assert max(steps.details) == "2 at once"


def test_the_schedule_is_linear_and_then_constant() -> None:
    schedule = TemperatureSchedule(3.0, 1.0, 4)
    assert [schedule.at(i) for i in (0, 1, 2, 3, 4, 5, 1000)] == [3.0, 2.5, 2.0, 1.5, 1.0, 1.0, 1.0]
    assert TemperatureSchedule(3.0, 0.5, 0).at(0) == 0.5


def test_the_schedule_reaches_the_draws(story_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
        seen.append(temperature)
        return draw_tokens(logits, uniform, temperature)

    monkeypatch.setattr(generate, "draw_tokens", spy)
    sample_windows(story_model, 1, samples=1, seqlen=6, seed=0, schedule=TemperatureSchedule(3.0, 1.0, 4))
    assert seen == [3.0, 2.5, 2.0, 1.5, 1.0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_have_the_frequencies_of_the_softmax(temperature: float) -> None:
    # An even grid of n numbers hits an interval of length p between p n - 1 and p n + 1 times.
    logits = torch.randn(9, generator=torch.Generator().manual_seed(0)) * 2
    count = 20_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    result = torch.bincount(draw_tokens(logits.expand(count, 9), grid, temperature), minlength=9)
    weights = [2.718281828459045 ** (x / temperature) for x in logits.tolist()]
    for hits, weight in zip(result.tolist(), weights, strict=True):
        assert abs(hits - count * weight / sum(weights)) < 1.01


def test_what_has_no_probability_is_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]).expand(3, 5)
    ends = torch.tensor([0.0, 0.3, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(logits, ends, 1.0).tolist() == [1, 3, 3]


def test_forbidden_tokens_do_not_occur(story_model: Any) -> None:
    free = sample_windows(story_model, 1, samples=4, seqlen=32, seed=0)
    forbidden = torch.tensor(sorted(set(free[:, 1:].flatten().tolist()))[::2])
    result = sample_windows(story_model, 1, samples=4, seqlen=32, seed=0, forbidden=forbidden)
    assert bool(torch.isin(free[:, 1:], forbidden).any()) and not bool(torch.isin(result[:, 1:], forbidden).any())


def test_the_end_of_a_text_is_a_token_like_others(story_model: Any) -> None:
    end = story_model.config.eos_token_id
    others = torch.tensor([i for i in range(story_model.config.vocab_size) if i not in (end, 5)])
    result = sample_windows(
        story_model, 1, samples=8, seqlen=40, seed=0, schedule=TemperatureSchedule(50.0, 50.0, 1), forbidden=others
    )
    assert set(result[:, 1:].flatten().tolist()) == {end, 5} and result.shape == (8, 40)
    after = result[:, 2:][result[:, 1:-1] == end]
    assert 5 in after.tolist()


def test_the_model_comes_back_as_it_was(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sample_windows(model, 0, samples=2, seqlen=8, seed=0)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()


def test_bfloat16_is_sampled_from_float32_logits(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", torch.bfloat16)
    result = sample_windows(model, 0, samples=3, seqlen=16, seed=0, batch_size=3)
    assert torch.equal(
        result, sample_windows(model, 0, samples=3, seqlen=16, seed=0, batch_size=3)
    ) and result.shape == (
        3,
        16,
    )


class _Odd(nn.Module):
    """Model whose forward returns what `answer` does."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answer = answer
        self.config = SimpleNamespace(num_attention_heads=1, hidden_size=4, num_hidden_layers=1)

    def forward(self, **_: Any) -> Any:
        return self.answer()


def _out_of_memory() -> Any:
    raise torch.OutOfMemoryError("tried to allocate")


@pytest.mark.parametrize(
    ("answer", "kind", "complaint"),
    [
        (lambda: SimpleNamespace(logits=torch.zeros(2, 1, 4)), UnsupportedModel, "no key-value cache"),
        (_out_of_memory, ConfigError, "does not fit into the memory of cpu"),
        (
            lambda: SimpleNamespace(logits=torch.full((2, 1, 4), torch.nan), past_key_values=1),
            NotFinite,
            "NaN or infinite logits for 1 sampled tokens",
        ),
        (
            lambda: SimpleNamespace(logits=torch.full((2, 1, 4), torch.inf), past_key_values=1),
            NotFinite,
            "NaN or infinite logits for 1 sampled tokens",
        ),
    ],
    ids=["no cache", "out of memory", "NaN", "infinite"],
)
def test_models_that_cannot_be_sampled_say_why(
    answer: Callable[[], Any], kind: type[Exception], complaint: str
) -> None:
    steps, model = Steps(), _Odd(answer).train()
    with pytest.raises(kind, match=complaint):
        sample_windows(model, 0, samples=2, seqlen=8, seed=0, progress=steps)
    assert steps.finished == 1 and model.training
