"""Load on ``flashvlm serve`` by locust: requests per second and time to first token, pruned against unpruned.

Regime: CPU, clients and server on the same cores. Questions are those of a data set, such as ``python
benchmarks/tiny/dataset.py build/scenes/load --count 70`` writes. Each picture is encoded before it is timed, so that
what is timed is selection, prefill, decode, and the waiting of clients for each other: with 64 clients and 8 answers
under way, most of it. Every answer is compared with the one that its request got alone.

Exit code 1 if a request failed, or an answer differs. ``--soak`` adds one long run with all budgets mixed, and the
memory of the server at its beginning and end.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import requests
from output import finish

HERE = Path(__file__).parent
MIB = 1 << 20


@contextmanager
def server(bundle: Path, max_answers: int, *more: str) -> Iterator[tuple[str, psutil.Process]]:
    """Start ``flashvlm serve`` at a free port; yield its address and process."""
    options = ["--port", "0", "--positions", "original", "--max-answers", str(max_answers), "--max-queue", "64", *more]
    command = [sys.executable, "-m", "flashvlm_export", "serve", str(bundle), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = next((match for line in process.stdout if (match := re.match(r"listening at (\S+),", line))), None)
        if found is None:
            sys.exit("the server did not start")
        try:
            yield found.group(1), psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


def bodies(data: Path, model: str, budgets: list[int | str]) -> list[dict[str, Any]]:
    """Return the questions of a data set as bodies of requests, with the budgets in turn."""
    asked = []
    for number, line in enumerate(data.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        content = base64.b64encode((data.parent / row["image"]).read_bytes()).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}},
            {"type": "text", "text": row["question"]},
        ]
        body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 16}
        asked.append({**body, "token_budget": budgets[number % len(budgets)]})
    return asked


def ask_alone(url: str, asked: list[dict[str, Any]]) -> list[str]:
    """Return each answer, one at a time."""
    session, answers = requests.Session(), []
    for body in asked:
        response = session.post(f"{url}/v1/chat/completions", json=body, timeout=300)
        response.raise_for_status()
        answers.append(response.json()["choices"][0]["message"]["content"])
    return answers


def run_locust(url: str, asked: list[dict[str, Any]], answers: list[str], clients: int, seconds: int) -> dict[str, Any]:
    """Let ``clients`` ask for so long; return locust's figures."""
    rows = [{"body": {**body, "stream": True}, "answer": answer} for body, answer in zip(asked, answers, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        load = Path(folder) / "load.json"
        load.write_text(json.dumps({"url": url, "asked": rows}), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "locust",
            "-f",
            str(HERE / "http_load_client.py"),
            "--headless",
            "--only-summary",
        ]
        command += ["-u", str(clients), "-r", str(clients), "-t", f"{seconds}s", "--stop-timeout", "60"]
        command += ["--csv", f"{folder}/locust", "--exit-code-on-error", "0"]
        subprocess.run(
            command,
            env={**os.environ, "FLASHVLM_LOAD": str(load)},
            check=True,
            stdout=sys.stderr,
            stderr=subprocess.DEVNULL,
        )
        with (Path(folder) / "locust_stats.csv").open(encoding="utf-8") as file:
            stats = {row["Name"]: row for row in csv.DictReader(file)}
        with (Path(folder) / "locust_failures.csv").open(encoding="utf-8") as file:
            failures = [
                f"{row['Occurrences']} x {row['Error']}" for row in csv.DictReader(file) if row["Name"] == "answer"
            ]
    first, whole = stats["first token"], stats["answer"]
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": int(whole["Request Count"]),
        "failed_or_different": int(whole["Failure Count"]),
        "failures": failures,
        "requests_per_second": round(float(whole["Requests/s"]), 2),
        **{f"first_token_p{p}_ms": float(first[f"{p}%"]) for p in (50, 99)},
        **{f"answer_p{p}_ms": float(whole[f"{p}%"]) for p in (50, 99)},
    }


def watched(process: psutil.Process | None, every_s: float, stop: threading.Event, sizes: list[float]) -> None:
    """Note the memory of ``process``, in MiB, until told to stop."""
    while process is not None and not stop.wait(every_s):
        sizes.append(process.memory_info().rss / MIB)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="exported with --split")
    parser.add_argument("--url", help="load a server that runs already, with this bundle, instead of one of our own")
    parser.add_argument("data", type=Path, help="questions, as flashvlm eval reads them")
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--budgets", default="128,full")
    parser.add_argument("--seconds", type=int, default=30, help="of each run")
    parser.add_argument("--soak", type=int, default=0, metavar="SECONDS", help="length of a last run with 64 clients")
    parser.add_argument("--max-answers", type=int, default=8, help="of the server: answers under way at once")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    budgets = [text if text == "full" else int(text) for text in args.budgets.split(",")]
    result: dict[str, Any] = {"benchmark": "http_load", "max_answers": args.max_answers, "rows": []}
    with nullcontext((args.url, None)) if args.url else server(args.bundle, args.max_answers) as (url, process):
        model = requests.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
        print(
            f"{'budget':>8}{'clients':>9}{'requests/s':>12}{'first token p50, p99, ms':>28}{'wrong':>7}",
            file=sys.stderr,
        )
        alone = {}
        for budget in budgets:
            asked = bodies(args.data, model, [budget])
            alone[budget] = ask_alone(url, asked)
            for clients in (int(text) for text in args.clients.split(",")):
                row = {"budget": budget, **run_locust(url, asked, alone[budget], clients, args.seconds)}
                result["rows"].append(row)
                times = f"{row['first_token_p50_ms']:.0f}, {row['first_token_p99_ms']:.0f}"
                rate, wrong = row["requests_per_second"], row["failed_or_different"]
                print(f"{budget:>8}{clients:>9}{rate:>12.2f}{times:>28}{wrong:>7}", file=sys.stderr)
        if args.soak:
            asked = bodies(args.data, model, [16, 64, 128, "full"])
            answers, sizes, stop = ask_alone(url, asked), [], threading.Event()
            watcher = threading.Thread(target=watched, args=(process, 5.0, stop, sizes))
            watcher.start()
            row = run_locust(url, asked, answers, 64, args.soak)
            stop.set()
            watcher.join()
            if sizes:
                tenth = max(1, len(sizes) // 10)
                parts = {"second_tenth": sizes[tenth : 2 * tenth], "last_tenth": sizes[-tenth:], "all": sizes}
                row |= {f"rss_mib_{name}": round(max(part, default=0.0), 1) for name, part in parts.items()}
            result["soak"] = row
            print(f"soak: {row}", file=sys.stderr)
    finish(result, args.output)
    rows = [*result["rows"], *([result["soak"]] if args.soak else [])]
    return 1 if any(row["failed_or_different"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
