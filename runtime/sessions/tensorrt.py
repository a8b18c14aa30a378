"""The visual graph as a TensorRT or TensorRT-RTX engine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from flashvlm_export import tensorrt_api
from flashvlm_export.bundle import Bundle
from flashvlm_export.engines import Engine, EngineEntry, build_command, check_engine
from flashvlm_export.errors import SessionError
from flashvlm_export.gpu import Gpu, gpu_at_hand
from flashvlm_export.profiles import Profile, format_profile
from flashvlm_export.runtime.sessions.base import VisualOutputs, VisualSession
from flashvlm_export.runtime.sessions.tensorrt_worker import TensorRTWorker
from flashvlm_export.specs import Feeds, Precision
from flashvlm_export.targets import format_capability


class TensorRTSession(VisualSession):
    """Runs an engine of ``bundle`` on the first GPU.

    :meth:`run` is thread-safe: calls at the same time have workers of their own (stream, buffers, contexts), as many as
    there ever were calls at once; the engine with its weights is shared. Close it when no call is under way.

    Args:
        bundle: the opened bundle; the engine has to belong to its graph.
        engine: from :func:`flashvlm_export.engines.find_engine`.
        cuda_graphs: replay one CUDA graph for each combination of sizes instead of launching every kernel anew. With
            TensorRT, a run of an engine that cannot be captured is refused; TensorRT-RTX is told to capture, and does
            not tell whether it did.
    """

    name = "tensorrt"

    def __init__(self, bundle: Bundle, engine: Engine, *, cuda_graphs: bool = False) -> None:
        super().__init__(bundle.manifest.graphs[engine.entry.precision].spec)
        self.bundle = bundle
        self.engine = engine
        self.cuda_graphs = cuda_graphs
        self.profiles = [tuple(profile) for profile in engine.entry.profiles]
        self._loaded: Any = None
        self._idle: list[TensorRTWorker] = []
        self._lock = threading.Lock()

    def _open(self) -> None:
        entry = self.engine.entry
        check_engine(self.bundle, self.engine)
        self._backend = tensorrt_api.as_backend(entry.backend)
        self._trt = tensorrt_api.load(self._backend)
        rebuild = f"{build_command(self.bundle, entry.precision, entry.target)} --overwrite"
        require_fit(entry, str(self._trt.__version__), gpu_at_hand(), rebuild)
        try:
            self._load(rebuild)
            self._idle.append(self._create_worker())  # a GPU without room says so now
        except BaseException:
            self._close()
            raise

    def _load(self, rebuild: str) -> None:
        trt, entry = self._trt, self.engine.entry
        self._logger = trt.Logger(trt.Logger.ERROR)
        runtime = trt.Runtime(self._logger)
        if entry.settings.version_compatible:
            runtime.engine_host_code_allowed = True
        self._loaded = runtime.deserialize_cuda_engine(self.engine.file.read_bytes())
        if self._loaded is None:
            raise SessionError(f"{entry.backend} cannot load the engine", received=self.engine.file, hint=rebuild)
        if entry.settings.strip_weights:
            self._refit(rebuild)

    def _refit(self, rebuild: str) -> None:
        """Put the weights of the ONNX file into an engine that was built without."""
        refitter = self._trt.Refitter(self._loaded, self._logger)
        graph = self.bundle.graph_file(Precision(self.engine.entry.precision))
        if not self._trt.OnnxParserRefitter(refitter, self._logger).refit_from_file(str(graph)):
            raise SessionError("the engine does not take the weights of the graph", received=graph, hint=rebuild)
        if not refitter.refit_cuda_engine():
            raise SessionError("the engine lacks weights after refitting", received=graph, hint=rebuild)

    def _close(self) -> None:
        with contextlib.ExitStack() as stack:  # all of them, whatever one of them raises
            for worker in self._idle:
                stack.callback(worker.close)
            self._idle.clear()
        self._loaded = None

    def _create_worker(self) -> TensorRTWorker:
        captures = self.cuda_graphs and self._backend == "tensorrt"  # TensorRT-RTX does it inside of its contexts
        return TensorRTWorker(self.spec, self.profiles, self._create_context, captures=captures)

    def _create_context(self) -> Any:
        return tensorrt_api.create_context(self._trt, self._loaded, self._backend, cuda_graphs=self.cuda_graphs)

    def _run(self, feeds: Feeds) -> VisualOutputs:
        sizes = self.spec.check_feeds(feeds)
        command = build_command(self.bundle, self.engine.entry.precision, self.engine.entry.target)
        profile = choose_profile(self.profiles, sizes, command)
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        worker = worker or self._create_worker()
        try:
            return worker.run(profile, sizes, feeds)
        finally:
            self._idle.append(worker)


def require_fit(entry: EngineEntry, version: str, gpu: Gpu | None, rebuild: str) -> None:
    """Raise :class:`SessionError` unless this library version and this GPU can run the engine.

    TensorRT refuses an engine of any other version; version-compatible ones run on later releases of the same major
    version. TensorRT-RTX may run on architectures that an engine does not name; that was not tried, so it is refused.
    """
    if gpu is None:
        raise SessionError(
            "there is no NVIDIA GPU to run the engine on",
            expected=f"compute capability {', '.join(entry.compute_capabilities)}, its driver, and cuda-python",
            hint="run the bundle with ONNX Runtime: leave out --engine",
        )
    if format_capability(gpu.capability) not in entry.compute_capabilities and not entry.settings.hardware_compatible:
        raise SessionError(
            "the engine was built for another GPU",
            received=f"{gpu.name}, compute capability {format_capability(gpu.capability)}",
            expected=", ".join(entry.compute_capabilities),
            hint=f"build one for this GPU: {rebuild}",
        )
    same_major = version.split(".")[0] == entry.backend_version.split(".")[0]
    if version != entry.backend_version and not (entry.settings.version_compatible and same_major):
        raise SessionError(
            f"the engine was built with another version of {entry.backend}",
            received=version,
            expected=entry.backend_version,
            hint=f"build it again with this version: {rebuild}",
        )


def choose_profile(profiles: Sequence[Profile], sizes: Mapping[str, int], command: str) -> int:
    """Return the index of the first profile that holds ``sizes``, or raise :class:`SessionError`."""
    for index, profile in enumerate(profiles):
        if all(dim.min <= sizes[dim.name] <= dim.max for dim in profile):
            return index
    ranges = " --profile ".join(format_profile(profile) for profile in profiles)
    raise SessionError(
        "no profile of the engine holds these sizes",
        received=", ".join(f"{name} {size}" for name, size in sizes.items()),
        expected=" or ".join(format_profile(profile) for profile in profiles),
        hint=f"build with wider ranges: {command} --profile {ranges} --overwrite",
    )
