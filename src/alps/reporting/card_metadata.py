"""Metadata of a model card, as hubs read it: base model, licence, data sets, measured figures.

Fields and their forms are those of `huggingface_hub.ModelCardData`; figures become a `model-index`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from alps.checkpoints.atomic_io import write_text
from alps.core.errors import CheckpointError, first_line
from alps.data.hub_corpora import HUB_CORPORA
from alps.models.auto_class import reads_images
from alps.models.demo_model import DEMO_CARD, DEMO_MODEL_NAME
from alps.models.load import looks_local
from alps.reporting.records import CalibrationRecord, EvaluationRecord, TaskRecord

CARD_NAME = "README.md"
# Fields of a source's card that hold for what is made of it.
_INHERITED = ("license", "license_name", "license_link", "language", "base_model")
_PERPLEXITY = "perplexity"


def read_source_card(directory: Path | None, model: str) -> dict[str, Any]:
    """Return the fields of a source's card that hold for what is made of it.

    Args:
        directory: of the source; None for a model without one.
        model: its name.

    Returns:
        Those of licence, language and base model that the card has; none for a card that cannot be read.
    """
    if model == DEMO_MODEL_NAME:
        return dict(DEMO_CARD)
    try:
        card = {} if directory is None else read_card(directory).data.to_dict()
    except CheckpointError:  # the licence is then not known, which the new card says
        card = {}
    return {name: card[name] for name in _INHERITED if _is_words(card.get(name))}


def front_matter(
    title: str,
    model: str,
    *,
    architecture: str,
    source: Mapping[str, Any],
    tags: Sequence[str],
    calibrations: Iterable[CalibrationRecord | None],
    evaluations: Sequence[EvaluationRecord] = (),
) -> list[str]:
    """Write the front matter of a card, and the title below it.

    Args:
        title: of the card, and name of the model among figures.
        model: name of the source as the user gave it.
        architecture: class of the model.
        source: fields of the source's card, see `read_source_card`.
        tags: to find the model by.
        calibrations: windows of every step that read some.
        evaluations: measured perplexities of this model.
    """
    base = source.get("base_model") if looks_local(model) or "/" not in model else model
    results = _results(evaluations)
    data = ModelCardData(
        # A hub refuses a base model that is not on a hub, and a card must not show the user's folders.
        base_model=base,
        # A hub knows adapter, merge, quantized and finetune: other weights of the same type are the last.
        base_model_relation=None if base is None else "finetune",
        license=source.get("license"),
        license_name=source.get("license_name"),
        license_link=source.get("license_link"),
        language=source.get("language"),
        library_name="transformers",
        pipeline_tag="image-text-to-text" if reads_images(architecture) else "text-generation",
        tags=[*tags],
        datasets=_datasets(calibrations) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=title,
        eval_results=results or None,
    )
    if not results:
        data.pop("model_name")
    return ["---", data.to_yaml(), "---", "", f"# {title}", ""]


def licence_sentence(source: Mapping[str, Any]) -> str:
    """State the licence of the source, or that it is not known."""
    if name := source.get("license_name") or source.get("license"):
        return f"Licence: that of the source, `{name}`."
    return "The source's card names no licence: look it up before you share this model."


def read_card(directory: Path) -> Any:
    """Read the card of a directory, as a `huggingface_hub.ModelCard`, whose fields have no types.

    Raises:
        CheckpointError: when there is none, or it cannot be read.
    """
    path = directory / CARD_NAME
    try:
        return ModelCard(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"'{path}' does not exist: give a directory that alps wrote.") from None
    except Exception as error:  # what is no UTF-8, YAML or model-index
        raise CheckpointError(f"The metadata of '{path}' cannot be read ({first_line(error)}): correct it.") from None


def add_results(directory: Path, records: Sequence[EvaluationRecord | TaskRecord]) -> None:
    """Add measured figures to the card of a directory; they replace earlier ones of the same measurement.

    Raises:
        CheckpointError: as for `read_card`.
    """
    card = read_card(directory)
    new = _results(records)
    kept = [row for row in card.data.eval_results or [] if not any(row.is_equal_except_value(other) for other in new)]
    card.data.eval_results = [*kept, *new] or None
    card.data.model_name = card.data.model_name or directory.resolve().name
    card.data.metrics = sorted({*(card.data.metrics or []), *(row.metric_type for row in new)}) or None
    write_text(directory / CARD_NAME, str(card))


def _results(records: Sequence[EvaluationRecord | TaskRecord]) -> list[EvalResult]:
    results = []
    for record in records:
        if isinstance(record, TaskRecord):
            results += [
                _result(record.task, name, estimate.value, {"items": record.items, "num_fewshot": record.num_fewshot})
                for name, estimate in record.metrics.items()
            ]
        elif math.isfinite(record.perplexity):
            settings = {"windows": record.windows, "seqlen": record.seqlen, "bos": record.bos}
            results.append(_result(record.text, _PERPLEXITY, record.perplexity, settings))
    return results


def _result(text: str, metric: str, value: float, settings: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=_dataset(text) or text,
        dataset_name=text,
        metric_type=metric,
        metric_value=round(value, 4),
        metric_args=settings,
    )


def _datasets(calibrations: Iterable[CalibrationRecord | None]) -> list[str]:
    records = [record for record in calibrations if record is not None]
    sources = [part.source for record in records for part in record.parts] + [record.source for record in records]
    return list(dict.fromkeys(name for source in sources if (name := _dataset(source)) is not None))


def _dataset(text: str) -> str | None:
    """Return the hub's name of a corpus; `wikitext2:FILE` is a copy of one."""
    corpus = HUB_CORPORA.get(text.partition(":")[0])
    return None if corpus is None else corpus.repo


def _is_words(value: object) -> bool:
    """Check for what a hub takes as a field: a word, or a list of words."""
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and word for word in words)
