"""Photographs with questions, pictures of any shape, and greedy answers: what the tests against transformers share."""

from __future__ import annotations

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_image

from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import PrunedPrompt

NEW_TOKENS = 32
PAIRS = [
    ("chelsea", "What is the animal looking at?"),
    ("chelsea", "Is there a dog?"),
    ("astronaut", "Who is in this picture?"),
    ("coffee", "What is in the cup?"),
    ("rocket", "Where is the rocket? Describe the sky."),
    ("camera", "What does the man hold?"),
    ("coins", "How many coins are there?"),
    ("page", "Read the first line."),
    ("retina", "What colour is this?"),
    ("china.jpg", "What kind of building is this?"),
    ("flower.jpg", "Which flower is it, and how many petals does it have?"),
    ("text", "What is written here?"),
]


def photograph(name: str) -> np.ndarray:
    """Return the photograph that scikit-image or scikit-learn has under ``name``."""
    return load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()


def picture(size: tuple[int, int]) -> Image.Image:
    """Return noise of ``size`` (width, height)."""
    width, height = size
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def greedy(pipeline: Pipeline, prompt: PrunedPrompt) -> list[int]:
    """Return the tokens of the answer, up to :data:`NEW_TOKENS`."""
    return pipeline.answer(prompt, SamplingParams(max_new_tokens=NEW_TOKENS)).token_ids
