"""Engines that turn prompt embeddings into text tokens.

- ``base``: the interface, its settings, its checks, its timing.
- ``sampling``: logits → token id, in NumPy.
- ``onnxruntime``: the bundle's own decoder.
- ``transformers``: a checkpoint, in torch.
- ``registry``: the engines by name.
"""
