"""Corpora of the hub, from a server on this machine: what is fetched, what is cached, and what is said without one."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download

from alps.core.errors import ConfigError
from alps.data.hub_corpora import HUB_CORPORA
from alps.data.mixture import load_calibration
from alps.data.text_sources import load_text
from alps.data.windows import draw_calibration_windows
from helpers.hub_server import HubServer, serve_hub

SHARD = "datasets/allenai/c4/resolve/main/en/c4-train.00000-of-01024.json.gz"
ROWS = [f"Document {i} — “ünïcode”,\nwith a second line.\u2028" for i in range(50)]


def shard(rows: list[str]) -> bytes:
    """Content of a file as C4 has them."""
    lines = [
        json.dumps({"text": row, "timestamp": "2019-04-25T12:57:54Z", "url": f"http://{i}"})
        for i, row in enumerate(rows)
    ]
    return gzip.compress("\n".join(lines).encode() + b"\n")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    # The client waits up to a minute for a hub that does not answer.
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 1, raising=False)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    with serve_hub(tmp_path / "hub", monkeypatch) as server:
        server.files[SHARD] = shard(ROWS)
        yield server


def _refused(spec: str = "c4") -> str:
    with pytest.raises(ConfigError) as caught:
        load_text(spec, "calibration")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".TAG")]


def test_every_document_of_the_first_shard_in_its_order_and_then_from_the_cache(hub: HubServer) -> None:
    text = load_text("c4", "calibration")
    assert text.rows == ROWS and text.name == "c4" and text.origin.documents == 50
    assert hub.requests == [f"HEAD {SHARD}", f"GET cdn/{SHARD}"] and hub.sent == len(hub.files[SHARD])
    assert load_text("c4", "calibration").rows == ROWS and hub.sent == len(hub.files[SHARD])
    hub.stop()
    assert load_text("c4", "calibration").rows == ROWS


def test_the_file_for_evaluation_is_another(hub: HubServer) -> None:
    hub.files = {"datasets/allenai/c4/resolve/main/en/c4-validation.00000-of-00008.json.gz": shard(["validation"])}
    assert load_text("c4", "evaluation").rows == ["validation"]


def test_without_a_hub_one_sentence_says_so(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files.clear()
    message = _refused()
    assert (
        f"({hub.endpoint} answers 404 for allenai/c4/en/c4-train.00000-of-01024.json.gz): give a local file" in message
    )
    hub.stop()
    assert f"({hub.endpoint} does not answer, and the file is not in the cache)" in _refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "(HF_HUB_OFFLINE is set, and the file is not in the cache)" in _refused()
    assert not [path for path in _files(tmp_path / "hub") if path.stat().st_size > 40]


def test_a_broken_download_leaves_no_file_in_the_cache(hub: HubServer, tmp_path: Path) -> None:
    hub.cut = 100
    assert "cannot be fetched from the hub" in _refused()
    # Before huggingface_hub 2 the part that arrived stays, under a name of its own, and is continued.
    parts = [path for path in _files(tmp_path / "hub") if path.suffix != ".incomplete"]
    assert not [path for path in parts if path.name.startswith("c4-train") or path.parent.name == "blobs"]
    hub.cut = None
    assert load_text("c4", "calibration").rows == ROWS


def test_a_damaged_file_is_named_and_fetched_again_when_it_is_removed(hub: HubServer) -> None:
    sound = hub.files[SHARD]
    hub.files[SHARD] = sound[:-30]
    message = _refused()
    assert message.startswith("The cached file of text 'c4' cannot be read (it is damaged or cut short (")
    blob = Path(message.split("remove '")[1].split("'")[0])
    assert blob.is_file() and blob.parent.name == "blobs"
    blob.unlink()
    hub.files[SHARD] = sound
    assert load_text("c4", "calibration").rows == ROWS


def test_parquet_corpora_name_the_extra_that_they_need(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("wikitext2", "ptb"):
        message = _refused(name)
        assert (
            message.startswith(f"Text '{name}' is a parquet file") and "pip install 'alps-prune[datasets]'" in message
        )
    assert hub.requests == []


def test_parquet_corpora_are_read_with_it(hub: HubServer, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    paths = {
        "text": "datasets/Salesforce/wikitext/resolve/main/wikitext-2-raw-v1/train-00000-of-00001.parquet",
        "sentence": "datasets/ptb-text-only/ptb_text_only/resolve/refs%2Fconvert%2Fparquet/"
        "penn_treebank/train/0000.parquet",
    }
    for column, path in paths.items():
        pyarrow.parquet.write_table(arrow.table({column: ["", *ROWS]}), tmp_path / "a.parquet")
        hub.files[path] = (tmp_path / "a.parquet").read_bytes()
    assert load_text("wikitext2", "calibration").rows == load_text("ptb", "calibration").rows == ["", *ROWS]


def test_the_documents_are_those_of_datasets(tmp_path: Path, hub: HubServer) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "shard.json.gz").write_bytes(hub.files[SHARD])
    files = {"train": str(tmp_path / "shard.json.gz")}
    expected = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "datasets"))
    assert load_text("c4", "calibration").rows == list(expected["text"])


def test_windows_are_those_of_the_same_text_in_a_file_and_stay_without_the_hub(
    hub: HubServer, tmp_path: Path, english: str, word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    hub.files[SHARD] = shard([english[i : i + 900] for i in range(0, 7_200, 900)])
    (tmp_path / "local.json.gz").write_bytes(hub.files[SHARD])

    def sha256(spec: str, seed: int) -> str:
        mix = load_calibration(spec, 8)
        assert mix.sources[0].text is not None
        return draw_calibration_windows(mix.sources[0].text, word_tokenizer, samples=8, seqlen=64, seed=seed).sha256

    fetched = [sha256("c4", seed) for seed in range(3)]
    hub.stop()
    assert fetched == [sha256("c4", seed) for seed in range(3)]
    assert fetched == [sha256(str(tmp_path / "local.json.gz"), seed) for seed in range(3)] and len(set(fetched)) == 3


@pytest.mark.slow
def test_the_command_in_an_environment_without_datasets(
    hub: HubServer, stories: Path, tmp_path: Path, english: str
) -> None:
    """HF_ENDPOINT alone leads to the server; the second run is offline."""
    hub.files[SHARD] = shard([english[i : i + 900] for i in range(0, 18_000, 900)])
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    command = [
        sys.executable,
        "-m",
        "alps",
        "prune",
        str(stories),
    ]
    settings = ["--sparsity", "0.5", "--method", "wanda", "--samples", "4", "--seqlen", "64"]
    for name, offline in (("first", "0"), ("second", "1")):
        environment |= {"HF_HUB_OFFLINE": offline, "TRANSFORMERS_OFFLINE": offline}
        done = subprocess.run(
            [*command, str(tmp_path / name), *settings],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (
        tmp_path / "second" / "model.safetensors"
    ).read_bytes()
    assert set(HUB_CORPORA) == {"wikitext2", "c4", "ptb"}
