"""Which matrix products become INT8, and how they are put together into layers.

A product is quantised if its second factor is a float16 matrix stored in the graph: those are the linear layers of
vision encoder and projector. Attention multiplies activations by activations, and selection is float32: neither has
such a factor.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx

from flashvlm_export.errors import BundleError

#: Values inside every exported graph, float32: what selection sees.
PATCH_FEATURES, PROJECTED_TOKENS = "patch_features", "projected_tokens"

# What a tensor may pass through and still be the same activations.
_MOVES = frozenset(("Cast", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"))


@dataclass(frozen=True)
class Product:
    """One MatMul or Gemm with constant weights.

    Attributes:
        node: its name.
        activation: name of its first input.
        weight: name of its weights.
        shape: rows and columns of the weights.
    """

    node: str
    activation: str
    weight: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """Products that are quantised or left in float16 together."""

    name: str
    products: tuple[Product, ...]

    @property
    def weights(self) -> int:
        """Number of weights, those that several products share counted once."""
        return sum(rows * columns for rows, columns in {p.weight: p.shape for p in self.products}.values())


def tokens_and_features(names: Collection[str]) -> tuple[str, str]:
    """Return what selection sees, by name, of a graph that has values called ``names``.

    Twice the same in Qwen2.5-VL, whose visual tokens are patch features too.
    """
    return PROJECTED_TOKENS if PROJECTED_TOKENS in names else PATCH_FEATURES, PATCH_FEATURES


def find_products(graph: onnx.GraphProto) -> list[Product]:
    """Return the products to quantise, in the order of the graph.

    Raises:
        BundleError: if there is none.
    """
    matrices = {
        tensor.name: (tensor.dims[0], tensor.dims[1])
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT16 and len(tensor.dims) == 2
    }
    products = [
        Product(node.name, node.input[0], node.input[1], matrices[node.input[1]])
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in matrices and node.input[0] not in matrices
    ]
    if not products or len({product.node for product in products}) < len(products):
        raise BundleError(
            "the fp16 graph has no matrix products that could be quantised",
            received=f"{len(products)} MatMul or Gemm nodes with float16 weights",
            expected="the linear layers of a vision encoder, each node with a name of its own",
            hint="export the bundle again with this version",
        )
    return products


def find_layers(graph: onnx.GraphProto, products: list[Product], most: int) -> list[Layer]:
    """Put ``products`` together, at most ``most`` layers.

    A norm begins a sublayer (attention, or the feed-forward part); what follows the patch features is the projector.
    With more sublayers than ``most``, neighbours are joined: by two, each is one transformer block.
    """
    producers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    features = _origin(PATCH_FEATURES, producers)
    sublayers: list[list[Product]] = []
    projector: list[Product] = []
    root = None
    for product in products:
        origin = _origin(product.activation, producers)
        node = producers.get(origin)
        if projector or origin == features:
            projector.append(product)
        elif not sublayers or (node is not None and _is_norm(node, constants) and origin != root):
            sublayers.append([product])
            root = origin
        else:
            sublayers[-1].append(product)
    step = max(1, -(-len(sublayers) // max(1, most - bool(projector))))
    layers = []
    for first in range(0, len(sublayers), step):
        joined = sublayers[first : first + step]
        last = first + len(joined) - 1
        name = f"sublayer {first}" if step == 1 else f"sublayers {first}-{last}"
        layers.append(Layer(name, tuple(product for sublayer in joined for product in sublayer)))
    if projector:
        layers.append(Layer("projector", tuple(projector)))
    return layers


def _is_norm(node: onnx.NodeProto, constants: Collection[str]) -> bool:
    """Whether ``node`` ends a norm: LayerNormalization, or the product with its weights that ends an RMS norm."""
    return node.op_type == "LayerNormalization" or (node.op_type == "Mul" and any(i in constants for i in node.input))


def _origin(name: str, producers: dict[str, onnx.NodeProto]) -> str:
    """Follow ``name`` back through nodes that only move values."""
    while name in producers and producers[name].op_type in _MOVES:
        name = producers[name].input[0]
    return name
