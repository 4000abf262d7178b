"""Metadata of cards: what hubs are told, what is inherited from a source, and figures that survive a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from alps.core.errors import CheckpointError
from alps.reporting.card_metadata import add_results, front_matter, licence_sentence, read_source_card
from alps.reporting.records import CalibrationPart, CalibrationRecord, Estimate, EvaluationRecord, TaskRecord


def _read(text: str) -> Any:
    return ModelCard(text)


def _calibration(*sources: str) -> CalibrationRecord:
    parts = [CalibrationPart(source=source, windows=2) for source in sources]
    return CalibrationRecord(source=",".join(sources), windows=4, seqlen=8, tokens=32, seed=0, sha256="a", parts=parts)


def _perplexity(text: str, value: float, windows: int = 3) -> EvaluationRecord:
    return EvaluationRecord(
        model="/home/me/pruned", text=text, windows=windows, seqlen=8, predicted_tokens=21, loss=2.0, perplexity=value
    )


def _card(model: str = "owner/name", source: dict[str, Any] | None = None, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"architecture": "LlamaForCausalLM", "tags": ["pruned"], "calibrations": []}
    lines = front_matter("name, pruned", model, source=source or {}, **(defaults | settings))
    return _read("\n".join([*lines, "Text.", ""]))


def test_a_hub_model_is_the_base_and_a_folder_is_not() -> None:
    data = _card().data.to_dict()
    assert data["base_model"] == "owner/name" and data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    local = _card("/home/me/model").data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "datasets", "model-index"} & local.keys()
    # A copy of a hub model on disk, or a pruned one, whose card names its base.
    inherited = _card("/home/me/model", {"base_model": "owner/base"}).data.to_dict()
    assert inherited["base_model"] == "owner/base" and "/home" not in str(inherited)
    assert _card("owner/name", {"base_model": "owner/base"}).data.base_model == "owner/name"


def test_licence_and_language_are_those_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama-9\nlicense_link: LICENSE\nlanguage: [en, de]\ntags: [chat]\n"
        "datasets: secret/data\nbase_model: owner/base\n---\n# A model\n",
        encoding="utf-8",
    )
    source = read_source_card(tmp_path, "/home/me/model")
    data = _card("/home/me/model", source).data
    assert (data.license, data.license_name, data.license_link) == ("other", "llama-9", "LICENSE")
    assert data.language == ["en", "de"] and data.tags == ["pruned"] and data.datasets is None
    assert licence_sentence(source) == "Licence: that of the source, `llama-9`."
    assert read_source_card(None, "smollm2-135m")["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"no metadata",
        b"---\nlicense: [\n---\n",
        b"---\nlicense: {a: 1}\nlanguage: 3\n---\n",
        b"---\n- a\n---\n",
        b"\xff",
    ],
    ids=["absent", "none", "broken", "no words", "a list", "no UTF-8"],
)
def test_a_source_without_a_usable_card_has_no_known_licence(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "README.md").write_bytes(content)
    source = read_source_card(tmp_path, "owner/name")
    assert source == {} and licence_sentence(source).startswith("The source's card names no licence: look it up")


def test_data_sets_are_those_of_the_calibrations_by_their_names_on_the_hub() -> None:
    calibrations = [_calibration("c4", "my-text.txt"), None, _calibration("wikitext2:train.txt"), _calibration("c4")]
    assert _card(calibrations=calibrations).data.datasets == ["allenai/c4", "Salesforce/wikitext"]
    assert _card(calibrations=[_calibration("self")]).data.datasets is None


def test_figures_survive_the_hubs_own_reader() -> None:
    rows = [_perplexity("wikitext2:test.txt", 12.34567), _perplexity("my.txt", 7.0, 9), _perplexity("c4", float("inf"))]
    card = _card(evaluations=rows)
    assert card.data.metrics == ["perplexity"] and card.data.model_name == "name, pruned"
    results = {row.dataset_name: row for row in _read(str(card)).data.eval_results or []}
    assert set(results) == {"wikitext2:test.txt", "my.txt"}
    row = results["wikitext2:test.txt"]
    assert (row.dataset_type, row.task_type, row.metric_type) == (
        "Salesforce/wikitext",
        "text-generation",
        "perplexity",
    )
    assert row.metric_value == 12.3457 and row.metric_args == {"windows": 3, "seqlen": 8, "bos": False}
    assert results["my.txt"].dataset_type == "my.txt" and "/home" not in str(card)


def test_new_figures_replace_those_of_the_same_measurement_alone(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(str(_card(evaluations=[_perplexity("c4", 30.0), _perplexity("my.txt", 7.0)])), encoding="utf-8")
    task = TaskRecord(
        model="m", task="piqa", metrics={"acc": Estimate(value=0.61, stderr=0.01)}, items=40, num_fewshot=0, lm_eval="1"
    )
    add_results(tmp_path, [_perplexity("c4", 31.0), _perplexity("c4", 32.0, windows=9), task])
    card = _read(path.read_text(encoding="utf-8"))
    values = [(row.dataset_name, row.metric_type, row.metric_value) for row in card.data.eval_results or []]
    assert sorted(values) == [
        ("c4", "perplexity", 31.0),
        ("c4", "perplexity", 32.0),
        ("my.txt", "perplexity", 7.0),
        ("piqa", "acc", 0.61),
    ]
    assert card.data.metrics == ["acc", "perplexity"] and card.text.strip() == "# name, pruned\n\nText."
    assert card.data.base_model == "owner/name"


def test_figures_need_a_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"README.md' does not exist: give a directory that alps wrote"):
        add_results(tmp_path, [])
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(CheckpointError, match="cannot be read"):
        add_results(tmp_path, [])
