"""Plans of smaller models: their counts are those of the shapes."""

from __future__ import annotations

from pathlib import Path

import torch

from alps.pruning.shrink_config import ShrinkConfig
from alps.pruning.shrink_plan import open_plan


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
