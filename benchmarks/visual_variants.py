"""What ``visual_latency.py`` measures: the visual side of one model in several ways, on the same weights and inputs.

:func:`prepare` writes graphs and inputs into a directory; :func:`make_variant` makes one variant of them, in whatever
process calls it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
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
from flashvlm_export.export.processor_files import read_preprocessor
from flashvlm_export.export.text_model import write_text_embeddings
from flashvlm_export.export.visual_graph import VisualGraph, build_visual_graph
from flashvlm_export.manifest import PromptSettings
from flashvlm_export.models import adapter_class
from flashvlm_export.models.adapter import Adapter
from flashvlm_export.ort import ort_session
from flashvlm_export.progress import Progress
from flashvlm_export.runtime.embeddings import TextEmbeddings
from flashvlm_export.runtime.preprocess import ImagePreprocessor
from flashvlm_export.runtime.prompt import PromptBuilder
from flashvlm_export.selection import FlashVLMConfig, get_selector
from flashvlm_export.selection.config import DIVERSITIES
from flashvlm_export.specs import QUESTION_INPUTS, VISUAL_OUTPUTS, Array, Feeds, Precision

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
FEEDS = "feeds.npz"
INPUTS = ("pixel_values", *QUESTION_INPUTS)


def prepare(directory: Path, model: str, threads: int, *, budget: int, text: int) -> None:
    """Write the graphs, their parts, and the inputs of each into ``directory``; graphs that are there are used."""
    torch.set_num_threads(threads)
    adapter, weights = _open(model)
    module = build_visual_graph(adapter, weights, get_selector("flashvlm"), FlashVLMConfig(), Precision.FP32)
    files = export_graphs(module, adapter, directory)
    front = FrontEnd(adapter, weights, directory)
    feeds: dict[str, Array] = {
        "pixel_values": front.pixels(),
        "text_embeds": front.guide(text),
        "text_mask": np.ones((1, text), np.bool_),
        "budget": np.array(budget, np.int64),
    }
    for file in files.values():
        extract_parts(file)
    for part in ("vision encoder", "projector"):
        feeds |= Part(_part_file(files["bipartite"], part), threads)(feeds)
    np.savez(directory / FEEDS, allow_pickle=False, **feeds)


def make_variant(name: str, directory: Path, model: str, threads: int) -> Callable[[], dict[str, Array]]:
    """Return the variant called ``name`` as a function without arguments that returns its outputs by name."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    feeds: dict[str, Array] = dict(np.load(directory / FEEDS))
    kind, _, diversity = name.rpartition(" ")
    if kind in ("fused", "selection"):
        file = graph_file(directory, diversity)
        part = Part(file if kind == "fused" else _part_file(file, kind), threads)
        return lambda: part(feeds)
    if name in PARTS:
        part = Part(_part_file(graph_file(directory, "bipartite"), name), threads)
        return lambda: part(feeds)
    adapter, weights = _open(model)
    if name in ("preprocess", "tokenise and look up"):
        front, text = FrontEnd(adapter, weights, directory), feeds["text_embeds"].shape[1]
        return lambda: {"": front.pixels() if name == "preprocess" else front.guide(text)}
    pixels, text_embeds, text_mask, budget = inputs = [torch.from_numpy(feeds[name]) for name in INPUTS]
    if name == "reference":
        authors = Authors(adapter, weights)
        return lambda: _named(("patch_features", "saliency", "projected_tokens"), authors.encode(pixels))
    if name == "authors":
        authors = Authors(adapter, weights)
        return lambda: _named(VISUAL_OUTPUTS, authors(pixels, text_embeds, text_mask, int(budget)))
    module: Any = build_visual_graph(adapter, weights, get_selector("flashvlm"), FlashVLMConfig(), Precision.FP32)
    if name == "products":
        return _products(module.encoder)
    if name == "compiled":
        torch._dynamo.config.capture_scalar_outputs = True  # the budget decides a shape
        module = torch.compile(module)
    return lambda: _named(VISUAL_OUTPUTS, module(*inputs)[: len(VISUAL_OUTPUTS)])


def _products(encoder: Any) -> Callable[[], dict[str, Array]]:
    """Return a function that computes the encoder's matrix products, each into memory of its own, and nothing else."""
    config = encoder.vision_tower.config
    rows = encoder.vision_tower.embeddings.num_positions
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    factors = [
        (torch.randn(rows, module.in_features), module.weight.T)
        for module in encoder.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    query, weights = torch.randn(heads, rows, size), torch.randn(heads, rows, rows)
    factors += [(query, query.transpose(1, 2)), (weights, query)] * config.num_hidden_layers
    outputs = [a @ b for a, b in factors]

    def run() -> dict[str, Array]:
        for (a, b), output in zip(factors, outputs, strict=True):
            torch.matmul(a, b, out=output)
        return {}

    return run


def graph_file(directory: Path, diversity: str) -> Path:
    """Return where the fused graph with ``diversity`` lies."""
    return directory / diversity / f"visual.{Precision.FP32.value}.onnx"


def say(text: str) -> None:
    """Print for people: standard output ends with the JSON line alone."""
    print(text, file=sys.stderr, flush=True)


def _open(model: str) -> tuple[Adapter, WeightSource]:
    weights = open_weights(model, "random:0")
    return adapter_class(weights.config["model_type"])(weights.config), weights


def _named(names: tuple[str, ...], values: tuple[Tensor, ...]) -> dict[str, Array]:
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


class Authors:
    """The visual side as the method was released, on the weights of ``weights``."""

    def __init__(self, adapter: Adapter, weights: WeightSource) -> None:
        encoder: Any = build_visual_graph(
            adapter, weights, get_selector("flashvlm"), FlashVLMConfig(), Precision.FP32
        ).encoder
        self.projector = encoder.multi_modal_projector
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
        file = graph_file(directory, diversity)
        if not file.is_file():
            say(f"exporting the graph with {diversity}")
            file.parent.mkdir(parents=True, exist_ok=True)
            module.selector = get_selector("flashvlm").make_module(FlashVLMConfig(diversity=diversity))
            inputs = adapter.inputs(Precision.FP32, batch=2, text=9, budget=max(1, adapter.dims.num_patches // 3))
            onnx_from_visual_graph(module, inputs, file).probe.unlink()
        files[diversity] = file
    return files


def extract_parts(file: Path) -> None:
    """Cut the exported graph into encoder, projector and selection; weights stay in the file they are in."""
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
        ir.save(ir.Model(graph, ir_version=model.ir_version), _part_file(file, part))


def _part_file(file: Path, part: str) -> Path:
    return file.with_name(f"{part.replace(' ', '_')}.onnx")


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
        self.preprocess = ImagePreprocessor(read_preprocessor(adapter, weights, Progress()))
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
