"""``flashvlm report`` on the tiny model: transformers in PyTorch against the bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is what the report compares with")
pytest.importorskip("skimage", reason="photographs of scikit-image")

from helpers.fake_bundle import add_engine

from flashvlm_export.bundle import Bundle
from flashvlm_export.calibration.photographs import packaged_photographs
from flashvlm_export.cli import main
from flashvlm_export.report.records import Report

ARGUMENTS = ["--max-images", "2", "--rounds", "2", "--warm-up", "1", "--max-tokens", "4", "--budgets", "6,3"]
# float16 on a model of 16 patches: an exchanged token is a third of the important part of six.
LOOSE = ["--require", "fp16.important=0.3", "--require", "fp16.coverage=0.5"]


@pytest.fixture(scope="module")
def written(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report") / "new"
    command = ["report", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint), "--output", str(output)]
    assert main([*command, *ARGUMENTS, *LOOSE]) == 0
    return output


@pytest.fixture
def report(written: Path) -> Report:
    import msgspec

    return msgspec.json.decode((written / "report.json").read_bytes(), type=Report)


def test_the_float32_graph_answers_as_pytorch_does(report: Report) -> None:
    (row,) = [row for row in report.parity if row.precision == "fp32"]
    assert (row.backend, row.iou, row.important_iou) == ("ONNX Runtime CPU", 1.0, 1.0)
    assert (row.same_answers, row.answers) == (6, 6)  # two images at 6, 3 and all tokens
    # Sums of a few hundred float32 products, in another order.
    assert row.max_error < 1e-5


def test_every_backend_and_budget_was_timed(report: Report) -> None:
    assert report.settings.budgets == [6, 3, 16]
    rows = {(row.backend, row.precision, row.budget) for row in report.latency}
    names = {("PyTorch CPU", "fp32"), ("ONNX Runtime CPU", "fp32"), ("ONNX Runtime CPU", "fp16")}
    assert rows == {(*name, budget) for name in names for budget in (6, 3, 16)}
    for row in report.latency:
        shares = {"vision", "selection"} if row.backend.startswith("PyTorch") else {"visual"}
        assert shares | {"preprocess", "prefill", "decode"} <= set(row.stages)
        before = sum(times.p50_ms for stage, times in row.stages.items() if stage != "decode")
        # A median of sums lies near the sum of medians: of two rounds, both are means.
        assert row.time_to_first_token.p50_ms == pytest.approx(before, rel=1e-3)
        assert row.time_to_first_token.p50_ms <= row.time_to_first_token.p99_ms
    texts = {row.budget: row.prompt_tokens - row.budget for row in report.latency}
    assert len(set(texts.values())) == 1  # the same text around more or fewer visual tokens


def test_the_same_answers_stand_on_the_page(report: Report, written: Path) -> None:
    page = (written / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 2
    assert len({example.image for example in report.examples}) == 2
    for example in report.examples:
        assert example.answers["PyTorch CPU fp32"] == example.answers["ONNX Runtime CPU fp32"]
        assert example.image in page
    assert "| PyTorch CPU fp32 | 6 |" in (written / "report.md").read_text(encoding="utf-8")


def test_a_missed_requirement_fails_and_the_report_is_there(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["report", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path), "--json"]
    assert main([*command, *ARGUMENTS, *LOOSE, "--require", "fp16.cosine=1.1"]) == 1
    captured = capsys.readouterr()
    assert "1 of 6 checks failed" in captured.err
    printed = json.loads(captured.out)
    assert printed["passed"] is False
    assert [check["passed"] for check in printed["checks"]].count(False) == 1
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budgets", "6,17"], "17"),
        (["--budgets", "six"], "--budgets takes whole numbers"),
        (["--budgets", "16"], "no budget that prunes"),
        (["--max-images", "0"], "no images"),
        (["--require", "fp16.iou"], "not a requirement"),
        (["--require", "int9.iou=1"], "nothing of this name is measured"),
        (["--rounds", "0"], "--rounds"),
        (["--max-tokens", "100000"], "--max-tokens"),
        (["--threads", "0"], "--threads"),
        (["--threads", "1000"], "--threads"),
        (["--images", "nowhere"], "no such image folder"),
    ],
)
def test_what_is_asked_wrongly_is_said_before_anything_runs(
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    output = tmp_path / "report"
    command = ["report", str(tiny_bundle), "--checkpoint", str(tmp_path / "none"), "--output", str(output)]
    assert main([*command, "--budgets", "6", *more]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_no_checkpoint_no_bundle(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report"
    where = ["--output", str(output), "--budgets", "6"]
    assert main(["report", str(tiny_bundle), "--checkpoint", str(tmp_path / "none"), *where]) == 1
    assert "there is no checkpoint" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none"), "--checkpoint", str(tmp_path), *where]) == 1
    assert not output.exists()


def test_another_checkpoint_is_not_compared_with(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vision_feature_layer": -1}))
    command = ["report", str(tiny_bundle), "--checkpoint", str(other), "--output", str(tmp_path / "report")]
    assert main([*command, "--budgets", "6"]) == 1
    assert "from another checkpoint" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_said_at_once(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "bad.png").write_bytes(b"no picture")
    command = ["report", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "report")]
    assert main([*command, "--budgets", "6", "--images", str(tmp_path / "photos")]) == 1
    assert "bad.png" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_an_evaluation_of_the_bundle_is_part_of_it(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="draws the accuracy")
    image = packaged_photographs()[0]
    rows = [
        {
            "id": str(n),
            "image": str(image),
            "question": f"Is it {n}?",
            "answers": ["yes"],
            "kind": "is",
            "metric": "exact",
        }
        for n in range(3)
    ]
    data, found = tmp_path / "data.jsonl", tmp_path / "eval"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    budgets = ["--budgets", "full,6", "--max-tokens", "2"]
    assert main(["eval", str(tiny_bundle), "--data", str(data), "--output", str(found), *budgets]) == 0
    output = tmp_path / "report"
    command = ["report", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint), "--output", str(output), *ARGUMENTS]
    command += LOOSE
    # A model with random weights is never right: 0 / 0 is no relative accuracy, and not enough.
    assert main([*command, "--eval", str(found), "--require", "accuracy@6=0.5"]) == 1
    assert "accuracy at 6 visual tokens" in capsys.readouterr().err
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "3 questions of data.jsonl" in page
    assert main([*command, "--eval", str(found), "--require", "accuracy@5=0.5"]) == 2
    assert main([*command, "--eval", str(tmp_path)]) == 2
    assert "there is no evaluation" in capsys.readouterr().err
    results = json.loads((found / "results.json").read_text())
    results["settings"]["bundle_sha256"] = "0" * 64
    (found / "results.json").write_text(json.dumps(results))
    assert main([*command, "--eval", str(found)]) == 2
    assert "of another bundle" in capsys.readouterr().err


def test_an_engine_that_cannot_run_here_is_named_and_a_damaged_one_fails(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    add_engine(bundle, "l4")
    command = ["report", str(bundle.path), "--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "report")]
    reports = []
    for content, code in ((b"an engine", 0), (b"an edited", 1)):
        (bundle.path / "engines" / "l4.fp16.engine").write_bytes(content)
        assert main([*command, *ARGUMENTS, *LOOSE]) == code
        reports.append(json.loads((tmp_path / "report" / "report.json").read_text()))
    (name,) = reports[0]["not_run"]
    assert name == "tensorrt l4, decoder CPU fp16"
    assert name.removesuffix(" fp16") not in {row["backend"] for row in reports[0]["latency"]}
    assert list(reports[1]["failed"]) == [name]
    assert {"name": f"{name}: runs", "measured": 0.0, "required": 1.0, "passed": False} in reports[1]["checks"]
