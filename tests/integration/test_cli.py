"""The command as users type it: what it prints where, its exit codes, and that mistakes end in one message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashvlm_export.bundle import Bundle
from flashvlm_export.cli import main
from flashvlm_export.selection import SELECTORS


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8)).save(path)
    return path


def test_models_for_people_and_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert "llava-hf/llava-1.5-13b-hf" in capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    names = [entry["name"] for entry in listed["models"]]
    llava_next = [f"llava-v1.6-{name}" for name in ("vicuna-7b", "vicuna-13b", "mistral-7b")]
    others = ["llava-onevision-0.5b", "llava-onevision-7b", "qwen2.5-vl-3b", "qwen2.5-vl-7b"]
    assert names == ["flashvlm-tiny", "llava-1.5-7b", "llava-1.5-13b", *llava_next, *others]
    assert {entry["family"] for entry in listed["models"]} <= listed["families"].keys()
    assert listed["families"]["qwen2_5_vl"]["takes"] == "images, videos"


def test_export_inspect_run(tiny_checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The way of the README, with the checkpoint given beside a model name."""
    bundle = tmp_path / "bundle"
    arguments = ["export", "--weights", str(tiny_checkpoint), "llava-1.5-7b", "--output", str(bundle)]
    assert main([*arguments, "--precision", "fp32", "--diversity", "farthest", "--set", "eta=0.4", "--json"]) == 0
    captured = capsys.readouterr()
    exported = json.loads(captured.out)
    assert exported["selection"]["config"]["eta"] == 0.4
    assert exported["checks"]["fp32"]["parity"]["exact_rows"] == 7
    assert exported["checks"]["fp32"]["tensorrt_rtx"]["engine_size_bytes"] > 100_000
    assert "its own sizes are used" in captured.err  # the checkpoint is not the 7B model that was named

    assert main(["inspect", str(bundle), "--verify", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)["manifest"]
    # Pillow's versions differ in the last bit of a resize, so it belongs to what made a bundle.
    assert {"torch", "transformers", "pillow", "tensorrt_rtx_cu12"} <= set(manifest["tools"])
    assert manifest["selection"]["config"]["diversity"] == "farthest"
    assert main(["inspect", str(bundle)]) == 0
    assert "16 visual tokens" in capsys.readouterr().out

    run = ["run", str(bundle), "--image", str(photo), "--max-tokens", "5"]
    assert main([*run, "--prompt", "What?", "--prompt", "Where is it?", "--budget", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("kept 3 of 16 visual tokens") == 2
    assert "prefill" in printed
    sampled = [*run, "--prompt", "What?", "--temperature", "1.5", "--top-p", "0.9", "--json", "--seed"]
    answers = []
    for seed in ("1", "1", "2", "3"):
        assert main([*sampled, seed]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answers"][0]["answer"])
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1


@pytest.mark.parametrize(
    ("selector", "precision", "settings"),
    [
        ("vispruner", "fp32", {"important_ratio": 0.25, "merge_step": 8}),
        ("visionzip", "fp32", {"contextual_ratio": 0.15625}),
        ("divprune", "fp32", {}),
        ("cdpruner", "fp16", {}),
        ("cls-attention", "fp32", {}),
        ("uniform", "fp32", {}),
        ("random", "fp16", {"seed": 7}),
    ],
)
def test_every_other_selector_exports_with_the_same_checks(
    selector: str,
    precision: str,
    settings: dict[str, float],
    tiny_checkpoint: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those that need no saliency have no attention row in the graph; the bundle runs all the same."""
    bundle = tmp_path / "bundle"
    export = ["export", str(tiny_checkpoint), "--output", str(bundle), "--selector", selector, "--decoder", "none"]
    changed = {"vispruner": ["--set", "important_ratio=0.25"], "random": ["--set", "seed=7"]}.get(selector, [])
    assert main([*export, *changed, "--precision", precision, "--engine-check", "required", "--json"]) == 0
    captured = capsys.readouterr()
    exported = json.loads(captured.out)
    assert exported["selection"] == {"selector": selector, "config": settings}
    checks = exported["checks"][precision]
    assert checks["parity"]["exact_rows"] == 7
    assert checks["tensorrt_rtx"]["engine_size_bytes"] > 100_000
    assert "None output" not in captured.err
    run = ["run", str(bundle), "--image", str(photo), "--prompt", "What?", "--budget", "5", "--json"]
    assert main([*run, "--visual-only"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["kept_tokens"] == 5


def test_a_decoder_in_eight_bits_answers(
    tiny_checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    export = ["export", str(tiny_checkpoint), "--output", str(bundle), "--precision", "fp32", "--engine-check", "off"]
    assert main([*export, "--decoder", "int8"]) == 0
    assert Bundle.open(bundle).manifest.decoder.precision == "int8"
    capsys.readouterr()
    run = ["run", str(bundle), "--image", str(photo), "--prompt", "What is it?", "--max-tokens", "7", "--json"]
    assert main(run) == 0
    assert 0 < json.loads(capsys.readouterr().out)["answers"][0]["new_tokens"] <= 7


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--budget", "0"], 2, "the token budget is out of range"),
        (["--budget", "-4"], 2, "the token budget is out of range"),
        (["--budget", "17"], 2, "the token budget is out of range"),
        (["--budget", "many"], 2, "the token budget is not a whole number"),
        (["--prompt", ""], 2, "the question is empty"),
        (["--prompt", "what is <image>?"], 2, "placeholders do not match"),
        (["--prompt", "none at all", "--raw-prompt"], 2, "placeholders do not match"),
        (["--prompt", "a", "--prompt", "b", "--prompt", "c", "--image", "x.png"], 2, "do not pair up"),
        (["--temperature", "-1"], 2, "temperature"),
        (["--max-tokens", "0"], 2, "max_new_tokens"),
        (["--max-tokens", "5000"], 1, "too long"),
        (["--heatmap", "kept.xyz"], 2, "unknown picture format"),
        (["--heatmap", "no/such/folder/kept.png"], 2, "folder does not exist"),
        (["--threads", "0"], 2, "cannot use this many threads"),
        (["--precision", "int8"], 2, "no visual graph in this precision"),
        (["--provider", "cuda"], 1, "no such execution provider"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_end_in_one_message(
    extra: list[str], code: int, message: str, tiny_bundle: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [] if "--prompt" in extra else ["--prompt", "What is it?"]
    if "--provider" in extra:
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this machine has the provider")
    assert main(["run", str(tiny_bundle), "--image", str(photo), *prompt, *extra]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "received:" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "empty"), (b"not a picture", "not an image"), ("cut", "truncated")],
    ids=["missing", "empty", "text", "truncated"],
)
def test_unreadable_images(
    content: bytes | str | None,
    message: str,
    tiny_bundle: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = tmp_path / "image.png"
    if content is not None:
        image.write_bytes(photo.read_bytes()[:2000] if content == "cut" else content)
    assert main(["run", str(tiny_bundle), "--image", str(image), "--prompt", "What?"]) == 1
    error = capsys.readouterr().err
    assert str(image) in error
    assert message in error.lower()


def test_extreme_images_are_answered(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in {"dot": (1, 1), "wide": (20_000, 200), "tall": (3, 900)}.items():
        Image.new("RGB", size, (200, 30, 90)).save(tmp_path / f"{name}.png")
        run = ["run", str(tiny_bundle), "--image", str(tmp_path / f"{name}.png"), "--prompt", "What?"]
        assert main([*run, "--max-tokens", "2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["answers"][0]["kept_tokens"] == 16


def test_export_refuses_what_it_cannot_do(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "bundle")
    model = str(tiny_checkpoint)
    for arguments, code, message in (
        (["export", "llava-2", "--output", out], 2, "unknown model"),
        (["export", model, "--revision", "main", "--output", out], 2, "a revision belongs to the hub"),
        (["export", model, "--output", out, "--diversity", "farthest", "--set", "diversity=bipartite"], 2, "twice"),
        (
            ["export", model, "--output", out, "--diversity", "farthest", "--selector", "divprune"],
            2,
            "to the selector 'fl",
        ),
        (
            ["export", model, "--output", out, "--set", "diversity=farthest", "--selector", "random"],
            2,
            "no such setting",
        ),
        (["export", model, "--output", out, "--precision", "fp8"], 2, "unknown precision"),
        (["export", model, "--output", out, "--precision", "int8"], 2, "not exported but calibrated"),
        (["export", model, "--output", out, "--set", "eta"], 2, "not a setting"),
        (["export", model, "--output", out, "--set", "etta=1"], 2, "no such setting"),
        (["export", model, "--output", out, "--set", "eta=7"], 2, "out of range"),
        (["export", model, "--output", str(tiny_bundle)], 1, "the output path is taken"),
        (["export", "llava-1.5-7b", "--weights", "random", "--decoder", "int4", "--output", out], 2, "random weights"),
    ):
        assert main(arguments) == code, arguments
        assert message in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
    assert Bundle.open(tiny_bundle)


def test_an_interrupt_inside_exec_ends_with_the_code_of_an_interrupt(tmp_path: Path) -> None:
    """``python -m`` would die of SIGINT at its end, though the exception was caught: it arose in code given as text."""
    (tmp_path / "program.py").write_text(
        "import sys; from flashvlm_export.cli import run_verb; "
        "sys.exit(run_verb('verb', lambda args: exec('raise KeyboardInterrupt'), None))"
    )
    command = [sys.executable, "-m", "program"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "verb: interrupted; nothing half-written is left behind\n")


def test_help_tells_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for verb in ("models", "export", "run", "dataset", "eval", "inspect"):
        with pytest.raises(SystemExit) as stopped:
            main([verb, "--help"])
        assert stopped.value.code == 0
        shown[verb] = " ".join(capsys.readouterr().out.split())
        assert "--json" in shown[verb]
    assert "(default: fp32,fp16)" in shown["export"]
    for row in SELECTORS.values():
        # Without blanks: argparse also breaks lines at hyphens.
        assert f"{row.name} = {row.summary}".replace(" ", "") in shown["export"].replace(" ", "")
    assert "(default: auto)" in shown["export"]
    assert "longest answer, in tokens (default: 128)" in shown["run"]
    assert "longest answer, in tokens (default: 64)" in shown["eval"]
    assert "(default: None)" not in "".join(shown.values())
