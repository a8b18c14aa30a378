"""Backends that run the visual graph.

- ``base.py``         life cycle and checks, written once
- ``onnxruntime.py``  ONNX Runtime, CPU or CUDA provider as asked for
- ``split.py``        encoder and selectors as graphs of their own, in ONNX Runtime
- ``tensorrt.py``     TensorRT and TensorRT-RTX engines; ``tensorrt_worker.py`` is what each thread needs of one
- ``fake.py``         NumPy stand-in with real selection, for testing pipelines without an engine
"""
