"""Sharing of results: the hub's own client uploads a directory as it is, and a model loads from what arrived."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import alps
from alps.reporting.card_metadata import read_card
from helpers.hub_server import TOKEN, HubServer, serve_hub

_LOAD = """
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("owner/name")
model.save_pretrained(sys.argv[1])
"""


def _run(hub: HubServer, home: Path, *command: object, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_TOKEN": token}
    environment |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)


def _upload(hub: HubServer, folder: Path, home: Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run the command of docs/how-to/serving.md."""
    hf = Path(sys.executable).parent / "hf"
    options = ("--private", "--commit-message", "50 % zeros")
    return _run(hub, home, hf, "upload", "owner/name", folder, *options, token=token)


@pytest.mark.slow
def test_a_result_is_uploaded_and_loads_from_the_hub(
    short_stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(short_stories, tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# Stories\n")
    out, packed = tmp_path / "pruned", tmp_path / "packed"
    alps.prune(model, sparsity=0.5, method="magnitude", measure_error=False, out=out)
    alps.pack(out, packed)
    with serve_hub(tmp_path / "hub", monkeypatch) as hub:
        refused = _upload(hub, out, tmp_path / "home", "hf_of_another")
        assert refused.returncode != 0 and "Invalid" in refused.stdout + refused.stderr and hub.files == {}
        for folder in (out, packed):
            hub.files.clear()
            done = _upload(hub, folder, tmp_path / "home")
            assert done.returncode == 0, done.stderr
            arrived = {name.removeprefix("owner/name/resolve/main/"): content for name, content in hub.files.items()}
            assert arrived == {
                str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }
            # What the hub is asked to check is the card.
            card: Any = yaml.safe_load(hub.cards[-1].split("---")[1])
            assert card == yaml.safe_load(str(read_card(folder).data)) and card["license"] == "mit"
        # `visibility` since huggingface_hub 2.
        assert all("private" in (settings.get("visibility"), *settings) for settings in hub.created)

        hub.files.clear()
        assert _upload(hub, out, tmp_path / "home").returncode == 0
        done = _run(hub, tmp_path / "other home", sys.executable, "-c", _LOAD, tmp_path / "fetched")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "fetched" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
