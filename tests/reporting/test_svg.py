"""Shared parts of the drawings: colours, keys, digits and ticks."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numpy.typing import NDArray

from alps.reporting.svg import format_number, format_tick, line_keys, log_ticks


@pytest.mark.parametrize("methods", [1, 9, 20])
def test_any_number_of_methods_is_told_apart(methods: int) -> None:
    names = [f"alps+dense_target=0.{i}" for i in range(methods)]
    assert len({key.svg for key in line_keys(names)}) == len({key.svg for key in line_keys(names, False)}) == methods
    assert [key.name for key in line_keys(names)] == names


# Machado, Oliveira and Fernandes 2009, on linear sRGB, complete deficiencies: red, green and blue-blind.
BLIND = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
)


# Ottosson's OKLab: cone responses of linear sRGB, and lightness and two opponents of their cube roots.
CONES = ((0.41222, 0.53633, 0.05145), (0.21190, 0.68070, 0.10740), (0.08830, 0.28172, 0.62998))


OPPONENTS = ((0.21045, 0.79362, -0.00407), (1.97800, -2.42859, 0.45059), (0.02590, 0.78277, -0.80868))


def linear(colour: str) -> NDArray[np.float64]:
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def test_colours_are_told_apart_by_the_colour_blind_and_from_both_papers(text: str) -> None:
    palettes = [
        re.findall(r"--(s\d|paper): (#\w{6})", part) for part in re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    ]
    assert len(palettes) == 2
    for palette in palettes:
        paper, *series = [colour for _, colour in palette]
        assert len(set(series)) == 8
        shades = [float(linear(colour) @ (0.2126, 0.7152, 0.0722)) + 0.05 for colour in (paper, *series)]
        assert all(max(shade / shades[0], shades[0] / shade) >= 3 for shade in shades[1:])
        for eyes in BLIND:
            seen = [np.cbrt(np.array(CONES) @ np.clip(np.array(eyes) @ linear(colour), 0, 1)) for colour in series]
            places = [np.array(OPPONENTS) @ cones for cones in seen]
            assert min(np.linalg.norm(a - b) for i, a in enumerate(places) for b in places[:i]) > 0.06


def test_figures_have_sensible_digits() -> None:
    found = [format_number(value) for value in (48965.123, 1000, 156.34, 24.53, 3.14159, 0.03321, 0.0)]
    assert found == ["48,965", "1,000", "156.3", "24.5", "3.14", "0.0332", "0"]
    assert [format_tick(value) for value in (0.001, 0.3, 20000, 1e6, 2e7, 5e-5)] == [
        "0.001", "0.3", "20,000", "10⁶", "2·10⁷", "5·10⁻⁵",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.05), (24, 62683), (0.0019, 0.385), (1e-9, 1e9), (64, 70), (0.1, 1.1)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 6 and all(low <= value <= high for value in ticks)
    assert all(value == pytest.approx(float(f"{value:.3g}"), rel=1e-9) for value in ticks)
    assert ticks == sorted(set(ticks)) and all(len(format_tick(value)) <= 7 for value in ticks)
