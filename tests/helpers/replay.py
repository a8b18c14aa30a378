"""A visual graph whose encoder replays given features, to feed selection exactly, through the real export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from flashvlm_export.export.onnx_graph import onnx_from_visual_graph
from flashvlm_export.export.visual_graph import VisualGraph
from flashvlm_export.models.adapter import GraphInputs
from flashvlm_export.selection import get_selector
from flashvlm_export.specs import DynamicDim, GraphSpec, TensorSpec


class ReplayEncoder(nn.Module):
    """Unpacks ``pixel_values [B, N, C+1+D]`` into features, saliency and visual tokens."""

    needs_saliency = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return packed[:, :, : self.width], packed[:, :, self.width], packed[:, :, self.width + 1 :]


@dataclass(frozen=True)
class Replay:
    """An exported replay graph in ONNX Runtime."""

    file: Path
    spec: GraphSpec
    session: Any

    def run(
        self,
        features: np.ndarray,
        saliency: np.ndarray,
        tokens: np.ndarray,
        text_embeds: np.ndarray,
        text_mask: np.ndarray,
        budget: int,
    ) -> list[np.ndarray]:
        """Return ``visual_tokens, visual_indices, scores``."""
        feeds = {
            "pixel_values": np.concatenate([features, saliency[:, :, None], tokens], axis=2),
            "text_embeds": text_embeds,
            "text_mask": text_mask,
            "budget": np.array(budget, np.int64),
        }
        outputs: list[np.ndarray] = self.session.run(["visual_tokens", "visual_indices", "scores"], feeds)
        return outputs


def replay_graph(
    directory: Path,
    config: Any,
    *,
    patches: int,
    width: int,
    llm_width: int,
    selector: str = "flashvlm",
    any_size: bool = False,
) -> Replay:
    """Export one and open it; with ``any_size`` for up to ``patches`` of them."""
    visual = "visual" if any_size else patches
    spec = GraphSpec(
        inputs=(
            TensorSpec("pixel_values", "float32", ("batch", visual, width + 1 + llm_width)),
            TensorSpec("text_embeds", "float32", ("batch", "text", llm_width)),
            TensorSpec("text_mask", "bool", ("batch", "text")),
            TensorSpec("budget", "int64", ()),
        ),
        outputs=(
            TensorSpec("visual_tokens", "float32", ("batch", "kept", llm_width)),
            TensorSpec("visual_indices", "int64", ("batch", "kept")),
            TensorSpec("scores", "float32", ("batch", visual)),
        ),
        dims=(
            DynamicDim("batch", 1, 1, 8),
            *([DynamicDim("visual", 4, patches, patches)] if any_size else []),
            DynamicDim("text", 1, 64, 512),
            DynamicDim("budget", 1, min(128, patches), patches),
        ),
    )
    generator = torch.Generator().manual_seed(0)
    tensors = (
        torch.randn(2, patches // 2 if any_size else patches, width + 1 + llm_width, generator=generator),
        torch.randn(2, 9, llm_width, generator=generator),
        torch.ones(2, 9, dtype=torch.bool),
        torch.tensor(max(1, patches // 3)),
    )
    module = VisualGraph(ReplayEncoder(width), get_selector(selector).make_module(config)).eval()
    name = f"{selector}_{getattr(config, 'diversity', '')}_{visual}"
    graph = onnx_from_visual_graph(module, GraphInputs(tensors, spec), directory / f"{name}.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph.file, options, providers=["CPUExecutionProvider"])
    return Replay(graph.file, spec, session)
