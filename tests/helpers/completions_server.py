"""A completions server as vLLM's, for its clients: answers with a torch model, or fails as it is told to."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

_REFUSALS = {
    "busy": (503, "later"),
    "key": (401, "Unauthorized"),
    "flag": (400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`."),
}


@dataclass
class Served:
    """A model behind ``url``; ``faults`` are taken one per completion, and ``requests`` hold what came."""

    model: Any
    url: str = ""
    faults: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)

    def rows(self, body: dict[str, Any]) -> torch.Tensor:
        if "prompt" in body:
            return self.model.get_input_embeddings()(torch.tensor(body["prompt"])).detach()
        return torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)

    def tokens(self, rows: torch.Tensor, count: int) -> Iterator[tuple[int, float]]:
        """Greedy tokens with their log-probabilities, each computed from the whole prompt."""
        for _ in range(count):
            with torch.no_grad():
                logits = self.model(inputs_embeds=rows[None]).logits[0, -1].log_softmax(-1)
            token = int(logits.argmax())
            yield token, float(logits[token])
            rows = torch.cat([rows, self.model.get_input_embeddings()(torch.tensor([token])).detach()])


@contextmanager
def serve(model: Any) -> Iterator[Served]:
    """Serve ``model`` on a port of this machine."""
    served = Served(model)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, content: object) -> None:
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            found = self.path == "/v1/models"
            self.reply(200 if found else 404, {"data": [{"id": "tiny", "max_model_len": 64}]} if found else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append(body | {"authorization": self.headers.get("Authorization")})
            fault = served.faults.pop(0) if served.faults else ""
            if fault in _REFUSALS:
                status, message = _REFUSALS[fault]
                return self.reply(status, {"error": {"message": message}})
            if fault == "drop":
                self.close_connection = True
                return None
            if fault == "silence":
                time.sleep(2)
            answer = served.tokens(served.rows(body), body["max_tokens"])
            if not body.get("stream"):
                token, logprob = next(answer)
                logprobs = None if fault == "no logprobs" else {"token_logprobs": [logprob]}
                return self.reply(200, {"choices": [{"text": "?", "token_ids": [token], "logprobs": logprobs}]})
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                self.stream(answer, body["stop_token_ids"], fault)
            except OSError:  # the reader has gone
                self.close_connection = True
            return None

        def stream(self, answer: Iterator[tuple[int, float]], stop: list[int], fault: str) -> None:
            for number, (token, _) in enumerate(answer):
                if fault == "break" and number == 3:
                    self.close_connection = True
                    return
                if fault == "error event" and number == 3:
                    self.event({"error": {"message": "the engine died"}})
                    break
                ids = {} if fault == "text alone" else {"token_ids": [token]}
                self.event({"choices": [{"text": "?", **ids}]})
                if token in stop:
                    break
            self.event({"choices": [], "usage": {}})
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")

        def event(self, content: object) -> None:
            self.chunk(f"data: {json.dumps(content)}\n\n".encode())

        def chunk(self, content: bytes) -> None:
            self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
