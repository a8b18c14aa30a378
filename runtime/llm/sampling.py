"""Logits → token id, in NumPy; the same filters in the same order as Hugging Face ``generate``."""

from __future__ import annotations

import numpy as np

from flashvlm_export.errors import LLMError
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.specs import Array


class Sampler:
    """Chooses tokens for one answer; holds the random state that ``params.seed`` starts."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._random = np.random.default_rng(params.seed)

    def __call__(self, logits: Array) -> int:
        """Return the next token for ``logits``, floating point ``[vocab]``.

        Raises:
            LLMError: if they hold NaN or +infinity; -infinity rules a token out.
        """
        if not logits.max() < np.inf:  # NaN wins any maximum and loses any comparison
            raise LLMError(
                "the language model's logits contain NaN or infinity",
                hint="half precision may have overflowed: use a decoder in another precision (fp32, int8 or int4)",
            )
        if self.params.temperature == 0:
            return int(logits.argmax())
        cumulative = np.cumsum(token_probabilities(logits, self.params))
        # Scaled by the last sum, which rounding leaves off 1; the token is the first whose sum exceeds the draw.
        return int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))


def token_probabilities(logits: Array, params: SamplingParams) -> Array:
    """Return float64 ``[vocab]``: the probability of each token after temperature, top-k and top-p, in this order.

    ``params.temperature`` has to be above 0. Tokens as likely as the k-th stay in, as in transformers.
    """
    # Shifted before it is divided: where a tiny temperature overflows, minus infinity is then the right answer.
    with np.errstate(over="ignore"):
        scores = (logits.astype(np.float64) - float(logits.max())) / params.temperature
    if 0 < params.top_k < scores.size:
        kth = np.partition(scores, -params.top_k)[-params.top_k]
        scores[scores < kth] = -np.inf
    probabilities = _softmax(scores)
    if params.top_p < 1:
        order = np.argsort(probabilities, kind="stable")
        dropped = np.cumsum(probabilities[order]) <= 1 - params.top_p
        dropped[-1] = False
        probabilities[order[dropped]] = 0
        probabilities /= probabilities.sum()
    return probabilities


def _softmax(scores: Array) -> Array:
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()
