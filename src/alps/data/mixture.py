"""What calibration windows are drawn from: one text, the model itself, or several of them with weights."""

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
    """A source of windows and its weight; `text` is None for windows that the dense model samples."""

    text: Text | None
    weight: Fraction = Fraction(1)

    @property
    def name(self) -> str:
        """As it is shown beside figures."""
        return SELF if self.text is None else self.text.name


@dataclass(frozen=True)
class CalibrationMix:
    """Sources of calibration windows; most often only one."""

    parts: tuple[CalibrationSource, ...]

    @property
    def name(self) -> str:
        """The source's name, or SPEC:WEIGHT of every part with commas between them."""
        if len(self.parts) == 1:
            return self.parts[0].name
        return ",".join(f"{part.name}:{float(part.weight):g}" for part in self.parts)

    def counts(self, samples: int) -> list[int]:
        """Windows of every part, by largest remainder: they add up to `samples`, equal remainders favour the earlier.

        Raises:
            ConfigError: when a part would get none.
        """
        total = sum(part.weight for part in self.parts)
        quotas = [samples * part.weight / total for part in self.parts]
        counts = [math.floor(quota) for quota in quotas]
        by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
        for i in by_remainder[: samples - sum(counts)]:
            counts[i] += 1
        if 0 in counts:
            raise ConfigError(
                f"Part '{self.parts[counts.index(0)].name}' of the calibration mix gets none of {samples} windows: "
                "raise its weight or --samples, or leave it out."
            )
        return counts

    def seeds(self, seed: int) -> list[int]:
        """A seed for every part; a single source takes `seed` itself."""
        return [seed] if len(self.parts) == 1 else [derive_seed(seed, f"part {i}") for i in range(len(self.parts))]


def load_calibration(spec: str, samples: int) -> CalibrationMix:
    """Resolve what a user wrote for the calibration, and load its texts.

    Args:
        spec: a text as `alps.data.text_sources.load_text` takes it; `self` for windows sampled from the model; or a
            mix,
            SPEC:WEIGHT with commas between them, such as `c4.jsonl:0.7,self:0.3`. A file of that name comes first.
        samples: windows that will be drawn.

    Raises:
        ConfigError: for a text that cannot be used, a weight that is missing or not positive, a part that is named
            twice, or one that would get no window.
    """
    if "," not in spec or _is_file(spec):
        return CalibrationMix((_part(spec, Fraction(1)),))
    weights = {}
    for word in spec.split(","):
        source, _, weight = word.strip().rpartition(":")
        if not source:
            raise ConfigError(
                f"Part '{word}' of calibration mix '{spec}' has no weight: write SPEC:WEIGHT, as in c4:0.7,self:0.3."
            )
        if source in weights:
            raise ConfigError(f"Calibration mix '{spec}' names '{source}' twice: add up its weights.")
        weights[source] = _weight(weight, word, spec)
    mix = CalibrationMix(tuple(_part(source, weight) for source, weight in weights.items()))
    mix.counts(samples)
    return mix


def combine(mix: CalibrationMix, drawn: Sequence[Windows], seed: int) -> Windows:
    """The windows of all parts in a seeded order.

    Args:
        mix: where they come from.
        drawn: one set of windows, equally long, for every part.
        seed: of the order.
    """
    if len(drawn) == 1:
        return drawn[0]
    ids = torch.cat([windows.ids for windows in drawn])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(derive_seed(seed, "order")))
    parts = tuple((windows.source, len(windows.ids)) for windows in drawn)
    return Windows(ids[order], mix.name, sum(windows.available for windows in drawn), parts)


def _part(spec: str, weight: Fraction) -> CalibrationSource:
    if spec == SELF and not _is_file(spec):
        return CalibrationSource(None, weight)
    return CalibrationSource(load_text(spec, "calibration"), weight)


def _weight(word: str, part: str, spec: str) -> Fraction:
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
