"""``config.pbtxt``: what Triton has to know about a model, as its schema ``ModelConfig`` has it.

Written as protobuf text without the schema, which comes only with Triton's client; the tests read it back with that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flashvlm_export.profiles import Profile
from flashvlm_export.specs import GraphSpec, TensorSpec

#: First line of every configuration that is ours to replace.
HEADER = "# Written by flashvlm export-triton."

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "bool": "TYPE_BOOL"}


@dataclass(frozen=True)
class TritonBackend:
    """What runs a model inside of Triton.

    Attributes:
        name: ``backend`` of the configuration.
        platform: ``platform`` of the configuration.
        file: name of the model's file in the directory of its version.
        kind: where instances run; ``KIND_AUTO`` is a GPU where there is one.
    """

    name: str
    platform: str
    file: str
    kind: str


ONNX_RUNTIME = TritonBackend("onnxruntime", "onnxruntime_onnx", "model.onnx", "KIND_AUTO")
TENSORRT = TritonBackend("tensorrt", "tensorrt_plan", "model.plan", "KIND_GPU")


@dataclass(frozen=True)
class Batching:
    """How Triton serves a model.

    Attributes:
        max_batch: most images of one run; 0 for a model whose requests cannot be put together, which then have the
            batch axis of their own.
        max_queue_delay_us: microseconds that a request waits for company; 0 puts together what waits anyway.
        instances: copies of the model on each GPU, or on the processor.
    """

    max_batch: int
    max_queue_delay_us: int = 0
    instances: int = 1


def model_config(
    name: str,
    backend: TritonBackend,
    spec: GraphSpec,
    batching: Batching,
    profiles: Sequence[Profile] = (),
    parameters: Mapping[str, str] | None = None,
) -> str:
    """Return the text of ``config.pbtxt``.

    Args:
        name: of the model, and of its directory.
        backend: what runs it.
        spec: contract of its graph, without scalars.
        batching: how requests are put together.
        profiles: of an engine, all of which Triton then chooses from.
        parameters: notes for clients; Triton passes them on and reads none.
    """
    axis = 1 if batching.max_batch else 0  # Triton puts the batch axis in front where it batches
    profile = [f"profile: [ {', '.join(json.dumps(str(each)) for each in range(len(profiles)))} ]"]
    lines = [
        HEADER,
        f"name: {json.dumps(name)}",
        f"backend: {json.dumps(backend.name)}",
        f"platform: {json.dumps(backend.platform)}",
        f"default_model_filename: {json.dumps(backend.file)}",
        f"max_batch_size: {batching.max_batch}",
        *(line for tensor in spec.inputs for line in _block("input", _tensor(tensor, axis))),
        *(line for tensor in spec.outputs for line in _block("output", _tensor(tensor, axis))),
        *_block(
            "instance_group",
            [f"count: {batching.instances}", f"kind: {backend.kind}", *(profile if len(profiles) > 1 else [])],
        ),
    ]
    if batching.max_batch > 1:
        delay = [f"max_queue_delay_microseconds: {batching.max_queue_delay_us}"]
        lines += _block("dynamic_batching", delay if batching.max_queue_delay_us else [])
    for sizes in _warmups(spec, batching, profiles):
        lines += _block("model_warmup", _warmup(spec, sizes, axis))
    for key, value in (parameters or {}).items():
        lines += _block(
            "parameters", [f"key: {json.dumps(key)}", *_block("value", [f"string_value: {json.dumps(value)}"])]
        )
    return "\n".join(lines) + "\n"


def _block(name: str, lines: Iterable[str]) -> list[str]:
    return [f"{name} {{", *(f"  {line}" for line in lines), "}"]


def _tensor(tensor: TensorSpec, axis: int) -> list[str]:
    sizes = [size if isinstance(size, int) else -1 for size in tensor.shape[axis:]]
    return [f"name: {json.dumps(tensor.name)}", f"data_type: {_TYPES[tensor.dtype]}", f"dims: {sizes}"]


def _warmups(spec: GraphSpec, batching: Batching, profiles: Sequence[Profile]) -> list[dict[str, int]]:
    """Return the sizes to run before the first request: what a graph or each profile is optimised for."""
    sizes = [{dim.name: dim.opt for dim in profile} for profile in profiles or [spec.dims]]
    most = batching.max_batch or sizes[0]["batch"]
    if profiles:
        return [each for each in sizes if each["batch"] <= most]
    return [sizes[0] | {"batch": batch} for batch in sorted({1, most})]


def _warmup(spec: GraphSpec, sizes: Mapping[str, int], axis: int) -> list[str]:
    lines = [
        f"name: {json.dumps(' '.join(f'{name}={size}' for name, size in sizes.items()))}",
        f"batch_size: {sizes['batch'] if axis else 1}",
    ]
    for tensor in spec.inputs:
        dims = [size if isinstance(size, int) else sizes[size] for size in tensor.shape[axis:]]
        value = [f"data_type: {_TYPES[tensor.dtype]}", f"dims: {dims}", "zero_data: true"]
        lines += _block("inputs", [f"key: {json.dumps(tensor.name)}", *_block("value", value)])
    return lines
