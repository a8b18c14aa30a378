"""Measuring and writing: the whole of ``flashvlm report``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from flashvlm_export.bundle import Bundle
from flashvlm_export.files import atomic_write, storage_errors
from flashvlm_export.progress import Progress
from flashvlm_export.records import encode_record
from flashvlm_export.report.measure import Measured, ReportSettings, check_settings, measure
from flashvlm_export.report.pages import Picture, to_html, to_markdown
from flashvlm_export.report.records import Report

# Of more examples, the first ones are drawn: each picture is some 100 kB of the page.
MOST_PICTURES = 8


def write_report(settings: ReportSettings, output: Path, progress: Progress | None = None) -> Report:
    """Measure, and write ``report.json``, ``report.md`` and ``report.html`` into ``output``.

    Raises:
        BundleError, CheckpointError, ConfigError, ImageError, StorageError: see their messages; a report that stood
            there is as it was.
    """
    progress = progress or Progress()
    check_settings(settings)
    with storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    measured = measure(settings, progress)
    report = measured.report
    progress.step(f"writing {output}")
    # The figures first: whatever becomes of the pages, they were measured.
    _write(output / "report.json", encode_record(report))
    _write(output / "report.md", to_markdown(report).encode())
    _write(output / "report.html", to_html(report, _draw(settings, measured), _plot(report)).encode())
    return report


def _write(file: Path, content: bytes) -> None:
    with storage_errors(file), atomic_write(file) as temporary:
        temporary.write_bytes(content)


def _plot(report: Report) -> str | None:
    """Return the accuracy over the budget as an SVG element."""
    if report.accuracy is None:
        return None
    from flashvlm_export.evaluation.plot import draw_accuracy

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "accuracy.svg")
        draw_accuracy(report.accuracy, file)
        text = file.read_text(encoding="utf-8")
    return text[text.index("<svg") :]


def _draw(settings: ReportSettings, measured: Measured) -> list[Picture]:
    from flashvlm_export.runtime.graph_inputs import GraphInputs
    from flashvlm_export.runtime.heatmap import draw_selection
    from flashvlm_export.runtime.images import load_image

    bundle = Bundle.open(settings.bundle)
    inputs, budget = GraphInputs(bundle), measured.report.settings.budgets[0]
    pictures = []
    for index, (image, question) in enumerate(settings.pairs[:MOST_PICTURES]):
        indices, scores = measured.selections[index, budget]
        loaded = load_image(image)
        grids = inputs.prepare(loaded).layout.grids
        drawing = draw_selection([inputs.preprocess.view(loaded)], indices, scores, grids, question)
        pictures.append(Picture(index, f"{image.name}: {question}", drawing))
    return pictures
