"""The model and the calibration windows that a run reads, as its settings name them."""

from __future__ import annotations

from torch import Tensor

from alps.core.errors import ConfigError
from alps.data.loaded_model import LoadedModel, load, open_model
from alps.data.mixture import CalibrationMix
from alps.data.windows import Windows
from alps.pruning.calibrated_config import CalibratedConfig
from alps.pruning.environment import RunEnvironment


def open_for_run(config: CalibratedConfig, source: CalibrationMix | Tensor | None) -> LoadedModel:
    """Open the model of some settings; one that samples its own calibration text is loaded into memory.

    Raises:
        ConfigError, UnsupportedModel, CheckpointError: see `alps.data.loaded_model.open_model`.
    """
    samples_itself = isinstance(source, CalibrationMix) and any(part.text is None for part in source.sources)
    return (load if samples_itself else open_model)(config.model, config.dtype)


def make_calibration_windows(
    loaded: LoadedModel,
    source: CalibrationMix | Tensor,
    config: CalibratedConfig,
    environment: RunEnvironment,
) -> Windows:
    """Return the calibration windows of a run, drawn from texts unless they are token ids already.

    Args:
        loaded: model and tokenizer.
        source: texts, or token ids (windows, tokens).
        config: number, length and seed of the windows, and whether they begin with BOS.
        environment: device and progress for a model that samples its own text.

    Raises:
        ConfigError, UnsupportedModel: see `LoadedModel.token_ids` and `LoadedModel.calibration`.
    """
    if isinstance(source, Tensor):
        if config.bos:
            raise ConfigError("`bos` is for windows of a text: put the BOS token into the token ids.")
        return loaded.token_ids(source)
    return loaded.calibration(
        source,
        config.samples,
        config.seqlen,
        config.seed,
        environment.device,
        environment.progress,
        bos=config.bos,
    )
