"""Mixes of calibration sources: exact counts, own streams, and what is refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alps.core.errors import ConfigError
from alps.data.mixture import CalibrationMix, CalibrationSource, combine, load_calibration
from alps.data.text_sources import Text
from alps.data.windows import Windows

_WEIGHTS = st.lists(st.decimals("0.001", "50", places=3), min_size=1, max_size=6)


def mixed(*weights: object) -> CalibrationMix:
    return CalibrationMix(
        tuple(CalibrationSource(Text(f"t{i}", ["x"]), Fraction(str(weight))) for i, weight in enumerate(weights))
    )


@given(_WEIGHTS, st.integers(1, 300))
def test_counts_follow_the_largest_remainder(weights: list[object], samples: int) -> None:
    mix = mixed(*weights)
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [samples * weight / sum(exact) for weight in exact]
    # One window after the other goes to the part that lacks most of its quota, after the whole ones.
    expected = [int(quota) for quota in quotas]
    while sum(expected) < samples:
        lacking = [quota - count for quota, count in zip(quotas, expected, strict=True)]
        expected[lacking.index(max(lacking))] += 1
    if 0 in expected:
        with pytest.raises(ConfigError, match=f"'t{expected.index(0)}' of the calibration mix gets none of {samples} "):
            mix.counts(samples)
    else:
        assert mix.counts(samples) == expected
        assert all(abs(count - quota) < 1 for count, quota in zip(expected, quotas, strict=True))


@pytest.mark.parametrize(
    ("weights", "samples", "counts"),
    [
        (("0.7", "0.3"), 10, [7, 3]),
        (("0.7", "0.3"), 128, [90, 38]),
        (("1", "1"), 5, [3, 2]),
        (("1", "1", "1"), 8, [3, 3, 2]),
        (("70", "30"), 10, [7, 3]),
        (("0.1", "0.2", "0.3"), 6, [1, 2, 3]),
        (("1", "1e-300"), 1, None),
    ],
)
def test_counts_of_a_few_mixes(weights: tuple[str, ...], samples: int, counts: list[int] | None) -> None:
    if counts is not None:
        assert mixed(*weights).counts(samples) == counts
    else:
        with pytest.raises(ConfigError, match="gets none of 1 windows"):
            mixed(*weights).counts(samples)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "wiki.txt").write_text("a row\nanother row\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    return tmp_path


def parts(spec: str, samples: int = 100) -> list[tuple[str, float]]:
    return [(part.name, float(part.weight)) for part in load_calibration(spec, samples).sources]


def test_specs_are_split_at_commas_and_last_colons(folder: Path) -> None:
    assert parts("a.txt") == [("a.txt", 1)]
    assert parts("self") == [("self", 1)]
    assert parts("wikitext2:wiki.txt") == [("wikitext2:wiki.txt", 1)]
    assert parts("wikitext2:wiki.txt:0.5,self:0.5") == [
        ("wikitext2:wiki.txt", 0.5),
        ("self", 0.5),
    ]
    assert parts("rows.jsonl:7, python-docs:2 ,self:1e0") == [("rows.jsonl", 7), ("python-docs", 2), ("self", 1)]
    mix = load_calibration("rows.jsonl:0.70,self:.3", 10)
    assert mix.name == "rows.jsonl:0.7,self:0.3" and mix.sources[1].text is None
    assert mix.sources[0].text == Text("rows.jsonl", ["one", "two"])


def test_files_come_before_readings_of_their_names(folder: Path) -> None:
    for name in ("one,two.txt", "a.txt:0.5,self:0.5", "self"):
        (folder / name).write_text("text of " + name)
        (part,) = load_calibration(name, 1).sources
        assert part.text is not None and part.text.rows == ["text of " + name]


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("a.txt:0.5,self", "'self' of calibration mix 'a.txt:0.5,self' has no weight"),
        ("a.txt,self:1", "'a.txt' of .* has no weight"),
        ("a.txt:1,", "'' of .* has no weight"),
        (",", "has no weight"),
        ("a.txt:1,:1", "':1' of .* has no weight"),
        ("wikitext2:wiki.txt,self:1", "has weight 'wiki.txt', which is not a number"),
        ("a.txt:half,self:1", "has weight 'half', which is not a number"),
        ("a.txt:,self:1", "has weight '', which is not a number"),
        ("a.txt:1/2,self:1", "has weight '1/2', which is not a number"),
        ("a.txt:0,self:1", "has weight 0: it must be above 0"),
        ("a.txt:1,self:-0.5", "has weight -0.5: it must be above 0"),
        ("a.txt:nan,self:1", "has weight nan: it must be above 0"),
        ("a.txt:inf,self:1", "has weight inf: it must be above 0"),
        ("a.txt:1e999999999,self:1", "must be above 0"),
        ("a.txt:1e-999999999,self:1", "must be above 0"),
        ("a.txt:1,a.txt:2", "names 'a.txt' twice"),
        ("a.txt:1,slef:1", "'slef' is neither a file nor one of .*python-docs, self. Did you mean 'self'?"),
        ("a.txt:1,absent.txt:1", "'absent.txt' is neither a file"),
        ("a.txt:1,wikitext2:absent.txt:1", "'wikitext2:absent.txt' is neither a file"),
        ("a.txt:0.999,self:0.001", "'self' of the calibration mix gets none of 100 windows: raise its weight"),
        ("self:1", "'self:1' is neither a file"),
        ("slef", "Did you mean 'self'?"),
        ("x,\0", "has no weight"),
    ],
)
def test_wrong_mixes_are_one_sentence(folder: Path, spec: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_calibration(spec, 100)
    assert "\n" not in str(caught.value)


def _windows(source: str, start: int, count: int) -> Windows:
    return Windows(torch.arange(start, start + 3 * count).view(count, 3), source, 10 * count)


def test_windows_are_all_there_in_a_seeded_order() -> None:
    mix = CalibrationMix(
        (CalibrationSource(Text("a", ["x"]), Fraction(7, 10)), CalibrationSource(None, Fraction(3, 10)))
    )
    drawn = [_windows("a", 0, 14), _windows("self", 1000, 6)]
    item, again, other = (combine(mix, drawn, seed) for seed in (0, 0, 1))
    assert item.source == "a:0.7,self:0.3" and item.parts == (("a", 14), ("self", 6)) and item.available == 200
    assert torch.equal(item.ids, again.ids) and not torch.equal(item.ids, other.ids)
    everything = torch.cat([windows.ids for windows in drawn])
    for result in (item, other):
        assert sorted(result.ids.tolist()) == everything.tolist() != result.ids.tolist()
    # Both kinds among the first and among the last ones: batches see them mixed.
    kinds = (item.ids[:, 0] >= 1000).tolist()
    assert len(set(kinds[:8])) == len(set(kinds[-8:])) == 2


def test_a_single_source_is_left_alone() -> None:
    mix, windows = CalibrationMix((CalibrationSource(Text("a", ["x"])),)), _windows("a", 0, 5)
    assert combine(mix, [windows], 0) is windows and mix.seeds(11) == [11] and mix.name == "a"


def test_every_part_has_a_seed_of_its_own() -> None:
    seeds = [seed for base in (0, 1) for seed in mixed(1, 1, 1).seeds(base)]
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert mixed(1, 1, 1).seeds(0) == mixed(3, 2, 1).seeds(0)
