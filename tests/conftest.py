"""Tiny random models, a tokenizer and a text: everything a test needs, made on the spot, with the network off."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# One core each: what the tests start has as many threads as they have, and so the same bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from alps.core.openmp import openmp_settings

# As the command does, before torch: for the tests that compute with several threads, and for all that they start.
os.environ.update(openmp_settings(os.environ))

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from alps.core import cpu_count
from alps.reporting import publish
from helpers.blank_page import write_blank_page


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """As many workers as CPUs that the process may use: pytest-xdist does not know the quotas of containers."""
    return cpu_count.usable_cpus()


# The same examples in every run; how long one takes says nothing on a machine that others use, too.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")

KINDS = ("llama", "opt", "opt-postnorm", "gpt2")
_VOCABULARY = 64
_SHARED = Path(__file__).parent.parent.parent / "shared"


def _llama() -> nn.Module:
    # 4 query heads read 2 key-value heads, so k_proj and v_proj are not square; 44 is a multiple of 4 and not of 8.
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def _opt(norm_before: bool) -> nn.Module:
    config = OPTConfig(
        vocab_size=_VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        do_layer_norm_before=norm_before,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model: nn.Module = OPTForCausalLM(config)
    return model


def _gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=_VOCABULARY,
        n_positions=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "opt": lambda: _opt(norm_before=True),
    "opt-postnorm": lambda: _opt(norm_before=False),
    "gpt2": _gpt2,
}


def _tiny_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    # The generator is forked, so that a model is the same wherever a test builds it. Fresh models have zero
    # biases, unit norms and weights too small for their layers to matter: all are drawn anew.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20240607)
        model = _BUILDERS[kind]()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = parameter.new_tensor(0.2 if parameter.ndim > 1 else 0.1)
                shift = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
                parameter.copy_(shift + scale * torch.randn_like(parameter))
    return model.eval().to(dtype)


@pytest.fixture(autouse=True)
def _blank_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw report.html in the tests of `reporting` alone; all others have a blank one."""
    if "reporting" not in request.path.parts:
        monkeypatch.setattr(publish, "_write", write_blank_page)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """`tiny_model(kind, dtype)` builds a random model of one of the kinds; equal calls give equal weights."""
    return _tiny_model


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind of tiny model in turn."""
    name: str = request.param
    return name


@pytest.fixture
def ids() -> Tensor:
    """Token ids for the tiny models: seven windows of 16, reproducibly random."""
    return torch.randint(2, _VOCABULARY, (7, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """A tokenizer for the tiny models: lower-cased characters, with the 60 of English text and `<unk>`."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,;:!?'\"()[]{}<>=+-*/_"
    words = ["<s>", "</s>", "<unk>", *letters][:_VOCABULARY]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def english() -> str:
    """About 60,000 characters of English that every CPython carries: the language reference, no part repeated."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[topic] for topic in sorted(topics, key=lambda t: (len(topics[t]), t))[-12:])[:60_000]


@pytest.fixture
def english_file(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That text as a file, outside the test's own `tmp_path`."""
    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_text(english)
    return path


@pytest.fixture(scope="session")
def stories() -> Path:
    """The directory of a real trained LLaMA of 260,032 parameters; skips where the file is not at hand."""
    return _shared("models/stories260K/hf")


@pytest.fixture(scope="session")
def short_stories(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the first two of the five blocks of `stories`, for runs whose time is that of their blocks."""
    folder = tmp_path_factory.mktemp("models") / "short-stories"
    model = LlamaForCausalLM.from_pretrained(stories)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(stories).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """The raw WikiText-2 test file; skips where it is not at hand."""
    return _shared("data/wikitext2/test.txt")


def _shared(path: str) -> Path:
    found = _SHARED / path
    if not found.exists():
        pytest.skip(f"needs ../shared/{path}")
    return found


@pytest.fixture(scope="session")
def site_inputs() -> Callable[[nn.Module, Tensor], dict[str, Tensor]]:
    """`site_inputs(model, ids)`: what every linear map received in `model(ids)`, by name, (tokens, in), float64.

    Independent of the package: plain hooks on the whole model, all windows in one batch.
    """

    def record(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def keep(_module: nn.Module, args: tuple[Tensor, ...], _output: Any) -> None:
                seen[name] = args[0].detach().double().flatten(0, -2)

            return keep

        handles = [
            module.register_forward_hook(hook(name))
            for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D")
        ]
        with torch.no_grad():
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
        return seen

    return record
