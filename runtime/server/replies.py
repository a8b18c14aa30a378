"""The answer as OpenAI's objects: ``chat.completion``, and ``chat.completion.chunk`` as server-sent events.

Source: OpenAI's API reference, "The chat completion object" and "The chat completion chunk object". Beside their fields
there is ``flashvlm``: what is kept of each image, if asked for, and the milliseconds of each stage.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from flashvlm_export.runtime.server.answering import Done, KeptTokens
from flashvlm_export.runtime.server.conversation import Box

#: Ends a stream.
DONE_EVENT = b"data: [DONE]\n\n"


@dataclass
class Reply:
    """One answer, whole or in chunks."""

    model: str
    views: Sequence[Box]
    with_selection: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def first_chunk(self, kept: Sequence[KeptTokens]) -> bytes:
        """Who speaks, and what is kept."""
        return self._chunk({"role": "assistant", "content": ""}, None, self._selection(kept))

    def text_chunk(self, text: str) -> bytes:
        """A piece of text."""
        return self._chunk({"content": text}, None, {})

    def last_chunk(self, done: Done) -> bytes:
        """Why it ended, and how long it took."""
        return self._chunk({}, done.finish_reason, {"stage_ms": done.stage_ms})

    def usage_chunk(self, done: Done) -> bytes:
        """Counts of tokens."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(done)})

    def whole(self, kept: Sequence[KeptTokens], text: str, done: Done) -> dict[str, Any]:
        """The answer in one object."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": done.finish_reason}
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": usage(done),
            "flashvlm": {**self._selection(kept), "stage_ms": done.stage_ms},
        }

    def _chunk(self, delta: dict[str, str], reason: str | None, ours: dict[str, Any]) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return event({**chunk, "flashvlm": ours} if ours else chunk)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _selection(self, kept: Sequence[KeptTokens]) -> dict[str, Any]:
        if not self.with_selection:
            return {}
        rows = zip(kept, self.views, strict=True)
        return {
            "images": [{"grids": one.grids, "kept_indices": one.indices, "view": view} for one, view in rows],
        }


def usage(done: Done) -> dict[str, int]:
    """Counts of tokens; those of the prompt are what is left after pruning, kept visual tokens included."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.new_tokens,
        "total_tokens": done.prompt_tokens + done.new_tokens,
        "visual_tokens": done.visual_tokens,
        "kept_tokens": done.kept_tokens,
    }


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
