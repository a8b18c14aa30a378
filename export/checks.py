"""Checks an exported graph has to pass before a bundle is called good.

1. ``onnx.checker`` with shape inference.
2. On fresh inputs of several shapes and budgets: encoder outputs close to the torch module in float32.
3. On the same inputs: the kept indices are exactly those of the NumPy oracle fed with the graph's own features.
4. The shipped file gives what the probed one gives, in float16 up to rounding; its tokens are the rows that its indices
   name.
5. Where TensorRT-RTX is installed: the file parses and compiles.
6. Of the two halves, where they are exported: check 1; the encoder gives what the probe gives, and each selector keeps
   exactly what its oracle keeps; in float32 both together give the fused graph's very bits.

Separating 2 from 3 makes both sharp: rounding in the encoder may move a close decision, the selection stage may not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from flashvlm_export.errors import ExportError
from flashvlm_export.export.onnx_graph import ExportedGraph
from flashvlm_export.export.ort_outputs import ort_outputs
from flashvlm_export.export.visual_graph import VisualGraph
from flashvlm_export.models.adapter import Adapter
from flashvlm_export.selection import select_tokens
from flashvlm_export.specs import ENCODER_OUTPUTS, QUESTION_INPUTS, VISUAL_OUTPUTS, Array, Feeds, Precision

# Largest error of encoder outputs against float32 torch, relative to their largest magnitude. float32 sums of some
# thousand terms in another order stay near 1e-5 over 23 layers; float16 has 2^-11 per operation and reaches 1e-2.
_ENCODER_TOLERANCE = {Precision.FP32: 1e-3, Precision.FP16: 5e-2}
# How far a token of the shipped file may lie from the probe's: nothing in float32; in float16 the two files may be
# rounded at different places inside, which reaches some units of 2^-11.
_ROUNDING = {Precision.FP32: 0.0, Precision.FP16: 1e-2}
# The same for the scores, which are 0 to 1: ten times what was seen over 64 tiny models.
_SCORE_ROUNDING = {Precision.FP32: 0.0, Precision.FP16: 5e-2}
# Draws of noise on the oracle's inputs (``config.rounding``). Where one changes the kept set, the decision was a tie
# that float32 cannot settle.
_TIE_TRIALS = 8


@dataclass(frozen=True)
class CheckCase:
    """Sizes of one set of check inputs."""

    batch: int
    text: int
    budget: int


@dataclass(frozen=True)
class CheckReport:
    """What was measured.

    Attributes:
        cases: sets of inputs.
        encoder_error: largest error of features, saliency and visual tokens, relative to their magnitude.
        exact_rows: images whose kept set equals the oracle's.
        tied_rows: images where it differs and the oracle itself changes its mind under noise of float32's size.
        shipped_overlap: smallest share of kept tokens that the shipped file and its probe have in common.
    """

    cases: int
    encoder_error: float
    exact_rows: int
    tied_rows: int
    shipped_overlap: float


def check_cases(num_patches: int) -> list[CheckCase]:
    """Return the sizes to check: small and large batch, text and budget, none of them those of the export."""
    budgets = (num_patches // 4 or 1, 1, num_patches, max(1, num_patches // 9))
    return [CheckCase(*sizes) for sizes in zip((1, 2, 1, 3), (23, 7, 1, 40), budgets, strict=True)]


def check_graph(
    graph: ExportedGraph,
    adapter: Adapter,
    reference: VisualGraph,
    config: Any,
    precision: Precision,
    progress: Callable[[str], None],
) -> CheckReport:
    """Run checks 1 to 4 on ``graph``; ``reference`` is the float32 torch module with the same weights.

    Raises:
        ExportError: naming the check, what was measured and what is allowed.
    """
    progress("ONNX checker")
    _check_onnx(graph.file)
    cases = check_cases(adapter.sample_patches)
    feeds = [_feeds(adapter, precision, case, seed) for seed, case in enumerate(cases, start=100)]
    progress("reference outputs in torch")
    expected = [_reference_encoder(reference, feed) for feed in feeds]
    _free(reference)
    progress("graph outputs in ONNX Runtime")
    probed = ort_outputs(graph.probe, feeds)
    shipped = ort_outputs(graph.file, feeds)

    worst, exact, tied, overlap = 0.0, 0, 0, 1.0
    for case, feed, want, probe, ship in zip(cases, feeds, expected, probed, shipped, strict=True):
        worst = max(worst, _encoder_error(case, want, probe, precision))
        rows_exact, rows_tied = _selection_agreement(case, feed, probe, config)
        exact, tied = exact + rows_exact, tied + rows_tied
        overlap = min(
            overlap,
            _shipped_overlap(case, probe, ship, precision, min(config.important_tokens(case.budget), case.budget // 2)),
        )
    return CheckReport(len(cases), worst, exact, tied, overlap)


@dataclass(frozen=True)
class SelectorCase:
    """A selector's own graph, and the settings that it was made with."""

    file: Path
    config: Any


@dataclass(frozen=True)
class SplitReport:
    """What was measured of the two halves.

    Attributes:
        encoder_difference: largest difference between encoder and fused graph, relative to the largest magnitude.
        exact_rows: images whose kept set equals the oracle's, over all selectors.
        tied_rows: images where it differs and the oracle itself changes its mind under noise of float32's size.
    """

    encoder_difference: float
    exact_rows: int
    tied_rows: int


def check_split(
    graph: ExportedGraph,
    encoder: Path,
    selectors: Sequence[SelectorCase],
    adapter: Adapter,
    precision: Precision,
    progress: Callable[[str], None],
) -> SplitReport:
    """Run check 6; the first of ``selectors`` is the fused graph's own.

    Raises:
        ExportError: naming what differs.
    """
    progress("the halves: ONNX checker")
    for file in (encoder, *(selector.file for selector in selectors)):
        _check_onnx(file)
    progress("the halves in ONNX Runtime")
    cases = check_cases(adapter.sample_patches)
    feeds = [_feeds(adapter, precision, case, seed) for seed, case in enumerate(cases, start=100)]
    fused = ort_outputs(graph.probe, feeds)
    encoded = ort_outputs(encoder, [_vision(feed) for feed in feeds])
    worst = 0.0
    for case, whole, half in zip(cases, fused, encoded, strict=True):
        for name in ENCODER_OUTPUTS:
            error = float(np.abs(whole[name] - half[name].astype(np.float32)).max() / np.abs(whole[name]).max())
            if not error <= _ROUNDING[precision]:
                raise ExportError(
                    f"'{name}' of the encoder alone differs from the fused graph at {case}",
                    received=f"largest difference {error:.2e} of the largest magnitude",
                    expected=f"at most {_ROUNDING[precision]:.0e}",
                )
            worst = max(worst, error)
    exact = tied = 0
    for selector in selectors:
        questions = [{name: feed[name] for name in QUESTION_INPUTS} for feed in feeds]
        given = [{**half, **question} for half, question in zip(encoded, questions, strict=True)]
        chosen = ort_outputs(selector.file, given)
        for case, feed, half, kept in zip(cases, feeds, encoded, chosen, strict=True):
            rows = np.take_along_axis(half["projected_tokens"], kept["visual_indices"][:, :, None], axis=1)
            if not np.array_equal(rows, kept["visual_tokens"]):
                raise ExportError(f"{selector.file.name}: its tokens are not the rows that its indices name at {case}")
            rows_exact, rows_tied = _selection_agreement(case, feed, {**half, **kept}, selector.config)
            exact, tied = exact + rows_exact, tied + rows_tied
        if selector is selectors[0] and precision is Precision.FP32:
            for case, whole, kept in zip(cases, fused, chosen, strict=True):
                for name in VISUAL_OUTPUTS:
                    if not np.array_equal(whole[name], kept[name]):
                        raise ExportError(f"'{name}' of encoder and selector differs from the fused graph at {case}")
    return SplitReport(worst, exact, tied)


def _check_onnx(file: Path) -> None:
    try:
        onnx.checker.check_model(file, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError("the ONNX checker rejects the exported graph", received=f"{file.name}: {error}") from error
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(
            "ONNX shape inference fails on the exported graph", received=f"{file.name}: {error}"
        ) from error


def _feeds(adapter: Adapter, precision: Precision, case: CheckCase, seed: int) -> Feeds:
    inputs = adapter.inputs(precision, batch=case.batch, text=case.text, budget=case.budget, seed=seed)
    return {spec.name: tensor.numpy() for spec, tensor in zip(inputs.spec.inputs, inputs.tensors, strict=True)}


def _vision(feed: Feeds) -> Feeds:
    """Return what the encoder takes of the inputs of the whole graph, in their order."""
    return {name: array for name, array in feed.items() if name not in QUESTION_INPUTS}


def _reference_encoder(reference: VisualGraph, feed: Feeds) -> dict[str, Array]:
    with torch.no_grad():
        outputs = reference.encoder(*map(torch.from_numpy, _vision(feed).values()))
    return {name: output.numpy() for name, output in zip(ENCODER_OUTPUTS, outputs, strict=True) if output is not None}


def _free(module: VisualGraph) -> None:
    """Give a module's weights back to the system before other tools take memory for theirs."""
    for parameter in module.parameters():
        # In place: torch.export holds on to the parameters that it traced.
        parameter.data = torch.empty(0)
    # glibc keeps freed blocks of this size for itself; other C libraries have no such call and no such habit.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _encoder_error(case: CheckCase, want: dict[str, Array], have: dict[str, Array], precision: Precision) -> float:
    """Return the largest relative error over features, saliency and projected tokens."""
    worst = 0.0
    for name, reference in want.items():
        error = float(np.abs(reference - have[name]).max() / np.abs(reference).max())
        # Written so that NaN fails too.
        if not error <= _ENCODER_TOLERANCE[precision]:
            raise ExportError(
                f"'{name}' of the {precision.value} graph differs from torch at {case}",
                received=f"largest error {error:.2e} of the largest magnitude",
                expected=f"at most {_ENCODER_TOLERANCE[precision]:.0e}",
                hint="no bundle was written; try another precision, and report this with the versions in use",
            )
        worst = max(worst, error)
    return worst


def _selection_agreement(case: CheckCase, feed: Feeds, have: dict[str, Array], config: Any) -> tuple[int, int]:
    """Return how many images agree with the oracle exactly, and how many differ in a tie."""
    exact = tied = 0
    for row in range(case.batch):
        arrays = [
            have["patch_features"][row],
            have["saliency"][row] if "saliency" in have else np.zeros(have["scores"].shape[1], np.float32),
            have["projected_tokens"][row],
            feed["text_embeds"][row],
        ]
        mask = feed["text_mask"][row]
        kept = _oracle(arrays, mask, case.budget, config)
        if np.array_equal(kept, have["visual_indices"][row]):
            exact += 1
            continue
        overlap = np.intersect1d(kept, have["visual_indices"][row]).size
        # A tie in the diversity step leaves the tokens that score alone chose.
        scored = min(config.important_tokens(case.budget), case.budget // 2)
        if overlap >= scored and _is_tie(arrays, mask, case.budget, config, kept):
            tied += 1
        else:
            raise ExportError(
                f"the graph keeps other visual tokens than the selection algorithm at {case}, image {row}",
                received=f"{overlap} of {case.budget} indices agree; {config}",
                expected="all, given the graph's own features",
                hint="no bundle was written; report this with the versions in use",
            )
    return exact, tied


def _oracle(arrays: list[Array], mask: Array, budget: int, config: Any) -> Array:
    features, saliency, tokens, text = (array[None].astype(np.float64) for array in arrays)
    indices: Array = select_tokens(features, saliency, tokens, text, mask[None], budget, config)[0]
    return indices


def _is_tie(arrays: list[Array], mask: Array, budget: int, config: Any, kept: Array) -> bool:
    rng = np.random.default_rng(0)
    for _ in range(_TIE_TRIALS):
        noisy = [array * (1.0 + config.rounding * rng.standard_normal(array.shape)) for array in arrays]
        if not np.array_equal(_oracle(noisy, mask, budget, config), kept):
            return True
    return False


def _shipped_overlap(
    case: CheckCase, probe: dict[str, Array], ship: dict[str, Array], precision: Precision, scored: int
) -> float:
    """Return the smallest share of an image's kept tokens that shipped file and probe agree on, or raise.

    In float32 both files return the same bits. In float16, ONNX Runtime rounds inside the graph where the outputs make
    it do so: a file with fewer outputs may keep other background tokens. What it keeps has to be the rows that its
    indices name, with scores near the probe's, and share at least the ``scored`` tokens that no diversity step chose.
    """
    rows = np.take_along_axis(probe["projected_tokens"], ship["visual_indices"][:, :, None], axis=1)
    error = float(np.abs(rows - ship["visual_tokens"].astype(np.float32)).max() / np.abs(rows).max())
    if not error <= _ROUNDING[precision] or (np.diff(ship["visual_indices"]) <= 0).any():
        raise ExportError(
            f"'visual_tokens' are not the rows that 'visual_indices' names at {case}",
            received=f"largest error {error:.2e} of the largest magnitude",
            expected=f"at most {_ROUNDING[precision]:.0e}, indices ascending",
        )
    for name in VISUAL_OUTPUTS:
        if precision is Precision.FP32 and not np.array_equal(probe[name], ship[name]):
            raise ExportError(f"the shipped graph and its probe disagree on '{name}' at {case}")
    score_error = float(np.abs(probe["scores"] - ship["scores"]).max())
    pairs = zip(probe["visual_indices"], ship["visual_indices"], strict=True)
    common = min(np.intersect1d(one, other).size for one, other in pairs)
    if not score_error <= _SCORE_ROUNDING[precision] or common < scored:
        raise ExportError(
            f"the shipped {precision.value} graph selects otherwise than its probe at {case}",
            received=f"scores differ by up to {score_error:.2e}; {common} of {case.budget} kept tokens agree",
            expected=f"at most {_SCORE_ROUNDING[precision]:.0e}; at least {scored}",
            hint="no bundle was written; report this with the versions in use",
        )
    return common / case.budget
