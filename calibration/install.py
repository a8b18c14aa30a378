"""Putting the finished INT8 graph into the bundle.

A reader never meets half of it: files that the manifest does not list are no part of the bundle, so a graph that is
replaced is taken off the list first, and the new one is listed last. Killed anywhere in between, the bundle opens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from flashvlm_export.bundle import Bundle, write_manifest
from flashvlm_export.files import sha256_of, storage_errors
from flashvlm_export.manifest import FileEntry, GraphEntry, Manifest
from flashvlm_export.specs import Precision

_INT8 = Precision.INT8.value
GRAPH = f"visual.{_INT8}.onnx"
RANGES = "calibration/ranges.json"
SENSITIVITY = "calibration/sensitivity.json"
#: Everything that calibration adds to a bundle.
FILES = (GRAPH, f"{GRAPH}.data", RANGES, SENSITIVITY)


def install(staging: Path, bundle: Path, entry: GraphEntry, checks: Mapping[str, dict[str, float]]) -> Bundle:
    """Move :data:`FILES` from ``staging`` into ``bundle`` and list them; the caller holds the bundle's lock.

    Args:
        staging: on the same file system; empty afterwards.
        bundle: the manifest is read anew, so that what another verb has added meanwhile stays.
        entry: of the graph.
        checks: what was measured.

    Raises:
        StorageError: if a file cannot be moved; the bundle then opens as it was, or without an INT8 graph.
    """
    with storage_errors(bundle):
        files = {name: FileEntry((staging / name).stat().st_size, sha256_of(staging / name)) for name in FILES}
        for name in FILES:
            with (staging / name).open("rb") as stream:
                os.fsync(stream.fileno())
        old = Bundle.open(bundle).manifest
        without = _without_int8(old)
        if without != old:
            write_manifest(bundle, without)
        for name in FILES:
            (bundle / name).parent.mkdir(exist_ok=True)
            (staging / name).replace(bundle / name)
        graphs = {**without.graphs, _INT8: entry}
        write_manifest(
            bundle,
            replace(
                without,
                graphs=graphs,
                files=dict(sorted({**without.files, **files}.items())),
                checks={**without.checks, _INT8: dict(checks)},
            ),
        )
    return Bundle.open(bundle)


def _without_int8(manifest: Manifest) -> Manifest:
    return replace(
        manifest,
        graphs={name: graph for name, graph in manifest.graphs.items() if name != _INT8},
        files={name: file for name, file in manifest.files.items() if name not in FILES},
        checks={name: found for name, found in manifest.checks.items() if name != _INT8},
    )
