"""The models this package exports.

- ``registry.py``  one row per model users can name, one line per architecture; importable without torch
- ``adapter.py``   what an architecture has to declare
- ``qwen2_5_vl.py``  Qwen2.5-VL: attention in windows, merger, Qwen2
- ``llava.py``     LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: CLIP ViT or SigLIP, two-layer projector
- ``saliency.py``  the attention that patches get, which scores them
"""

from flashvlm_export.models.registry import (
    FAMILIES,
    MODELS,
    ModelEntry,
    adapter_class,
    find_model,
    outside_families,
)

__all__ = ["FAMILIES", "MODELS", "ModelEntry", "adapter_class", "find_model", "outside_families"]
