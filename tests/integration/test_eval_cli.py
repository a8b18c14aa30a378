"""``flashvlm eval`` as users type it, on a real bundle: figures, resuming, and mistakes that end in one message."""

from __future__ import annotations

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
from PIL import Image

from flashvlm_export.bundle import Bundle
from flashvlm_export.cli import main
from flashvlm_export.engines import BuildSettings, EngineEntry, engine_file, write_entry
from flashvlm_export.errors import LLMError
from flashvlm_export.files import sha256_of
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Answer
from flashvlm_export.specs import Precision

SHORT = ["--max-tokens", "4"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five questions of two kinds about three pictures."""
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    animals = [
        {
            "id": n,
            "image": f"{n}.png",
            "question": "What is it?",
            "answers": ["cat"],
            "kind": "animals",
            "metric": "exact",
        }
        for n in range(3)
    ]
    there = [
        {"id": f"p{n}", "image": f"{n}.png", "question": "Is it?", "answers": ["yes"], "kind": "pope", "metric": "pope"}
        for n in range(2)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in animals + there))
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every question that reaches the pipeline, with its budget."""
    asked: list[tuple[str, int]] = []
    ask = Pipeline.ask

    def counted(self: Pipeline, image: Any, question: str, **options: Any) -> Answer:
        asked.append((f"{Path(image).name} {question}", options["budget"]))
        return ask(self, image, question, **options)

    monkeypatch.setattr(Pipeline, "ask", counted)
    return asked


def test_figures_and_resuming(
    tiny_bundle: Path, data: Path, tmp_path: Path, calls: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["eval", str(tiny_bundle), "--data", str(data), "--output", str(out), *SHORT]
    assert main([*command, "--budgets", "full,4", "--json"]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert "10 answer(s) to 5 question(s) are missing" in captured.err
    assert len(calls) == 10

    results = printed["results"]
    assert results == json.loads((out / "results.json").read_text())
    assert [kind["kind"] for kind in results["kinds"]] == ["animals", "pope"]
    assert [figures["budget"] for figures in results["overall"]] == [16, 4]
    assert results["settings"]["backend"] == "onnxruntime CPUExecutionProvider"
    # What the model says is what the pipeline says.
    with Pipeline.open(tiny_bundle) as pipeline:
        from flashvlm_export.runtime.llm.base import SamplingParams

        said = pipeline.ask(
            data.parent / "1.png", "What is it?", budget=4, params=SamplingParams(max_new_tokens=4)
        ).text
    lines = [json.loads(text) for text in (out / "answers.jsonl").read_text().splitlines()[1:]]
    assert [line["text"] for line in lines if (line["id"], line["budget"]) == ("1", 4)] == [said]

    calls.clear()
    assert main([*command, "--budgets", "4,2"]) == 0
    shown = capsys.readouterr().out
    assert {budget for _, budget in calls} == {2}
    assert len(calls) == 5
    assert "relative to 16" in shown
    # The budget that was not asked for this time is answered all the same, so it is still reported.
    assert [figures["budget"] for figures in json.loads((out / "results.json").read_text())["overall"]] == [16, 4, 2]

    calls.clear()
    assert main([*command, "--budgets", "2", "--kinds", "pope", "--json"]) == 0
    narrowed = json.loads(capsys.readouterr().out)["results"]
    assert calls == []
    assert narrowed["dataset"]["kinds"] == ["pope"]
    assert narrowed["dataset"]["questions"] == 2


def test_the_default_budgets_a_sample_and_the_plot(
    tiny_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["eval", str(tiny_bundle), "--data", str(data), "--output", str(out), *SHORT, "--json"]
    assert main([*command, "--limit", "2", "--seed", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [figures["budget"] for figures in printed["results"]["overall"]] == [16, 5, 3, 1]
    assert printed["results"]["dataset"] | {"sha256": ""} == {
        "file": "data.jsonl",
        "sha256": "",
        "questions": 2,
        "limit": 2,
        "seed": 3,
        "kinds": None,
    }
    assert printed["plot"] is None or Path(printed["plot"]).is_file()


def test_without_matplotlib_only_the_plot_is_missing(
    tiny_bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["eval", str(tiny_bundle), "--data", str(data), "--output", str(tmp_path / "out"), *SHORT]
    assert main([*command, "--budgets", "4", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["plot"] is None
    assert "pip install '.[report]'" in captured.err
    assert (tmp_path / "out/results.json").is_file()


def test_another_bundle_is_refused(
    tiny_bundle: Path, data: Path, tmp_path: Path, calls: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    command = ["--data", str(data), "--output", str(out), *SHORT, "--budgets", "4"]
    assert main(["eval", str(tiny_bundle), *command]) == 0
    before = (out / "answers.jsonl").read_bytes()
    shutil.copytree(tiny_bundle, other)
    calls.clear()
    assert main(["eval", str(other), *command]) == 0  # a copy is the same bundle
    assert calls == []

    # Another graph beside it changes nothing; other text embeddings do.
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["graphs"].pop("fp16")
    for name in [name for name in manifest["files"] if name.startswith("visual.fp16")]:
        manifest["files"].pop(name)
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert main(["eval", str(other), *command]) == 0
    assert calls == []
    manifest["files"]["text_embeddings.npy"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    # Refused: small files are hashed when a bundle is opened, so this one is given its due size and hash first.
    embeddings = np.load(other / "text_embeddings.npy")
    np.save(other / "text_embeddings.npy", embeddings * 2)
    manifest["files"]["text_embeddings.npy"]["sha256"] = sha256_of(other / "text_embeddings.npy")
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert main(["eval", str(other), *command]) == 1
    error = capsys.readouterr().err
    assert "holds answers that were given under other settings" in error
    assert "bundle_sha256" in error
    assert "--output" in error
    assert main(["eval", str(tiny_bundle), *command, "--precision", "fp16"]) == 1
    assert "precision fp16" in capsys.readouterr().err
    assert calls == []
    assert (out / "answers.jsonl").read_bytes() == before


def test_an_engine_is_a_backend_of_its_own(
    tiny_bundle: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a GPU: what would be opened and asked is replaced, what is recorded is not."""
    with Pipeline.open(tiny_bundle) as real:
        said = real.ask(data.parent / "0.png", "What is it?", budget=4)
    monkeypatch.setattr(Pipeline, "load", lambda self: None)
    monkeypatch.setattr(Pipeline, "ask", lambda self, *asked, **options: said)
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    file = engine_file(bundle, "rtx-40", Precision.FP16)
    file.parent.mkdir()

    def build(content: bytes) -> None:
        file.write_bytes(content)
        graph, engine = bundle.graph_sha256(Precision.FP16), sha256_of(file)
        built_for = ("rtx-40", "tensorrt-rtx", "1.7", ["8.9"], "fp16")
        write_entry(file, EngineEntry(1, *built_for, graph, engine, len(content), [], BuildSettings(), 1.0, 1, {}))

    build(b"first build")
    command = ["eval", str(bundle.path), "--data", str(data), "--output", str(tmp_path / "out"), "--budgets", "4"]
    assert main([*command, "--engine", "--json"]) == 0
    recorded = json.loads(capsys.readouterr().out)["results"]["settings"]
    assert recorded["backend"] == "tensorrt-rtx rtx-40, decoder on CPUExecutionProvider"
    assert recorded["precision"] == "fp16"
    assert main([*command, "--precision", "fp16"]) == 1  # ONNX Runtime's answers are not the engine's
    assert "backend onnxruntime CPUExecutionProvider" in capsys.readouterr().err
    build(b"second build")
    assert main([*command, "--engine", "rtx-40"]) == 1
    assert "bundle_sha256" in capsys.readouterr().err


def test_an_interrupt_tells_how_to_go_on(
    tiny_bundle: Path,
    data: Path,
    tmp_path: Path,
    calls: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ask = Pipeline.ask

    def interrupted(self: Pipeline, image: Any, question: str, **options: Any) -> Answer:
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(self, image, question, **options)

    command = [
        "eval",
        str(tiny_bundle),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "out"),
        *SHORT,
        "--budgets",
        "4",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "ask", interrupted)
        assert main(command) == 130
    error = capsys.readouterr().err
    assert "3 answers are kept in" in error
    assert "the same command goes on" in error
    assert not (tmp_path / "out/results.json").exists()
    calls.clear()
    assert main(command) == 0
    assert len(calls) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_process_that_is_stopped_goes_on(
    number: signal.Signals, tiny_bundle: Path, data: Path, tmp_path: Path
) -> None:
    record = json.loads(data.read_text().splitlines()[0])
    asked = [record | {"id": n, "question": f"What is number {n}?"} for n in range(150)]
    data.write_text("".join(json.dumps(line) + "\n" for line in asked))
    journal = tmp_path / "out/answers.jsonl"
    command = [sys.executable, "-m", "flashvlm_export", "eval", str(tiny_bundle), "--data", str(data)]
    command += ["--output", str(journal.parent), "--budgets", "4", "--max-tokens", "8"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    before = [
        json.loads(line)["id"] for line in journal.read_text().splitlines(keepends=True)[1:] if line.endswith("\n")
    ]
    assert 4 < len(before) < 150
    if number is signal.SIGINT:
        assert process.returncode == 130
        assert f"{len(before)} answers are kept in {journal.parent}" in error
        assert "Traceback" not in error
    subprocess.run(command, check=True, capture_output=True)
    after = [json.loads(line)["id"] for line in journal.read_text().splitlines()[1:]]
    assert after == [str(n) for n in range(150)]


def test_questions_that_fail(
    tiny_bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (data.parent / "1.png").read_bytes()
    (data.parent / "1.png").write_bytes(content[:500])
    command = [
        "eval",
        str(tiny_bundle),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "out"),
        *SHORT,
        "--budgets",
        "4",
    ]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "2 question(s) could not be answered" in error
    assert "1.png" in error
    assert "3 answers are kept" in error
    (data.parent / "1.png").write_bytes(content)
    assert main(command) == 0
    capsys.readouterr()

    def too_long(self: Pipeline, *args: Any, **options: Any) -> Answer:
        raise LLMError("prompt and answer together are too long", received="9000")

    monkeypatch.setattr(Pipeline, "ask", too_long)
    assert main([*command[:-1], "16"]) == 1
    assert "too long" in capsys.readouterr().err


BAD: list[tuple[Callable[[dict[str, Any]], dict[str, Any] | str], str]] = [
    (lambda record: record | {"image": "gone.png"}, "image 'gone.png': missing"),
    (lambda record: record | {"id": 0}, "id '0' is taken by line 1"),
    (lambda record: record | {"kind": ""}, "unknown kind ''"),
    (lambda record: record | {"metric": "bleu"}, "unknown metric 'bleu'"),
    (lambda record: record | {"answers": []}, "there are no answers"),
    (lambda record: json.dumps(record)[:-9], "broken, no JSON object"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_data(
    spoil: Callable[[dict[str, Any]], dict[str, Any] | str],
    message: str,
    tiny_bundle: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = data.read_text().splitlines()
    spoiled = spoil(json.loads(lines[2]))
    lines[2] = spoiled if isinstance(spoiled, str) else json.dumps(spoiled)
    data.write_text("\n".join(lines))
    assert main(["eval", str(tiny_bundle), "--data", str(data), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"line 3: {message}" in error
    for part in ("received:", "expected:", "what to do:"):
        assert part in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--budgets", "17"], "the token budget is out of range"),
        (["--budgets", "4,many"], "not a list of token budgets"),
        (["--limit", "0"], "--limit is out of range"),
        (["--seed", "-1"], "--seed is out of range"),
        (["--kinds", "dogs"], "no questions of this kind"),
        (["--max-tokens", "0"], "--max-tokens is out of range"),
        (["--precision", "int8"], "no visual graph in this precision"),
        (["--data", "none.jsonl"], "the data set cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_end_in_one_message(
    extra: list[str], message: str, tiny_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["eval", str(tiny_bundle), "--data", str(data), "--output", str(out), *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "received:" in error
    assert "Traceback" not in error
    assert not out.exists()


def test_it_needs_neither_torch_nor_matplotlib(tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    """As on a device: whatever is not in the base install cannot be imported."""
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'optimum', 'onnx', 'matplotlib', 'scipy'): sys.modules[name] = None\n"
        "from flashvlm_export.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = ["eval", tiny_bundle, "--data", data, "--output", tmp_path / "out", "--budgets", "4", *SHORT]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, command)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "all kinds" in done.stdout


def test_selectors_side_by_side(
    tiny_bundle: Path, data: Path, tmp_path: Path, calls: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["eval", str(tiny_bundle), "--data", str(data), "--output", str(out), "--budgets", "full,4", *SHORT]
    assert main([*command, "--selector", "flashvlm,divprune", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(calls) == 15  # what keeps every token is asked once
    assert printed["results"] == json.loads((out / "comparison.json").read_text())
    assert [(row["selector"], row["budget"]) for row in printed["results"]["selectors"]] == [
        ("flashvlm", 16),
        ("flashvlm", 4),
        ("divprune", 16),
        ("divprune", 4),
    ]
    if printed["plot"] is not None:  # matplotlib is an extra
        assert "divprune" in (out / "selectors.svg").read_text()
    # The fused graph, in a directory of its own, says the same as its two halves.
    fused = tmp_path / "fused"
    assert main(["eval", str(tiny_bundle), "--data", str(data), "--output", str(fused), *SHORT, "--budgets", "4"]) == 0
    said = {row["id"]: row["text"] for row in map(json.loads, (fused / "answers.jsonl").read_text().splitlines()[1:])}
    halves = [json.loads(line) for line in (out / "flashvlm" / "answers.jsonl").read_text().splitlines()[1:]]
    assert {row["id"]: row["text"] for row in halves if row["budget"] == 4} == said

    # Another selector joins; what is answered is not asked again, and what lies beside it is compared too.
    calls.clear()
    capsys.readouterr()
    shutil.copytree(out / "divprune", out / "downsampling")
    foreign = shutil.copytree(out / "divprune", out / "foreign") / "answers.jsonl"
    header, *others = foreign.read_text().splitlines(keepends=True)
    record = json.loads(header)
    record["settings"]["weights_sha256"] = "0" * 64
    foreign.write_text("".join([json.dumps(record) + "\n", *others]))
    (out / "damaged").mkdir()
    (out / "damaged" / "answers.jsonl").write_text("{\n")
    assert main([*command, "--selector", "all"]) == 0
    assert len(calls) == 5
    captured = capsys.readouterr()
    assert f"{out / 'foreign'} is not compared: another weights_sha256" in captured.err
    assert f"{out / 'damaged'} is not compared" in captured.err
    shown = captured.out
    assert [line.split()[0] for line in shown.splitlines()[1:9:2]] == [
        "flashvlm",
        "divprune",
        "cdpruner",
        "downsampling",
    ]


def test_positions_stand_beside_each_other(
    tiny_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["eval", str(tiny_bundle), "--data", str(data), "--output", str(out), "--budgets", "full,4", *SHORT]
    for positions in ("contiguous", "original"):
        assert main([*command, "--selector", "flashvlm", "--positions", positions]) == 0
    found = json.loads((out / "comparison.json").read_text())
    assert {name: settings["positions"] for name, settings in found["settings"].items()} == {
        "flashvlm-original": "original",
        "flashvlm": "contiguous",
    }
    said: dict[str, dict[tuple[str, int], str]] = {}
    for name in found["settings"]:
        rows = [json.loads(line) for line in (out / name / "answers.jsonl").read_text().splitlines()[1:]]
        said[name] = {(row["id"], row["budget"]): row["text"] for row in rows}
    differing = [cell for cell, text in said["flashvlm"].items() if said["flashvlm-original"][cell] != text]
    assert differing
    assert {budget for _, budget in differing} == {4}, "nothing was pruned, so nothing moved"

    fused = [*command[:5], str(tmp_path / "fused"), *command[6:]]
    assert main(fused) == 0
    capsys.readouterr()
    assert main([*fused, "--positions", "original"]) == 1
    assert "positions original" in capsys.readouterr().err


def test_selectors_that_are_not_there(
    tiny_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["eval", str(tiny_bundle), "--data", str(data), "--output", str(out), "--selector"]
    assert main([*command, "flashvlm,uniform"]) == 2
    message = capsys.readouterr().err
    assert "no such selector" in message
    assert "--split divprune,cdpruner,uniform" in message
    assert not out.exists()
    image = str(data.parent / "0.png")
    run = ["run", str(tiny_bundle), "--image", image, "--prompt", "What?", "--selector"]
    assert main([*run, "flashvlm,divprune"]) == 2
    assert "a single name" in capsys.readouterr().err
    assert main([*run, "divprune", "--budget", "4", "--max-tokens", "2"]) == 0
    assert "encode" in capsys.readouterr().out


def test_answers_without_room_are_refused_at_once(
    tiny_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(tiny_bundle), "--data", str(data), "--output", str(tmp_path / "out"), "--max-tokens", "1010"]
    assert main([*command, "--budgets", "full"]) == 2
    message = capsys.readouterr().err
    assert "--max-tokens 1010 behind 16 positions of visual tokens" in message
    assert "1024 positions" in message
    command[-1] = "1009"
    assert main([*command, "--budgets", "4", "--positions", "original"]) == 2  # they end where 16 tokens would
    assert "--max-tokens 1009 behind 16 positions of visual tokens" in capsys.readouterr().err
    command[-1] = "1007"
    assert main([*command, "--budgets", "full", "--limit", "0"]) == 2
    assert "has no room" not in capsys.readouterr().err
    assert main([*command, "--budgets", "full,99"]) == 2
    assert "--budgets full,128,32" in capsys.readouterr().err
