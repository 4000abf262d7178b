"""The commands that pack and unpack: sizes in closed form, and every byte back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.command_line import run_alps


@pytest.mark.parametrize("options", [[], ["--compress"]], ids=["plain", "compressed"])
def test_pack_and_unpack(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stories: Path,
    tmp_path: Path,
    options: list[str],
) -> None:
    pruned, packed, back = (tmp_path / name for name in ("pruned", "packed", "back"))
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            smallest = parameter.detach().abs().float().flatten().argsort(stable=True)
            parameter.data.view(-1)[smallest[: round(0.7 * parameter.numel())]] = 0
    model.save_pretrained(pruned)

    assert run_alps(monkeypatch, "pack", pruned, packed, *options) == 0
    printed = capsys.readouterr().out
    # Offsets are 4 bytes a row of 64 or 172 columns here, which is why it is not 0.363.
    expected = "Packed 35 of 47 tensors: 453,120 -> " + ("111," if options else "177,180 bytes (0.3910).")
    assert expected in printed and "All weights: 520,064 -> " in printed and ", in 1 file; other files" in printed

    assert run_alps(monkeypatch, "unpack", packed, back) == 0
    printed = capsys.readouterr().out
    assert "Unpacked 47 tensors, 520,064 bytes, each with the sha256 recorded at packing." in printed
    assert {path.name: path.read_bytes() for path in back.iterdir()} == {
        path.name: path.read_bytes() for path in pruned.iterdir()
    }

    assert run_alps(monkeypatch, "pack", pruned, packed) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run_alps(monkeypatch, "unpack", pruned, tmp_path / "more") == 2
    assert "is not a packed directory: it has no packed.json" in capsys.readouterr().err
    assert run_alps(monkeypatch, "inspect", packed) == 2
    assert f"is packed: use what `alps unpack {packed} NEW-DIRECTORY` writes" in capsys.readouterr().err
