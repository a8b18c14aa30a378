"""Time to import the runtime and to open a small bundle, each in a fresh interpreter.

Regime: bound by reading and executing Python modules and shared libraries (NumPy, Pillow, tokenizers, ONNX Runtime),
not by the model: the bundle should be a tiny one, and files are in the page cache after the first round, which does not
count. A device pays this once per process; importing torch or transformers would multiply it, so their absence is
checked.

Exit code 1 if torch or transformers was imported, or the bundle does not open. A missed target is no error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

TARGET_S = 1.0
FORBIDDEN = ("torch", "transformers", "optimum", "onnx", "onnxscript", "tensorflow")
# `python -c` and not a module of ours: nothing may be imported before the clock starts.
_CHILD = """
import sys, time
start = time.perf_counter()
from flashvlm_export.runtime.pipeline import Pipeline
imported = time.perf_counter()
pipeline = Pipeline.open(sys.argv[1], llm="onnxruntime" if sys.argv[2] == "llm" else None)
pipeline.load()
opened = time.perf_counter()
loaded = sorted({name.partition(".")[0] for name in sys.modules})
pipeline.close()
import json
print(json.dumps({"import_s": imported - start, "open_s": opened - imported, "modules": loaded}))
"""


def measure(bundle: Path, repeats: int, *, with_llm: bool) -> tuple[dict[str, Any], list[str]]:
    """Return medians over fresh interpreters, and what was wrong in any of them."""
    rounds: list[dict[str, Any]] = []
    for turn in range(repeats + 1):
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, str(bundle), "llm" if with_llm else "visual"],
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode != 0:
            return {}, [f"the bundle does not open: {(child.stderr.strip().splitlines() or ['no message'])[-1]}"]
        if turn:
            rounds.append(json.loads(child.stdout.splitlines()[-1]))
    seen = {name for one in rounds for name in one["modules"]} & set(FORBIDDEN)
    result = {key: round(statistics.median(one[key] for one in rounds), 3) for key in ("import_s", "open_s")}
    result["total_s"] = round(statistics.median(one["import_s"] + one["open_s"] for one in rounds), 3)
    result["best_total_s"] = round(min(one["import_s"] + one["open_s"] for one in rounds), 3)
    return result, [f"the runtime imports {name}" for name in sorted(seen)]


def say(text: str) -> None:
    """Print for people: standard output ends with the JSON line alone."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="a tiny bundle, written by flashvlm export")
    parser.add_argument("--repeats", type=int, default=7, help="fresh interpreters that count")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    if not (args.bundle / "manifest.json").is_file():
        parser.error(f"{args.bundle} is not a bundle: there is no manifest.json")
    has_llm = json.loads((args.bundle / "manifest.json").read_text(encoding="utf-8")).get("decoder") is not None
    summary: dict[str, Any] = {"benchmark": "start_up", "repeats": args.repeats, "target_s": TARGET_S, "results": {}}
    problems: list[str] = []
    say(f"{'opened':24}{'import s':>10}{'open s':>10}{'together':>10}{'best':>10}")
    for name, with_llm in (("visual graph", False), *([("with the decoder", True)] if has_llm else [])):
        result, wrong = measure(args.bundle, args.repeats, with_llm=with_llm)
        problems += [f"{name}: {text}" for text in wrong]
        if result:
            summary["results"][name] = result
            say(
                f"{name:24}{result['import_s']:10.2f}{result['open_s']:10.2f}{result['total_s']:10.2f}"
                f"{result['best_total_s']:10.2f}  target of {TARGET_S} s "
                f"{'met' if result['total_s'] < TARGET_S else 'MISSED'}"
            )
    for problem in problems:
        say(f"WRONG: {problem}")
    summary["problems"] = problems
    if args.output is not None:
        args.output.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
