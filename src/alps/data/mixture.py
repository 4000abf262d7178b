"""Sources of calibration windows: a text, the model itself, or a weighted mix of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from alps.core.errors import ConfigError
from alps.core.seeds import derive_seed
from alps.data.text_sources import SELF, Text, load_text
from alps.data.windows import Windows


@dataclass(frozen=True)
class CalibrationSource:
    """Source of windows with its weight; a `text` of None stands for windows that the dense model samples."""

    text: Text | None
    weight: Fraction = Fraction(1)

    @property
    def name(self) -> str:
        """Name for tables and reports."""
        return SELF if self.text is None else self.text.name


@dataclass(frozen=True)
class CalibrationMix:
    """Weighted sources of calibration windows; usually one."""

    sources: tuple[CalibrationSource, ...]

    @property
    def name(self) -> str:
        """Name of a single source; otherwise SPEC:WEIGHT of every source, separated by commas."""
        if len(self.sources) == 1:
            return self.sources[0].name
        return ",".join(f"{source.name}:{float(source.weight):g}" for source in self.sources)

    def counts(self, samples: int) -> list[int]:
        """Divide windows among the sources by the largest-remainder method; earlier sources win ties.

        Args:
            samples: number of windows.

        Returns:
            Windows of each source, which add up to `samples`.

        Raises:
            ConfigError: when a source would get none.
        """
        total = sum(source.weight for source in self.sources)
        quotas = [samples * source.weight / total for source in self.sources]
        counts = [math.floor(quota) for quota in quotas]
        by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
        for i in by_remainder[: samples - sum(counts)]:
            counts[i] += 1
        if 0 in counts:
            raise ConfigError(
                f"Part '{self.sources[counts.index(0)].name}' of the calibration mix gets none of {samples} windows: "
                "raise its weight or --samples, or leave it out."
            )
        return counts

    def seeds(self, seed: int) -> list[int]:
        """Derive a seed for every source; a single source uses `seed` itself."""
        return [seed] if len(self.sources) == 1 else [derive_seed(seed, f"part {i}") for i in range(len(self.sources))]


def load_calibration(spec: str, samples: int) -> CalibrationMix:
    """Parse the calibration that a user gave, and load its texts.

    Args:
        spec: a text as for `alps.data.text_sources.load_text`, `self` for windows sampled from the model, or a mix:
            SPEC:WEIGHT separated by commas, such as `c4.jsonl:0.7,self:0.3`. An existing file of that name takes
            precedence.
        samples: number of windows that will be drawn.

    Raises:
        ConfigError: when a text cannot be used, a weight is missing or not positive, or a source is named twice or
            would get no window.
    """
    if "," not in spec or _is_file(spec):
        return CalibrationMix((_load_source(spec, Fraction(1)),))
    weights = {}
    for word in spec.split(","):
        source, _, weight = word.strip().rpartition(":")
        if not source:
            raise ConfigError(
                f"Part '{word}' of calibration mix '{spec}' has no weight: write SPEC:WEIGHT, as in c4:0.7,self:0.3."
            )
        if source in weights:
            raise ConfigError(f"Calibration mix '{spec}' names '{source}' twice: add up its weights.")
        weights[source] = _parse_weight(weight, word, spec)
    mix = CalibrationMix(tuple(_load_source(source, weight) for source, weight in weights.items()))
    mix.counts(samples)
    return mix


def combine(mix: CalibrationMix, drawn: Sequence[Windows], seed: int) -> Windows:
    """Return the windows of all sources in a seeded order.

    Args:
        mix: the sources.
        drawn: windows of each source, all of the same length.
        seed: of the order.
    """
    if len(drawn) == 1:
        return drawn[0]
    ids = torch.cat([windows.ids for windows in drawn])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(derive_seed(seed, "order")))
    parts = tuple((windows.source, len(windows.ids)) for windows in drawn)
    origins = tuple(windows.origin for windows in drawn)
    return Windows(ids[order], mix.name, sum(windows.available for windows in drawn), parts, origins, drawn[0].bos)


def _load_source(spec: str, weight: Fraction) -> CalibrationSource:
    if spec == SELF and not _is_file(spec):
        return CalibrationSource(None, weight)
    return CalibrationSource(load_text(spec, "calibration"), weight)


def _parse_weight(word: str, part: str, spec: str) -> Fraction:
    try:
        value = float(word)
    except ValueError:
        raise ConfigError(
            f"Part '{part}' of calibration mix '{spec}' has weight '{word}', which is not a number: "
            "write SPEC:WEIGHT, as in c4:0.7,self:0.3."
        ) from None
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"Part '{part}' of calibration mix '{spec}' has weight {word}: it must be above 0.")
    return Fraction(word.strip())  # exact: 0.7 of 10 windows are 7


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a path, a NUL byte, no home
        return False
