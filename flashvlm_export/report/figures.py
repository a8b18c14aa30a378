"""Runs → figures, and what is required of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flashvlm_export.evaluation.results import Results
from flashvlm_export.report.backends import Run, Timing
from flashvlm_export.report.records import Check, Latency, Parity, Percentiles

Label = tuple[str, str]
"""Backend and precision."""

#: What can be required of a precision; each is a share, and 1 is PyTorch's.
FIGURES = ("cosine", "iou", "important", "coverage", "answers")

#: What each precision has to reach where kept sets withstand rounding, and where they do not (``docs/selection.md``).
STABLE: dict[str, dict[str, float]] = {
    "fp32": {"cosine": 0.9999, "iou": 0.99},
    "fp16": {"cosine": 0.999, "iou": 0.97},
    "int8": {"cosine": 0.99, "iou": 0.90},
}
UNSTABLE: dict[str, dict[str, float]] = {
    "fp32": {"cosine": 0.9999, "important": 0.99, "coverage": 0.97},
    "fp16": {"cosine": 0.999, "important": 0.97, "coverage": 0.97},
    "int8": {"cosine": 0.99, "important": 0.90, "coverage": 0.97},
}


def parity(
    label: Label,
    references: Mapping[tuple[int, int], Run],
    runs: Mapping[tuple[int, int], Run],
    budget: int,
    unpruned: int,
    important: int,
) -> Parity:
    """Return how like ``runs`` are to PyTorch's, both by pair and budget.

    Args:
        label: whose runs they are.
        references: PyTorch's.
        runs: of the same pairs and budgets.
        budget: that kept sets are compared at.
        unpruned: the budget that keeps all, where row i is patch i.
        important: size of the part of the kept set that is chosen by score.
    """
    from flashvlm_export.calibration.likeness import compare
    from flashvlm_export.calibration.readings import Reading

    indices = sorted({index for index, _ in references})

    def readings(found: Mapping[tuple[int, int], Run]) -> list[Reading]:
        features = [references[index, unpruned].features for index in indices]
        assert all(array is not None for array in features)  # PyTorch's runs have them
        return [
            Reading(found[index, unpruned].tokens, array, found[index, budget].indices, found[index, budget].scores)
            for index, array in zip(indices, features, strict=True)
            if array is not None
        ]

    like = compare(readings(references), readings(runs), important)
    return Parity(
        backend=label[0],
        precision=label[1],
        cosine=like.cosine,
        worst_token_cosine=like.worst_token_cosine,
        max_error=float(np.max([_row_error(references[key[0], unpruned], run) for key, run in runs.items()])),
        score_error=float(np.max([np.abs(run.scores - references[key].scores).max() for key, run in runs.items()])),
        iou=like.iou,
        important_iou=like.important_iou,
        coverage=like.coverage,
        same_answers=sum(run.token_ids == references[key].token_ids for key, run in runs.items() if _answered(run)),
        answers=sum(map(_answered, runs.values())),
    )


def latency(label: Label, budget: int, timings: Sequence[Timing]) -> Latency:
    """Return percentiles over ``timings``, of which there is at least one."""
    stages = dict.fromkeys(stage for timing in timings for stage in timing.stage_ms)
    first_ms = [sum(ms for stage, ms in timing.stage_ms.items() if stage != "decode") for timing in timings]
    decode_ms = sum(timing.stage_ms.get("decode", 0.0) for timing in timings)
    decoded = sum(timing.decoded for timing in timings)
    return Latency(
        backend=label[0],
        precision=label[1],
        budget=budget,
        stages={stage: _percentiles([timing.stage_ms.get(stage, 0.0) for timing in timings]) for stage in stages},
        time_to_first_token=_percentiles(first_ms),
        tokens_per_s=round(1e3 * decoded / decode_ms, 1) if decode_ms else 0.0,
        prompt_tokens=float(np.mean([timing.prompt_tokens for timing in timings])),
    )


def checks(
    rows: Sequence[Parity],
    failed: Sequence[str],
    accuracy: Results | None,
    *,
    is_stable: bool,
    required: Mapping[str, float],
) -> list[Check]:
    """Return what is required, by default and by ``required``, and whether it was reached.

    Backends that failed, and requirements on what did not run, are checks that failed: a guard must not pass because
    what it guards was not there.
    """
    table = STABLE if is_stable else UNSTABLE
    wanted = {f"{name}.{figure}": least for name, row in table.items() for figure, least in row.items()}
    wanted |= {name: least for name, least in required.items() if not name.startswith("accuracy@")}
    found = [Check(f"{name}: runs", 0.0, 1.0, False) for name in failed]
    for row in rows:
        measured = {
            "cosine": row.cosine,
            "iou": row.iou,
            "important": row.important_iou,
            "coverage": row.coverage,
            "answers": row.same_answers / row.answers if row.answers else 0.0,
        }
        for figure in FIGURES:
            least = wanted.get(f"{row.precision}.{figure}")
            if least is not None:
                found.append(_check(f"{row.backend} {row.precision}: {figure}", measured[figure], least))
    ran = {row.precision for row in rows}
    found += [
        Check(f"{name}, which did not run", 0.0, least, False)
        for name, least in required.items()
        if not name.startswith("accuracy@") and name.partition(".")[0] not in ran
    ]
    if not rows and not failed:
        found.append(Check("a backend to compare with PyTorch", 0.0, 1.0, False))
    for figures in accuracy.overall if accuracy else ():
        least = required.get(f"accuracy@{figures.budget}")
        if least is not None:
            # Without a run that keeps all there is nothing to relate to: that is a miss, not a pass.
            relative = figures.relative.value if figures.relative and figures.relative.value is not None else 0.0
            found.append(_check(f"accuracy at {figures.budget} visual tokens, relative to all", relative, least))
    return found


def _check(name: str, measured: float, least: float) -> Check:
    return Check(name, measured, least, measured >= least)  # NaN does not pass


def _answered(run: Run) -> bool:
    return run.timing.prompt_tokens > 0


def _row_error(everything: Run, run: Run) -> float:
    """Return the largest error of the rows that ``run`` kept against those of the same index in ``everything``."""
    want = everything.tokens[run.indices]
    return float(np.abs(run.tokens - want).max() / max(float(np.abs(everything.tokens).max()), 1e-30))


def _percentiles(values_ms: Sequence[float]) -> Percentiles:
    return Percentiles(*(round(float(value), 3) for value in np.percentile(values_ms, (50, 90, 99))))
