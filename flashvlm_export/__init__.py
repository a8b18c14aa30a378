"""Vision-language models with text-guided visual token selection inside the exported graph.

- ``errors.py``     every exception raised on purpose
- ``specs.py``      the contract of the visual graph: names, shapes, dtypes, ranges
- ``manifest.py``   the contract of the bundle, ``manifest.json``
- ``bundle.py``     opening and checking a bundle
- ``files.py``      atomic writes, hashes, disk space
- ``targets.py``    devices that engines are built for
- ``profiles.py``   ranges of batch, text length and budget of an engine
- ``engines.py``    engines of a bundle and their sidecars
- ``records.py``    JSON records: encoded, decoded strictly
- ``ort.py``        opening ONNX Runtime sessions
- ``gpu.py``        the GPU at hand
- ``tensorrt_api.py`` where TensorRT's versions and TensorRT-RTX differ
- ``interrupts.py`` Ctrl-C and SIGTERM inside of libraries that swallow them
- ``progress.py``   steps and bars on standard error
- ``selection/``    selectors: settings, NumPy definition, torch module
- ``models/``       registry and adapters, one per architecture
- ``cli/``          the ``flashvlm`` command
- ``export/``       checkpoint → ONNX (needs torch)
- ``calibration/``  ranges → INT8 graph
- ``runtime/``      what ships to the device: no torch but in one engine
"""

import os

__version__ = "0.1.0"

# ONNX Runtime's wheels for Linux report sessions, models and errors to their maker from 1.29 on; it decides once, when
# it is loaded. Who wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
