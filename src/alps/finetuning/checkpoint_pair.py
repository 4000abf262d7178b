"""Pair of a dense checkpoint and one pruned from it: checks that they belong together, and output of jobs on both."""

from __future__ import annotations

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
from alps.models.blocks import find_blocks
from alps.models.demo_model import DEMO_MODEL_NAME
from alps.models.dense_parameters import dense_parameters
from alps.models.load import check_checkpoint, parse_dtype
from alps.models.sites import Site
from alps.reporting.model_card import model_card
from alps.reporting.publish import publish_run
from alps.reporting.run_report import REPORT_NAME, DenseRecord, LayerRecord, RunReport
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
    """Refuse models that differ in more than the values of their weights, or a second model that is not pruned.

    Raises:
        ConfigError: naming the first difference in class, parameters, shapes or vocabulary, or when `pruned` has no
            more zeros in its linear layers than `dense`.
        UnsupportedModel: when a model has no decoder blocks, or looks ahead.
    """
    difference = _model_difference(dense.model, pruned.model) or _vocabulary_difference(dense, pruned)
    if difference:
        raise ConfigError(
            f"'{dense.name}' and '{pruned.name}' do not belong together, {difference}: "
            "give the dense model from which the pruned one was made."
        )
    dense.check_causal()
    if count_zeros(pruned.model) <= count_zeros(dense.model):
        raise ConfigError(
            f"Nothing is pruned in '{pruned.name}': its linear layers have no more zeros than those of "
            f"'{dense.name}'; give DENSE first, then PRUNED."
        )


def count_zeros(model: nn.Module) -> int:
    """Count the zeros of all layers."""
    return sum(int((site.read() == 0).sum()) for block in find_blocks(model) for site in block.sites)


def describe(pruned: LoadedModel, dense: str, device: str) -> RunReport:
    """Make the report of a model that another program has pruned, from counts of its weights alone.

    Args:
        pruned: the model.
        dense: name of the dense model.
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
        model=dense,
        architecture=type(pruned.model).__name__,
        method="unknown",
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
        (folder / "README.md").write_text(model_card(report, page))


def _model_difference(dense: nn.Module, pruned: nn.Module) -> str | None:
    if type(dense) is not type(pruned):
        return f"one is a {type(dense).__name__}, the other a {type(pruned).__name__}"
    own = {name: tuple(parameter.shape) for name, parameter in dense.named_parameters()}
    other = {name: tuple(parameter.shape) for name, parameter in pruned.named_parameters()}
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
