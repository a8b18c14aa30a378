"""The measuring behind ``flashvlm report``: parity with PyTorch first, then latency in turns."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashvlm_export.bundle import Bundle
from flashvlm_export.engines import list_engines
from flashvlm_export.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    DependencyError,
    FlashVLMError,
    SessionError,
)
from flashvlm_export.evaluation.evaluate import bundle_sha256
from flashvlm_export.evaluation.results import RESULTS, Results
from flashvlm_export.evaluation.results import SCHEMA_VERSION as RESULTS_VERSION
from flashvlm_export.manifest import MANIFEST
from flashvlm_export.progress import Progress
from flashvlm_export.records import decode_record
from flashvlm_export.report.backends import Pair, Run, Timing, backends_of, make_pytorch, make_session
from flashvlm_export.report.environment import describe_environment
from flashvlm_export.report.figures import FIGURES, Label, checks, latency, parity
from flashvlm_export.report.records import PYTORCH, SCHEMA_VERSION, Example, Report, Settings, Subject
from flashvlm_export.report.worker import Worker
from flashvlm_export.selection import get_selector
from flashvlm_export.specs import Array, Precision, check_budget


@dataclass(frozen=True)
class ReportSettings:
    """What ``flashvlm report`` was asked for.

    Attributes:
        bundle: its directory.
        checkpoint: what it was exported from, for PyTorch.
        pairs: images with their questions.
        budgets: visual tokens to keep per image; kept sets are compared at the first. One that keeps all is added.
        rounds: of latency that count.
        warm_up: rounds before.
        max_tokens: longest answer.
        threads: of every backend.
        requirements: ``precision.figure`` → least value, on top of those in ``figures.py``; with an evaluation also
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
    """A report, and by pair and budget what the pictures show: kept indices and scores, as a graph gave them."""

    report: Report
    selections: dict[tuple[int, int], tuple[Array, Array]]


def check_settings(settings: ReportSettings) -> Results | None:
    """Refuse before anything runs what would fail later; return what the evaluation found.

    Raises:
        BudgetError, BundleError, CheckpointError, ConfigError, ImageError: see their messages.
    """
    bundle = Bundle.open(settings.bundle)
    _budgets(settings, bundle)
    if bundle.manifest.prompt is None:
        raise BundleError(
            "the bundle takes no questions: it has no tokenizer",
            received=bundle.path,
            expected="a bundle exported from a checkpoint with a tokenizer",
            hint="bundles of random weights are for sizing: benchmarks/visual_latency.py times those",
        )
    for name, value, least, most in (
        ("--rounds", settings.rounds, 1, 1 << 30),
        ("--warm-up", settings.warm_up, 0, 1 << 30),
        ("--max-tokens", settings.max_tokens, 1, _most_tokens(bundle)),
        ("--threads", settings.threads, 1, os.cpu_count() or 1),
    ):
        if not least <= value <= most:
            expected = f"at least {least}" if most == 1 << 30 else f"{least} to {most}"
            raise ConfigError(f"{name} is out of range", received=value, expected=expected)
    accuracy = None if settings.evaluation is None else _read_evaluation(settings.evaluation, bundle)
    known = [f"{precision}.{figure}" for precision in bundle.manifest.graphs for figure in FIGURES]
    known += [f"accuracy@{figures.budget}" for figures in (accuracy.overall if accuracy else ())]
    unknown = sorted(set(settings.requirements) - set(known))
    if unknown:
        lacking = accuracy is None and any(name.startswith("accuracy@") for name in unknown)
        raise ConfigError(
            "nothing of this name is measured",
            received=", ".join(unknown),
            expected=", ".join(known),
            hint="accuracy needs --eval DIR, what flashvlm eval wrote for this bundle" if lacking else None,
        )
    _check_checkpoint(settings.checkpoint, bundle)
    from flashvlm_export.runtime.images import load_image

    for image in dict(settings.pairs):
        load_image(image)
    return accuracy


def measure(settings: ReportSettings, progress: Progress | None = None) -> Measured:
    """Return the report. Backends that are not available here are named in it; those that failed fail its checks.

    Raises:
        FlashVLMError: what :func:`check_settings` refuses, and what opening or running PyTorch raises.
    """
    accuracy = check_settings(settings)
    progress = progress or Progress()
    bundle = Bundle.open(settings.bundle, verify=True)
    budgets = _budgets(settings, bundle)
    wanted = [(index, budget) for index in range(len(settings.pairs)) for budget in budgets]
    common = (settings.pairs, settings.max_tokens, settings.threads)
    runs: dict[Label, dict[tuple[int, int], Run]] = {}
    not_run: dict[str, str] = {}
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        progress.step("PyTorch")
        pytorch = stack.enter_context(Worker(make_pytorch, settings.bundle, settings.checkpoint, *common))
        workers: dict[Label, Worker] = {PYTORCH: pytorch}
        runs[PYTORCH] = {key: pytorch(*key) for key in progress.track(wanted, "answers")}
        for backend in backends_of(bundle):
            label = (backend.name, backend.precision)
            progress.step(" ".join(label))
            worker = stack.enter_context(Worker(make_session, backend, settings.bundle, *common))
            try:
                try:
                    worker.wait()
                except (SessionError, DependencyError) as error:
                    not_run[" ".join(label)] = str(error)
                    progress.note(f"not run: {error.what}")
                    continue
                runs[label] = {key: worker(*key) for key in progress.track(wanted, "answers")}
            except FlashVLMError as error:
                failed[" ".join(label)] = str(error)
                progress.note(f"FAILED: {error}")
            else:
                workers[label] = worker
        progress.step(f"latency: {settings.rounds} rounds of {len(workers)} backends, {len(budgets)} budgets")
        timings = _take_turns(workers, budgets, settings, failed, progress)
        peaks = {" ".join(label): worker.peak_memory_bytes for label, worker in workers.items()}
    selection, decoder = bundle.manifest.selection, bundle.manifest.decoder
    config: Any = get_selector(selection.selector).make_config(selection.config)
    important = config.important_tokens(budgets[0])
    rows = [
        parity(label, runs[PYTORCH], found, budgets[0], budgets[-1], important)
        for label, found in runs.items()
        if label != PYTORCH
    ]
    required = checks(rows, list(failed), accuracy, is_stable=config.is_stable, required=settings.requirements)
    report = Report(
        schema_version=SCHEMA_VERSION,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        environment=describe_environment(),
        subject=Subject(
            bundle=bundle.path.resolve().name,
            model=bundle.manifest.source.model,
            manifest_sha256=hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest(),
            selector=", ".join([selection.selector, *(f"{name}={value}" for name, value in selection.config.items())]),
            visual_tokens=budgets[-1],
            decoder=None if decoder is None else decoder.precision,
        ),
        settings=Settings(budgets, settings.rounds, settings.warm_up, settings.max_tokens, settings.threads),
        parity=rows,
        latency=[latency(label, budget, found) for (label, budget), found in timings.items()],
        peak_memory_bytes=peaks,
        examples=[
            Example(
                image.name,
                question,
                {
                    " ".join(label): {budget: found[index, budget].text for budget in budgets}
                    for label, found in runs.items()
                    if decoder is not None
                },
            )
            for index, (image, question) in enumerate(settings.pairs)
        ],
        not_run=not_run,
        failed=failed,
        checks=required,
        passed=all(check.passed for check in required),
        accuracy=accuracy,
    )
    shown = next((found for label, found in runs.items() if label != PYTORCH), runs[PYTORCH])
    return Measured(report, {key: (run.indices, run.scores) for key, run in shown.items()})


def _most_tokens(bundle: Bundle) -> int:
    """Return the longest answer that has room beside all visual tokens of one image, the smallest where they differ."""
    decoder, dims = bundle.manifest.decoder, bundle.manifest.dims
    return 1 << 30 if decoder is None else decoder.max_positions - dims.least_patches - 1


def _budgets(settings: ReportSettings, bundle: Bundle) -> list[int]:
    """Return the budgets of ``settings``, each once, and at last the one that keeps all."""
    unpruned = bundle.manifest.dims.num_patches
    pruning = [budget for budget in settings.budgets if check_budget(budget, unpruned) != unpruned]
    if not pruning:
        raise ConfigError(
            "no budget that prunes",
            received=", ".join(map(str, settings.budgets)),
            expected=f"at least one below {unpruned}, the visual tokens of one image; keeping all is added anyway",
        )
    return [*dict.fromkeys(pruning), unpruned]


def _check_checkpoint(checkpoint: Path, bundle: Bundle) -> None:
    file = checkpoint / "config.json"
    if not file.is_file():
        raise CheckpointError(
            "there is no checkpoint to compare with",
            received=checkpoint,
            expected="the directory that the bundle was exported from, with its config.json",
        )
    config = json.loads(file.read_bytes())
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    if digest != bundle.manifest.source.config_sha256:
        raise CheckpointError(
            "the bundle was exported from another checkpoint",
            received=file,
            expected=f"the config.json of {bundle.manifest.source.model}, which the manifest has the hash of",
        )


def _read_evaluation(directory: Path, bundle: Bundle) -> Results:
    file = directory / RESULTS
    again = f"flashvlm eval {bundle.path} --data FILE --output {directory}"
    if not file.is_file():
        raise ConfigError(
            "there is no evaluation", received=directory, expected=f"a directory with {RESULTS}", hint=again
        )
    results = decode_record(file.read_bytes(), Results, newest=RESULTS_VERSION, what=str(file), mend=again)
    own = {bundle_sha256(bundle, Precision(name)) for name in bundle.manifest.graphs}
    selector = bundle.manifest.selection.selector
    own |= {bundle_sha256(bundle, Precision(name), selector=selector) for name in bundle.manifest.split}
    own |= {bundle_sha256(bundle, Precision(engine.entry.precision), engine) for engine in list_engines(bundle)}
    if results.settings.bundle_sha256 not in own:
        raise ConfigError(
            "the evaluation is of another bundle", received=file, expected=f"one of {bundle.path}", hint=again
        )
    return results


def _take_turns(
    workers: dict[Label, Worker],
    budgets: Sequence[int],
    settings: ReportSettings,
    failed: dict[str, str],
    progress: Progress,
) -> dict[tuple[Label, int], list[Timing]]:
    """Let all backends and budgets take turns in an order that rotates: other load hits all of them alike.

    A backend that fails on the way leaves ``workers`` for ``failed``.
    """
    turns = [(label, budget) for label in workers for budget in budgets]
    timings: dict[tuple[Label, int], list[Timing]] = {turn: [] for turn in turns}
    for number in progress.track(range(settings.warm_up + settings.rounds), "rounds"):
        shift = number % len(turns)
        for label, budget in turns[shift:] + turns[:shift]:
            if label not in workers:
                continue
            try:
                timing = workers[label](number % len(settings.pairs), budget).timing
            except FlashVLMError as error:
                if label == PYTORCH:
                    raise
                failed[" ".join(label)] = str(error)
                del workers[label]
                continue
            if number >= settings.warm_up:
                timings[label, budget].append(timing)
    return {(label, budget): found for (label, budget), found in timings.items() if label in workers}
