"""Bundle → archive for a device: the whole of ``flashvlm pack``.

::

    NAME-TARGET/
      README.md           what to type on the device
      target.env          device, precision, versions: what the scripts read
      install.sh          checks the device, makes .venv from the wheels, verifies the bundle
      build.sh            flashvlm build for this device
      requirements.txt    the runtime with the extras that the device needs
      wheels/             the runtime, and with --offline all that it needs
      bundle/             graphs of the chosen precisions, engines for the target

The same input gives the same bytes, but for what pip downloads.
"""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from tqdm.utils import CallbackIOWrapper

from flashvlm_export.bundle import Bundle
from flashvlm_export.engines import Engine, check_engine, list_engines, sidecar_of
from flashvlm_export.errors import ConfigError, DependencyError, StorageError
from flashvlm_export.export.wheel import wheel_from_source
from flashvlm_export.files import atomic_write, require_free_space, sha256_of
from flashvlm_export.manifest import MANIFEST, Manifest
from flashvlm_export.progress import Progress
from flashvlm_export.records import encode_record
from flashvlm_export.specs import Precision
from flashvlm_export.targets import JetPack, Target, find_target

# Built on the device unless it is told otherwise: the smaller the better, and calibrated means meant to be used.
_PREFERRED = (Precision.INT8, Precision.FP16, Precision.FP32)
_DEVICE_FILES = ("README.md", "build.sh", "install.sh")
# The oldest time that zip and tar tools show without complaint: an archive has no business with the clock.
_MTIME = 315532800
# What an archive spends on each member besides its content, at most.
_HEADER_BYTES = 4 * tarfile.BLOCKSIZE


@dataclass(frozen=True)
class PackSettings:
    """What ``flashvlm pack`` was asked for.

    Attributes:
        bundle: directory of the bundle.
        target: row of the target table.
        output: archive to write; ``None`` is ``NAME-TARGET.tar`` beside the bundle.
        precisions: graphs to take along; empty for all.
        offline: take the wheels of every dependency along, for a Jetson without a network.
        wheel: of this package; ``None`` builds it from the source tree that is running.
        overwrite: replace an archive that stands at ``output``.
    """

    bundle: Path
    target: str
    output: Path | None = None
    precisions: Sequence[Precision] = ()
    offline: bool = False
    wheel: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Archive:
    """What was written.

    Attributes:
        file: the archive.
        size_bytes: of it.
        sha256: of it.
        commands: what to type on the device, in order.
    """

    file: Path
    size_bytes: int
    sha256: str
    commands: list[str]


def pack(settings: PackSettings, progress: Progress | None = None) -> Archive:
    """Write the archive; on any error what stood at the output is as it was.

    Raises:
        BundleError: if the bundle, or an engine of it, is not whole.
        ConfigError: unknown target, a precision that the bundle has not, or ``offline`` for no Jetson.
        DependencyError, ExportError: if the wheels cannot be had.
        StorageError: if the archive stands there already, or the disk is full.
    """
    progress = progress or Progress()
    target = find_target(settings.target)
    jetpack = target.jetpack
    if settings.offline and jetpack is None:
        raise ConfigError(
            "only a Jetson's Python is known well enough to take its wheels along",
            received=f"--offline --target {target.name}",
            expected="a Jetson, or a device with a network",
        )
    name = f"{settings.bundle.resolve().name}-{target.name}"
    output = settings.output or settings.bundle.resolve().parent / f"{name}.tar"
    if output.exists() and not settings.overwrite:
        raise StorageError(
            "there is something at the output path already",
            received=output,
            expected="a new path, or --overwrite",
        )
    progress.step(f"checking {settings.bundle}")
    bundle = Bundle.open(settings.bundle, verify=True)
    manifest = _part(bundle, settings.precisions)
    engines = [
        engine
        for engine in list_engines(bundle)
        if engine.entry.target == target.name and engine.entry.precision in manifest.graphs
    ]
    for engine in engines:
        check_engine(bundle, engine)
    precision = next(choice for choice in _PREFERRED if choice.value in manifest.graphs)
    progress.note(f"target       {target.name}: {target.devices}, compute capability {target.capabilities}")
    progress.note(f"graphs       {', '.join(manifest.graphs)}; build.sh takes {precision.value}")
    progress.note(f"engines      {', '.join(engine.file.name for engine in engines) or 'none: build.sh builds it'}")
    with tempfile.TemporaryDirectory() as work:
        wheels = Path(work) / "wheels"
        wheel = _take_wheel(settings.wheel, wheels, progress)
        requirements = _requirements(wheel, target, engines)
        if settings.offline and jetpack is not None:
            _download(requirements, Path(work), jetpack, progress)
        device = resources.files("flashvlm_export.export") / "device"
        members: dict[str, Path | bytes] = {
            **{file: (device / file).read_bytes() for file in _DEVICE_FILES},
            "target.env": _environment(target, precision, settings.offline).encode(),
            "requirements.txt": "".join(f"{line}\n" for line in requirements).encode(),
            f"bundle/{MANIFEST}": encode_record(manifest),
            **{f"bundle/{file}": bundle.path / file for file in manifest.files},
            **{f"wheels/{file.name}": file for file in wheels.iterdir()},
        }
        for engine in engines:
            for file in (engine.file, sidecar_of(engine.file)):
                members[f"bundle/{file.relative_to(bundle.path)}"] = file
        require_free_space(output, sum(map(_size, members.values())) + _HEADER_BYTES * len(members))
        progress.step(f"writing {output}")
        with atomic_write(output) as temporary:
            _write(temporary, name, members, progress)
            size_bytes, digest = temporary.stat().st_size, sha256_of(temporary)
    progress.step(f"archive written: {output}")
    commands = [f"tar -xf {shlex.quote(output.name)}", f"cd {shlex.quote(name)}", "./install.sh"]
    if not engines:
        commands.append("./build.sh")
    visual_only = "" if manifest.decoder is not None else " --visual-only"
    which = f" {target.name} --precision {engines[0].entry.precision}" if len(engines) > 1 else ""
    commands.append(
        f'.venv/bin/flashvlm run bundle --engine{which}{visual_only} --image PHOTO --prompt "What is this?"'
    )
    return Archive(output, size_bytes, digest, commands)


def _part(bundle: Bundle, precisions: Sequence[Precision]) -> Manifest:
    """Return the manifest of a bundle with the graphs of ``precisions`` alone."""
    for precision in precisions:
        bundle.graph_file(precision)  # says how to get one that is not there
    manifest = bundle.manifest
    left_out = [name for name in manifest.graphs if precisions and Precision(name) not in precisions]
    gone = {
        file
        for precision in map(Precision, left_out)
        for file in (*bundle.graph_files(precision), *bundle.split_files(precision))
    }
    return replace(
        manifest,
        graphs={name: graph for name, graph in manifest.graphs.items() if name not in left_out},
        files={name: entry for name, entry in manifest.files.items() if name not in gone},
        checks={name: found for name, found in manifest.checks.items() if name not in left_out},
        split={name: halves for name, halves in manifest.split.items() if name not in left_out},
    )


def _take_wheel(given: Path | None, wheels: Path, progress: Progress) -> Path:
    wheels.mkdir()
    if given is None:
        progress.step("building the wheel of the runtime")
        return wheel_from_source(wheels)
    if not (given.is_file() and given.name.startswith("flashvlm_export-") and given.suffix == ".whl"):
        raise ConfigError("not a wheel of this package", received=given, expected="flashvlm_export-VERSION-….whl")
    wheel = wheels / given.name
    wheel.write_bytes(given.read_bytes())
    return wheel


def _requirements(wheel: Path, target: Target, engines: Sequence[Engine]) -> list[str]:
    """Return the lines of ``requirements.txt``, read in the directory above ``wheels/``."""
    extras = {"ort"}
    lines = []
    if target.jetpack is not None:
        # TensorRT is JetPack's; the bindings have to be of its CUDA's major version.
        major = int(target.jetpack.cuda.partition(".")[0])
        lines.append(f"cuda-python>={'12.9' if major == 12 else f'{major}.0'},<{major + 1}")
    elif "tensorrt-rtx" in {engine.entry.backend for engine in engines}:
        extras.add("rtx")
    else:
        extras.add("tensorrt")
    return [f"./wheels/{wheel.name}[{','.join(sorted(extras))}]", *lines]


def _environment(target: Target, precision: Precision, offline: bool) -> str:
    jetpack = target.jetpack
    values = {
        "TARGET": target.name,
        "DEVICES": target.devices,
        "MACHINE": target.machine,
        "PRECISION": precision.value,
        "JETPACK": jetpack.version if jetpack else "",
        "SYSTEM_TENSORRT": jetpack.tensorrt if jetpack else "",
        "PYTHON_VERSION": jetpack.python if jetpack else "",
        "OFFLINE": "yes" if offline else "",
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


def _download(requirements: Sequence[str], work: Path, jetpack: JetPack, progress: Progress) -> None:
    """Put the wheels that ``requirements`` need on the Jetson into ``wheels/``."""
    progress.step(f"downloading wheels for Python {jetpack.python} on aarch64")
    oldest, newest = 17, int(jetpack.glibc.partition(".")[2])
    platforms = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(oldest, newest + 1))]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", "wheels"]
    command += ["--implementation", "cp", "--python-version", jetpack.python]
    command += [argument for platform in platforms for argument in ("--platform", platform)]
    done = subprocess.run([*command, *requirements], cwd=work, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise DependencyError(
            "the wheels for the device cannot be downloaded",
            received="; ".join(errors[-2:]) or f"pip: exit code {done.returncode}",
            hint="leave out --offline: install.sh then fetches them on the device",
        )


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _write(file: Path, root: str, members: Mapping[str, Path | bytes], progress: Progress) -> None:
    with (
        tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive,
        progress.bar(sum(map(_size, members.values())), "packing", "B") as bar,
    ):
        for name, content in sorted(members.items()):
            info = tarfile.TarInfo(f"{root}/{name}")
            info.mtime = _MTIME
            info.mode = 0o755 if name.endswith(".sh") else 0o644
            info.size = _size(content)
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as stream:
                archive.addfile(info, CallbackIOWrapper(bar.update, stream, "read"))
