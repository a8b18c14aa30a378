"""The contract of the visual graph: names, dtypes, shapes and the ranges of what is dynamic.

One declaration, :func:`visual_graph_spec`, feeds the ONNX axes, the engine profiles, the manifest and the
checks that a session makes on its inputs. :func:`encoder_spec` and :func:`selector_spec` are the same in two halves.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flashvlm_export.errors import BudgetError, SessionError

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
DType = Literal["float32", "float16", "int64", "bool"]

QUESTION_INPUTS = ("text_embeds", "text_mask", "budget")
VISUAL_OUTPUTS = ("visual_tokens", "visual_indices", "scores")
ENCODER_OUTPUTS = ("patch_features", "saliency", "projected_tokens")


class Precision(str, Enum):
    """Number format of a graph's weights and activations; selection is float32 in each."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"

    @property
    def float_dtype(self) -> Literal["float32", "float16"]:
        """Floating-point dtype at the graph's inputs and outputs."""
        return "float32" if self is Precision.FP32 else "float16"


@dataclass(frozen=True)
class DynamicDim:
    """A dimension known at run time, with the range that engine profiles are built for.

    ONNX Runtime takes sizes beyond ``max``; a TensorRT engine refuses them.
    """

    name: str
    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"{self.name}: need 1 <= min <= opt <= max, got {self.min}, {self.opt}, {self.max}")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: an ``int`` in ``shape`` is fixed, a ``str`` names a dynamic dimension."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def check(self, array: Array, sizes: dict[str, int]) -> None:
        """Raise :class:`SessionError` unless ``array`` fits; ``sizes`` collects what each dynamic name was bound to."""
        if not isinstance(array, np.ndarray):
            raise SessionError(
                f"input '{self.name}' is not an array", received=type(array).__name__, expected="a NumPy array"
            )
        if array.dtype != np.dtype(self.dtype):
            raise SessionError(f"input '{self.name}' has the wrong dtype", received=array.dtype, expected=self.dtype)
        fits = array.ndim == len(self.shape)
        for want, have in zip(self.shape, array.shape, strict=False):
            fits = fits and (sizes.setdefault(want, have) == have if isinstance(want, str) else want == have)
        if not fits:
            bound = {k: v for k, v in sizes.items() if k in self.shape}
            raise SessionError(
                f"input '{self.name}' has the wrong shape",
                received=list(array.shape),
                expected=f"{list(self.shape)}" + (f" where {bound}" if bound else ""),
            )
        if 0 in array.shape:
            raise SessionError(
                f"input '{self.name}' is empty", received=list(array.shape), expected="at least one row per dimension"
            )


#: Tokens of many tiles are scaled down where their grid's sides get shorter by more than this (LLaVA-OneVision).
SHORTENED = 1.1


@dataclass(frozen=True)
class WindowDims:
    """How an image at its own resolution is cut up (Qwen2.5-VL).

    Attributes:
        patch_size: height and width of a patch, in pixels.
        frames: frames that one patch holds; a still image stands for each.
        merge_size: patches along each side that become one visual token.
        side: visual tokens along each side of a window.
    """

    patch_size: int
    frames: int
    merge_size: int
    side: int

    @property
    def patch_values(self) -> int:
        """Numbers of one patch, three channels of each frame."""
        return 3 * self.frames * self.patch_size**2

    @property
    def window_tokens(self) -> int:
        """Visual tokens of a whole window."""
        return self.side**2

    @property
    def window_patches(self) -> int:
        """Patches of a whole window."""
        return self.window_tokens * self.merge_size**2


@dataclass(frozen=True)
class VisualDims:
    """Sizes of one model's visual side.

    Attributes:
        image_size: height and width of ``pixel_values``, in pixels; 0 where an image has its own.
        patch_size: height and width of a patch, in pixels.
        num_patches: visual tokens of one image before pruning (``N``); where images differ, the most one can have.
        vision_width: channels of a patch feature (``C``).
        llm_width: channels of an LLM embedding (``D``).
        most_tiles: pictures of ``image_size`` in which one image is seen, at most: an overview and tiles; 1 for models
            that see it as one.
        most_area: pictures whose tokens those of all tiles are scaled down to, where they are clearly more; 0 for
            never.
        windows: how an image at its own resolution is cut up; ``None`` where it is scaled to ``image_size``.
    """

    image_size: int
    patch_size: int
    num_patches: int
    vision_width: int
    llm_width: int
    most_tiles: int = 1
    most_area: int = 0
    windows: WindowDims | None = None

    @property
    def has_one_size(self) -> bool:
        """Whether every image has the same visual tokens."""
        return self.most_tiles == 1 and self.windows is None

    @property
    def least_patches(self) -> int:
        """Visual tokens that every image has at least."""
        return 1 if self.windows else self.num_patches // self.most_tiles

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns of ``pixel_values``."""
        side = self.image_size // self.patch_size
        return side, side

    def describe_pictures(self) -> str:
        """Return size and visual tokens of an image, for people."""
        if self.windows is not None:
            return f"images at their own resolution, up to {self.num_patches} visual tokens"
        if self.most_tiles == 1:
            return f"{self.image_size} px, {self.num_patches} visual tokens"
        return f"up to {self.most_tiles} pictures of {self.image_size} px, up to {self.num_patches} visual tokens"


@dataclass(frozen=True)
class GraphSpec:
    """Inputs, outputs and dynamic dimensions of one graph.

    ``budget`` is listed among the dimensions although it is a value: TensorRT wants the values of a shape tensor
    in the profile exactly where other inputs have sizes.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: tuple[DynamicDim, ...]

    def dim(self, name: str) -> DynamicDim:
        """Return the dynamic dimension called ``name``."""
        return next(dim for dim in self.dims if dim.name == name)

    @property
    def vision_inputs(self) -> list[str]:
        """Names of the inputs that do not depend on the question."""
        return [tensor.name for tensor in self.inputs if tensor.name not in QUESTION_INPUTS]

    def check_feeds(self, feeds: Feeds) -> dict[str, int]:
        """Return the size of each dynamic dimension of ``feeds``, and the budget.

        Raises:
            SessionError, BudgetError: unless ``feeds`` are exactly what the graph takes.
        """
        names = [spec.name for spec in self.inputs]
        if sorted(feeds) != sorted(names):
            raise SessionError("wrong set of inputs", received=sorted(feeds), expected=sorted(names))
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            spec.check(feeds[spec.name], sizes)
        if sizes.get("visual", 0) > max((dim.max for dim in self.dims if dim.name == "visual"), default=1 << 62):
            raise SessionError(
                "an image has more visual tokens than the graph can sort",
                received=sizes["visual"],
                expected=f"at most {self.dim('visual').max}",
            )
        if "budget" in names:
            sizes["budget"] = check_budget(feeds["budget"].item(), sizes.get("visual", self.dim("budget").max))
        return sizes


def visual_graph_spec(dims: VisualDims, precision: Precision) -> GraphSpec:
    """Return the contract of the fused visual graph for one model at one precision."""
    return _with_dims(dims, (*_pictures(dims), *_question(dims, precision)), _kept(dims, precision))


def encoder_spec(dims: VisualDims, precision: Precision) -> GraphSpec:
    """Return the contract of the encoder alone: what an image is, whatever is asked about it."""
    return _with_dims(dims, _pictures(dims), _encoded(dims, precision))


def selector_spec(dims: VisualDims, precision: Precision) -> GraphSpec:
    """Return the contract of a selector alone: an encoded image, the text and the budget to the kept tokens."""
    return _with_dims(dims, (*_encoded(dims, precision), *_question(dims, precision)), _kept(dims, precision))


def _with_dims(dims: VisualDims, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> GraphSpec:
    """Return the graph with those dynamic dimensions that its inputs have, and the budget if it takes one."""
    sizes = {size for tensor in inputs for size in (*tensor.shape, tensor.name)}
    return GraphSpec(inputs, outputs, tuple(dim for dim in _dynamic(dims) if dim.name in sizes))


def _pictures(dims: VisualDims) -> tuple[TensorSpec, ...]:
    """Pixels, and for images that differ in size which patches, in which order, are the visual tokens of each image."""
    side, windows = dims.image_size, dims.windows
    if windows is not None:
        rows = ("batch", "windows", windows.window_patches)
        return (
            TensorSpec("pixel_values", "float32", (*rows, windows.patch_values)),
            TensorSpec("patch_positions", "int64", (*rows, 2)),
            TensorSpec("patch_mask", "bool", rows),
            TensorSpec("layout", "int64", ("batch", "visual")),
        )
    if dims.most_tiles == 1:
        return (TensorSpec("pixel_values", "float32", ("batch", 3, side, side)),)
    corners = (4,) if dims.most_area else ()  # neighbours that a token of a grid that is scaled down lies between
    return (
        TensorSpec("pixel_values", "float32", ("tiles", 3, side, side)),
        TensorSpec("layout", "int64", ("batch", "visual", *corners)),
        *(TensorSpec("layout_weights", "float32", ("batch", "visual", each)) for each in corners),
    )


def _encoded(dims: VisualDims, precision: Precision) -> tuple[TensorSpec, ...]:
    dtype, n = precision.float_dtype, _visual(dims)
    return (
        TensorSpec("patch_features", dtype, ("batch", n, dims.vision_width)),
        TensorSpec("saliency", "float32", ("batch", n)),
        TensorSpec("projected_tokens", dtype, ("batch", n, dims.llm_width)),
    )


def _question(dims: VisualDims, precision: Precision) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec("text_embeds", precision.float_dtype, ("batch", "text", dims.llm_width)),
        TensorSpec("text_mask", "bool", ("batch", "text")),
        TensorSpec("budget", "int64", ()),
    )


def _kept(dims: VisualDims, precision: Precision) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec("visual_tokens", precision.float_dtype, ("batch", "kept", dims.llm_width)),
        TensorSpec("visual_indices", "int64", ("batch", "kept")),
        TensorSpec("scores", "float32", ("batch", _visual(dims))),
    )


def _visual(dims: VisualDims) -> int | str:
    return dims.num_patches if dims.has_one_size else "visual"


def _dynamic(dims: VisualDims) -> tuple[DynamicDim, ...]:
    n, text = dims.num_patches, DynamicDim("text", 1, 64, 512)
    if dims.has_one_size:
        return DynamicDim("batch", 1, 1, 8), text, DynamicDim("budget", 1, min(128, n), n)
    if dims.windows is not None:
        # Optimised for a photograph of about a megapixel; long and thin images have windows that are partly empty.
        usual, whole = min(1024, n), dims.windows.window_tokens
        return (
            DynamicDim("batch", 1, 1, 2),
            DynamicDim("windows", 1, max(1, usual // whole), max(2, 2 * n // whole)),
            DynamicDim("visual", 4, usual, n),
            text,
            DynamicDim("budget", 1, max(1, usual * 2 // 9), n),
        )
    # The paper keeps 640 of LLaVA-NeXT's 2,880 tokens, as it keeps 128 of 576.
    tiles = dims.most_tiles
    return (
        DynamicDim("tiles", 1, tiles, 2 * tiles),
        DynamicDim("batch", 1, 1, 2),
        DynamicDim("visual", n // tiles, n, n),
        text,
        DynamicDim("budget", 1, max(1, n * 2 // 9), n),
    )


def check_budget(budget: object, num_patches: int, what: str = "one image") -> int:
    """Return ``budget`` as an ``int``; raise :class:`BudgetError` unless it is a whole number in ``1..num_patches``.

    Those are the visual tokens of ``what``, for people.
    """
    try:
        if isinstance(budget, bool):
            raise TypeError
        value = operator.index(budget)  # type: ignore[arg-type]  # its TypeError is the check
    except TypeError:
        raise BudgetError(
            "the token budget is not a whole number",
            received=repr(budget),
            expected=f"a whole number from 1 to {num_patches}",
        ) from None
    if not 1 <= value <= num_patches:
        raise BudgetError(
            "the token budget is out of range",
            received=value,
            expected=f"1 to {num_patches}, the visual tokens of {what}",
            hint=f"{num_patches} keeps every token",
        )
    return value
