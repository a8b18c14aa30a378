"""What each client of ``http_load.py`` does, for locust: ask, read the stream, compare the answer, ask the next one.

``FLASHVLM_LOAD`` names a JSON file: the server's address, and request bodies with the answers that they got alone.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import requests
from locust import User, task

LOAD: dict[str, Any] = json.loads(Path(os.environ["FLASHVLM_LOAD"]).read_text(encoding="utf-8"))


class Client(User):
    """Asks without a pause."""

    def on_start(self) -> None:
        """Connect, once for all questions."""
        self.session = requests.Session()
        self.random = random.Random()

    @task
    def ask(self) -> None:
        """Ask one question, and tell locust how it went."""
        asked = self.random.choice(LOAD["asked"])
        start, first_ms, text, error = time.perf_counter(), None, "", None
        try:
            with self.session.post(
                f"{LOAD['url']}/v1/chat/completions", json=asked["body"], stream=True, timeout=300
            ) as response:
                if response.status_code != 200:
                    raise RuntimeError(f"{response.status_code}: {response.text[:200]}")
                for line in response.iter_lines():
                    if not line or line == b"data: [DONE]":
                        continue
                    chunk = json.loads(line.removeprefix(b"data: "))
                    if "error" in chunk:
                        raise RuntimeError(str(chunk["error"]))
                    piece = chunk["choices"][0]["delta"].get("content", "") if chunk["choices"] else ""
                    if piece and first_ms is None:
                        first_ms = (time.perf_counter() - start) * 1e3
                    text += piece
            if text != asked["answer"]:
                raise RuntimeError(f"{text!r} instead of {asked['answer']!r}")
        except Exception as caught:  # whatever it is, it is what the table has to show
            error = caught
        total_ms = (time.perf_counter() - start) * 1e3
        for name, ms in (("first token", total_ms if first_ms is None else first_ms), ("answer", total_ms)):
            self.environment.events.request.fire(
                request_type="POST", name=name, response_time=ms, response_length=len(text), exception=error, context={}
            )
