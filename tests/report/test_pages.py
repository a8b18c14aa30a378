"""The pages, from a report made by hand."""

from __future__ import annotations

import html.parser
import re
from dataclasses import replace

import pytest
from PIL import Image

from flashvlm_export.evaluation.journal import RunSettings
from flashvlm_export.evaluation.results import BudgetFigures, DataSetEntry, Estimate, KindResult, Results
from flashvlm_export.report.pages import Picture, ratio, segments, to_html, to_markdown
from flashvlm_export.report.records import (
    PYTORCH,
    Check,
    Environment,
    Example,
    Latency,
    Parity,
    Percentiles,
    Report,
    Settings,
    Subject,
)

NAME = '<script>alert("x")</script>'


def latency(backend: str, budget: int, first_ms: float, **stages: float) -> Latency:
    times = {name: Percentiles(ms, 2 * ms, 3 * ms) for name, ms in stages.items()}
    return Latency(backend, "fp32", budget, times, Percentiles(first_ms, 2 * first_ms, 3 * first_ms), 25.0, 150.0)


@pytest.fixture
def report() -> Report:
    return Report(
        schema_version=1,
        created="2026-01-01T00:00:00+00:00",
        environment=Environment("A processor", 2, 24 * 10**9, None, "Linux", {"torch": "2.13"}),
        subject=Subject("bundle", NAME, "ab" * 32, "flashvlm, diversity=farthest", 576, "fp32"),
        settings=Settings([128, 576], 20, 2, 32, 2),
        parity=[Parity("ONNX Runtime CPU", "fp32", 0.99999, 0.9998, 1e-6, 2e-5, 0.98, 1.0, 1.0, 3, 4)],
        latency=[
            latency("PyTorch CPU", 128, 200.0, vision=100, selection=20, prefill=80, decode=50),
            latency("PyTorch CPU", 576, 400.0, vision=100, prefill=300, decode=50),
            latency("ONNX Runtime CPU", 128, 50.0, visual=40, prefill=10, decode=50),
            latency("ONNX Runtime CPU", 576, 100.0, visual=40, prefill=60, decode=50),
        ],
        peak_memory_bytes={"PyTorch CPU fp32": 2 * 10**9, "ONNX Runtime CPU fp32": 10**9},
        examples=[Example("photo.png", "Is 1 < 2?", {"PyTorch CPU fp32": {128: "<b>yes</b>", 576: "no"}})],
        not_run={"tensorrt l4 fp16": "there is no NVIDIA GPU to run the engine on"},
        failed={"ONNX Runtime CUDA fp16": "the process ended"},
        checks=[Check("ONNX Runtime CPU fp32: iou", 0.98, 0.99, False)],
        passed=False,
    )


def test_ratios_are_of_the_same_budget_and_of_the_same_backend(report: Report) -> None:
    row = report.find("ONNX Runtime CPU", "fp32", 128)
    assert ratio(report, row, to="pytorch") == 4.0
    assert ratio(report, row, to="unpruned") == 2.0
    assert ratio(report, report.find(*PYTORCH, 128), to="pytorch") == 1.0
    # What keeps all is known by its number, wherever it stands in the list.
    turned = replace(report, settings=replace(report.settings, budgets=[576, 128]))
    assert ratio(turned, row, to="unpruned") == 2.0


def test_bars_leave_decoding_out_and_share_one_scale(report: Report) -> None:
    parts = segments(report.find(*PYTORCH, 128), longest_ms=400.0)
    assert [(part["stage"], part["percent"]) for part in parts] == [("vision", 25), ("selection", 5), ("prefill", 20)]


class Reader(html.parser.HTMLParser):
    """Collects the tags, the text, and everything that a browser would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.fetched = re.findall(r"url\(([^)]*)\)|@import ([^;]*)", page)
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def test_the_page_needs_nothing_beside_it(report: Report, accuracy: Results) -> None:
    picture = Picture(0, "photo.png: Is 1 < 2?", Image.new("RGB", (8, 8), "red"))
    reader = Reader(to_html(replace(report, accuracy=accuracy), [picture], "<svg></svg>"))
    assert len(reader.fetched) == 1
    assert reader.fetched[0].startswith("data:image/jpeg;base64,")
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    assert "svg" in reader.tags


def test_names_and_answers_are_text_on_the_page(report: Report) -> None:
    page = to_html(report)
    assert "<script" not in page
    reader = Reader(page)
    assert NAME in reader.text
    assert "<b>yes</b>" in reader.text
    assert "1000" in reader.text  # MB, of ONNX Runtime
    assert "2000" in reader.text


def test_what_failed_and_what_was_not_run_is_said(report: Report) -> None:
    for shown in (Reader(to_html(report)).text, to_markdown(report)):
        assert "hecks failed" in shown
        assert "0.9800" in shown
        assert "tensorrt l4 fp16: there is no NVIDIA GPU" in " ".join(shown.split())
        assert "ONNX Runtime CUDA fp16: the process ended" in " ".join(shown.split())
    passed = replace(report, checks=[], passed=True)
    assert "all checks passed" in Reader(to_html(passed)).text


@pytest.fixture
def accuracy() -> Results:
    def figures(budget: int, value: float, relative: Estimate | None) -> BudgetFigures:
        shown = Estimate(value, value - 0.01, value + 0.01)
        return BudgetFigures(budget, {"mean": shown, "accuracy": shown}, relative, 0)

    # A budget that only a kind has comes first there, so that rows are found by budget and not by place.
    kind = KindResult("colour", "exact", "accuracy", 30, 30, [figures(64, 0.5, None), figures(128, 0.7, None)])
    return Results(
        1,
        RunSettings("model", "0" * 64, "fp32", "onnxruntime CPUExecutionProvider", 8, "prompt"),
        DataSetEntry("scenes.jsonl", "0" * 64, 30),
        576,
        [kind],
        [figures(128, 0.7, Estimate(0.98, 0.95, None)), figures(64, 0.5, None)],
        {},
    )


def test_accuracy_stands_with_its_intervals(report: Report, accuracy: Results) -> None:
    shown = replace(report, accuracy=accuracy)
    lines = to_markdown(shown).splitlines()
    assert "| 128 | 0.700 [0.690, 0.710] | 0.980 | 0.700 [0.690, 0.710] |" in lines
    assert "| 64 | 0.500 [0.490, 0.510] | – | 0.500 [0.490, 0.510] |" in lines
    text = " ".join(Reader(to_html(shown, accuracy_svg="<svg></svg>")).text.split())
    assert "64 0.500 [0.490, 0.510] – 0.500" in text
    assert "Accuracy over budget" not in to_html(report)


def test_markdown_tables_have_a_row_for_each_measurement(report: Report, accuracy: Results) -> None:
    lines = to_markdown(replace(report, accuracy=accuracy)).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ONNX")]
    parity, first, second = rows[1:]
    columns = 0
    assert parity[-1] == "3 of 4"
    assert first[:7] == ["ONNX Runtime CPU fp32", "128", "50.0", "100.0", "150.0", "4.00", "2.00"]
    assert second[5:7] == ["4.00", "1.00"]
    for line in lines:
        if line.startswith("| ---"):
            columns = line.count("|")
        elif columns and line.startswith("|"):
            assert line.count("|") == columns
        else:
            columns = 0
