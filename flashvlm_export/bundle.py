"""A bundle on disk: the directory that ``flashvlm export`` writes and every later stage opens.

::

    manifest.json           what is here (see ``manifest.py``)
    visual.fp32.onnx        the fused graph; weights in visual.fp32.onnx.data
    visual.fp16.onnx        the same in half precision, selection still float32
    visual.int8.onnx        optional: explicit Q/DQ, by flashvlm calibrate; ranges and tables in calibration/
    encoder.fp32.onnx       optional: the fused graph up to the selector, on the same weights
    selector.NAME.fp32.onnx optional: selectors for it, without weights
    text_embeddings.npy     the LLM's input embeddings [vocab, D], memory-mapped
    tokenizer.json          as the tokenizers library writes it
    chat_template.jinja     rendered in a sandbox
    preprocessor.json       settings of the image processor
    llm/model.onnx          optional: the decoder that takes embeddings
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashvlm_export.errors import BundleError, ConfigError
from flashvlm_export.files import atomic_write, sha256_of
from flashvlm_export.manifest import MANIFEST, FileEntry, Manifest, SplitGraphs, decode_manifest
from flashvlm_export.records import encode_record
from flashvlm_export.selection import get_selector
from flashvlm_export.specs import Precision

NEWLINE = "image_newline.npy"
TEXT_EMBEDDINGS = "text_embeddings.npy"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
PREPROCESSOR = "preprocessor.json"
VIDEO_PREPROCESSOR = "video_preprocessor.json"

# Files up to this size are hashed whenever a bundle is opened; `flashvlm inspect --verify` hashes all.
_HASHED_ON_OPEN_BYTES = 64 << 20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its directory and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Bundle:
        """Read the manifest and check the files.

        Every file must be there with its recorded size; those up to 64 MiB, or all with ``verify``, must also have
        the recorded SHA-256.

        Raises:
            BundleError: naming what is missing, damaged or too new, and the command that mends it.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise BundleError(
                "there is no bundle at this path",
                received=f"{path} ({_reason(path)})",
                expected="a directory written by flashvlm export",
                hint=f"this is a checkpoint; export it: flashvlm export {path} --output BUNDLE"
                if (path / "config.json").is_file()
                else "give the directory that was exported, or export one: flashvlm export MODEL --output BUNDLE",
            )
        bundle = cls(path, decode_manifest((path / MANIFEST).read_bytes()))
        bundle._check_files(verify)
        return bundle

    def file(self, name: str) -> Path:
        """Return the path of a file the manifest lists; raise :class:`BundleError` if it lists none of that name."""
        if name not in self.manifest.files:
            raise BundleError(
                f"the bundle has no {name}",
                received=f"{self.path}: {', '.join(sorted(self.manifest.files))}",
                hint=f"export again from a checkpoint that has it: {self.export_command()}",
            )
        return self.path / name

    def graph_file(self, precision: Precision) -> Path:
        """Return the ONNX file for ``precision``; raise :class:`ConfigError` if the bundle has none."""
        entry = self.manifest.graphs.get(precision.value)
        if entry is None:
            raise ConfigError(
                "the bundle has no visual graph in this precision",
                received=precision.value,
                expected=f"one of {', '.join(self.manifest.graphs)}",
                hint=f"flashvlm calibrate {self.path}"
                if precision is Precision.INT8
                else self.export_command(*map(Precision, self.manifest.graphs), precision),
            )
        return self.file(entry.file)

    def graph_files(self, precision: Precision) -> dict[str, FileEntry]:
        """Return the files of the graph for ``precision``: the ONNX file and its weights.

        Raises:
            ConfigError: if the bundle has no such graph.
        """
        graph = self.graph_file(precision).name
        return {name: entry for name, entry in sorted(self.manifest.files.items()) if name.startswith(graph)}

    def split_graphs(self, precision: Precision) -> SplitGraphs:
        """Return encoder and selectors for ``precision``; raise :class:`ConfigError` if the bundle has none."""
        halves = self.manifest.split.get(precision.value)
        if halves is None:
            raise ConfigError(
                "the bundle has no encoder and selector as graphs of their own in this precision",
                received=precision.value,
                expected=f"one of {', '.join(self.manifest.split)}"
                if self.manifest.split
                else "a bundle that has them",
                hint=f"--precision {next(iter(self.manifest.split))}"
                if self.manifest.split
                else f"fp32 and fp16 can have them: {self.export_command(split=[self.manifest.selection.selector])}",
            )
        return halves

    def split_files(self, precision: Precision) -> dict[str, FileEntry]:
        """Return the files of encoder and selectors for ``precision``, without the weights; empty if there are none."""
        halves = self.manifest.split.get(precision.value)
        names = [halves.encoder.file, *(entry.file for entry in halves.selectors.values())] if halves else []
        return {name: self.manifest.files[name] for name in names}

    def graph_sha256(self, precision: Precision, *, verify: bool = False) -> str:
        """Return one hash over the files of a graph, from the manifest.

        Args:
            precision: of the graph.
            verify: read the files, and refuse what the manifest does not say.

        Raises:
            BundleError: if a file is not what was written.
            ConfigError: if the bundle has no such graph.
        """
        files = self.graph_files(precision)
        for name, entry in files.items() if verify else ():
            have = sha256_of(self.path / name)
            if have != entry.sha256:
                raise BundleError(
                    f"{name} is damaged: its content has changed",
                    received=f"SHA-256 {have}",
                    expected=entry.sha256,
                    hint=f"copy it again from where it is whole, or export it again: {self.export_command()}",
                )
        return hashlib.sha256("\n".join(f"{name} {entry.sha256}" for name, entry in files.items()).encode()).hexdigest()

    def export_command(self, *precisions: Precision, split: Sequence[str] = ()) -> str:
        """Return the command that replaces this bundle, by one with other precisions or split selectors if named."""
        source = self.manifest.source
        weights = "DIR" if source.weights == "checkpoint" else source.weights
        command = f"flashvlm export {source.model} --weights {weights} --output {self.path} --overwrite"
        selection = self.manifest.selection
        command += "" if selection.selector == "flashvlm" else f" --selector {selection.selector}"
        for name, value in selection.config.items():
            if value != getattr(get_selector(selection.selector).config_type(), name):
                command += f" --set {name}={value}"
        if not split and self.manifest.split:
            split = list(next(iter(self.manifest.split.values())).selectors)
        if split:
            command += f" --split {','.join(name for name in split if name != selection.selector)}".rstrip()
        if precisions:
            command += f" --precision {','.join(precision.value for precision in precisions)}"
        return command

    def _check_files(self, verify: bool) -> None:
        problems = []
        for name, entry in self.manifest.files.items():
            file = self.path / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                problems.append(f"{name}: points outside of the bundle")
            elif not file.is_file():
                problems.append(f"{name}: missing")
            elif (size := file.stat().st_size) != entry.size_bytes:
                problems.append(f"{name}: {size} bytes instead of {entry.size_bytes}")
            elif (verify or size <= _HASHED_ON_OPEN_BYTES) and sha256_of(file) != entry.sha256:
                problems.append(f"{name}: content differs from what was written (SHA-256)")
        if problems:
            raise BundleError(
                "the bundle is damaged",
                received="\n            ".join([str(self.path), *problems]),
                expected="every file as manifest.json lists it",
                hint=f"copy it again from where it is whole, or export it again: {self.export_command()}",
            )


def _reason(path: Path) -> str:
    if path.is_dir():
        return f"no {MANIFEST}"
    return "not a directory" if path.exists() else "no such directory"


def describe_files(directory: Path, on_bytes: Callable[[int], object] = lambda count: None) -> dict[str, FileEntry]:
    """Return size and hash of every file below ``directory`` except the manifest.

    ``on_bytes`` is called with the number of bytes hashed since the last call.
    """
    return {
        str(file.relative_to(directory)): FileEntry(file.stat().st_size, sha256_of(file, on_bytes))
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` atomically."""
    with atomic_write(directory / MANIFEST) as temporary:
        temporary.write_bytes(encode_record(manifest))
