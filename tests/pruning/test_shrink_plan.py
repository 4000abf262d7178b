"""Plans of smaller models: their counts are those of the shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alps.data.loaded_model import LoadedModel
from alps.models.structure import Target, read_structure
from alps.pruning.shrink_config import ShrinkConfig
from alps.pruning.shrink_plan import describe_plan, open_plan
from helpers.decoders import decoder


def test_a_plan_counts_what_stays(stories: Path) -> None:
    config = ShrinkConfig(model=str(stories), mlp_width=128, num_heads=4, drop_blocks=[2], calibration="unread")
    # Token ids in place of a text: nothing is drawn for a plan.
    plan = open_plan(config, torch.zeros(1, 2, dtype=torch.int64))
    assert plan.target.kept_blocks == (0, 1, 3, 4)
    assert (plan.structure.mlp_width, plan.structure.heads, plan.structure.blocks) == (172, 8, 5)
    hidden, head, kv = 64, 8, 4
    attention = 2 * hidden * 4 * head + 2 * hidden * kv * head
    block = attention + 3 * hidden * 128 + 2 * hidden
    assert plan.after.parameters == 512 * hidden + hidden + 4 * block
    assert plan.before.parameters == 260_032
    assert plan.after.nbytes == 4 * plan.after.parameters
    assert plan.after.kv_bytes == 2 * kv * head * 4 * 4
    assert plan.after.fields == {"intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}
    assert plan.before.fields == {"intermediate_size": 172, "num_attention_heads": 8, "num_hidden_layers": 5}
    assert "260,032" in " ".join(plan.lines)


@pytest.mark.parametrize(
    ("kind", "target", "words"),
    [
        ("qwen2", Target(heads=2), "'qwen2' models with fewer heads"),
        ("qwen2", Target(kv_heads=1), "'qwen2' models with fewer heads"),
        ("qwen2", Target(mlp_width=32), None),
        ("gpt_bigcode", Target(mlp_width=32), "'gpt_bigcode' models with a narrower MLP"),
        ("qwen3", Target(heads=2), None),
    ],
)
def test_cuts_that_llama_cpp_does_not_load_are_said_before(kind: str, target: Target, words: str | None) -> None:
    loaded = LoadedModel("m", decoder(kind), None)
    complete = target.complete(read_structure(loaded.model, loaded.blocks()))
    lines = [line for line in describe_plan(loaded, complete).lines if line.startswith("llama.cpp")]
    assert len(lines) == (words is not None)
    assert words is None or f"llama.cpp does not load {words}: leave that cut out" in lines[0]
