"""Peak memory of exporting a full-size checkpoint, beside loading it the usual way.

Regime: 14 GB of float16 weights in three shards on disk, of which an export of the visual side reads 0.9 GB. What
bounds the peak is how many copies of the vision tower live at once: the torch module, the ONNX graph in torch's
exporter, the file, ONNX Runtime's session. Time is bound by the processor and says little here.

A child process runs ``flashvlm export``, another one transformers' ``from_pretrained``; both are sampled every 20 ms
with their descendants. Two numbers matter: *resident* (RSS, what ``ru_maxrss`` and container alarms see; pages of
memory-mapped files count as long as the system leaves them in) and *anonymous* (what cannot be dropped under pressure).
The checkpoint is random and is written shard by shard, tensor by tensor, so that this process stays small.

Exit code 1 if an export fails or its bundle does not open. A missed target is printed, not an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from flashvlm_export.bundle import Bundle
from flashvlm_export.errors import FlashVLMError

TARGET_BYTES = 3_500_000_000
SHARD_BYTES = 5_000_000_000
_SAMPLE_S = 0.02
# transformers 5 maps float16 shards and reads nothing; a model in use has touched every weight.
_LOAD = (
    "import sys, torch; from transformers import LlavaForConditionalGeneration as Model; "
    "model = Model.from_pretrained(sys.argv[1], dtype=torch.float16, local_files_only=True); "
    "assert all(p.device.type == 'cpu' and p.amax().isfinite() for p in model.parameters())"
)


def write_checkpoint(directory: Path, config: Mapping[str, Any]) -> int:
    """Write a float16 checkpoint in the layout of the released LLaVA-1.5 ones; return its size in bytes.

    The names and shapes come from transformers' own model on the meta device.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    full = LlavaConfig.from_dict(dict(config))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(full)
    shapes = {_released_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    del model
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        if used + 2 * int(np.prod(shape)) > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += 2 * int(np.prod(shape))
    files = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    noise = (0.02 * np.random.default_rng(0).standard_normal((1 << 24) + 17)).astype(np.float16)
    for file, shard in zip(files, shards, strict=True):
        say(f"writing {file}: {len(shard)} tensors")
        _write_shard(directory / file, shard, noise)
    total = sum((directory / file).stat().st_size for file in files)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    size = full.vision_config.image_size
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    # Last, because it is what makes the directory a checkpoint that --keep finds again.
    (directory / "config.json").write_text(full.to_json_string(), encoding="utf-8")
    return total


def _released_name(name: str) -> str:
    name = name.removeprefix("model.")
    for now, then in (
        ("language_model.", "language_model.model."),
        ("vision_tower.", "vision_tower.vision_model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(now):
            return then + name.removeprefix(now)
    return name


def _write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], noise: np.ndarray) -> None:
    """Write one safetensors file (length of the header, header, data) without ever holding it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for position, (name, shape) in enumerate(shapes.items()):
            left = int(np.prod(shape))
            if "norm" in name or "layrnorm" in name:
                file.write(np.full(left, 1.0 if name.endswith("weight") else 0.0, np.float16).tobytes())
                continue
            # Another start for every tensor: one block of noise serves all, and none repeats its neighbour.
            start = position * 7919 % len(noise)
            while left:
                piece = noise[start : start + left]
                file.write(memoryview(piece).cast("B"))
                left -= len(piece)
                start = 0


class Watched:
    """Runs a command and records the peak memory of its processes, in total and for each step it announces."""

    def __init__(self, command: list[str]) -> None:
        self.peak_rss = self.peak_anonymous = 0
        self.steps: dict[str, dict[str, int]] = defaultdict(lambda: {"rss_bytes": 0, "anonymous_bytes": 0})
        self._step = "start"
        self._ended = threading.Event()
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        sampler = threading.Thread(target=self._sample, args=(process.pid,), daemon=True)
        sampler.start()
        lines = []
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if line.startswith("["):  # "[  12.3 s] what comes now", as the command line reports its steps
                self._step = line.partition("] ")[2].strip()
        # wait4 and not wait: it gives the kernel's own peak of this child.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self._ended.set()
        sampler.join()
        self.returncode = process.returncode
        self.max_rss = usage.ru_maxrss * 1024
        self.elapsed_s = time.perf_counter() - start
        self.message = "".join(lines[-15:])

    def _sample(self, pid: int) -> None:
        while not self._ended.wait(_SAMPLE_S):
            rss = anonymous = 0
            with contextlib.suppress(psutil.Error):  # a process that ends between two looks
                root = psutil.Process(pid)
                for process in (root, *root.children(recursive=True)):
                    fields = _status(process.pid)
                    rss += fields.get("VmRSS", 0)
                    anonymous += fields.get("RssAnon", 0)
            step = self.steps[self._step]
            step["rss_bytes"] = max(step["rss_bytes"], rss)
            step["anonymous_bytes"] = max(step["anonymous_bytes"], anonymous)
            self.peak_rss, self.peak_anonymous = max(self.peak_rss, rss), max(self.peak_anonymous, anonymous)

    def as_json(self) -> dict[str, Any]:
        """Return the measurements; ``peak_rss_bytes`` is the larger of the kernel's and the sampled tree's."""
        return {
            "peak_rss_bytes": max(self.max_rss, self.peak_rss),
            "peak_anonymous_bytes": self.peak_anonymous,
            "elapsed_s": round(self.elapsed_s, 1),
        }


def _status(pid: int) -> dict[str, int]:
    """Return the memory fields of ``/proc/PID/status`` in bytes; nothing for a process that is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    pairs = (line.split() for line in text.splitlines() if line.endswith(" kB"))
    return {fields[0].rstrip(":"): int(fields[1]) * 1024 for fields in pairs}


def measure(args: argparse.Namespace, checkpoint: Path, work: Path) -> tuple[dict[str, Any], list[str]]:
    """Return measurements per child, and what went wrong."""
    results: dict[str, Any] = {}
    problems = []
    for engine_check in args.engine_check:
        name = f"flashvlm export, engine check {engine_check}"
        say(f"running {name}")
        bundle = work / "bundle"
        command = [sys.executable, "-m", "flashvlm_export", "export", args.model, "--weights", str(checkpoint)]
        command += ["--precision", args.precision, "--decoder", "none", "--engine-check", engine_check]
        export = Watched([*command, "--output", str(bundle), "--overwrite"])
        results[name] = {**export.as_json(), "steps": dict(export.steps)}
        try:
            if export.returncode != 0:
                problems.append(f"{name}: exit code {export.returncode}\n{export.message}")
            else:
                Bundle.open(bundle, verify=True)
        except FlashVLMError as error:
            problems.append(f"{name}: {error}")
        shutil.rmtree(bundle, ignore_errors=True)
    if args.transformers:
        say("running transformers' from_pretrained")
        load = Watched([sys.executable, "-c", _LOAD, str(checkpoint)])
        results["from_pretrained, every weight read"] = load.as_json()
        if load.returncode != 0:
            problems.append(f"transformers: exit code {load.returncode}\n{load.message}")
    return results, problems


def print_tables(results: Mapping[str, Any]) -> None:
    """Print the results for people, on standard error."""
    say(f"\n{'process':44}{'peak RSS GB':>13}{'anonymous GB':>14}{'seconds':>9}")
    for name, row in results.items():
        say(
            f"{name:44}{row['peak_rss_bytes'] / 1e9:13.2f}{row['peak_anonymous_bytes'] / 1e9:14.2f}"
            f"{row['elapsed_s']:9.0f}"
        )
    for name, row in results.items():
        if "steps" in row:
            met = "met" if row["peak_rss_bytes"] <= TARGET_BYTES else "MISSED"
            say(f"\n{name}: target of {TARGET_BYTES / 1e9} GB {met}")
            for step, peak in row["steps"].items():
                shown = Path(step).name if step.startswith(("exporting", "bundle written")) else step
                say(f"  {shown:50}{peak['rss_bytes'] / 1e9:7.2f}{peak['anonymous_bytes'] / 1e9:14.2f}")


def say(text: str) -> None:
    """Print for people: standard output ends with the JSON line alone."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def workspace(parent: Path | None) -> Iterator[Path]:
    """Yield a directory that is removed."""
    with tempfile.TemporaryDirectory(prefix="flashvlm-bench-", dir=parent) as directory:
        yield Path(directory)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="llava-1.5-7b", help="registry name")
    parser.add_argument("--precision", default="fp16", help="as flashvlm export takes it")
    parser.add_argument(
        "--engine-check", nargs="+", choices=("auto", "off"), default=["auto", "off"], help="one export for each"
    )
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where to put temporary files (needs 18 GB)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the checkpoint here and use it again")
    parser.add_argument(
        "--transformers", action=argparse.BooleanOptionalAction, default=True, help="measure from_pretrained too"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    from flashvlm_export.models import find_model

    entry = find_model(args.model)
    if entry is None:
        parser.error(f"--model {args.model}: not a registry name; flashvlm models lists them")
    with workspace(args.directory) as work:
        checkpoint = args.keep or work / "checkpoint"
        checkpoint.mkdir(parents=True, exist_ok=True)
        reused = (checkpoint / "config.json").is_file()
        need = (0 if reused else 2 * int(entry.parameters * 1e9)) + 4_000_000_000
        free = shutil.disk_usage(checkpoint).free
        if free < need:
            parser.error(f"{need / 1e9:.0f} GB of disk are needed and {free / 1e9:.0f} GB are free; see --directory")
        if not reused:
            # In a child, so that what transformers allocates there is gone before anything is measured.
            code = "import json, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import export_memory; "
            code += "export_memory.write_checkpoint(Path(sys.argv[2]), json.loads(sys.argv[3]))"
            here = str(Path(__file__).parent)
            config = json.dumps(dict(entry.config))
            subprocess.run([sys.executable, "-c", code, here, str(checkpoint), config], check=True)
        results, problems = measure(args, checkpoint, work)
    print_tables(results)
    for problem in problems:
        say(f"WRONG: {problem}")
    own = _status(os.getpid()).get("VmHWM", 0)
    summary = {
        "benchmark": "export_memory",
        "model": args.model,
        "precision": args.precision,
        "target_bytes": TARGET_BYTES,
        "own_peak_rss_bytes": own,
        "results": results,
        "problems": problems,
    }
    for row in results.values():
        row["steps"] = {step: peak for step, peak in row.get("steps", {}).items() if not _names_a_path(step)}
    if args.output is not None:
        args.output.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    return 1 if problems else 0


def _names_a_path(step: str) -> bool:
    return step.startswith(("exporting", "bundle written"))


if __name__ == "__main__":
    sys.exit(main())
