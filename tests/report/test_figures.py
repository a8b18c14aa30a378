"""Figures of runs made by hand, against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flashvlm_export.report.backends import Run, Timing
from flashvlm_export.report.figures import checks, latency, parity
from flashvlm_export.report.records import Check, Parity

N, D = 4, 2
TOKENS = np.array([[1, 0], [0, 1], [2, 0], [0, 4]], np.float32)
FEATURES = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
SCORES = np.array([0.9, 0.1, 0.8, 0.2], np.float32)


def run(indices: list[int], *, features: bool = False, **changes: object) -> Run:
    kept = np.array(indices)
    made = Run(
        Timing({"visual": 1.0}, prompt_tokens=9),
        TOKENS[kept],
        FEATURES if features else None,
        kept,
        SCORES,
        token_ids=[5, 6],
    )
    return replace(made, **changes)


def pair(index: int, kept: list[int], *, features: bool = False) -> dict[tuple[int, int], Run]:
    return {(index, 2): run(kept, features=features), (index, N): run([0, 1, 2, 3], features=features)}


REFERENCES = {**pair(0, [0, 2], features=True), **pair(1, [0, 2], features=True)}


def compared(runs: dict[tuple[int, int], Run]) -> Parity:
    return parity(("a", "fp32"), REFERENCES, runs, budget=2, unpruned=N, important=1)


def test_what_is_alike_is_alike() -> None:
    row = compared({**pair(0, [0, 2]), **pair(1, [0, 2])})
    assert (row.cosine, row.worst_token_cosine, row.max_error, row.score_error) == (1, 1, 0, 0)
    assert (row.iou, row.important_iou, row.coverage) == (1, 1, 1)
    assert (row.same_answers, row.answers) == (4, 4)


def test_another_kept_set_shows_in_iou_and_coverage() -> None:
    # Of the second image patches 0 and 1 are kept: one of three is shared, and features of 2 and 3 are covered by none.
    row = compared({**pair(0, [0, 2]), **pair(1, [0, 1])})
    assert row.iou == pytest.approx((1 + 1 / 3) / 2)
    assert row.important_iou == 1
    assert row.coverage == pytest.approx((1 + 0.5) / 2)
    assert row.max_error == 0


def test_an_error_shows_where_it_is() -> None:
    runs = {**pair(0, [0, 2]), **pair(1, [0, 2])}
    turned = TOKENS.copy()
    turned[2] = [0, 2]
    runs[1, N] = replace(runs[1, N], tokens=turned)
    row = compared(runs)
    assert row.worst_token_cosine == 0
    assert row.cosine == pytest.approx(0.75)
    assert row.max_error == pytest.approx(2 / 4)


def test_pruned_rows_have_to_be_the_rows_that_their_indices_name() -> None:
    runs = {**pair(0, [0, 2]), **pair(1, [0, 2])}
    runs[1, 2] = replace(runs[1, 2], tokens=TOKENS[[0, 3]])
    row = compared(runs)
    assert row.iou == 1
    assert row.max_error == pytest.approx(4 / 4)


def test_answers_and_scores_are_compared_at_every_budget() -> None:
    runs = {**pair(0, [0, 2]), **pair(1, [0, 2])}
    runs[0, N] = replace(runs[0, N], token_ids=[5, 7])
    runs[1, 2] = replace(runs[1, 2], scores=SCORES + np.array([0, 0, 0, 0.25], np.float32))
    row = compared(runs)
    assert (row.same_answers, row.answers) == (3, 4)
    assert row.score_error == pytest.approx(0.25)


def test_nan_anywhere_passes_no_check() -> None:
    runs = {**pair(0, [0, 2]), **pair(1, [0, 2])}
    runs[1, N] = replace(runs[1, N], tokens=np.full((N, D), np.nan, np.float32))
    row = compared(runs)
    assert np.isnan([row.cosine, row.max_error]).all()
    (cosine, iou) = checks([row], [], None, is_stable=True, required={})
    assert (cosine.passed, iou.passed) == (False, True)


def test_latency_figures() -> None:
    timings = [
        Timing({"visual": 10.0, "prefill": 5.0}, 7, 0),  # an answer of one token: nothing was decoded
        Timing({"visual": 20.0, "prefill": 5.0, "decode": 50.0}, 9, 4),
        Timing({"visual": 30.0, "prefill": 5.0, "decode": 150.0}, 11, 6),
    ]
    row = latency(("a", "fp16"), 3, timings)
    assert list(row.stages) == ["visual", "prefill", "decode"]
    assert row.stages["visual"].p50_ms == 20
    assert row.time_to_first_token.p50_ms == 25
    assert row.time_to_first_token.p90_ms == pytest.approx(33)  # between 25 and 35, at four fifths
    assert row.tokens_per_s == 50  # ten steps in 200 ms
    assert row.prompt_tokens == 9


ROW = Parity("b", "int8", 0.995, 0.9, 0.1, 0.1, iou=0.8, important_iou=0.95, coverage=0.98, same_answers=3, answers=4)


def named(found: list[Check]) -> dict[str, bool]:
    return {check.name: check.passed for check in found}


def test_kept_sets_that_hang_on_rounding_are_judged_by_what_does_not() -> None:
    assert named(checks([ROW], [], None, is_stable=True, required={})) == {"b int8: cosine": True, "b int8: iou": False}
    assert named(checks([ROW], [], None, is_stable=False, required={})) == {
        "b int8: cosine": True,
        "b int8: important": True,
        "b int8: coverage": True,
    }
    assert (
        named(checks([replace(ROW, coverage=0.9)], [], None, is_stable=False, required={}))["b int8: coverage"] is False
    )


def test_requirements_replace_defaults_and_add_to_them() -> None:
    found = named(checks([ROW], [], None, is_stable=True, required={"int8.iou": 0.8, "int8.answers": 0.76}))
    assert found == {"b int8: cosine": True, "b int8: iou": True, "b int8: answers": False}


def test_a_guard_does_not_pass_because_nothing_was_there() -> None:
    assert not any(named(checks([], [], None, is_stable=True, required={})).values())
    found = named(checks([ROW], ["c fp16"], None, is_stable=True, required={"int8.iou": 0, "fp16.cosine": 0.5}))
    assert found == {
        "c fp16: runs": False,
        "b int8: cosine": True,
        "b int8: iou": True,
        "fp16.cosine, which did not run": False,
    }
    silent = replace(ROW, same_answers=0, answers=0)
    assert not named(checks([silent], [], None, is_stable=True, required={"int8.answers": 0.5}))["b int8: answers"]
