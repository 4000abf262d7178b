"""Serving of results by `transformers serve`: greedy text over HTTP is the text of the model in this process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import alps

pytestmark = [pytest.mark.slow, pytest.mark.serving]
PROMPT, TOKENS = "Once upon a time", 12


@pytest.fixture(autouse=True)
def _server_packages() -> None:
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def _serve(model: Path, log: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port, command = _free_port(), Path(sys.executable).parent / "transformers"
    arguments = [str(command), "serve", str(model), "--device", "cpu", "--port", str(port), *options]
    with log.open("wb") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=file, env=dict(os.environ))
        try:
            yield process, f"http://localhost:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _complete(process: subprocess.Popen[bytes], address: str, model: Path) -> str:
    """Return the greedy continuation of the prompt, as soon as the server answers."""
    body = {"model": str(model), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(240):
        assert process.poll() is None, "the server has ended"
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                text: str = json.load(response)["choices"][0]["text"]
                return text
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError("the server does not answer")


def _generate(directory: Path) -> str:
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    generated = model.generate(ids, do_sample=False, max_new_tokens=TOKENS)
    text: str = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def test_plain_and_packed_results_are_served(stories: Path, tmp_path: Path, english_file: Path) -> None:
    pruned, packed, shrunk = (tmp_path / name for name in ("pruned", "packed", "shrunk"))
    alps.prune(stories, sparsity=0.5, method="magnitude", measure_error=False, out=pruned)
    alps.pack(pruned, packed)
    alps.shrink(stories, shrunk, mlp=0.25, calibration=english_file, samples=4, seqlen=64)
    for directory, plain, options in (
        (pruned, pruned, ()),
        (shrunk, shrunk, ()),
        (packed, pruned, ("--trust-remote-code",)),
    ):
        with _serve(directory, tmp_path / "log", *options) as server:
            assert _complete(*server, directory) == _generate(plain), (tmp_path / "log").read_text()


def test_a_packed_result_is_not_served_without_alps(stories: Path, tmp_path: Path) -> None:
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    alps.prune(stories, sparsity=0.5, method="magnitude", measure_error=False, out=pruned)
    alps.pack(pruned, packed)
    with _serve(packed, tmp_path / "log") as (process, _):
        assert process.wait(120) != 0
    assert "Error" in (tmp_path / "log").read_text()
