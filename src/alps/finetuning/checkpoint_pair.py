"""Pair of a dense checkpoint and one pruned from it: checks that they belong together, and output of jobs on both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from alps.checkpoints.atomic_io import check_target, move_files, new_directory
from alps.checkpoints.safetensors_io import check_result
from alps.core.device import pick_device
from alps.core.errors import ConfigError
from alps.core.memory import peak_device_bytes, peak_host_bytes
from alps.core.provenance import provenance
from alps.core.text_format import dtype_name
from alps.data.loaded_model import LoadedModel
from alps.models.blocks import Block, find_blocks
from alps.models.demo_model import DEMO_MODEL_NAME
from alps.models.dense_parameters import dense_parameters
from alps.models.load import check_checkpoint, parse_dtype
from alps.models.sites import Site
from alps.reporting.card_metadata import CARD_NAME, read_source_card
from alps.reporting.model_card import model_card
from alps.reporting.publish import publish_run
from alps.reporting.run_report import REPORT_NAME, STRUCTURED, DenseRecord, LayerRecord, RunReport
from alps.reporting.shrink_report import SHRINK_REPORT_NAME, ShrinkReport
from alps.solvers.patterns import USUAL_PATTERNS, group_violations


def check_request(dense: str, pruned: str, out: Path, *, device: str, dtype: str) -> RunReport | None:
    """Check device, dtype, models and output directory before anything is loaded.

    Args:
        dense: name of the dense model.
        pruned: directory of the pruned model.
        out: directory to write.
        device: as the user gave it.
        dtype: as the user gave it.

    Returns:
        The report of the pruned directory; None if there is none.

    Raises:
        ConfigError: for an unknown device or dtype, or a model that does not exist.
        CheckpointError: for an output directory that cannot be written, or a file that is not a report.
    """
    parse_dtype(dtype)
    pick_device(device)
    for name in (dense, pruned):
        if name != DEMO_MODEL_NAME:
            check_checkpoint(name)
    check_target(out)
    return RunReport.read(Path(pruned))


def check_pair(dense: LoadedModel, pruned: LoadedModel) -> None:
    """Refuse models of which the second is neither a pruned nor a shrunk version of the first.

    A pruned model differs in the values of its weights alone. A shrunk one has fewer parameters, in the same hidden
    states and with the same vocabulary.

    Raises:
        ConfigError: naming the first difference in class, parameters, shapes or vocabulary, or when `pruned` has no
            more zeros in its linear layers than `dense`.
        UnsupportedModel: when a model has no decoder blocks, or looks ahead.
    """
    difference = _model_difference(dense.model, pruned.model)
    if difference and is_shrunk(dense.model, pruned.model):
        difference = _frame_difference(dense.model, pruned.model)
    difference = difference or _vocabulary_difference(dense, pruned)
    if difference:
        raise ConfigError(
            f"'{dense.name}' and '{pruned.name}' do not belong together, {difference}: "
            "give the dense model from which the pruned one was made."
        )
    dense.check_causal()
    if is_shrunk(dense.model, pruned.model):
        return
    if count_zeros(pruned.model) <= count_zeros(dense.model):
        raise ConfigError(
            f"Nothing is pruned in '{pruned.name}': its linear layers have no more zeros than those of "
            f"'{dense.name}'; give DENSE first, then PRUNED."
        )


def is_shrunk(dense: nn.Module, pruned: nn.Module) -> bool:
    """Check if the second model has lost whole structures: a parameter is missing, and no other one is larger.

    Parameters of blocks are compared by their names inside a block, since the blocks that stay may be any.
    """
    own, other = (find_blocks(model) for model in (dense, pruned))
    if len(other) > len(own):
        return False
    before, after = (_block_shapes(blocks) for blocks in (own, other))
    if not after.keys() <= before.keys():
        return False
    sizes = [(before[name], shape) for name, shape in after.items()]
    fits = all(len(a) == len(b) and all(x <= y for x, y in zip(b, a, strict=True)) for a, b in sizes)
    return fits and (len(other) < len(own) or any(a != b for a, b in sizes))


def kept_blocks(dense: nn.Module, pruned: nn.Module, folder: Path) -> tuple[int, ...]:
    """Return the indices of the dense model's blocks that stay in a pruned or shrunk one.

    Args:
        dense: the dense model.
        pruned: the other model.
        folder: of the other model, whose `shrink.json` names the blocks if some are missing.

    Raises:
        ConfigError: when blocks are missing, and the file does not say which.
        CheckpointError: when the file is not a report.
    """
    before, after = (len(find_blocks(model)) for model in (dense, pruned))
    if before == after:
        return tuple(range(before))
    report = ShrinkReport.read(folder) if folder.is_dir() else None
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    # A model that was shrunk twice names the blocks of the one in between.
    named = report is not None and report.before.parameters == parameters
    kept = tuple(block.block for block in report.blocks) if report is not None and named else ()
    if len(kept) != after or list(kept) != sorted({*kept} & {*range(before)}):
        raise ConfigError(
            f"'{folder}' has {after} of {before} blocks, and its {SHRINK_REPORT_NAME} does not say which: reconstruct "
            "the directory that `alps shrink` has written, with the model that it was made from."
        )
    return kept


def count_zeros(model: nn.Module) -> int:
    """Count the zeros of all layers."""
    return sum(int((site.read() == 0).sum()) for block in find_blocks(model) for site in block.sites)


def describe(pruned: LoadedModel, dense: LoadedModel, device: str) -> RunReport:
    """Make the report of a model without one from counts of its weights alone: a shrunk one, or another program's.

    Args:
        pruned: the model.
        dense: from which it was made.
        device: of the job.
    """
    sites = [(block.index, site) for block in find_blocks(pruned.model) for site in block.sites]
    records = [
        LayerRecord(
            name=site.name,
            block=index,
            kind=site.kind,
            shape=site.shape,
            entries=site.entries,
            zeros=int((site.read() == 0).sum()),
            expert=site.expert,
            error=None,
            magnitude_error=None,
            solve={"notes": []},
        )
        for index, site in sites
    ]
    unpruned = dense_parameters(pruned.model, {site.parameter_name for _, site in sites})
    report = RunReport(
        model=dense.name,
        architecture=type(pruned.model).__name__,
        method=STRUCTURED if is_shrunk(dense.model, pruned.model) else "unknown",
        pattern="",
        dtype=dtype_name(sites[0][1].dtype),
        device=device,
        calibration=None,
        layers=records,
        dense=[DenseRecord(name=row.name, shape=row.shape, reason=row.reason) for row in unpruned],
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(pick_device(device)),
        versions=provenance(),
    )
    return report.model_copy(update={"pattern": _pattern([site for _, site in sites], report.sparsity)})


def write_changed(pruned: LoadedModel, report: RunReport, out: Path, side_files: Path) -> None:
    """Write a changed model to `out` atomically.

    The report keeps the times of the one-shot run; the time to save is not added.

    Args:
        pruned: the model.
        report: of the directory.
        out: directory to create.
        side_files: directory with the files other than weights, which are moved.
    """
    check_result(pruned.model, str(out))
    with new_directory(out) as folder:
        move_files(side_files, folder)
        pruned.writer.write_weights(folder)
        (folder / REPORT_NAME).write_text(report.to_json())
        page = publish_run(folder, report, out)
        source = read_source_card(pruned.directory, pruned.name)
        card = model_card(report, page, ShrinkReport.read(folder), source)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")


def _block_shapes(blocks: Sequence[Block]) -> dict[str, tuple[int, ...]]:
    """Return the largest shape of every parameter of any block, by its name inside the block."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in blocks:
        for name, parameter in block.module.named_parameters():
            shape = tuple(parameter.shape)
            shapes[name] = max(shapes.get(name, shape), shape)
    return shapes


def _frame_difference(dense: nn.Module, pruned: nn.Module) -> str | None:
    """Compare everything outside the blocks; a LLaMA with fewer heads is a Mistral, so classes may differ."""
    shapes = []
    for model in (dense, pruned):
        inside = {id(p) for block in find_blocks(model) for p in block.module.parameters()}
        shapes.append({n: tuple(p.shape) for n, p in model.named_parameters() if id(p) not in inside})
    return _shape_difference(*shapes)


def _model_difference(dense: nn.Module, pruned: nn.Module) -> str | None:
    if type(dense) is not type(pruned):
        return f"one is a {type(dense).__name__}, the other a {type(pruned).__name__}"
    own, other = ({n: tuple(p.shape) for n, p in model.named_parameters()} for model in (dense, pruned))
    return _shape_difference(own, other)


def _shape_difference(own: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> str | None:
    for name in [*own, *other]:
        if name not in own or name not in other:
            return f"only one of them has {name}"
        if own[name] != other[name]:
            return f"{name} is {own[name]} in one and {other[name]} in the other"
    return None


def _vocabulary_difference(dense: LoadedModel, pruned: LoadedModel) -> str | None:
    if dense.tokenizer is None or pruned.tokenizer is None:
        return None
    own, other = dense.tokenizer.get_vocab(), pruned.tokenizer.get_vocab()
    different = [word for word in [*own, *other] if own.get(word) != other.get(word)]
    if not different:
        return None
    return f"their tokenizers differ in {different[0]!r}"


def _pattern(sites: list[Site], sparsity: float) -> str:
    """Return the first of the usual N:M patterns that holds in every group, else the sparsity in per cent."""
    for pattern in USUAL_PATTERNS:
        if all(group_violations(site.read(), pattern)[1] == 0 for site in sites):
            return str(pattern)
    return f"{100 * sparsity:.4g}%"
