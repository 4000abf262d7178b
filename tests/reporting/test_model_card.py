"""The model card: hubs can read its front matter, people its figures."""

from __future__ import annotations

import yaml

from alps.reporting.model_card import model_card
from alps.reporting.records import EvaluationRecord
from alps.reporting.run_report import LayerRecord, RunReport


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
    for model, expected in (("owner/name", "owner/name"), ("/home/someone/secret/llama", None), ("smollm2-135m", None)):
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
