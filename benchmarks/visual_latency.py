"""Latency of the full-size visual side: the authors' way, plain PyTorch, and the fused exported graph.

Regime: one image, float32, CPU. The encoder is 23 layers of matrix products with 577 rows, about 390 GFLOP with the
projector, so it is bound by the processor's multiply-add rate and not by memory; what differs between the variants is
what runs beside those products. The selection is the opposite: a few megabytes of cosines and a loop of some hundred
small operators, bound by the overhead of each. All variants have the same seeded random weights and the same inputs,
use the same number of threads, live in one process and take turns in an order that rotates, so that other load on the
machine hits all of them; compare the ratios, not the milliseconds.

Variants:

- ``authors``            transformers' CLIP tower with eager attention, all layers, every attention map and hidden state
  kept, the projector run twice, selection as a loop over images in PyTorch
- ``torch``              the module this package exports, run by PyTorch as it is (scaled dot-product attention)
- ``compiled``           the same through ``torch.compile``
- ``fused bipartite``    the exported graph in ONNX Runtime, opened as the runtime opens it
- ``fused farthest``     the same with the other diversity step

The share of the selection is measured on the part of the same ONNX graph that lies behind the projector, extracted into
a session of its own and run in the same rounds as the whole graph.

Exit code 1 if outputs do not agree: kept tokens are the reference's rows, the important half is the reference's, with
``farthest`` the whole kept set is; with ``bipartite``, whose other half hangs on rounding, the coverage is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPVisionModel

from flashvlm_export.export.checkpoint import WeightSource
from flashvlm_export.export.locate import open_weights
from flashvlm_export.export.onnx_graph import onnx_from_visual_graph
from flashvlm_export.export.processor_files import write_preprocessor
from flashvlm_export.export.text_model import write_text_embeddings
from flashvlm_export.export.visual_graph import VisualGraph, build_visual_graph
from flashvlm_export.manifest import PromptSettings
from flashvlm_export.models import adapter_class
from flashvlm_export.models.adapter import Adapter
from flashvlm_export.ort import ort_session
from flashvlm_export.preprocessor import decode_preprocessor
from flashvlm_export.runtime.embeddings import TextEmbeddings
from flashvlm_export.runtime.preprocess import ImagePreprocessor
from flashvlm_export.runtime.prompt import PromptBuilder
from flashvlm_export.selection import FlashVLMConfig, get_selector
from flashvlm_export.selection.config import DIVERSITIES
from flashvlm_export.specs import VISUAL_OUTPUTS, Array, Feeds, Precision

# Largest difference of a float32 tensor from the reference's, relative to the reference's largest magnitude.
TOLERANCE = 1e-3
# Largest difference of mean coverage between two kept sets of the same size.
COVERAGE_TOLERANCE = 0.02
# A function that returns sooner than this is called several times in a row.
_SHORTEST_MS = 300.0
QUESTION = (
    "Look at the photograph closely and tell me, in one or two sentences, which objects lie on the table beside the "
    "window, what colour the largest of them has, how many people are in the room, and whether anything is written "
    "on the sign above the door; if you cannot read it, say so and describe its shape, its colour and its place."
)
PARTS = {
    "vision encoder": ((), ("patch_features", "saliency")),
    "projector": (("patch_features",), ("projected_tokens",)),
    "selection": (("patch_features", "saliency", "projected_tokens"), VISUAL_OUTPUTS),
}


class Authors:
    """The visual side as the method was released, on the weights of ``weights``."""

    def __init__(self, adapter: Adapter, weights: WeightSource, projector: torch.nn.Module) -> None:
        config = adapter.config.vision_config
        config._attn_implementation = "eager"
        with torch.device("meta"):
            self.tower: Any = CLIPVisionModel(config).eval()
        state = {
            name: weights.read(f"vision_tower.{name}", tuple(parameter.shape)).float()
            for name, parameter in self.tower.named_parameters()
        }
        self.tower.load_state_dict(state, strict=False, assign=True)
        embeddings = self.tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions).expand(1, -1)
        self.projector = projector
        self.layer = adapter.config.vision_feature_layer

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(patch_features [B,N,C], saliency [B,N], visual tokens [B,N,D])``."""
        output = self.tower(pixel_values, output_attentions=True, output_hidden_states=True)
        features = output.hidden_states[self.layer][:, 1:]
        return features, output.attentions[self.layer][:, :, 0, 1:].mean(1), self.projector(features)

    def __call__(
        self, pixel_values: Tensor, text_embeds: Tensor, text_mask: Tensor, budget: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(visual_tokens [B,K,D], visual_indices [B,K], scores [B,N])``."""
        features, saliency, guide = self.encode(pixel_values)
        tokens = self.projector(features)
        rows = [
            self.select(features[b], saliency[b], guide[b], text_embeds[b][text_mask[b]], budget)
            for b in range(len(features))
        ]
        indices = torch.stack([kept for kept, _ in rows])
        kept_tokens = torch.stack([tokens[b][kept] for b, kept in enumerate(indices)])
        return kept_tokens, indices, torch.stack([score for _, score in rows])

    @staticmethod
    def select(features: Tensor, saliency: Tensor, tokens: Tensor, text: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """Return the kept indices of one image, ascending, and its fused score."""
        normalize = torch.nn.functional.normalize
        cosine = normalize(tokens, dim=-1) @ normalize(text, dim=-1).T
        relevance = (torch.softmax(cosine / 0.05, dim=-1) * cosine).sum(-1)
        sharp = _minmax(torch.softmax(relevance / 0.01, dim=0) ** 2.5)
        sharp = _minmax(torch.where(sharp >= torch.quantile(sharp, 0.995), sharp, 0.1 * sharp))
        blend = 0.5 * torch.log(_minmax(saliency).clamp_min(1e-6)) + 0.5 * torch.log(sharp.clamp_min(1e-6))
        score = _minmax(torch.exp(blend))

        order = torch.sort(score, descending=True, stable=True).indices
        important, residual = order[: budget // 2], order[budget // 2 :]
        target = budget - len(important)
        directions = normalize(features, dim=-1)
        likeness = directions @ directions.T
        while len(residual) > target:
            evens, odds = residual[0::2], residual[1::2]
            nearest = likeness[evens][:, odds].amax(1)
            evens = evens[torch.sort(nearest, descending=True, stable=True).indices]
            residual = torch.cat([evens[min(8, len(residual) - target) :], odds])
        return torch.cat([important, residual]).sort().values, score


def _minmax(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min() + 1e-6)


def export_graphs(module: VisualGraph, adapter: Adapter, directory: Path) -> dict[str, Path]:
    """Write the fused graph once per diversity step, unless ``directory`` has it; return the files."""
    files = {}
    for diversity in DIVERSITIES:
        file = directory / diversity / f"visual.{Precision.FP32.value}.onnx"
        if not file.is_file():
            say(f"exporting the graph with {diversity}")
            file.parent.mkdir(parents=True, exist_ok=True)
            module.selector = get_selector("flashvlm").make_module(FlashVLMConfig(diversity=diversity))
            inputs = adapter.inputs(Precision.FP32, batch=2, text=9, budget=max(1, adapter.dims.num_patches // 3))
            onnx_from_visual_graph(module, inputs, file).probe.unlink()
        files[diversity] = file
    return files


def extract_parts(file: Path) -> dict[str, Path]:
    """Cut the exported graph into encoder, projector and selection; weights stay in the file they are in."""
    files = {}
    for part, (inputs, outputs) in PARTS.items():
        model = ir.load(file)
        # Where the batch size is read from any of the graph's inputs, a part needs that input too.
        graph_inputs = [value.name for value in model.graph.inputs]
        graph = ir.convenience.extract(model.graph, inputs=[*graph_inputs, *inputs], outputs=list(outputs))
        for value in [value for value in graph.inputs if value.name in graph_inputs and not value.uses()]:
            graph.inputs.remove(value)
        for value in graph.inputs:
            # Values inside of the shipped graph carry no type; those cut here are float32.
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        files[part] = file.with_name(f"{part.replace(' ', '_')}.onnx")
        ir.save(ir.Model(graph, ir_version=model.ir_version), files[part])
    return files


class Part:
    """A session on one file, which takes what it needs of ``feeds``."""

    def __init__(self, file: Path, threads: int) -> None:
        self.session = ort_session(file, providers=["CPUExecutionProvider"], threads=threads)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        """Return all outputs by name."""
        values = self.session.run(self.outputs, {name: feeds[name] for name in self.inputs})
        return dict(zip(self.outputs, values, strict=True))


class FrontEnd:
    """What the runtime does before the graph, with files made on the spot: image, prompt, embedding table."""

    def __init__(self, adapter: Adapter, weights: WeightSource, directory: Path) -> None:
        write_preprocessor(directory / "preprocessor.json", adapter, weights)
        self.preprocess = ImagePreprocessor(decode_preprocessor((directory / "preprocessor.json").read_bytes()))
        table = directory / "text_embeddings.npy"
        if not table.is_file():
            say("writing the text embeddings")
            write_text_embeddings(table, adapter, weights)
        self.embeddings = TextEmbeddings(table)
        tokenizer = _tokenizer()
        tokenizer.save(str(directory / "tokenizer.json"))
        settings = PromptSettings(
            image_token="<image>",
            image_token_id=tokenizer.token_to_id("<image>"),
            bos_token="<s>",
            eos_token="</s>",
            eos_token_ids=[tokenizer.token_to_id("</s>")],
            pad_token_id=None,
        )
        self.prompts = PromptBuilder(directory / "tokenizer.json", adapter.default_chat_template, settings)
        coarse = np.random.default_rng(3).integers(0, 256, (12, 16, 3), np.uint8)
        self.photo = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)

    def pixels(self) -> Array:
        """Return ``pixel_values [1,3,H,W]`` of a 640 x 480 picture."""
        return self.preprocess([self.photo])

    def guide(self, count: int) -> Array:
        """Return the embeddings of the first ``count`` text tokens of the prompt: ``[1, count, D]``."""
        ids = self.prompts.chat(QUESTION).text_ids("prompt")
        if len(ids) < count:
            raise SystemExit(f"the benchmark's prompt has {len(ids)} tokens; --text can be at most that")
        return self.embeddings.lookup(ids[:count], np.float32)[None]


def _tokenizer() -> Tokenizer:
    """Return a small byte-level BPE with LLaVA's special tokens, trained on this file: a vocabulary is not its cost."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<unk>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((__doc__ or "").splitlines(), trainer)
    return tokenizer


def compile_module(module: VisualGraph, inputs: tuple[Tensor, ...]) -> tuple[Callable[[], Any] | None, dict[str, Any]]:
    """Return the compiled module as a function without arguments, or ``None``, and what the compilation took."""
    torch._dynamo.config.capture_scalar_outputs = True  # the budget decides a shape
    compiled = torch.compile(module)
    start = time.perf_counter()
    try:
        compiled(*inputs)
    except Exception as error:  # without a C++ compiler, or on an untried torch: recorded as the result
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        return None, {"failed": f"{type(error).__name__}: {reason}"}
    return lambda: compiled(*inputs), {"compile_s": round(time.perf_counter() - start, 1)}


def take_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return milliseconds of ``repeats`` rounds per function, after one round that does not count.

    A short function runs several times in a row, and its mean counts: inside the graph it finds its inputs in the
    cache and the threads awake, which a single call after another variant's seconds does not.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in runs}
    calls = dict.fromkeys(runs, 1)
    names = list(runs)
    for turn in range(repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            for _ in range(calls[name]):
                runs[name]()
            mean_ms = (time.perf_counter() - start) * 1e3 / calls[name]
            if turn:
                times_ms[name].append(mean_ms)
            else:
                calls[name] = 1 + int(_SHORTEST_MS / mean_ms)
    return times_ms


class Agreement:
    """Compares every variant with the reference: transformers' own encoder and projector."""

    def __init__(self, reference: tuple[Tensor, Tensor, Tensor], scores: Tensor, budget: int) -> None:
        self.features, self.saliency, self.tokens = (value.numpy() for value in reference)
        self.important = self._best(scores.numpy(), budget)
        self.budget = budget
        self.problems: list[str] = []
        self.measured: dict[str, dict[str, float]] = {}

    def close(self, name: str, have: Array, want: Array) -> float:
        """Return the relative error, and note a problem where it is above the tolerance."""
        error = float(np.abs(have - want).max() / np.abs(want).max())
        if not error <= TOLERANCE:  # written so that NaN fails too
            self.problems.append(f"{name}: relative error {error:.1e}, allowed {TOLERANCE:.0e}")
        return error

    def outputs(self, name: str, tokens: Array, indices: Array, scores: Array, *, kept: Array | None = None) -> None:
        """Check one variant; ``kept`` is the set it has to keep where the diversity step is stable."""
        rows = np.take_along_axis(self.tokens, indices[:, :, None], axis=1)
        error = self.close(f"{name}: visual tokens", tokens, rows)
        important = self._best(scores, self.budget)
        if not np.array_equal(important, self.important):
            self.problems.append(f"{name}: the important half is not the reference's")
        if not all(np.isin(best, row).all() for best, row in zip(important, indices, strict=True)):
            self.problems.append(f"{name}: a token of the important half is not kept")
        coverage = self.coverage(indices)
        self.measured[name] = {"token_error": error, "coverage": round(coverage, 4)}
        if kept is not None and not np.array_equal(kept, indices):
            self.problems.append(f"{name}: the kept set is not the reference's")

    def same_coverage(self, name: str, other: str) -> None:
        """Note a problem where two variants cover the image unequally well."""
        have, want = self.measured[name]["coverage"], self.measured[other]["coverage"]
        if not abs(have - want) <= COVERAGE_TOLERANCE:
            self.problems.append(f"{name}: coverage {have}, {other} has {want}")

    def coverage(self, indices: Array) -> float:
        """Return the mean over patches of the largest cosine to a kept one."""
        unit = self.features / np.linalg.norm(self.features, axis=-1, keepdims=True)
        per_image = [(u @ u[row].T).max(1).mean() for u, row in zip(unit, indices, strict=True)]
        return float(np.mean(per_image))

    @staticmethod
    def _best(scores: Array, budget: int) -> Array:
        return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, : budget // 2], axis=1)


def benchmark(args: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what was measured, and the problems found in the outputs."""
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    weights = open_weights(args.model, "random:0")
    adapter = adapter_class(weights.config["model_type"])(weights.config)
    selector = get_selector("flashvlm")
    say(f"{args.model}: seeded random weights, {args.threads} threads, budget {args.budget}, {args.text} text tokens")
    module = build_visual_graph(adapter, weights, selector, FlashVLMConfig(), Precision.FP32)
    files = export_graphs(module, adapter, directory)
    module.selector = selector.make_module(FlashVLMConfig(diversity="bipartite"))
    encoder: Any = module.encoder
    authors = Authors(adapter, weights, encoder.multi_modal_projector)
    front = FrontEnd(adapter, weights, directory)

    feeds: dict[str, Array] = {
        "pixel_values": front.pixels(),
        "text_embeds": front.guide(args.text),
        "text_mask": np.ones((1, args.text), np.bool_),
        "budget": np.array(args.budget, np.int64),
    }
    pixels, text, mask, budget = inputs = tuple(torch.from_numpy(value) for value in feeds.values())
    fused = {diversity: Part(file, args.threads) for diversity, file in files.items()}
    cut = {diversity: extract_parts(file) for diversity, file in files.items()}
    parts = {part: Part(file, args.threads) for part, file in cut["bipartite"].items() if part != "selection"}
    selection = {diversity: Part(cut[diversity]["selection"], args.threads) for diversity in files}
    for part in parts.values():
        feeds |= part(feeds)

    runs: dict[str, Callable[[], Any]] = {
        "authors": lambda: authors(pixels, text, mask, args.budget),
        "torch": lambda: module(*inputs),
    }
    compilation: dict[str, Any] = {"skipped": "--no-compile"}
    if args.compile:
        say("torch.compile")
        compiled, compilation = compile_module(module, inputs)
        if compiled is not None:
            runs["compiled"] = compiled
    for diversity in files:
        runs[f"fused {diversity}"] = lambda graph=fused[diversity]: graph(feeds)

    say("comparing outputs")
    agreement = Agreement(authors.encode(pixels), runs["authors"]()[2], args.budget)
    for name, run in runs.items():
        output = run()
        kept = None
        if name == "fused farthest":
            stable = selector.make_module(FlashVLMConfig(diversity="farthest"))
            marked = stable(
                *(torch.from_numpy(v) for v in (agreement.features, agreement.saliency, agreement.tokens)),
                text,
                mask,
                budget,
            )[0]
            kept = np.stack([np.flatnonzero(row) for row in marked.numpy()])
        values: Any = output.values() if isinstance(output, dict) else (value.numpy() for value in output[:3])
        agreement.outputs(name, *values, kept=kept)
        if name != "fused farthest":
            agreement.same_coverage(name, "authors")
    for name, want in (("patch_features", agreement.features), ("saliency", agreement.saliency)):
        agreement.close(f"vision encoder: {name}", feeds[name], want)

    for part, session in parts.items():
        runs[part] = lambda session=session: session(feeds)
    for diversity, session in selection.items():
        runs[f"selection {diversity}"] = lambda session=session: session(feeds)
    runs["preprocess"] = front.pixels
    runs["tokenise and look up"] = lambda: front.guide(args.text)
    say(f"measuring {args.repeats} rounds of {len(runs)} functions in turn")
    times_ms = take_turns(runs, args.repeats)
    result = {
        "benchmark": "visual_latency",
        "model": args.model,
        "threads": args.threads,
        "budget": args.budget,
        "text_tokens": args.text,
        "repeats": args.repeats,
        "torch_compile": compilation,
        "median_ms": {name: round(statistics.median(values), 2) for name, values in times_ms.items()},
        "best_ms": {name: round(min(values), 2) for name, values in times_ms.items()},
        "agreement": agreement.measured,
        "problems": agreement.problems,
        "versions": _versions(),
    }
    for kind in ("median", "best"):
        values = result[f"{kind}_ms"]
        result[f"speed_up_of_{kind}"] = {
            name: round(values["authors"] / values[name], 2) for name in agreement.measured
        }
        result[f"selection_share_of_{kind}_percent"] = {
            diversity: round(100 * values[f"selection {diversity}"] / values[f"fused {diversity}"], 2)
            for diversity in files
        }
    return result, agreement.problems


def print_tables(result: dict[str, Any]) -> None:
    """Print the result for people, on standard error."""
    median, best = result["median_ms"], result["best_ms"]
    ratio, best_ratio = result["speed_up_of_median"], result["speed_up_of_best"]
    say(
        f"\n{'variant':24}{'median ms':>11}{'best ms':>11}{'speed-up':>10}{'of best':>9}"
        f"{'token error':>13}{'coverage':>10}"
    )
    for name, measured in result["agreement"].items():
        say(
            f"{name:24}{median[name]:11.0f}{best[name]:11.0f}{ratio[name]:9.2f}x{best_ratio[name]:8.2f}x"
            f"{measured['token_error']:13.1e}{measured['coverage']:10.3f}"
        )
    compilation = result["torch_compile"]
    say("torch.compile: " + ", ".join(f"{key} = {value}" for key, value in compilation.items()))
    say(f"\n{'stage':24}{'median ms':>11}{'best ms':>11}{'of fused':>10}{'of best':>9}")
    stages = ("preprocess", "tokenise and look up", *list(PARTS)[:2], *(f"selection {name}" for name in DIVERSITIES))
    for name in stages:
        whole = "fused farthest" if name.endswith("farthest") else "fused bipartite"
        shares = (100 * median[name] / median[whole], 100 * best[name] / best[whole])
        say(f"{name:24}{median[name]:11.2f}{best[name]:11.2f}{shares[0]:9.2f}%{shares[1]:8.2f}%")


def say(text: str) -> None:
    """Print for people: standard output ends with the JSON line alone."""
    print(text, file=sys.stderr, flush=True)


def _versions() -> dict[str, str]:
    import onnxruntime
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


@contextlib.contextmanager
def workspace(keep: Path | None) -> Iterator[Path]:
    """Yield ``keep``, or a directory that is removed."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="flashvlm-bench-") as directory:
        yield Path(directory)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="llava-1.5-7b", help="registry name")
    parser.add_argument("--budget", type=int, default=128, help="visual tokens to keep")
    parser.add_argument("--text", type=int, default=60, help="text tokens that guide the selection")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every variant")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="include torch.compile")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the graphs (3 GB) here and use them again")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    with workspace(args.keep) as directory:
        result, problems = benchmark(args, directory)
    print_tables(result)
    for problem in problems:
        say(f"WRONG: {problem}")
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
