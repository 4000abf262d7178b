"""Report of a structured pruning run that was never made."""

from __future__ import annotations

from alps.reporting.records import CalibrationRecord
from alps.reporting.shrink_report import BlockRemoval, CutRecord, ShrinkReport, ShrunkBlock, SizeRecord


def shrink_report(model: str = "/models/tiny") -> ShrinkReport:
    """Return a report of a model with one block left."""
    cut = CutRecord(layer="x", unit="channel", kept=[0, 2], total=3, error=0.1, share=0.3, tokens=256)
    return ShrinkReport(
        model=model,
        architecture="LlamaForCausalLM",
        dtype="float32",
        device="cpu",
        before=SizeRecord(parameters=4000, nbytes=16000, kv_bytes=64, fields={"intermediate_size": 44}),
        after=SizeRecord(parameters=3000, nbytes=12000, kv_bytes=32, fields={"intermediate_size": 32}),
        calibration=CalibrationRecord(
            source="text.txt", windows=8, seqlen=32, tokens=256, seed=7, sha256="a" * 64, parts=[]
        ),
        removals=[BlockRemoval(block=5, kl=0.5), BlockRemoval(block=3, kl=None)],
        blocks=[ShrunkBlock(block=0, cuts=[cut], error=0.25, reconstruction=None, seconds={"total": 1.0})],
        seconds={"load": 1.0, "total": 2.0},
        peak_host_bytes=1,
        peak_device_bytes=0,
        versions={"torch": "2.6"},
    )
