"""Running the fp16 graph over the calibration images, and remembering what was seen.

The state is written after every image; a run that was killed goes on behind the last one. The finished ranges lie in
the bundle and are used again as long as graph, images, prompts and method are the same.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx

from flashvlm_export.calibration.layers import Product
from flashvlm_export.calibration.observers import Method, Observer, Range, make_observer
from flashvlm_export.calibration.readings import opened, with_outputs
from flashvlm_export.calibration.samples import Sample, combined_key
from flashvlm_export.files import atomic_write
from flashvlm_export.progress import Progress

PARTIAL = "ranges.partial.npz"


@dataclass(frozen=True)
class Ranges:
    """Activation ranges and what they were made from.

    Attributes:
        key: over everything that decides the ranges.
        graph_sha256: of the fp16 graph, its file and its weights.
        method: how ``amax`` was chosen.
        percentile: for that method, in percent.
        images: names of the calibration images.
        tensors: by name of the value in the fp16 graph.
    """

    key: str
    graph_sha256: str
    method: Method
    percentile: float
    images: list[str]
    tensors: dict[str, Range]


def ranges_key(graph_sha256: str, method: Method, percentile: float, samples: Sequence[Sample]) -> str:
    """Return what a cache of ranges goes by."""
    return combined_key([graph_sha256, method, f"{percentile!r}", *(sample.key for sample in samples)])


def observe_ranges(
    structure: onnx.ModelProto,
    products: Sequence[Product],
    samples: Sequence[Sample],
    *,
    graph_sha256: str,
    method: Method,
    percentile: float,
    probe: Path,
    partial: Path,
    progress: Progress,
    on_image: Callable[[int], object] = lambda done: None,
) -> Ranges:
    """Return the ranges of every product's input.

    One image at a time is run and forgotten, so that memory does not grow with their number.

    Args:
        structure: the fp16 graph.
        products: whose inputs to watch.
        samples: calibration images.
        graph_sha256: for the key.
        method: see :class:`Ranges`.
        percentile: see :class:`Ranges`.
        probe: graph file to write for the time of the run, where the weights are found.
        partial: file for the state.
        progress: shows a bar.
        on_image: hears how many images are done.

    Raises:
        CalibrationError: if activations are not finite.
        ImageError: if an image has become unreadable.
    """
    key = ranges_key(graph_sha256, method, percentile, samples)
    names = list(dict.fromkeys(product.activation for product in products))
    observer = make_observer(method, percentile)
    done = _resume(partial, key, observer)
    if done:
        progress.note(f"resumed behind image {done} of {len(samples)}, where an earlier run stopped")
    graph = opened(with_outputs(structure, names, onnx.TensorProto.FLOAT16), probe)
    with progress.bar(len(samples), "images", "images") as bar:
        bar.update(done)
        for number, sample in enumerate(samples[done:], start=done + 1):
            for name, values in graph.run(sample.feeds(), names).items():
                observer.observe(name, values)
            _save(partial, key, number, observer)
            on_image(number)
            bar.update()
    tensors = dict(sorted(observer.ranges().items()))
    return Ranges(key, graph_sha256, method, percentile, [sample.name for sample in samples], tensors)


def decode_ranges(file: Path) -> Ranges | None:
    """Return the ranges in ``file``, or ``None`` if there are none that can be read: they are made again then."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Ranges)
    except (OSError, msgspec.DecodeError):
        return None


def _save(file: Path, key: str, done: int, observer: Observer) -> None:
    arrays = {f"tensor/{name}": array for name, array in observer.state().items()}
    with atomic_write(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, key=np.array(key), done=np.array(done), **arrays)


def _resume(file: Path, key: str, observer: Observer) -> int:
    """Restore ``observer`` from ``file`` if it was written for the same ``key``; return the number of images done."""
    try:
        # Opened here, because NumPy leaves a file open that turns out not to be an archive.
        with file.open("rb") as stream, np.load(stream) as arrays:
            if str(arrays["key"]) != key:
                return 0
            prefix = "tensor/"
            state = {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}
            done = int(arrays["done"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return 0
    observer.restore(state)
    return done
