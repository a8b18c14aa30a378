"""Photographs and prompts → activation ranges → an explicit Q/DQ INT8 graph.

- ``calibrate.py``    the whole of it, from a bundle with an fp16 graph to one with an int8 graph
- ``samples.py``      what a calibration image is, and which of them are held out for the checks
- ``photographs.py``  image folders, prompt files, and the photographs that Python packages bring along
- ``layers.py``       which matrix products are quantised, and the layers that sensitivity is told for
- ``observers.py``    min-max, entropy and percentile over a stream of activations
- ``ranges.py``       runs the fp16 graph and observes; cached, resumable
- ``qdq.py``          ranges → Q/DQ graph, and the same with some products left in float16
- ``readings.py``     outputs of a graph in ONNX Runtime
- ``likeness.py``     how like two readings are: cosine, kept set, coverage
- ``sensitivity.py``  ranks layers and leaves the worst in float16 until the tolerance holds
- ``checks.py``       ONNX checker, census of dtypes, numbers on images that were held out
- ``install.py``      puts the finished files into the bundle
"""
