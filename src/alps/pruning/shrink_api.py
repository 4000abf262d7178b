"""Structured pruning from Python, with the settings of `alps shrink`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alps.checkpoints.safetensors_io import check_finite
from alps.core.errors import ConfigError
from alps.core.progress import NoProgress, Progress
from alps.core.settings import ARGUMENTS, make_config
from alps.data.loaded_model import LoadedModel
from alps.models.memory_check import check_weights_in_memory, eager, unwrap
from alps.pruning.shrink_config import ShrinkConfig
from alps.pruning.shrink_job import shrink_checkpoint
from alps.reporting.shrink_report import ShrinkReport


def shrink(
    model: nn.Module | str | Path,
    out: str | Path,
    *,
    mlp: float | None = None,
    mlp_width: int | None = None,
    heads: float | None = None,
    num_heads: int | None = None,
    kv_groups: int | None = None,
    blocks: int | None = None,
    drop_blocks: Sequence[int] = (),
    experts: float | None = None,
    num_experts: int | None = None,
    expert_mlp: float | None = None,
    expert_mlp_width: int | None = None,
    speedup: float | None = None,
    runtime: str = "transformers",
    align: int | None = None,
    preset: str = "layers",
    reconstruct_epochs: int | None = None,
    calibration: str | Path | Tensor = "c4",
    samples: int = 128,
    seqlen: int = 1024,
    seed: int = 0,
    bos: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    offload: bool = False,
    activation_memory: float | None = None,
    tokenizer: Any = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> ShrinkReport:
    """Remove whole structures from a causal language model, and write an ordinary, smaller checkpoint to `out`.

    A model given by name is shrunk as by `alps shrink`: one block in memory at a time, with a journal next to `out`,
    so that the same call continues an interrupted run. The settings are described in docs/reference/settings.md.

    Args:
        model: what `alps shrink` takes as MODEL, or a model in memory, which stays unchanged.
        out: directory to create.
        mlp: share of the MLP channels to remove from every block.
        mlp_width: MLP channels to keep, in place of `mlp`.
        heads: share of the query heads to remove.
        num_heads: query heads to keep, in place of `heads`.
        kv_groups: KV groups to keep.
        blocks: number of blocks to remove.
        drop_blocks: indices of the blocks to remove, in place of `blocks`.
        experts: share of the experts to remove.
        num_experts: experts to keep, in place of `experts`.
        expert_mlp: share of the channels to remove inside every expert.
        expert_mlp_width: channels to keep inside every expert, in place of `expert_mlp`.
        speedup: speed of generation to reach, in units of the dense model's, in place of all settings above.
        runtime: in which it is measured.
        align: multiple to which widths given as shares are rounded.
        preset: default of `reconstruct_epochs`, 0 for `layers` and 1 for `best`.
        reconstruct_epochs: epochs of block reconstruction.
        calibration: text as in `alps prune`, or token ids of shape (windows, tokens). A model in memory needs its
            `tokenizer` for a text.
        samples: calibration windows to choose, unless `calibration` is token ids.
        seqlen: tokens in each of them.
        seed: of their choice.
        bos: begin every such window with the tokenizer's BOS token, for models that need it.
        device: device to compute on; `auto` is the first GPU, or the device of a model in memory.
        dtype: data type of the weights of a model given by name.
        offload: keep activations in CPU memory.
        activation_memory: GiB of activations to keep in memory.
        tokenizer: tokenizer of a model in memory; saved with the smaller one.
        resume: fail when there is no unfinished run to continue.
        progress: receives every block.

    Returns:
        The report of the run, as written to `shrink.json` in `out`.

    Raises:
        ConfigError, UnsupportedModel, SolveFailed, CheckpointError: `out` is not written then.
    """
    values = {
        "model": str(model) if isinstance(model, str | Path) else type(model).__name__,
        "mlp": mlp,
        "mlp_width": mlp_width,
        "heads": heads,
        "num_heads": num_heads,
        "kv_groups": kv_groups,
        "blocks": blocks,
        "drop_blocks": list(drop_blocks),
        "experts": experts,
        "num_experts": num_experts,
        "expert_mlp": expert_mlp,
        "expert_mlp_width": expert_mlp_width,
        "speedup": speedup,
        "runtime": runtime,
        "align": align,
        "preset": preset,
        "reconstruct_epochs": reconstruct_epochs,
        "calibration": None if isinstance(calibration, Tensor) else str(calibration),
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "bos": bos,
        "device": device,
        "dtype": dtype,
        "offload": offload,
        "activation_memory": activation_memory,
    }
    token_ids = calibration if isinstance(calibration, Tensor) else None
    progress = progress or NoProgress()
    if isinstance(model, str | Path):
        config = make_config(ShrinkConfig, values, ARGUMENTS)
        return shrink_checkpoint(config, Path(out), progress, resume=resume, token_ids=token_ids)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"A {type(model).__name__} cannot be shrunk: give a model of transformers or its name.")
    module = unwrap(model)
    check_weights_in_memory(module)
    if device == "auto":
        values["device"] = str(next(module.parameters()).device)
    config = make_config(ShrinkConfig, values, ARGUMENTS)
    check_finite(module.named_parameters(), config.model)
    with eager(module):
        loaded = LoadedModel(config.model, module, tokenizer)
        return shrink_checkpoint(config, Path(out), progress, resume=resume, token_ids=token_ids, loaded=loaded)
