"""Choosing which visual tokens to keep.

A *selector* scores the visual tokens of an image against the question and keeps ``budget`` of them. The registry
row (:class:`Selector`) names its settings, what it needs from the vision encoder, its NumPy definition and the
torch module that exports.

- ``registry.py``   the rows, looked up by name; nothing heavy is imported until asked for
- ``config.py``     settings of every selector
- ``*_numpy.py``    a selector step by step, for reading and as the oracle
- ``*_torch.py``    the same result as data-parallel tensor operations that export to one graph
- ``stages_*.py``   what selectors share: min-max, the two diversity loops, marking, mask to ascending indices

``flashvlm`` is the method of this package; ``vispruner``, ``visionzip``, ``divprune`` and ``cdpruner`` are what it is
compared with, and ``baselines`` (random, uniform grid, CLS attention) what all have to beat.
"""

from flashvlm_export.selection.config import FlashVLMConfig
from flashvlm_export.selection.registry import SELECTORS, Selector, get_selector, select_tokens

__all__ = ["SELECTORS", "FlashVLMConfig", "Selector", "get_selector", "select_tokens"]
