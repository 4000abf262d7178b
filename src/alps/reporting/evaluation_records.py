"""What an evaluation finds: perplexities, comparisons with the dense model, scores in tasks."""

from __future__ import annotations

from alps.reporting.records import Record


class EvaluationRecord(Record):
    """A perplexity: text, windows of seqlen tokens, tokens predicted, mean loss in nats, its exponential.

    `sha256` is of the windows' token ids; None in records of versions that did not take it.
    """

    model: str
    text: str
    windows: int
    seqlen: int
    predicted_tokens: int
    loss: float
    perplexity: float
    sha256: str | None = None


class ComparisonRecord(EvaluationRecord):
    """A perplexity beside that of a reference, the dense model, on the same windows.

    Attributes:
        reference: its name; reference_perplexity: on the same tokens; ratio: perplexity / reference_perplexity.
        kl: mean over predicted tokens of KL(reference || model), nats.
        agreement: fraction of them for which both models' most likely token is the same.
    """

    reference: str
    reference_perplexity: float
    ratio: float
    kl: float
    agreement: float


class Estimate(Record):
    """A figure and its standard error; None where there is none, as for a single item."""

    value: float
    stderr: float | None


class TaskRecord(Record):
    """One zero-shot task.

    Attributes:
        model, task: their names.
        metrics: by name, as lm-eval calls them: acc, acc_norm, perplexity.
        items: scored; None for a group of lm-eval's, which has only an average.
        num_fewshot: examples in the prompt.
        lm_eval: version of the package that scored it.
    """

    model: str
    task: str
    metrics: dict[str, Estimate]
    items: int | None
    num_fewshot: int
    lm_eval: str
