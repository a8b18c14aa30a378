"""The report for people: one HTML page that needs nothing beside it, and the same figures in Markdown."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from PIL import Image

from flashvlm_export.evaluation.results import BudgetFigures, Estimate
from flashvlm_export.report.records import PYTORCH, Latency, Report

# Stages that only read or glue together are one colour; the expensive ones have their own.
COLOURS = {
    "vision": "#4c78a8",
    "visual": "#4c78a8",
    "selection": "#f58518",
    "prefill": "#54a24b",
}
_OTHER = "#b8bcc6"
# As they run; a bundle's graph has one stage for two of PyTorch's.
ORDER = ("tokenize", "load_images", "preprocess", "vision", "selection", "visual", "splice", "prefill", "decode")


@dataclass(frozen=True)
class Picture:
    """What was kept of one example's image: its number, a caption, and the drawing."""

    example: int
    caption: str
    image: Image.Image


def to_html(report: Report, pictures: Sequence[Picture] = (), accuracy_svg: str | None = None) -> str:
    """Return the page; pictures are inside of it."""
    return _render("report.html.j2", report, pictures=pictures, accuracy_svg=accuracy_svg, inline=_inline, escape=True)


def to_markdown(report: Report) -> str:
    """Return the tables as Markdown."""
    return _render("report.md.j2", report, escape=False)


def ratio(report: Report, row: Latency, *, to: str) -> float:
    """Return how many times sooner the first token comes than in PyTorch (``to="pytorch"``) or unpruned."""
    unpruned = report.subject.visual_tokens
    other = report.find(*PYTORCH, row.budget) if to == "pytorch" else report.find(row.backend, row.precision, unpruned)
    return other.time_to_first_token.p50_ms / row.time_to_first_token.p50_ms


def segments(row: Latency, longest_ms: float) -> list[dict[str, Any]]:
    """Return the stages up to the first token as shares of ``longest_ms``, for a bar."""
    return [
        {"stage": stage, "ms": ms, "percent": 100 * ms / longest_ms, "colour": COLOURS.get(stage, _OTHER)}
        for stage, ms in _before_first_token(row)
    ]


def _estimate(estimate: Estimate | None) -> str:
    """Return ``0.912 [0.898, 0.925]``; a dash for what is not defined."""
    if estimate is None or estimate.value is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _at(rows: Sequence[BudgetFigures], budget: int) -> BudgetFigures:
    return next(row for row in rows if row.budget == budget)


def _before_first_token(row: Latency) -> list[tuple[str, float]]:
    return [(stage, times.p50_ms) for stage, times in row.stages.items() if stage != "decode"]


def _render(template: str, report: Report, *, escape: bool, **more: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text("utf-8")),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    longest_ms = max(
        (sum(t.p50_ms for s, t in row.stages.items() if s != "decode") for row in report.latency), default=1
    )
    measured = {stage for row in report.latency for stage in row.stages}
    return environment.get_template(template).render(
        report=report,
        stages=[stage for stage in ORDER if stage in measured],
        ratio=lambda row, to: ratio(report, row, to=to),
        segments=lambda row: segments(row, longest_ms),
        colours={"vision (and selection, in a graph)": COLOURS["vision"], "selection": COLOURS["selection"]}
        | {"prefill": COLOURS["prefill"], "the rest": _OTHER},
        estimate=_estimate,
        at=_at,
        pytorch=PYTORCH[0],
        has_answers=any(row.answers for row in report.parity),
        **more,
    )


def _inline(picture: Picture) -> str:
    """Return the drawing as a data URI."""
    buffer = io.BytesIO()
    picture.image.convert("RGB").save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
