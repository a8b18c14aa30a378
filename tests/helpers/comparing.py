"""Outputs of two backends side by side, by Polygraphy, whose report on a failure shows where the errors lie."""

from __future__ import annotations

from collections.abc import Mapping

from polygraphy.comparator import Comparator, CompareFunc, IterationResult, RunResults

from flashvlm_export.specs import Array


def require_close(want: Mapping[str, Array], have: Mapping[str, Array], *, atol: float) -> None:
    """Fail if any element of any output of ``have`` is further than ``atol`` from that of ``want``."""
    results = RunResults(
        [
            (name, [IterationResult(dict(outputs), runner_name=name)])
            for name, outputs in (("have", have), ("want", want))
        ]
    )
    compare = CompareFunc.simple(atol=atol, rtol=0.0, check_error_stat="elemwise")
    assert bool(Comparator.compare_accuracy(results, compare_func=compare, fail_fast=False))
