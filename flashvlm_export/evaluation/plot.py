"""``accuracy.svg``: each kind's headline figure over the token budget, with its interval."""

from __future__ import annotations

from pathlib import Path

from flashvlm_export.errors import DependencyError, install_hint
from flashvlm_export.evaluation.results import BudgetFigures, Results
from flashvlm_export.files import atomic_write

PLOT = "accuracy.svg"


def draw_accuracy(results: Results, path: Path) -> None:
    """Write the picture; its format follows the ending of ``path``.

    Raises:
        DependencyError: if matplotlib is not installed.
    """
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
        lines = [(kind.kind, kind.headline, kind.budgets) for kind in results.kinds]
        if len(lines) > 1:
            lines.append(("all kinds", "mean", results.overall))
        for name, headline, budgets in lines:
            x, y, below, above = _points(headline, budgets)
            heavy = name == "all kinds"
            axes.errorbar(
                x,
                y,
                yerr=(below, above),
                label=f"{name} ({headline})",
                marker="o",
                capsize=3,
                color="black" if heavy else None,
                linewidth=2.5 if heavy else 1.5,
            )
        ticks = sorted({figures.budget for _, _, budgets in lines for figures in budgets})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"visual tokens kept, of {results.visual_tokens}")
        axes.set_ylabel("score, with 95 % interval")
        model = results.settings.model.rstrip("/").rpartition("/")[2]
        axes.set_title(f"{model}, {results.settings.precision}, {results.dataset.questions} questions")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=path.suffix.removeprefix("."), metadata={"Date": None})


def _points(headline: str, budgets: list[BudgetFigures]) -> tuple[list[float], ...]:
    """Return budgets, values, and how far the interval reaches below and above; undefined values are left out."""
    columns: tuple[list[float], ...] = ([], [], [], [])
    for figures in budgets:
        estimate = figures.figures[headline]
        if estimate.value is None:
            continue
        low = estimate.value if estimate.low is None else min(estimate.low, estimate.value)
        high = estimate.value if estimate.high is None else max(estimate.high, estimate.value)
        for column, number in zip(
            columns, (figures.budget, estimate.value, estimate.value - low, high - estimate.value), strict=True
        ):
            column.append(number)
    return columns
