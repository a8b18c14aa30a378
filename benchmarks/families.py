"""Each family of models: how large its adapter is, and what pruning leaves of the prefill.

Lines of code of the adapter, without blank lines, comments and docstrings. Visual tokens of a photograph of 1024 x 768
pixels before pruning and after it at the paper's ratios, and the floating-point operations that prefill takes for a
prompt with 64 tokens of text: two for each weight of the language model's layers and each position, four for each pair
of positions, channel and layer (attention, whole matrix), and one row of the output layer. Computed, not measured.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import tokenize
from pathlib import Path
from typing import Any

from output import finish
from transformers.utils import logging

from flashvlm_export.export.text_model import count_text_parameters
from flashvlm_export.models import MODELS, adapter_class
from flashvlm_export.models.adapter import Adapter
from flashvlm_export.preprocessor import PreprocessorSettings
from flashvlm_export.runtime.layout import choose_resolution, overview_and_tiles
from flashvlm_export.runtime.preprocess import within_pixels

PHOTOGRAPH, TEXT = (1024, 768), 64
RATIOS = (0.778, 0.889, 0.944)


def lines_of_code(adapter: type[Adapter]) -> int:
    """Return those of the adapter and its encoder; what it inherits counts where it stands."""
    module = inspect.getmodule(adapter)
    assert module is not None
    source = inspect.getsource(module)
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type not in skipped:
            code |= set(range(token.start[0], token.end[0] + 1)) - docs
    body, start = inspect.getsourcelines(adapter)
    families = [
        row for row in vars(module).values() if inspect.isclass(row) and issubclass(row, Adapter) and row is not Adapter
    ]
    own = range(start, start + len(body))
    if adapter.__bases__[0] in families:
        return len(code & set(own))
    derived = [inspect.getsourcelines(row) for row in families if row is not adapter]
    return len(code - {line for lines, first in derived for line in range(first, first + len(lines))})


def visual_tokens(adapter: Adapter) -> int:
    """Return those of the photograph."""
    settings, dims = PreprocessorSettings.from_hf(adapter.default_processor), adapter.dims
    if settings.pixel_range is not None:
        width, height = within_pixels(PHOTOGRAPH, *settings.pixel_range)
        return width * height // settings.pixel_range[0] ** 2
    if settings.resolutions:
        height, width = choose_resolution(PHOTOGRAPH, settings.resolutions)
        tiles = (height // dims.image_size, width // dims.image_size)
        return overview_and_tiles(PHOTOGRAPH, tiles, dims.grid, dims.most_area)[1].num_tokens
    return dims.num_patches


def prefill_flops(adapter: Adapter, visual: int) -> float:
    """Return the operations of a prefill with ``visual`` tokens of an image."""
    config = adapter.text_config
    weights = count_text_parameters(adapter) - 2 * config.vocab_size * config.hidden_size
    positions = visual + TEXT
    attention = 4 * positions**2 * config.hidden_size * config.num_hidden_layers
    return 2.0 * weights * positions + attention + 2.0 * config.vocab_size * config.hidden_size


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    logging.set_verbosity_error()
    rows: list[dict[str, Any]] = []
    for name, entry in MODELS.items():
        kind = adapter_class(entry.family)
        adapter = kind(entry.config)
        whole = visual_tokens(adapter)
        kept = [round(whole * (1 - ratio)) for ratio in RATIOS]
        rows.append(
            {
                "model": name,
                "family": entry.family,
                "adapter_lines": lines_of_code(kind),
                "visual_tokens": whole,
                "kept": kept,
                "prefill_tflops": prefill_flops(adapter, whole) / 1e12,
                "kept_prefill_tflops": [prefill_flops(adapter, count) / 1e12 for count in kept],
            }
        )
    print(f"{'model':24}{'adapter':>8}{'tokens':>8}{'TFLOP':>8}   kept, TFLOP", file=sys.stderr)
    for row in rows:
        pruned = ", ".join(f"{k} {f:.2f}" for k, f in zip(row["kept"], row["kept_prefill_tflops"], strict=True))
        print(
            f"{row['model']:24}{row['adapter_lines']:8}{row['visual_tokens']:8}{row['prefill_tflops']:8.2f}   {pruned}",
            file=sys.stderr,
        )
    finish({"benchmark": "families", "photograph": PHOTOGRAPH, "text": TEXT, "rows": rows}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
