"""The measuring behind ``flashvlm report``: parity with PyTorch first, then latency in turns."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flashvlm_export.bundle import Bundle
from flashvlm_export.engines import list_engines
from flashvlm_export.errors import BundleError, CheckpointError, ConfigError, FlashVLMError
from flashvlm_export.evaluation.evaluate import bundle_sha256
from flashvlm_export.evaluation.results import RESULTS, Results
from flashvlm_export.evaluation.results import SCHEMA_VERSION as RESULTS_VERSION
from flashvlm_export.gpu import gpu_at_hand
from flashvlm_export.manifest import MANIFEST
from flashvlm_export.progress import Progress
from flashvlm_export.records import decode_record
from flashvlm_export.report.backends import Pair, Run, backends_of, make_pytorch, make_session
from flashvlm_export.report.records import (
    PYTORCH,
    SCHEMA_VERSION,
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
from flashvlm_export.report.turns import Worker
from flashvlm_export.selection import get_selector
from flashvlm_export.specs import Array, Precision, check_budget

Name = tuple[str, str]
"""Backend and precision."""

_PACKAGES = (
    "flashvlm-export",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "pillow",
    "tokenizers",
    "torch",
    "transformers",
)

#: What can be required of a precision.
FIGURES = ("cosine", "iou", "coverage", "answers")

#: What each precision has to reach against PyTorch; IoU of what withstands rounding (see ``docs/selection.md``).
REQUIREMENTS: dict[str, dict[str, float]] = {
    "fp32": {"cosine": 0.9999, "iou": 0.99},
    "fp16": {"cosine": 0.999, "iou": 0.97},
    "int8": {"cosine": 0.99, "iou": 0.90},
}


@dataclass(frozen=True)
class ReportSettings:
    """What ``flashvlm report`` was asked for.

    Attributes:
        bundle: its directory.
        checkpoint: what it was exported from, for PyTorch.
        pairs: images with their questions.
        budgets: visual tokens to keep per image; parity is judged at the first. The unpruned run is added.
        rounds: of latency that count.
        warm_up: rounds before.
        max_tokens: longest answer.
        threads: of every backend.
        requirements: ``precision.figure`` → least value, on top of :data:`REQUIREMENTS`; with an evaluation also
            ``accuracy@BUDGET``, relative to no pruning, mean of all kinds.
        evaluation: directory that ``flashvlm eval`` wrote for this bundle; ``None`` for a report without accuracy.
    """

    bundle: Path
    checkpoint: Path
    pairs: Sequence[Pair]
    budgets: Sequence[int] = (128, 64, 32)
    rounds: int = 20
    warm_up: int = 2
    max_tokens: int = 32
    threads: int = len(os.sched_getaffinity(0))
    requirements: Mapping[str, float] = field(default_factory=dict)
    evaluation: Path | None = None


@dataclass(frozen=True)
class Measured:
    """A report, and per example and budget what the pictures show: kept indices and scores, as the graph gave them."""

    report: Report
    selections: dict[tuple[int, int], tuple[Array, Array]]


def check_settings(settings: ReportSettings) -> Results | None:
    """Refuse before anything runs what would fail later; return what the evaluation found.

    Raises:
        BudgetError, BundleError, CheckpointError, ConfigError: see their messages.
    """
    bundle = Bundle.open(settings.bundle)
    for budget in settings.budgets:
        check_budget(budget, bundle.manifest.dims.num_patches)
    if bundle.manifest.prompt is None:
        raise BundleError(
            "the bundle takes no questions: it has no tokenizer",
            received=bundle.path,
            expected="a bundle exported from a checkpoint with a tokenizer",
            hint="bundles of random weights are for sizing: benchmarks/visual_latency.py times those",
        )
    for name, value, least in (
        ("--rounds", settings.rounds, 1),
        ("--warm-up", settings.warm_up, 0),
        ("--max-tokens", settings.max_tokens, 1),
        ("--threads", settings.threads, 1),
    ):
        if value < least:
            raise ConfigError(f"{name} is too small", received=value, expected=f"at least {least}")
    accuracy = None if settings.evaluation is None else _read_evaluation(settings.evaluation, bundle)
    known = [f"{precision}.{figure}" for precision in bundle.manifest.graphs for figure in FIGURES]
    known += [f"accuracy@{figures.budget}" for figures in (accuracy.overall if accuracy else ())]
    unknown = sorted(set(settings.requirements) - set(known))
    if unknown:
        raise ConfigError("nothing of this name is measured", received=", ".join(unknown), expected=", ".join(known))
    if not (settings.checkpoint / "config.json").is_file():
        raise CheckpointError(
            "there is no checkpoint to compare with",
            received=settings.checkpoint,
            expected="the directory that the bundle was exported from, with its config.json",
        )
    return accuracy


def _read_evaluation(directory: Path, bundle: Bundle) -> Results:
    file = directory / RESULTS
    again = f"flashvlm eval {bundle.path} --data FILE --output {directory}"
    if not file.is_file():
        raise ConfigError(
            "there is no evaluation", received=directory, expected=f"a directory with {RESULTS}", hint=again
        )
    results = decode_record(file.read_bytes(), Results, newest=RESULTS_VERSION, what=str(file), mend=again)
    own = {bundle_sha256(bundle, Precision(name), None) for name in bundle.manifest.graphs}
    own |= {bundle_sha256(bundle, Precision(e.entry.precision), e) for e in list_engines(bundle)}
    if results.settings.bundle_sha256 not in own:
        raise ConfigError(
            "the evaluation is of another bundle", received=file, expected=f"one of {bundle.path}", hint=again
        )
    return results


def measure(settings: ReportSettings, progress: Progress | None = None) -> Measured:
    """Return the report; backends that do not run here are named in it, with their reason.

    Raises:
        FlashVLMError: what :func:`check_settings` refuses, and what opening or running PyTorch does.
    """
    accuracy = check_settings(settings)
    progress = progress or Progress()
    bundle = Bundle.open(settings.bundle, verify=True)
    unpruned = bundle.manifest.dims.num_patches
    budgets = list(dict.fromkeys([*(check_budget(budget, unpruned) for budget in settings.budgets), unpruned]))
    common = (settings.pairs, settings.max_tokens, settings.threads)
    runs: dict[Name, dict[tuple[int, int], Run]] = {}
    not_run: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        progress.step("PyTorch")
        workers: dict[Name, Worker] = {
            PYTORCH: stack.enter_context(Worker(make_pytorch, settings.bundle, settings.checkpoint, *common))
        }
        runs[PYTORCH] = _answer_all(workers[PYTORCH], len(settings.pairs), budgets, progress)
        for backend in backends_of(bundle):
            name = (backend.name, backend.precision)
            progress.step(" ".join(name))
            worker = stack.enter_context(Worker(make_session, backend, settings.bundle, *common))
            try:
                runs[name] = _answer_all(worker, len(settings.pairs), budgets, progress)
            except FlashVLMError as error:
                not_run[" ".join(name)] = error.what
                progress.note(f"not run: {error.what}")
            else:
                workers[name] = worker
        progress.step(f"latency: {settings.rounds} rounds of {len(workers)} backends, {len(budgets)} budgets")
        timed = _take_turns(workers, len(settings.pairs), budgets, settings, progress)
    selection = bundle.manifest.selection
    config = get_selector(selection.selector).make_config(selection.config)
    parity = [
        _parity(name, runs[PYTORCH], found, budgets[0], unpruned, config.important_tokens(budgets[0]))
        for name, found in runs.items()
        if name != PYTORCH
    ]
    decoder = bundle.manifest.decoder
    report = Report(
        schema_version=SCHEMA_VERSION,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        environment=_environment(),
        subject=Subject(
            bundle=bundle.path.resolve().name,
            model=bundle.manifest.source.model,
            manifest_sha256=hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest(),
            selector=f"{selection.selector} "
            + ", ".join(f"{name}={value}" for name, value in selection.config.items()),
            visual_tokens=unpruned,
            decoder=None if decoder is None else decoder.precision,
        ),
        settings=Settings(budgets, settings.rounds, settings.warm_up, settings.max_tokens, settings.threads),
        parity=parity,
        latency=[_latency(name, budget, timed[name, budget]) for name in workers for budget in budgets],
        examples=[
            Example(
                image.name,
                question,
                {
                    " ".join(name): {budget: found[index, budget].text for budget in budgets}
                    for name, found in runs.items()
                    if decoder is not None
                },
            )
            for index, (image, question) in enumerate(settings.pairs)
        ],
        not_run=not_run,
        checks=[
            *_checks(parity, is_stable=config.is_stable, requirements=settings.requirements),
            *_accuracy_checks(accuracy, settings.requirements),
        ],
        accuracy=accuracy,
    )
    shown = next((found for name, found in runs.items() if name != PYTORCH), runs[PYTORCH])
    return Measured(report, {key: (run.indices, run.scores) for key, run in shown.items()})


def _answer_all(worker: Worker, count: int, budgets: Sequence[int], progress: Progress) -> dict[tuple[int, int], Run]:
    wanted = [(index, budget) for index in range(count) for budget in budgets]
    return {(index, budget): worker(index, budget) for index, budget in progress.track(wanted, "answers")}


def _take_turns(
    workers: Mapping[Name, Worker],
    count: int,
    budgets: Sequence[int],
    settings: ReportSettings,
    progress: Progress,
) -> dict[tuple[Name, int], list[Run]]:
    """Let all backends and budgets take turns in an order that rotates: other load hits all of them alike."""
    turns = [(name, budget) for name in workers for budget in budgets]
    timed: dict[tuple[Name, int], list[Run]] = {turn: [] for turn in turns}
    for number in progress.track(range(settings.warm_up + settings.rounds), "rounds"):
        shift = number % len(turns)
        for name, budget in turns[shift:] + turns[:shift]:
            run = workers[name](number % count, budget)
            if number >= settings.warm_up:
                timed[name, budget].append(run)
    return timed


def _parity(
    name: Name,
    references: Mapping[tuple[int, int], Run],
    runs: Mapping[tuple[int, int], Run],
    budget: int,
    unpruned: int,
    important: int,
) -> Parity:
    from flashvlm_export.calibration.likeness import compare
    from flashvlm_export.calibration.readings import Reading

    indices = sorted({index for index, _ in runs})

    def readings(found: Mapping[tuple[int, int], Run]) -> list[Reading]:
        # Unpruned, row i is patch i everywhere.
        return [
            Reading(
                found[index, unpruned].tokens,
                references[index, unpruned].features,  # type: ignore[arg-type]  # PyTorch's runs have them
                found[index, budget].indices,
                found[index, budget].scores,
            )
            for index in indices
        ]

    like = compare(readings(references), readings(runs), important)
    answered = [key for key in runs if references[key].token_ids or references[key].prompt_tokens]
    return Parity(
        backend=name[0],
        precision=name[1],
        cosine=like.cosine,
        worst_token_cosine=like.worst_token_cosine,
        max_error=like.max_error,
        score_error=max(float(np.abs(runs[key].scores - references[key].scores).max()) for key in runs),
        iou=like.iou,
        important_iou=like.important_iou,
        coverage=like.coverage,
        same_answers=sum(runs[key].token_ids == references[key].token_ids for key in answered),
        answers=len(answered),
    )


def _latency(name: Name, budget: int, runs: Sequence[Run]) -> Latency:
    stages = {stage: _percentiles([run.stage_ms.get(stage, 0.0) for run in runs]) for stage in runs[0].stage_ms}
    decode_ms = sum(run.stage_ms.get("decode", 0.0) for run in runs)
    first_ms = [sum(run.stage_ms.values()) - run.stage_ms.get("decode", 0.0) for run in runs]
    return Latency(
        backend=name[0],
        precision=name[1],
        budget=budget,
        stages=stages,
        time_to_first_token=_percentiles(first_ms),
        tokens_per_s=round(1e3 * sum(run.decoded for run in runs) / decode_ms, 1) if decode_ms else 0.0,
        prompt_tokens=float(np.mean([run.prompt_tokens for run in runs])),
        peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
    )


def _percentiles(values_ms: Sequence[float]) -> Percentiles:
    return Percentiles(*(round(float(value), 3) for value in np.percentile(values_ms, (50, 90, 99))))


def _checks(parity: Sequence[Parity], *, is_stable: bool, requirements: Mapping[str, float]) -> list[Check]:
    wanted = {
        f"{precision}.{figure}": least for precision, row in REQUIREMENTS.items() for figure, least in row.items()
    }
    wanted |= requirements
    checks = []
    for row in parity:
        # Background tokens of an unstable selector hang on rounding; what is chosen by score does not.
        iou = row.iou if is_stable else row.important_iou
        answers = row.same_answers / row.answers if row.answers else 1.0
        for figure, measured in zip(FIGURES, (row.cosine, iou, row.coverage, answers), strict=True):
            required = wanted.get(f"{row.precision}.{figure}")
            if required is not None:
                name = f"{row.backend} {row.precision}: {figure}"
                checks.append(Check(name, measured, required, measured >= required))
    return checks


def _accuracy_checks(accuracy: Results | None, requirements: Mapping[str, float]) -> list[Check]:
    checks = []
    for figures in accuracy.overall if accuracy else ():
        required = requirements.get(f"accuracy@{figures.budget}")
        if required is not None:
            # Without an unpruned run there is nothing to relate to: that is a miss, not a pass.
            measured = figures.relative.value if figures.relative and figures.relative.value is not None else 0.0
            name = f"accuracy at {figures.budget} visual tokens, relative to all"
            checks.append(Check(name, measured, required, measured >= required))
    return checks


def _environment() -> Environment:
    gpu = gpu_at_hand()
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # one of the two ONNX Runtimes
            versions[name] = importlib.metadata.version(name)
    return Environment(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=None if gpu is None else gpu.name,
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        versions=versions,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
