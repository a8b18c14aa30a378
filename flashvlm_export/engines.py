"""Engines of a bundle and their sidecars, which say what each was built from.

``engines/<target>.<precision>.engine`` is for the runtime, ``….triton.engine`` for Triton.

The sidecar is written last and carries the engine's hash, so that an engine that is half-written, edited, or built from
another graph is known before anything loads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import BundleError
from flashvlm_export.files import atomic_write, sha256_of
from flashvlm_export.gpu import gpu_at_hand
from flashvlm_export.records import decode_record, encode_record
from flashvlm_export.specs import DynamicDim, Precision
from flashvlm_export.targets import TARGETS, format_capability

ENGINES = "engines"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built.

    Attributes:
        workspace_bytes: most scratch memory on the GPU that a layer may ask for; ``None`` leaves all of it.
        optimization_level: 0 (quickest build) to 5 (longest search).
        version_compatible: runs on later TensorRT releases of the same major version, with a lean runtime inside.
        hardware_compatible: runs on every GPU from Ampere on, slower than one built for it.
        strip_weights: leave the weights out; they are put in from the ONNX file when the engine is opened.
    """

    workspace_bytes: int | None = None
    optimization_level: int = 3
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False


@dataclass(frozen=True)
class EngineEntry:
    """Sidecar of one engine.

    Attributes:
        schema_version: of the sidecar; readers refuse a newer one.
        target: row of the target table, or the name of the GPU it was built on.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        backend_version: of the library that built it.
        compute_capabilities: GPUs it holds code for, such as ``8.7``.
        precision: of the graph it was built from.
        graph_sha256: over the graph and its weights, see :meth:`Bundle.graph_sha256`.
        engine_sha256: of the engine file.
        size_bytes: of the engine file.
        profiles: one or more; each lists the ranges of ``batch``, ``text`` and ``budget``.
        settings: how it was built.
        build_s: seconds the build took.
        peak_memory_bytes: largest resident memory of the building process.
        census: outputs of layers by type and dtype, such as ``{"MATRIX_MULTIPLY INT8": 140}``.
        for_triton: the budget is the width of its input ``keep``, so that Triton can batch; the runtime runs none.
    """

    schema_version: int
    target: str
    backend: str
    backend_version: str
    compute_capabilities: list[str]
    precision: str
    graph_sha256: str
    engine_sha256: str
    size_bytes: int
    profiles: list[list[DynamicDim]]
    settings: BuildSettings
    build_s: float
    peak_memory_bytes: int
    census: dict[str, int]
    for_triton: bool = False


@dataclass(frozen=True)
class Engine:
    """An engine file of a bundle and its sidecar."""

    file: Path
    entry: EngineEntry


def engine_file(bundle: Bundle, target: str, precision: Precision, *, for_triton: bool = False) -> Path:
    """Return where the engine for ``target`` belongs."""
    return bundle.path / ENGINES / f"{target}.{precision.value}{'.triton' if for_triton else ''}.engine"


def list_engines(bundle: Bundle, *, for_triton: bool = False) -> list[Engine]:
    """Return the runtime's engines, or those for Triton, by name.

    Only those that have a sidecar: files without one are leftovers of a killed build.
    """
    sidecars = sorted((bundle.path / ENGINES).glob("*.engine.json"))
    engines = [Engine(file.with_suffix(""), _read_entry(file)) for file in sidecars]
    return [engine for engine in engines if engine.entry.for_triton == for_triton]


def find_engine(
    bundle: Bundle, precision: Precision | None = None, target: str | None = None, *, for_triton: bool = False
) -> Engine:
    """Return the one engine of ``bundle`` that fits, for the runtime or for Triton; what is ``None`` may be anything.

    Without ``target``, one that has code for the GPU at hand goes before those that have none.

    Raises:
        BundleError: if there is none or more than one, with the command that builds or chooses.
    """
    engines = list_engines(bundle, for_triton=for_triton)
    fitting = [
        engine
        for engine in engines
        if precision in (None, Precision(engine.entry.precision)) and target in (None, engine.entry.target)
    ]
    if len(fitting) > 1 and target is None and (gpu := gpu_at_hand()) is not None:
        own = [engine for engine in fitting if format_capability(gpu.capability) in engine.entry.compute_capabilities]
        fitting = own or fitting
    if len(fitting) == 1:
        return fitting[0]
    raise BundleError(
        f"the bundle has no such engine{' for Triton' if for_triton else ''}" if not fitting else "several engines fit",
        received=", ".join(f"{e.entry.target} {e.entry.precision} ({e.entry.backend})" for e in fitting or engines)
        or f"{bundle.path} without engines{' for Triton' if for_triton else ''}",
        expected=f"one engine{f' in {precision.value}' if precision else ''}{f' for {target}' if target else ''}",
        hint=f"name target and precision, such as --engine {fitting[0].entry.target} "
        f"--precision {fitting[0].entry.precision}"
        if fitting
        else build_command(bundle, precision.value if precision else _usual(bundle), target, for_triton=for_triton),
    )


def check_engine(bundle: Bundle, engine: Engine, *, verify: bool = True) -> None:
    """Raise :class:`BundleError` unless the file is the one that was built, from the graph that the bundle has now.

    Without ``verify`` the file's size stands for its content.
    """
    entry = engine.entry
    command = build_command(bundle, entry.precision, entry.target, for_triton=entry.for_triton) + " --overwrite"
    if not engine.file.is_file():
        raise BundleError("the engine file is missing", received=engine.file, hint=command)
    size = engine.file.stat().st_size
    if size != entry.size_bytes or (verify and sha256_of(engine.file) != entry.engine_sha256):
        raise BundleError(
            "the engine file is damaged",
            received=f"{engine.file}: {size} bytes",
            expected=f"the {entry.size_bytes} bytes with the SHA-256 of its sidecar",
            hint=f"build it again: {command}",
        )
    if entry.graph_sha256 != bundle.graph_sha256(Precision(entry.precision)):
        raise BundleError(
            "the engine was built from another graph than the bundle has now",
            received=engine.file,
            hint=f"build it again: {command}",
        )


def _usual(bundle: Bundle) -> str:
    """Return the precision that most engines are built in, or another if the bundle has no graph in that."""
    return "fp16" if "fp16" in bundle.manifest.graphs else next(iter(bundle.manifest.graphs))


def write_entry(engine: Path, entry: EngineEntry) -> None:
    """Write the sidecar of ``engine`` atomically."""
    with atomic_write(sidecar_of(engine)) as temporary:
        temporary.write_bytes(encode_record(entry))


def sidecar_of(engine: Path) -> Path:
    """Return the sidecar's path."""
    return engine.with_name(f"{engine.name}.json")


def build_command(bundle: Bundle, precision: str, target: str | None = None, *, for_triton: bool = False) -> str:
    """Return the command that builds an engine; for a GPU that is not in the table, on the machine that has it."""
    named = f" --target {target}" if target in TARGETS else ""
    return f"flashvlm build {bundle.path} --precision {precision}{named}{' --for-triton' if for_triton else ''}"


def _read_entry(file: Path) -> EngineEntry:
    return decode_record(
        file.read_bytes(),
        EngineEntry,
        newest=SCHEMA_VERSION,
        what=str(file),
        mend="remove it, and build the engine again",
    )
