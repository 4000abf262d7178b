"""Generated text and the figures beside it, in Python and on the command line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

import alps
from alps.cli import main as cli
from alps.core.cpu_load import CpuReading, CpuTime
from alps.inference.text_generation import generate_text


def test_generate_and_eval_on_the_command_line(packed_stories: tuple[Path, Path], english_file: Path) -> None:
    dense, packed = map(str, packed_stories)
    runner = CliRunner()
    options = ("--prompt", "Once upon a time", "--tokens", "40")
    result = runner.invoke(cli.app, ["generate", packed, *options])
    assert result.exit_code == 0, result.output
    model, tokenizer = alps.load(dense).model, AutoTokenizer.from_pretrained(dense)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert result.stdout.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()
    message = result.stderr.replace("\n", " ")
    assert f"{len(expected)} tokens after {ids.shape[1]}: the first in" in message and "tokens/s; weights" in message
    assert "35 packed layers by" in message and "peak memory" in message
    written = generate_text(model, tokenizer, "Once upon a time", 1)
    assert written.tokens == 1 and written.tokens_per_second is None
    # Sampling with the same seed gives the same text.
    texts = [generate_text(model, tokenizer, "Once", 20, temperature=1.0, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    refused = runner.invoke(cli.app, ["generate", packed, *options, "--chat"])
    assert refused.exit_code != 0 and "chat template" in str(refused.exception)

    measured = []
    for folder in (dense, packed):
        told = runner.invoke(cli.app, ["eval", folder, "--text", str(english_file), "--seqlen", "64", "--windows", "4"])
        assert told.exit_code == 0, told.output
        measured.append(json.loads(told.stdout)[0]["perplexity"])
    assert f"{measured[0]:.4g}" == f"{measured[1]:.4g}"


def test_a_speed_on_a_busy_machine_says_so(packed_stories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for others, sentence in ((0.0, ""), (1.8, "The machine is busy: other programs use 1.8 of 2 CPUs.")):
        moments = itertools.count(0.0, 5.0)

        def read(moments: Iterator[float] = moments, others: float = others) -> CpuReading:
            wall = next(moments)
            return CpuReading(wall, 0.2 * wall, CpuTime(2, (0.2 + others) * wall))

        monkeypatch.setattr("alps.core.cpu_load.read_cpu_times", read)
        result = CliRunner().invoke(cli.app, ["generate", str(packed_stories[0]), "--prompt", "Once", "--tokens", "2"])
        assert result.exit_code == 0, result.output
        message = result.stderr.replace("\n", " ").strip()
        assert message.endswith(sentence or ("thread.", "threads.")) and message.count("busy") == bool(sentence)


def test_the_chat_template_is_applied(packed_stories: tuple[Path, Path]) -> None:
    model, tokenizer = alps.load(packed_stories[1]).model, AutoTokenizer.from_pretrained(packed_stories[1])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}Once"
    plain = generate_text(model, tokenizer, "Hello", 5)
    chat = generate_text(model, tokenizer, "Hello", 5, chat=True)
    assert chat.prompt_tokens > plain.prompt_tokens
