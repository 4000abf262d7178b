"""The model card: hubs can read its front matter, people its figures."""

from __future__ import annotations

from typing import Any

import yaml
from huggingface_hub import ModelCard

from alps.reporting.model_card import model_card
from alps.reporting.records import EvaluationRecord
from alps.reporting.run_report import STRUCTURED, LayerRecord, RunReport
from helpers.shrink_reports import shrink_report


def _read(text: str) -> Any:
    return ModelCard(text)


def report(model: str) -> RunReport:
    site = LayerRecord(
        name="layers.0.fc",
        block=0,
        kind="fc",
        shape=(2, 5),
        entries=10,
        zeros=7,
        error=0.125,
        magnitude_error=0.25,
        solve={},
    )
    row = EvaluationRecord(
        model="dense", text="some", windows=3, seqlen=8, predicted_tokens=21, loss=2.0, perplexity=7.389
    )
    return RunReport(
        model=model, architecture="Any", method="alps", pattern="70%", dtype="float32", device="cpu", calibration=None,
        layers=[site], versions={"torch": "2.13.0"}, evaluations=[row],
    )  # fmt: skip


def test_front_matter_names_a_hub_model_and_no_folder_of_this_machine() -> None:
    for model, expected in (("owner/name", "owner/name"), ("/home/someone/secret/llama", None)):
        card = model_card(report(model))
        front = yaml.safe_load(card.split("---")[1])
        assert front.get("base_model") == expected
        assert front["tags"] == ["pruned", "sparse", "alps"]
        assert "/home" not in card
    assert "# llama, pruned to 70% with alps" in model_card(report("/home/someone/secret/llama"))


def test_the_figures_are_those_of_the_report() -> None:
    card = model_card(report("owner/name"))
    assert "7 of 10 weights (70.00 %) in 1 linear layers" in card
    assert "| mean relative reconstruction error | 0.1250 |" in card
    assert "| mean error of magnitude pruning on the same inputs | 0.2500 |" in card
    assert "| dense | some | 3 x 8 | 7.39 |" in card
    (result,) = _read(card).data.eval_results or []
    assert (result.dataset_name, result.metric_value) == ("some", 7.389)


def test_the_licence_of_the_source_is_named() -> None:
    card = model_card(report("owner/name"), source={"license": "mit"})
    assert "\nLicence: that of the source, `mit`.\n" in card and _read(card).data.license == "mit"
    assert "names no licence" in model_card(report("owner/name"))


def test_a_tuned_shrunk_model_is_not_called_sparse() -> None:
    dense = report("owner/name")
    layers = [dense.layers[0].model_copy(update={"entries": 1000, "zeros": 1, "error": None, "magnitude_error": None})]
    shrunk = dense.model_copy(update={"method": STRUCTURED, "pattern": "0.1%", "layers": layers})
    card = model_card(shrunk, structure=shrink_report())
    assert "# owner/name, shrunk by structured pruning\n" in card
    assert "25.0 % of the parameters were removed: 4,000 -> 3,000," in card and "`shrink.json` lists" in card
    for words in ("zero", "unknown", "0%", "sparse", "packed"):
        assert words not in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["pruned", "structured-pruning"]
    sparse = shrunk.model_copy(update={"pattern": "70%", "layers": dense.layers})
    card = model_card(sparse)
    assert "# owner/name, shrunk by structured pruning, 70% zeros\n" in card and "7 of 10 weights" in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["pruned", "sparse", "structured-pruning"]
