"""Many clients at one pipeline: requests per second and latency of ``Service``, beside one answer at a time.

Regime: CPU. Decode is bound by memory bandwidth, and one run for all answers under way reads the weights once; prefill
and the encoder are matrix products, which company hardly helps. Each client asks its next question when it has the
answer to the last. Questions differ in picture, words and budget; first each is answered alone, which gives the rate of
one at a time and the tokens that every later answer is compared with.

Exit code 1 if an answer is lost or differs from the one that its request got alone. Products of several answers sum in
another order than those of one: in float32 no difference is expected, in float16 or int4 near ties can make one.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from output import finish

from flashvlm_export.errors import FlashVLMError
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Answer, Pruning, Request
from flashvlm_export.runtime.service import Service
from flashvlm_export.specs import Array

QUESTIONS = (
    "What is in the picture?",
    "Where is it?",
    "What is in the picture, and where is it, seen from the lower left corner?",
)


def picture(seed: int) -> Array:
    """Return noise of a photograph's size."""
    return np.random.default_rng(seed).integers(0, 256, (480, 640, 3), np.uint8)


def questions(count: int, pictures: int, budgets: Sequence[int]) -> list[tuple[Request, Pruning]]:
    """Return ``count`` questions, all different."""
    images = [picture(seed) for seed in range(pictures)]
    return [
        (Request([images[n % pictures]], f"{QUESTIONS[n % len(QUESTIONS)]} ({n})"), Pruning(budgets[n % len(budgets)]))
        for n in range(count)
    ]


def ask_alone(vlm: Pipeline, asked: Sequence[tuple[Request, Pruning]], params: SamplingParams) -> list[Answer]:
    """Return each answer, one at a time."""
    return [vlm.answer(vlm.encode_each([one])[0], params) for one in asked]


def ask_at_once(
    vlm: Pipeline,
    asked: Sequence[tuple[Request, Pruning]],
    params: SamplingParams,
    *,
    clients: int,
    max_answers: int,
    max_wait_ms: float,
) -> tuple[list[list[int] | None], list[float], float]:
    """Let ``clients`` threads share the questions; return tokens and latency in ms of each, and seconds in all.

    An answer that is lost has neither.
    """
    said: list[list[int] | None] = [None] * len(asked)
    latency_ms: list[float] = []
    left = deque(range(len(asked)))

    def client(service: Service) -> None:
        while True:
            try:
                place = left.popleft()
            except IndexError:
                return
            start = time.perf_counter()
            try:
                said[place] = service.submit(*asked[place], params).result().token_ids
            except FlashVLMError as error:
                print(f"question {place}: {error}", file=sys.stderr)
                continue
            latency_ms.append((time.perf_counter() - start) * 1e3)

    with Service(vlm, max_answers=max_answers, max_wait_ms=max_wait_ms, max_queue=clients) as service:
        threads = [threading.Thread(target=client, args=(service,)) for _ in range(clients)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return said, latency_ms, time.perf_counter() - start


def row(clients: int, latency_ms: Sequence[float], tokens: int, seconds: float) -> dict[str, float]:
    """Return the figures of one run."""
    return {
        "clients": clients,
        "requests": len(latency_ms),
        "seconds": round(seconds, 2),
        "requests_per_second": round(len(latency_ms) / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2),
        "p50_ms": round(float(np.percentile(latency_ms, 50)), 1),
        "p99_ms": round(float(np.percentile(latency_ms, 99)), 1),
    }


def show(name: str, figures: dict[str, float], base: dict[str, float]) -> None:
    """Print a row of the table."""
    ratio = figures["requests_per_second"] / base["requests_per_second"]
    print(
        f"{name:18}{figures['requests']:9.0f}{figures['requests_per_second']:12.2f}{figures['tokens_per_second']:10.1f}"
        f"{figures['p50_ms']:10.0f}{figures['p99_ms']:10.0f}{ratio:8.2f}",
        file=sys.stderr,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="exported with --split flashvlm")
    parser.add_argument("--llm", default="onnxruntime", metavar="ENGINE", help="as of flashvlm run; one that batches")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--requests", type=int, default=64, help="different questions, which each run asks all")
    parser.add_argument("--pictures", type=int, default=8, help="different pictures; each is encoded once")
    parser.add_argument("--budgets", default="128,64,32", help="of the questions, in turn")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--max-answers", type=int, default=8, help="of the service: answers under way at once")
    parser.add_argument("--max-wait-ms", type=float, default=5.0, help="of the service: for company")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every operator")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    args = parser.parse_args()
    params = SamplingParams(max_new_tokens=args.new_tokens)
    asked = questions(args.requests, args.pictures, [int(text) for text in args.budgets.split(",")])
    try:
        return measure(args, asked, params)
    except FlashVLMError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def measure(args: argparse.Namespace, asked: Sequence[tuple[Request, Pruning]], params: SamplingParams) -> int:
    """Print the table and the result; return the exit code."""
    wrong = 0
    result: dict[str, Any] = {"benchmark": "serving_load", "rows": []}
    with Pipeline.open(args.bundle, selectors=[], llm=args.llm, threads=args.threads) as vlm:
        ask_alone(vlm, asked[: args.pictures], params)  # encodes the pictures and warms up
        print(
            f"{'':18}{'requests':>9}{'requests/s':>12}{'tokens/s':>10}{'p50, ms':>10}{'p99, ms':>10}{'ratio':>8}",
            file=sys.stderr,
        )
        start = time.perf_counter()
        answers = ask_alone(vlm, asked, params)
        seconds = time.perf_counter() - start
        expected = [answer.token_ids for answer in answers]
        tokens = sum(map(len, expected))
        alone = row(1, [sum(answer.stage_ms.values()) for answer in answers], tokens, seconds)
        show("one at a time", alone, alone)
        for clients in (int(text) for text in args.clients.split(",")):
            said, latency_ms, seconds = ask_at_once(
                vlm, asked, params, clients=clients, max_answers=args.max_answers, max_wait_ms=args.max_wait_ms
            )
            tokens = sum(len(one) for one in said if one is not None)
            figures = row(clients, latency_ms, tokens, seconds)
            figures["lost_or_different"] = sum(one != other for one, other in zip(said, expected, strict=True))
            wrong += int(figures["lost_or_different"])
            result["rows"].append(figures)
            show(f"{clients} client{'s' * (clients > 1)}", figures, alone)
        if wrong:
            print(f"{wrong} answers are lost or differ from those of each request alone", file=sys.stderr)
        result |= {
            "model": vlm.bundle.manifest.source.model,
            "llm": args.llm,
            "threads": args.threads,
            "pictures": args.pictures,
            "budgets": args.budgets,
            "new_tokens": args.new_tokens,
            "max_answers": args.max_answers,
            "max_wait_ms": args.max_wait_ms,
            "one_at_a_time": alone,
        }
    finish(result, args.output)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
