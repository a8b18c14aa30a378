"""Which samples set the ranges, and which ones the result is judged on."""

from __future__ import annotations

import pytest

from flashvlm_export.calibration.samples import Sample, split_samples, spread


def samples(count: int) -> list[Sample]:
    return [Sample(str(number), str(number), dict) for number in range(count)]


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (2, 1), (3, 1), (4, 1), (8, 2), (100, 8)])
def test_samples_are_held_out_once_there_are_two(count: int, held_out: int) -> None:
    given = samples(count)
    split = split_samples(given)
    assert len(split.held_out) == held_out
    assert sorted(split.calibration + split.held_out, key=given.index) == given
    assert split.judged == (split.held_out or given)


def test_samples_are_spread_over_the_list() -> None:
    assert [sample.name for sample in spread(samples(100), 4)] == ["12", "37", "62", "87"]
    assert [sample.name for sample in spread(samples(2), 5)] == ["0", "1"]
    held_out = [int(sample.name) for sample in split_samples(samples(40)).held_out]
    assert held_out == [2, 7, 12, 17, 22, 27, 32, 37]
