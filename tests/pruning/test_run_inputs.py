"""The model and the windows of a run: in memory where it samples its own text, drawn by the settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alps.core.errors import ConfigError
from alps.data.mixture import load_calibration
from alps.pruning.calibrated_config import CalibratedConfig
from alps.pruning.environment import RunEnvironment
from alps.pruning.run_inputs import make_calibration_windows, open_for_run

_ENVIRONMENT = RunEnvironment(device=torch.device("cpu"))


def test_a_model_that_samples_its_own_text_is_in_memory(short_stories: Path, english_file: Path) -> None:
    config = CalibratedConfig(model=str(short_stories), dtype="bfloat16")
    for calibration, streamed in (("self", False), (str(english_file), True)):
        loaded = open_for_run(config, load_calibration(calibration, 2))
        assert (loaded.store is not None) == streamed
        assert next(loaded.model.parameters()).dtype == torch.bfloat16
    assert open_for_run(config, None).store is not None


def test_windows_are_those_of_the_settings(short_stories: Path, english_file: Path) -> None:
    source = load_calibration(str(english_file), 3)
    drawn = {}
    for seed in (0, 1):
        config = CalibratedConfig(model=str(short_stories), samples=3, seqlen=16, seed=seed)
        loaded = open_for_run(config, source)
        drawn[seed] = make_calibration_windows(loaded, source, config, _ENVIRONMENT).ids
        assert drawn[seed].shape == (3, 16)
    assert not torch.equal(drawn[0], drawn[1])
    ids = torch.ones(2, 4, dtype=torch.int64)
    assert torch.equal(make_calibration_windows(loaded, ids, config, _ENVIRONMENT).ids, ids)
    begun = config.model_copy(update={"bos": True})
    with pytest.raises(ConfigError, match="put the BOS token into the token ids"):
        make_calibration_windows(loaded, ids, begun, _ENVIRONMENT)
