"""Workers that take turns: other load on the machine hits all of them alike, so that their ratios hold."""

from __future__ import annotations

from collections.abc import Mapping

from flashvlm_export.report.worker import Worker

# A function that returns sooner than this is called several times in a row.
_SHORTEST_MS = 300.0


def take_turns(workers: Mapping[str, Worker], repeats: int) -> dict[str, list[float]]:
    """Return milliseconds of ``repeats`` rounds per worker, in an order that rotates, after one that does not count.

    A short function runs several times in a row, and its mean counts: inside a graph it finds its inputs in the cache
    and the threads awake, which a single call after another variant's seconds does not.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in workers}
    calls = dict.fromkeys(workers, 1)
    names = list(workers)
    for turn in range(repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            mean_ms = workers[name].mean_ms(calls[name])
            if turn:
                times_ms[name].append(mean_ms)
            else:
                calls[name] = 1 + int(_SHORTEST_MS / mean_ms)
    return times_ms
