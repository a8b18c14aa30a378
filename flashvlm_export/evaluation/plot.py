"""Figures over the token budget: each kind's in ``accuracy.svg``, each selector's in ``selectors.svg``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashvlm_export.errors import DependencyError, install_hint
from flashvlm_export.evaluation.compare import Comparison
from flashvlm_export.evaluation.results import Estimate, Results
from flashvlm_export.files import atomic_write

PLOT = "accuracy.svg"
SELECTORS_PLOT = "selectors.svg"


@dataclass(frozen=True)
class _Line:
    """One line of a picture: its label, its estimates by budget, and what it looks like."""

    label: str
    points: Mapping[int, Estimate]
    heavy: bool = False
    colour: str | None = None
    dashed: bool = False


def draw_accuracy(results: Results, path: Path) -> None:
    """Draw each kind's headline figure, and their mean; the picture's format follows the ending of ``path``.

    Raises:
        DependencyError: if matplotlib is not installed.
    """
    lines = [
        _Line(f"{kind.kind} ({kind.headline})", {row.budget: row.figures[kind.headline] for row in kind.budgets})
        for kind in results.kinds
    ]
    if len(lines) > 1:
        lines.append(
            _Line("all kinds (mean)", {row.budget: row.figures["mean"] for row in results.overall}, True, "black")
        )
    settings = results.settings
    title = _title(settings.model, settings.precision, results.dataset.questions)
    _draw(lines, path, title, "score", results.visual_tokens)


def draw_selectors(comparison: Comparison, path: Path) -> None:
    """Draw each selector's score relative to no pruning, or its mean score where that was not run.

    One selector has one colour; where kept tokens are numbered otherwise than in the first row, its line is dashed.

    Raises:
        DependencyError: if matplotlib is not installed.
    """
    points: dict[str, dict[int, Estimate]] = {}
    for row in comparison.selectors:
        points.setdefault(row.selector, {})[row.budget] = row.relative or row.mean
    settings = comparison.settings
    first = next(iter(settings.values()))
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(s.selector for s in settings.values()))}
    lines = [
        _Line(
            name,
            rows,
            heavy=settings[name].selector == first.selector,
            colour="black" if settings[name].selector == first.selector else colours[settings[name].selector],
            dashed=settings[name].positions != first.positions,
        )
        for name, rows in points.items()
    ]
    label = "mean score" if comparison.selectors[0].relative is None else "score relative to no pruning"
    title = _title(comparison.model, comparison.precision, comparison.dataset.questions)
    _draw(lines, path, title, label, comparison.visual_tokens)


def _title(model: str, precision: str, questions: int) -> str:
    return f"{model.rstrip('/').rpartition('/')[2]}, {precision}, {questions} questions"


def _draw(lines: Sequence[_Line], path: Path, title: str, label: str, visual_tokens: int) -> None:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError(
            "the plot needs matplotlib, which is not installed",
            hint=f"{install_hint('report')}; then run the same command again, which asks nothing anew",
        ) from error
    # The same results give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "flashvlm", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8.5, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            x, y, below, above = _points(line.points)
            axes.errorbar(
                x,
                y,
                yerr=(below, above),
                label=line.label,
                marker="o",
                capsize=3,
                color=line.colour,
                linestyle="--" if line.dashed else "-",
                linewidth=2.5 if line.heavy else 1.5,
            )
        ticks = sorted({budget for line in lines for budget in line.points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"visual tokens kept, of {visual_tokens}")
        axes.set_ylabel(f"{label}, with 95 % interval")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=path.suffix.removeprefix("."), metadata={"Date": None})


def _points(estimates: Mapping[int, Estimate]) -> tuple[list[float], ...]:
    """Return budgets, values, and how far the interval reaches below and above; undefined values are left out."""
    columns: tuple[list[float], ...] = ([], [], [], [])
    for budget, found in estimates.items():
        if found.value is None:
            continue
        low = found.value if found.low is None else min(found.low, found.value)
        high = found.value if found.high is None else max(found.high, found.value)
        numbers = (budget, found.value, found.value - low, high - found.value)
        for column, number in zip(columns, numbers, strict=True):
            column.append(number)
    return columns
