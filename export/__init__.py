"""Checkpoint → bundle. Needs the ``export`` extra (torch, transformers, onnx)."""
