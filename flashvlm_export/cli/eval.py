"""flashvlm eval: accuracy of a bundle over its token budget, on questions with known answers."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashvlm_export import __version__
from flashvlm_export.bundle import Bundle
from flashvlm_export.cli.backend import (
    add_backend_arguments,
    add_llm_argument,
    pipeline_from,
    selectors_from,
)
from flashvlm_export.cli.output import print_json, talk
from flashvlm_export.errors import ConfigError, DependencyError, UsageError
from flashvlm_export.files import atomic_write
from flashvlm_export.ort import PROVIDERS
from flashvlm_export.progress import Progress

if TYPE_CHECKING:
    from flashvlm_export.evaluation.compare import Comparison
    from flashvlm_export.evaluation.dataset import DataSet
    from flashvlm_export.evaluation.evaluate import Ask
    from flashvlm_export.evaluation.journal import Journal, RunSettings
    from flashvlm_export.evaluation.results import Results
    from flashvlm_export.runtime.pipeline import Pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flashvlm eval``."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="directory written by flashvlm export")
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        required=True,
        help="questions as JSON lines; flashvlm dataset makes them from published files",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        required=True,
        help="for answers, results.json and accuracy.svg; with --selector a directory for each, comparison.json and "
        "selectors.svg beside them; given again, the evaluation goes on where it ended",
    )
    parser.add_argument(
        "--budgets",
        metavar="LIST",
        help="visual tokens to keep per image, with commas; full keeps all (default: full, a third, two ninths and a "
        "ninth of it: 576,192,128,64 for LLaVA-1.5)",
    )
    parser.add_argument("--kinds", metavar="LIST", help="only these kinds of question, with commas")
    parser.add_argument("--limit", metavar="N", type=int, help="only N questions, drawn at random")
    parser.add_argument("--seed", metavar="SEED", type=int, default=0, help="of that draw, and of the intervals")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=64, help="longest answer, in tokens")
    add_backend_arguments(parser)
    add_llm_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Answer what is not answered yet, then write and print the figures."""
    from flashvlm_export.evaluation.dataset import read_dataset
    from flashvlm_export.evaluation.evaluate import answer_missing, parse_budgets, question_keys
    from flashvlm_export.evaluation.journal import Journal

    for name, least in (("seed", 0), ("max_tokens", 1)):
        if getattr(args, name) < least:
            raise ConfigError(
                f"--{name.replace('_', '-')} is out of range", received=getattr(args, name), expected=f"{least} or more"
            )
    bundle = Bundle.open(args.bundle)
    visual_tokens = bundle.manifest.dims.num_patches
    if args.budgets is None and not bundle.manifest.dims.has_one_size:
        raise UsageError(
            "images of this model differ in visual tokens, so that no budgets suit all of them",
            received="no --budgets",
            expected="--budgets full,… below the visual tokens of the images that are asked about",
            hint="flashvlm run BUNDLE --visual-only --image FILE --prompt TEXT shows how many one has",
        )
    budgets = parse_budgets(args.budgets, visual_tokens)
    whole = read_dataset(args.data)
    data = _chosen(whole, args)
    args.positions = args.positions or bundle.manifest.default_positions
    pipeline = pipeline_from(args, bundle)
    _check_room(args, bundle, budgets)
    chosen = selectors_from(args, bundle)
    # The fused graph's answers lie in the output directory itself, those of several selectors in one each.
    suffix = "" if args.positions == "contiguous" else f"-{args.positions}"
    folders = (
        {name: args.output / f"{name}{suffix}" for name in chosen}
        if chosen
        else {bundle.manifest.selection.selector: args.output}
    )
    progress = Progress.on_stderr()
    progress.step(f"{len(data.questions)} question(s) of {args.data}, budgets {', '.join(map(str, budgets))}")
    keys = question_keys(data.questions, progress)
    with ExitStack() as stack:
        journals = {
            name: stack.enter_context(Journal(folder, _settings(args, bundle, pipeline, name)))
            for name, folder in folders.items()
        }
        for journal in journals.values():
            if journal.damaged:
                progress.note(f"NOTE: {journal.damaged} damaged line(s) in {journal.path} are answered again")
        asking = _asking(args, pipeline)
        try:
            answer_missing(data.questions, keys, budgets, journals, asking, progress, visual_tokens=visual_tokens)
        except KeyboardInterrupt:
            kept = sum(len(journal.answers) for journal in journals.values())
            print(f"{kept} answers are kept in {args.output}; the same command goes on from there", file=sys.stderr)
            raise
        results = {
            name: _results(args, data, keys, budgets, journal, visual_tokens) for name, journal in journals.items()
        }
        written = [_write(folder, results[name]) for name, folder in folders.items()]
        drawn, comparison = all(written), None
        if chosen is not None:
            comparison, drawn = _compare(args, data, keys, budgets, journals, results)
    _report(args, results, comparison, drawn)


def _check_room(args: argparse.Namespace, bundle: Bundle, budgets: list[int]) -> None:
    """Refuse answers that cannot fit behind the visual tokens, before any question is asked."""
    decoder = bundle.manifest.decoder if args.llm == "onnxruntime" else None  # others check each prompt
    most = max(budgets) if args.positions == "contiguous" else bundle.manifest.dims.least_patches
    if decoder and args.max_tokens >= decoder.max_positions - most:
        raise ConfigError(
            "the language model has no room for answers as long as this",
            received=f"--max-tokens {args.max_tokens} behind {most} positions of visual tokens",
            expected=f"{decoder.max_positions} positions for image, question and answer together",
        )


def _chosen(whole: DataSet, args: argparse.Namespace) -> DataSet:
    data = whole
    if args.kinds is not None:
        data = data.of_kinds([kind.strip() for kind in args.kinds.split(",")])
    return data if args.limit is None else data.sample(args.limit, args.seed)


def _settings(args: argparse.Namespace, bundle: Bundle, pipeline: Pipeline, selector: str) -> RunSettings:
    from flashvlm_export.engines import find_engine
    from flashvlm_export.evaluation.evaluate import bundle_sha256
    from flashvlm_export.evaluation.journal import RunSettings
    from flashvlm_export.specs import Precision

    provider = PROVIDERS[args.provider][0]
    engine = None
    precision = Precision(args.precision or next(iter(bundle.manifest.graphs)))
    backend = f"{pipeline.session.name} {provider}"
    if args.engine is not None:
        wanted = None if args.precision is None else precision
        engine = find_engine(bundle, wanted, None if args.engine == "auto" else args.engine)
        precision = Precision(engine.entry.precision)
        backend = f"{engine.entry.backend} {engine.entry.target}, decoder on {provider}"
    if args.llm != "onnxruntime":
        assert pipeline.llm is not None
        backend += f", {pipeline.llm.identity}"
    return RunSettings(
        bundle.manifest.source.model,
        bundle_sha256(bundle, precision, engine, None if args.selector is None else selector),
        precision.value,
        backend,
        args.max_tokens,
        args.text_span,
        args.positions,
        selector,
        bundle.manifest.source.weights_sha256,
    )


@contextmanager
def _asking(args: argparse.Namespace, pipeline: Pipeline) -> Iterator[Ask]:
    """Open the pipeline and yield a function that answers one question, greedily."""
    from flashvlm_export.evaluation.evaluate import Reply
    from flashvlm_export.runtime.llm.base import SamplingParams

    params = SamplingParams(max_new_tokens=args.max_tokens)

    def ask(image: Path, question: str, budget: int, selector: str) -> Reply:
        chosen = None if args.selector is None else selector
        answer = pipeline.ask(
            image,
            question,
            budget=budget,
            params=params,
            text_span=args.text_span,
            positions=args.positions,
            selector=chosen,
        )
        return Reply(answer.text, answer.stats.new_tokens, answer.stats.finish_reason)

    with pipeline:
        yield ask


def _results(
    args: argparse.Namespace, data: DataSet, keys: list[str], budgets: list[int], journal: Journal, visual_tokens: int
) -> Results:
    """Return the figures at ``budgets``, and at whatever others an earlier run has answered these questions."""
    from flashvlm_export.evaluation.results import SCHEMA_VERSION, DataSetEntry, Results, bootstrap_settings, summarise

    known = {budget for _, budget in journal.answers}
    answered = {budget for budget in known if all((key, budget) in journal.answers for key in keys)}
    every = sorted({*budgets, *answered}, reverse=True)
    kinds, overall = summarise(
        data.questions, keys, every, journal.answers, visual_tokens=visual_tokens, seed=args.seed
    )
    return Results(
        SCHEMA_VERSION,
        journal.settings,
        DataSetEntry(
            args.data.name,
            data.sha256,
            len(data.questions),
            args.limit,
            None if args.limit is None else args.seed,
            None if args.kinds is None else list(dict.fromkeys(question.kind for question in data.questions)),
        ),
        visual_tokens,
        kinds,
        overall,
        bootstrap_settings(args.seed),
        {"flashvlm-export": __version__, "python": platform.python_version()},
    )


def _write(folder: Path, results: Results) -> bool:
    """Write the figures, and say whether their picture could be drawn."""
    from flashvlm_export.evaluation.plot import PLOT, draw_accuracy
    from flashvlm_export.evaluation.results import RESULTS
    from flashvlm_export.records import encode_record

    with atomic_write(folder / RESULTS) as temporary:
        temporary.write_bytes(encode_record(results))
    return _draw(lambda: draw_accuracy(results, folder / PLOT))


def _compare(
    args: argparse.Namespace,
    data: DataSet,
    keys: list[str],
    budgets: list[int],
    journals: dict[str, Journal],
    results: dict[str, Results],
) -> tuple[Comparison, bool]:
    """Write the selectors side by side: those of this run, and whatever else lies beside them and answers the same."""
    from flashvlm_export.evaluation.compare import COMPARISON, SCHEMA_VERSION, Comparison, compare, neighbours
    from flashvlm_export.evaluation.plot import SELECTORS_PLOT, draw_selectors
    from flashvlm_export.records import encode_record

    answers = {journal.path.parent.name: journal.answers for journal in journals.values()}
    settings = {journal.path.parent.name: journal.settings for journal in journals.values()}
    first = next(iter(results.values()))
    others, notes = neighbours(args.output, list(answers), first.settings, keys, budgets)
    for note in notes:
        print(f"NOTE: {note}", file=sys.stderr)
    for name, (theirs, found) in others.items():
        answers[name], settings[name] = found, theirs
    comparison = Comparison(
        SCHEMA_VERSION,
        first.settings.model,
        first.settings.precision,
        first.dataset,
        first.visual_tokens,
        compare(data.questions, keys, budgets, answers, visual_tokens=first.visual_tokens, seed=args.seed),
        settings,
        first.bootstrap,
        first.tools,
    )
    with atomic_write(args.output / COMPARISON) as temporary:
        temporary.write_bytes(encode_record(comparison))
    return comparison, _draw(lambda: draw_selectors(comparison, args.output / SELECTORS_PLOT))


def _draw(draw: Callable[[], None]) -> bool:
    try:
        draw()
    except DependencyError as error:
        print(f"no plot: {error}", file=sys.stderr)
        return False
    return True


def _report(args: argparse.Namespace, results: dict[str, Results], comparison: Comparison | None, drawn: bool) -> None:
    from flashvlm_export.evaluation.compare import COMPARISON, comparison_table
    from flashvlm_export.evaluation.plot import PLOT, SELECTORS_PLOT
    from flashvlm_export.evaluation.results import RESULTS, table

    say = talk(args.json)
    record, plot = (RESULTS, PLOT) if comparison is None else (COMPARISON, SELECTORS_PLOT)
    for line in table(next(iter(results.values()))) if comparison is None else comparison_table(comparison):
        say(line)
    cut_off = sum(figures.cut_off for found in results.values() for figures in found.overall)
    if cut_off:
        say(f"{cut_off} answer(s) were cut off at {args.max_tokens} tokens; --max-tokens allows longer ones")
    say(f"results: {args.output / record}")
    if drawn:
        say(f"plot: {args.output / plot}")
    if args.json:
        printed: dict[str, Any] = {
            "bundle": str(args.bundle),
            "output": str(args.output),
            "plot": str(args.output / plot) if drawn else None,
            "results": next(iter(results.values())) if comparison is None else comparison,
        }
        print_json(printed)
