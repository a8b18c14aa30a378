"""What Triton Inference Server does with a model repository, as far as our models meet it, written from its documents.

It reads ``config.pbtxt`` with Triton's published schema, refuses what Triton refuses, puts requests together by the
dynamic batcher's rules and runs the ONNX file in ONNX Runtime. It is not Triton, and no engine runs in it. Sources:
docs/user_guide/model_configuration.md of the server; model_config_utils.cc, scheduler_utils.cc and
dynamic_batch_scheduler.cc of its core.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from flashvlm_export.specs import Array

PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
ORT_TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(int64)": "TYPE_INT64",
    "tensor(bool)": "TYPE_BOOL",
}


def type_name(tensor: Any) -> str:
    return model_config_pb2.DataType.Name(tensor.data_type)


def numpy_type(tensor: Any) -> Any:
    return triton_to_np_dtype(type_name(tensor).removeprefix("TYPE_"))


def read_config(directory: Path) -> Any:
    """Return the ``ModelConfig`` of a model, checked as Triton does when it loads one."""
    config = text_format.Parse((directory / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    assert config.name == directory.name
    assert PLATFORMS[config.backend] == config.platform
    versions = [path for path in directory.iterdir() if path.is_dir()]
    assert versions
    for version in versions:
        assert version.name.isdecimal()
        assert not version.name.startswith("0")
        assert (version / config.default_model_filename).is_file()
    assert config.max_batch_size >= 0
    # The batcher has nothing to put together where a run takes one request.
    assert config.HasField("dynamic_batching") == (config.max_batch_size > 1)
    for tensor in (*config.input, *config.output):
        assert tensor.name
        assert tensor.data_type != model_config_pb2.TYPE_INVALID
        assert len(tensor.dims) > 0
        assert all(size == -1 or size > 0 for size in tensor.dims)
        assert not tensor.is_shape_tensor
    for group in config.instance_group:
        assert group.count > 0
        assert config.backend == "tensorrt" or not group.profile
        assert all(profile.isdecimal() for profile in group.profile)
    inputs = {tensor.name: tensor for tensor in config.input}
    for warmup in config.model_warmup:
        assert warmup.inputs.keys() == inputs.keys()
        assert 1 <= warmup.batch_size <= max(1, config.max_batch_size)
        for name, sample in warmup.inputs.items():
            assert sample.data_type == inputs[name].data_type
            assert fits(sample.dims, inputs[name].dims)
            assert sample.WhichOneof("input_data_type") is not None
    return config


def fits(shape: Sequence[int], dims: Sequence[int]) -> bool:
    """Return whether ``shape`` is one that ``dims``, in which -1 is any size, allow."""
    return len(shape) == len(dims) and all(have == want or want == -1 for have, want in zip(shape, dims, strict=True))


class TritonStandIn:
    """Serves one model of a repository, of the ONNX Runtime backend.

    Attributes:
        batches: images of each run so far.
    """

    def __init__(self, directory: Path) -> None:
        self.config = read_config(directory)
        assert self.config.backend == "onnxruntime"
        self._session = onnxruntime.InferenceSession(
            directory / "1" / self.config.default_model_filename, providers=["CPUExecutionProvider"]
        )
        self._axis = 1 if self.config.max_batch_size else 0
        for have, want in (
            (self._session.get_inputs(), self.config.input),
            (self._session.get_outputs(), self.config.output),
        ):
            assert {value.name for value in have} == {tensor.name for tensor in want}
            types = {tensor.name: tensor for tensor in want}
            for value in have:
                shape = [size if isinstance(size, int) else -1 for size in value.shape]
                assert ORT_TYPES[value.type] == type_name(types[value.name])
                assert shape[self._axis :] == list(types[value.name].dims)
                assert shape[: self._axis] in ([], [-1])
        self.batches: list[int] = []

    def warm_up(self) -> None:
        for warmup in self.config.model_warmup:
            rows = [warmup.batch_size] * self._axis
            self._run({name: np.zeros([*rows, *each.dims], numpy_type(each)) for name, each in warmup.inputs.items()})

    def infer(self, requests: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Return the answers to requests that wait in this order when the model becomes free.

        Raises:
            ValueError: for a request that Triton answers with an error.
        """
        for request in requests:
            self._check(request)
        answers = []
        for batch in self._batches(requests):
            joined = {name: np.concatenate([each[name] for each in batch]) for name in batch[0]}
            results = self._run(joined if self._axis else batch[0])
            ends = np.cumsum([len(request["text_mask"]) for request in batch])
            self.batches.append(int(ends[-1]))
            for start, end in zip((0, *ends[:-1]), ends, strict=True):
                answers.append({name: array[start:end] for name, array in results.items()})
        return answers

    def _batches(self, requests: Sequence[Mapping[str, Array]]) -> Iterator[list[Mapping[str, Array]]]:
        """Yield what is run together: a request joins while shapes are equal and there is room."""
        variable = [tensor.name for tensor in self.config.input if -1 in tensor.dims]
        pending: list[Mapping[str, Array]] = []
        for request in requests:
            rows = sum(len(each["text_mask"]) for each in (*pending, request))
            joins = all(pending[0][name].shape[1:] == request[name].shape[1:] for name in variable if pending)
            if pending and (rows > self.config.max_batch_size or not joins):
                yield pending
                pending = []
            pending.append(request)
        if pending:
            yield pending

    def _check(self, request: Mapping[str, Array]) -> None:
        if request.keys() != {tensor.name for tensor in self.config.input}:
            raise ValueError(f"wrong inputs: {sorted(request)}")
        for tensor in self.config.input:
            array = request[tensor.name]
            if array.dtype != numpy_type(tensor) or not fits(array.shape[self._axis :], tensor.dims):
                raise ValueError(f"{tensor.name}: unexpected {array.dtype} {array.shape}")
            if self._axis and not 1 <= len(array) <= self.config.max_batch_size:
                raise ValueError(f"{tensor.name}: batch of {len(array)}")

    def _run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        names = [tensor.name for tensor in self.config.output]
        return dict(zip(names, self._session.run(names, dict(arrays)), strict=True))


class _Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, model: TritonStandIn) -> None:
        self.model = model

    def ModelConfig(self, request: Any, context: Any) -> Any:
        if request.name != self.model.config.name:
            context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model {request.name}")
        return service_pb2.ModelConfigResponse(config=self.model.config)

    def ModelInfer(self, request: Any, context: Any) -> Any:
        arrays = {
            tensor.name: np.frombuffer(content, triton_to_np_dtype(tensor.datatype)).reshape(tensor.shape)
            for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        try:
            (answer,) = self.model.infer([arrays])
        except ValueError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        for name, array in answer.items():
            response.outputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response


@contextmanager
def serving(model: TritonStandIn) -> Iterator[str]:
    """Serve ``model`` over gRPC on loopback; yield host and port."""
    server = grpc.server(ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Service(model), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
