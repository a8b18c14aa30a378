"""The whole command: what it writes, that it can be repeated, stopped and resumed, and how mistakes end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.calibrating import calibrate, exit_code

from flashvlm_export.bundle import Bundle, describe_files, write_manifest
from flashvlm_export.calibration import install
from flashvlm_export.calibration import ranges as ranges_module
from flashvlm_export.calibration.calibrate import default_tolerance
from flashvlm_export.calibration.observers import MinMaxObserver
from flashvlm_export.errors import BundleError, CalibrationError
from flashvlm_export.files import bundle_lock
from flashvlm_export.manifest import decode_manifest

Calibrated = tuple[Path, dict[str, Any]]
NONE = ("--tolerance", "none")


def hashes(bundle: Path) -> dict[str, str]:
    return {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in install.FILES}


def content(bundle: Path) -> dict[str, bytes]:
    return {str(file.relative_to(bundle)): file.read_bytes() for file in bundle.rglob("*") if file.is_file()}


def change_manifest(bundle: Path, **changes: object) -> None:
    manifest = decode_manifest((bundle / "manifest.json").read_bytes())
    write_manifest(bundle, dataclasses.replace(manifest, **changes))


def test_what_the_bundle_gets(calibrated: Calibrated) -> None:
    path, printed = calibrated
    bundle = Bundle.open(path, verify=True)
    manifest = bundle.manifest
    assert manifest.graphs["int8"].file == "visual.int8.onnx"
    assert manifest.graphs["int8"].spec == manifest.graphs["fp16"].spec
    assert set(install.FILES) <= set(manifest.files)
    assert manifest.files.items() <= describe_files(path).items()
    assert manifest.checks["int8"] == printed["checks"]
    assert printed["checks"]["calibration"] | {"layers": 7, "excluded_layers": 0} == printed["checks"]["calibration"]
    assert (printed["checks"]["calibration"]["images"], printed["checks"]["calibration"]["held_out"]) == (5, 1)
    assert printed["likeness"]["cosine"] > 0.99
    assert not (path / ".calibration").exists()
    assert not [file for file in path.iterdir() if file.name.startswith(".")]
    assert (path / "visual.int8.onnx.data").stat().st_mode & 0o777 == (path / "visual.int8.onnx").stat().st_mode & 0o777


def test_the_table_of_layers(calibrated: Calibrated) -> None:
    table = json.loads((calibrated[0] / "calibration" / "sensitivity.json").read_text())
    assert len(table["layers"]) == 7
    shares = [layer["share"] for layer in table["layers"]]
    assert shares == sorted(shares, reverse=True)
    assert all(0.99 < layer["likeness"]["cosine"] < 1.0 for layer in table["layers"])
    assert table["everything"]["cosine"] < min(layer["likeness"]["cosine"] for layer in table["layers"])
    assert table["budget"] == 8
    assert table["judged_on"] == "important part and coverage"
    assert len({node for layer in table["layers"] for node in layer["nodes"]}) == 21


def test_the_pipeline_runs_int8(calibrated: Calibrated, photos: Path) -> None:
    from flashvlm_export.runtime.pipeline import Pipeline
    from flashvlm_export.runtime.request import Request

    requests = [Request([photos / "0.png"], "What is it?"), Request([photos / "1.png"], "Where?")]
    found = {}
    for precision in ("fp32", "int8"):
        with Pipeline.open(calibrated[0], precision=precision, llm=None) as vlm:
            found[precision] = vlm.encode(requests, budget=16)
    for want, have in zip(found["fp32"], found["int8"], strict=True):
        a, b = want.inputs_embeds.ravel(), have.inputs_embeds.ravel()
        assert 0.99 < a @ b / np.linalg.norm(a) / np.linalg.norm(b) < 0.9999999


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_the_same_images_give_the_same_bytes(
    method: str, bundle: Path, calibrated: Calibrated, photos: Path, tmp_path: Path
) -> None:
    again = bundle
    calibrate(again, "--images", photos, *NONE, "--method", method, "--max-layers", 1)
    if method == "minmax":
        for name in ("visual.int8.onnx", "visual.int8.onnx.data", "calibration/ranges.json"):
            assert (again / name).read_bytes() == (calibrated[0] / name).read_bytes()
    else:
        assert hashes(again)["visual.int8.onnx"] != hashes(calibrated[0])["visual.int8.onnx"]
        first = hashes(again)
        (again / "calibration" / "ranges.json").unlink()
        fresh = Path(shutil.copytree(calibrated[0], tmp_path / "fresh"))
        calibrate(fresh, "--images", photos, *NONE, "--method", method, "--max-layers", 1, "--overwrite")
        assert hashes(fresh) == first


def test_a_tolerance_leaves_layers_in_float16(bundle: Path, photos: Path, calibrated: Calibrated) -> None:
    """One that all layers together miss by a quarter."""
    table = json.loads((calibrated[0] / "calibration" / "sensitivity.json").read_text())
    between = (1 + 3 * table["everything"]["cosine"]) / 4
    printed = calibrate(bundle, "--images", photos, "--tolerance", f"cosine={between},iou=0,coverage=0")
    census = printed["checks"]["census"]
    assert 0 < len(printed["excluded_layers"]) < 7
    assert census["int8_products"] + census["float_products"] == 21
    assert 0 < census["float_products"] < 21
    written = json.loads((bundle / "calibration" / "sensitivity.json").read_text())
    assert written["chosen"]["cosine"] >= between > written["everything"]["cosine"]
    assert [layer["layer"] for layer in written["layers"] if layer["excluded"]] == printed["excluded_layers"]
    assert printed["checks"]["calibration"]["sensitivity_runs"] == written["runs"] <= (2 + 7 + 3) * 2


def test_a_tolerance_out_of_reach_leaves_the_bundle_as_it_was(bundle: Path, photos: Path) -> None:
    before = content(bundle)
    with pytest.raises(CalibrationError, match="does not come within the tolerance"):
        calibrate(bundle, "--images", photos, "--tolerance", "cosine=1")
    after = content(bundle)
    # The ranges are kept: the next attempt starts from them.
    assert after.pop(".calibration/ranges.partial.npz")
    assert after == before
    Bundle.open(bundle, verify=True)


@pytest.mark.parametrize(
    ("budget", "weights", "diversity", "iou"),
    [
        (8, "checkpoint", "bipartite", 3 / 5),  # of 4 important tokens one may be another
        (8, "checkpoint", "farthest", 7 / 9),
        (1, "checkpoint", "farthest", 0.0),
        (128, "checkpoint", "farthest", 0.9),
        (128, "random:0", "farthest", 0.0),
    ],
)
def test_the_default_tolerance_allows_one_exchanged_token(
    budget: int, weights: str, diversity: str, iou: float, bundle: Path
) -> None:
    manifest = Bundle.open(bundle).manifest
    source = dataclasses.replace(manifest.source, weights=weights)
    selection = dataclasses.replace(manifest.selection, config={**manifest.selection.config, "diversity": diversity})
    change_manifest(bundle, source=source, selection=selection)
    tolerance = default_tolerance(Bundle.open(bundle), budget)
    assert tolerance.iou == pytest.approx(iou)
    assert tolerance.cosine == 0.99


class Stopped(BaseException):
    """Stands for a kill: nothing catches it on purpose."""


def test_a_stopped_run_resumes_behind_the_last_image(
    bundle: Path, photos: Path, calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    observed: list[str] = []
    take = MinMaxObserver._take

    def counting(self: MinMaxObserver, name: str, values: Any) -> None:
        observed.append(name)
        if observed.count(name) == 4 and len(observed) < 100:
            raise Stopped
        take(self, name, values)

    before = content(bundle)
    monkeypatch.setattr(MinMaxObserver, "_take", counting)
    with pytest.raises(Stopped):
        calibrate(bundle, "--images", photos, *NONE)
    assert {name: data for name, data in content(bundle).items() if not name.startswith(".")} == before
    tensors = len(set(observed))
    observed.clear()
    observed.extend(["earlier"] * 100)
    capsys.readouterr()
    calibrate(bundle, "--images", photos, *NONE)
    assert len(observed) - 100 == 2 * tensors  # images 4 and 5
    assert "resumed behind image 3 of 5" in capsys.readouterr().err
    assert hashes(bundle) == hashes(calibrated[0])


def test_state_of_other_images_is_not_resumed(bundle: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(CalibrationError):
        calibrate(bundle, "--images", photos, "--tolerance", "cosine=1")
    fewer = Path(shutil.copytree(photos, tmp_path / "fewer"))
    (fewer / "2.png").unlink()
    capsys.readouterr()
    calibrate(bundle, "--images", fewer, *NONE, "--max-layers", 1)
    assert "resumed" not in capsys.readouterr().err
    cached = ranges_module.decode_ranges(bundle / "calibration" / "ranges.json")
    assert cached is not None
    assert "2.png" not in cached.images


def test_a_damaged_state_is_made_anew(bundle: Path, photos: Path, calibrated: Calibrated) -> None:
    (bundle / ".calibration").mkdir()
    (bundle / ".calibration" / "ranges.partial.npz").write_bytes(b"PK\x03\x04 cut off")
    calibrate(bundle, "--images", photos, *NONE)
    assert hashes(bundle) == hashes(calibrated[0])


def test_ranges_in_the_bundle_are_used_again(
    calibrated: Calibrated, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(calibrated[0], tmp_path / "bundle"))
    before = hashes(bundle)
    monkeypatch.setattr(MinMaxObserver, "_take", lambda *arguments: pytest.fail("measured again"))
    calibrate(bundle, "--images", photos, *NONE, "--overwrite")
    assert "ranges: those in calibration/ranges.json" in capsys.readouterr().err
    assert hashes(bundle) == before


def test_ranges_of_another_graph_are_measured_anew_and_that_is_said(
    calibrated: Calibrated, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A bundle whose fp16 graph was exported again: other weights, so other hashes in its manifest."""
    bundle = Path(shutil.copytree(calibrated[0], tmp_path / "bundle"))
    data = bundle / "visual.fp16.onnx.data"
    weights = np.fromfile(data, np.float16)
    (weights * np.float16(1.125)).tofile(data)
    change_manifest(bundle, files=describe_files(bundle))
    calibrate(bundle, "--images", photos, *NONE, "--overwrite", "--max-layers", 1)
    assert "is of another graph: ranges are measured anew" in capsys.readouterr().err
    assert hashes(bundle)["calibration/ranges.json"] != hashes(calibrated[0])["calibration/ranges.json"]


def test_a_graph_edited_behind_the_manifest_is_refused(bundle: Path, photos: Path) -> None:
    data = bundle / "visual.fp16.onnx.data"
    changed = bytearray(data.read_bytes())
    changed[5000] ^= 1
    data.write_bytes(bytes(changed))
    with pytest.raises(BundleError, match="damaged"):
        calibrate(bundle, "--images", photos)


@pytest.mark.parametrize("step", range(7))
def test_killed_anywhere_while_files_are_put_in_place_the_bundle_opens(
    step: int, calibrated: Calibrated, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An INT8 graph is replaced, which is the harder case; ``step`` counts what changes the disk."""
    bundle = Path(shutil.copytree(calibrated[0], tmp_path / "bundle"))
    done: list[str] = []

    def stopping(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: Any) -> object:
            if len(done) == step:
                raise Stopped
            done.append(call.__name__)
            return call(*arguments)

        return wrapped

    monkeypatch.setattr(install, "write_manifest", stopping(install.write_manifest))
    replace = stopping(Path.replace)
    monkeypatch.setattr(
        Path, "replace", lambda self, target: (replace if "staging" in self.parts else ORIGINAL_REPLACE)(self, target)
    )
    arguments = ("--images", photos, *NONE, "--method", "percentile", "--max-layers", 1, "--overwrite")
    if step == 6:  # one more than there are
        calibrate(bundle, *arguments)
        assert done == ["write_manifest", *["replace"] * 4, "write_manifest"]
    else:
        with pytest.raises(Stopped):
            calibrate(bundle, *arguments)
    manifest = Bundle.open(bundle, verify=True).manifest
    assert {"fp32", "fp16"} <= set(manifest.graphs)
    assert ("int8" in manifest.graphs) == (step in (0, 6))
    monkeypatch.undo()
    if step == 3:
        calibrate(bundle, *arguments)
        assert "int8" in Bundle.open(bundle, verify=True).manifest.graphs


ORIGINAL_REPLACE = Path.replace


def test_one_image_is_allowed_and_said_to_be_judged_on_itself(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(photos / "0.png", tmp_path / "one")
    printed = calibrate(bundle, "--images", tmp_path / "one", *NONE, "--max-layers", 1)
    assert printed["checks"]["calibration"]["held_out"] == 0
    assert "with one image nothing is held out" in capsys.readouterr().err


def test_bad_images_are_counted(bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mixed = Path(shutil.copytree(photos, tmp_path / "mixed"))
    (mixed / "7.png").write_bytes((photos / "0.png").read_bytes()[:500])
    assert exit_code(bundle, "--images", mixed) == 1
    assert "7.png" in capsys.readouterr().err
    printed = calibrate(bundle, "--images", mixed, *NONE, "--max-layers", 1, "--skip-bad")
    assert printed["images"] == 6
    assert [reason.partition(":")[0] for reason in printed["skipped_images"]] == ["7.png"]


def test_a_bundle_without_a_tokenizer_uses_random_text_and_says_so(
    bundle: Path, photos: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    change_manifest(bundle, prompt=None)
    calibrate(bundle, "--images", photos, *NONE, "--max-layers", 1)
    assert "random rows of its embedding table stand in" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("What?\n")
    assert exit_code(bundle, "--images", photos, "--prompts", tmp_path / "prompts.txt", "--overwrite") == 2
    assert "it has no tokenizer" in capsys.readouterr().err


def test_prompts_are_used(bundle: Path, photos: Path, calibrated: Calibrated, tmp_path: Path, capsys: Any) -> None:
    """They steer selection, not the encoder: the ranges stay, the key does not."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"Where is number {number}?" for number in range(9)))
    arguments = ("--images", photos, "--prompts", tmp_path / "prompts.txt", *NONE, "--max-layers", 1)
    calibrate(bundle, *arguments)
    assert "3 of 9 prompts are not used" in capsys.readouterr().err
    mine, other = (
        ranges_module.decode_ranges(path / "calibration" / "ranges.json") for path in (bundle, calibrated[0])
    )
    assert mine is not None
    assert other is not None
    assert mine.tensors == other.tensors
    assert mine.key != other.key


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--images", "nowhere"], 2, "no such image folder"),
        (["--images", "{empty}"], 2, "no images in the folder"),
        (["--prompts", "{photos}/x.txt"], 2, "prompts without images"),
        (["--images", "{photos}", "--prompts", "{gaps}"], 2, "empty lines"),
        (["--images", "{photos}", "--prompts", "{placeholder}"], 2, "placeholders do not match"),
        (["--images", "{photos}", "--tolerance", "cosine=2"], 2, "out of range"),
        (["--images", "{photos}", "--tolerance", "speed=2"], 2, "not a tolerance"),
        (["--images", "{photos}", "--tolerance", "iou=0.9,iou=0.8"], 2, "not a tolerance"),
        (["--images", "{photos}", "--percentile", "5", "--method", "percentile"], 2, "percentile is out of range"),
        (["--images", "{photos}", "--percentile", "99"], 2, "--percentile belongs to another method"),
        (["--images", "{photos}", "--budget", "17"], 2, "budget is out of range"),
        (["--images", "{photos}", "--max-images", "0"], 2, "--max-images is out of range"),
        (["--images", "{photos}", "--sensitivity-images", "-1"], 2, "--sensitivity-images is out of range"),
    ],
)
def test_mistakes_end_in_one_message_and_an_untouched_bundle(
    arguments: list[str],
    code: int,
    message: str,
    tiny_bundle: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "gaps").write_text("What?\n\nWhere?\n")
    (tmp_path / "placeholder").write_text("What is <image>?\n")
    places = {name: tmp_path / name for name in ("empty", "gaps", "placeholder")} | {"photos": photos}
    before = content(tiny_bundle)
    assert exit_code(tiny_bundle, *(argument.format(**places) for argument in arguments)) == code
    assert message in capsys.readouterr().err
    assert content(tiny_bundle) == before


def test_an_int8_graph_is_replaced_only_on_demand(calibrated: Calibrated, photos: Path, capsys: Any) -> None:
    assert exit_code(calibrated[0], "--images", photos) == 2
    assert f"flashvlm calibrate {calibrated[0]} --overwrite" in capsys.readouterr().err


def test_without_an_fp16_graph_the_export_command_is_named(bundle: Path, photos: Path, capsys: Any) -> None:
    change_manifest(bundle, graphs={"fp32": Bundle.open(bundle).manifest.graphs["fp32"]})
    assert exit_code(bundle, "--images", photos) == 1
    assert "--precision fp32,fp16" in capsys.readouterr().err


def test_a_bundle_that_is_being_written_is_refused(bundle: Path, photos: Path, capsys: Any) -> None:
    before = content(bundle)
    with bundle_lock(bundle):
        assert exit_code(bundle, "--images", photos) == 1
    assert "another process is writing" in capsys.readouterr().err
    assert content(bundle) == before


def test_a_killed_run_leaves_an_openable_bundle_and_is_resumed(
    bundle: Path, photos: Path, calibrated: Calibrated, capsys: pytest.CaptureFixture
) -> None:
    """Really killed, so that nothing cleans up behind it."""
    state = bundle / ".calibration" / "ranges.partial.npz"
    command = [sys.executable, "-m", "flashvlm_export", "calibrate", str(bundle), "--images", str(photos), *NONE]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 60
        while not state.exists() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    assert set(Bundle.open(bundle, verify=True).manifest.graphs) == {"fp32", "fp16"}
    assert state.exists()
    calibrate(bundle, "--images", photos, *NONE)
    assert "resumed behind image" in capsys.readouterr().err
    assert hashes(bundle) == hashes(calibrated[0])
    assert not [file for file in bundle.iterdir() if file.name.startswith(".")]
