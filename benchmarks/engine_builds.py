"""What TensorRT-RTX makes of a bundle's graphs: seconds, peak memory and size of each engine.

Regime: ahead-of-time compilation without a GPU; no kernel is timed, so the time goes into reading the weights, fusing
the graph and generating code, on one core. Each engine is built by ``flashvlm build`` in a process of its own, whose
largest resident memory is what the sidecar records; pages of the memory-mapped ONNX weights count. A ratio of that to
the engine's size says how many copies of the weights live at once; small engines are all fixed cost, some 400 MB.

Exit code 1 if a build fails. A missed target is printed, not an error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from output import finish

from flashvlm_export.bundle import Bundle

TARGET_RATIO = 3.0
# Engines below this size have no target.
LARGE_BYTES = 100_000_000
TARGETS = ("a100", "rtx-30", "rtx-40", "rtx-50")


def build(bundle: Path, precision: str, target: str) -> dict[str, Any]:
    """Build one engine and return its sidecar."""
    command = [sys.executable, "-m", "flashvlm_export", "build", str(bundle), "--precision", precision]
    command += ["--target", target, "--backend", "tensorrt-rtx", "--overwrite", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    sidecar: dict[str, Any] = json.loads(done.stdout)["sidecar"]
    return sidecar


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("bundle", type=Path, nargs="+", help="bundles; not changed")
    parser.add_argument("--target", nargs="+", default=TARGETS, help="rows of the target table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    rows = []
    print(
        f"{'bundle':20}{'graph':>7}{'target':>9}{'seconds':>9}{'size MB':>9}{'peak MB':>9}{'ratio':>7}", file=sys.stderr
    )
    for path in args.bundle:
        with tempfile.TemporaryDirectory(dir=path.resolve().parent) as temporary:
            # Links to the bundle's files in place of copies, so that its own engines stay as they are.
            shadow = Path(temporary, path.name)
            shadow.mkdir()
            for file in path.resolve().iterdir():
                if file.name != "engines":
                    (shadow / file.name).symlink_to(file)
            for precision in Bundle.open(shadow).manifest.graphs:
                for target in args.target:
                    sidecar = build(shadow, precision, target)
                    size, peak = sidecar["size_bytes"], sidecar["peak_memory_bytes"]
                    rows.append(
                        {
                            "bundle": path.name,
                            **{key: sidecar[key] for key in ("precision", "target", "compute_capabilities", "build_s")},
                            **{"size_bytes": size, "peak_memory_bytes": peak, "census": sidecar["census"]},
                        }
                    )
                    missed = size > LARGE_BYTES and peak > TARGET_RATIO * size
                    print(
                        f"{path.name:20}{precision:>7}{target:>9}{sidecar['build_s']:9.1f}{size / 1e6:9.1f}"
                        f"{peak / 1e6:9.0f}{peak / size:7.2f}{'  MISSED' if missed else ''}",
                        file=sys.stderr,
                        flush=True,
                    )
    result = {"benchmark": "engine_builds", "target_ratio": TARGET_RATIO, "engines": rows}
    finish(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
