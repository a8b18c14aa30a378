"""Engines that turn prompt embeddings into text tokens.

- ``base``: the interface, its settings, its checks, its timing.
- ``sampling``: logits → token id, in NumPy.
- ``onnxruntime``: the bundle's own decoder.
- ``transformers``: a checkpoint, in torch.
- ``llamacpp``: a GGUF file, in llama.cpp.
- ``vllm``: a server, over HTTP; ``torch_file`` writes what it reads.
- ``registry``: the engines by name.
"""
