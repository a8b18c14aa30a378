"""The contract of the visual graph: what a session refuses before any backend sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashvlm_export.errors import BudgetError, SessionError
from flashvlm_export.specs import (
    Array,
    DynamicDim,
    GraphSpec,
    Precision,
    VisualDims,
    check_budget,
    visual_graph_spec,
)

DIMS = VisualDims(image_size=28, patch_size=14, num_patches=4, vision_width=8, llm_width=6)


def feeds(batch: int = 2, text: int = 3, budget: int = 2, precision: Precision = Precision.FP32) -> dict[str, Array]:
    return {
        "pixel_values": np.zeros((batch, 3, 28, 28), np.float32),
        "text_embeds": np.zeros((batch, text, 6), precision.float_dtype),
        "text_mask": np.ones((batch, text), bool),
        "budget": np.array(budget, np.int64),
    }


def spec(precision: Precision = Precision.FP32) -> GraphSpec:
    return visual_graph_spec(DIMS, precision)


@pytest.mark.parametrize(
    "budget",
    [1, 576, *(kind(7) for kind in (np.int8, np.uint8, np.int32, np.int64, np.uint64)), np.array(7)],
    ids=lambda value: f"{type(value).__name__}-{value}",
)
def test_whole_numbers_in_range_are_budgets(budget: Any) -> None:
    value = check_budget(budget, 576)
    assert type(value) is int
    assert value == int(budget)


@pytest.mark.parametrize("budget", [0, -1, 577, 10**30, np.int64(0), np.int64(-(2**63)), np.uint64(2**64 - 1)])
def test_a_budget_out_of_range_is_told_the_range(budget: Any) -> None:
    with pytest.raises(BudgetError) as caught:
        check_budget(budget, 576)
    assert caught.value.received == int(budget)
    assert "1 to 576" in str(caught.value)
    assert "576 keeps every token" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "budget",
    [
        True,
        False,
        np.True_,
        64.0,
        0.5,
        np.float32(64),
        float("nan"),
        "64",
        b"64",
        None,
        [64],
        (64,),
        np.array([64]),
        1j,
    ],
    ids=repr,
)
def test_what_is_no_whole_number_is_no_budget(budget: Any) -> None:
    with pytest.raises(BudgetError) as caught:
        check_budget(budget, 576)
    assert repr(budget) in str(caught.value)
    assert "a whole number from 1 to 576" in str(caught.value)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize(("batch", "text", "budget"), [(1, 1, 1), (2, 3, 4), (64, 2000, 2)])
def test_feeds_that_fit_are_taken(precision: Precision, batch: int, text: int, budget: int) -> None:
    spec(precision).check_feeds(feeds(batch, text, budget, precision))


WRONG: dict[str, tuple[Callable[[dict[str, Array]], dict[str, Any]], str, str, str]] = {
    "input missing": (
        lambda good: {name: good[name] for name in good if name != "text_mask"},
        "wrong set of inputs",
        "['budget', 'pixel_values', 'text_embeds']",
        "'text_mask'",
    ),
    "input too many": (lambda good: {**good, "input_ids": good["budget"]}, "wrong set", "'input_ids'", "'text_mask'"),
    "input misspelt": (
        lambda good: {("pixels" if name == "pixel_values" else name): good[name] for name in good},
        "wrong set",
        "'pixels'",
        "'pixel_values'",
    ),
    "not an array": (
        lambda good: good | {"pixel_values": good["pixel_values"].tolist()},
        "'pixel_values'",
        "list",
        "NumPy array",
    ),
    "number for an array": (lambda good: good | {"budget": 2}, "'budget'", "int", "NumPy array"),
    "double pixels": (
        lambda good: good | {"pixel_values": good["pixel_values"].astype(np.float64)},
        "'pixel_values' has the wrong dtype",
        "float64",
        "float32",
    ),
    "half text": (
        lambda good: good | {"text_embeds": good["text_embeds"].astype(np.float16)},
        "'text_embeds' has the wrong dtype",
        "float16",
        "float32",
    ),
    "mask of integers": (
        lambda good: good | {"text_mask": good["text_mask"].astype(np.int64)},
        "'text_mask' has the wrong dtype",
        "int64",
        "bool",
    ),
    "other byte order": (
        lambda good: good | {"pixel_values": good["pixel_values"].astype(">f4")},
        "'pixel_values' has the wrong dtype",
        ">f4",
        "float32",
    ),
    "budget int32": (
        lambda good: good | {"budget": good["budget"].astype(np.int32)},
        "'budget' has the wrong dtype",
        "int32",
        "int64",
    ),
    "budget of rank 1": (
        lambda good: good | {"budget": good["budget"][None]},
        "'budget' has the wrong shape",
        "[1]",
        "[]",
    ),
    "one image without batch": (
        lambda good: good | {"pixel_values": good["pixel_values"][0]},
        "'pixel_values' has the wrong shape",
        "[3, 28, 28]",
        "['batch', 3, 28, 28]",
    ),
    "channels last": (
        lambda good: good | {"pixel_values": good["pixel_values"].transpose(0, 2, 3, 1)},
        "'pixel_values' has the wrong shape",
        "[2, 28, 28, 3]",
        "['batch', 3, 28, 28]",
    ),
    "image too large": (
        lambda good: good | {"pixel_values": np.zeros((2, 3, 42, 42), np.float32)},
        "'pixel_values' has the wrong shape",
        "[2, 3, 42, 42]",
        "['batch', 3, 28, 28]",
    ),
    "width of another model": (
        lambda good: good | {"text_embeds": np.zeros((2, 3, 7), np.float32)},
        "'text_embeds' has the wrong shape",
        "[2, 3, 7]",
        "['batch', 'text', 6]",
    ),
    "fewer texts than images": (
        lambda good: good | {"text_embeds": good["text_embeds"][:1]},
        "'text_embeds' has the wrong shape",
        "[1, 3, 6]",
        "{'batch': 2",
    ),
    "mask shorter than text": (
        lambda good: good | {"text_mask": good["text_mask"][:, :2]},
        "'text_mask' has the wrong shape",
        "[2, 2]",
        "{'batch': 2, 'text': 3}",
    ),
    "no image": (lambda good: feeds(batch=0), "'pixel_values' is empty", "[0, 3, 28, 28]", "at least one"),
    "no text": (lambda good: feeds(text=0), "'text_embeds' is empty", "[2, 0, 6]", "at least one"),
}


@pytest.mark.parametrize(("spoil", "what", "received", "expected"), WRONG.values(), ids=WRONG.keys())
def test_feeds_that_do_not_fit_are_refused(spoil: Callable[..., Any], what: str, received: str, expected: str) -> None:
    with pytest.raises(SessionError) as caught:
        spec().check_feeds(spoil(feeds()))
    assert what in caught.value.what
    assert received in str(caught.value.received)
    assert expected in str(caught.value.expected)


@pytest.mark.parametrize("budget", [0, -3, 5])
def test_the_budget_among_the_feeds_is_checked_too(budget: int) -> None:
    with pytest.raises(BudgetError, match="1 to 4"):
        spec().check_feeds(feeds(budget=budget))


def test_half_precision_graphs_want_half_precision_text_and_float32_pixels() -> None:
    half = spec(Precision.FP16)
    assert [(tensor.name, tensor.dtype) for tensor in (*half.inputs, *half.outputs)] == [
        ("pixel_values", "float32"),
        ("text_embeds", "float16"),
        ("text_mask", "bool"),
        ("budget", "int64"),
        ("visual_tokens", "float16"),
        ("visual_indices", "int64"),
        ("scores", "float32"),
    ]
    with pytest.raises(SessionError, match="text_embeds"):
        half.check_feeds(feeds())


@pytest.mark.parametrize("num_patches", [1, 4, 127, 128, 576, 4096])
def test_the_budget_ranges_over_every_token_of_the_image(num_patches: int) -> None:
    dims = VisualDims(image_size=28, patch_size=14, num_patches=num_patches, vision_width=8, llm_width=6)
    budget = visual_graph_spec(dims, Precision.FP32).dim("budget")
    assert (budget.min, budget.max) == (1, num_patches)
    assert budget.min <= budget.opt <= budget.max


@pytest.mark.parametrize("bounds", [(0, 1, 2), (2, 1, 3), (1, 4, 3), (-1, -1, -1)])
def test_a_range_that_is_none_is_refused(bounds: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="text: need 1 <= min <= opt <= max"):
        DynamicDim("text", *bounds)
