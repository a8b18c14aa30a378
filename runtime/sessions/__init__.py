"""Backends that run the visual graph.

- ``base.py``         life cycle and checks, written once
- ``onnxruntime.py``  ONNX Runtime, CPU or CUDA provider as asked for
- ``fake.py``         NumPy stand-in with real selection, for testing pipelines without an engine
"""
