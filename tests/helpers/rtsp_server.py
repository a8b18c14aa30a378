"""An RTSP camera on loopback: answers one client at a time and sends it a transport stream over the same connection."""

from __future__ import annotations

import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Payload type of MPEG transport streams (RFC 3551), whose packets have 188 bytes; seven fit into a frame of Ethernet.
_PAYLOAD_TYPE = 33
_PACKET_BYTES = 7 * 188
_SDP = (
    f"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP {_PAYLOAD_TYPE}\r\na=control:track\r\n"
)


@contextmanager
def rtsp_camera(stream: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the address at which ``stream``, a ``.ts`` file, is sent and then broken off, and what was asked of it."""
    asked: list[str] = []

    class Camera(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while request := self._request():
                method = request[0].split()[0]
                asked.append(method)
                number = next(line for line in request if line.lower().startswith("cseq"))
                headers, body = {"Session": "1"}, ""
                if method == "OPTIONS":
                    headers = {"Public": "OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN"}
                elif method == "DESCRIBE":
                    headers, body = {"Content-Type": "application/sdp"}, _SDP
                elif method == "SETUP":
                    headers["Transport"] = "RTP/AVP/TCP;unicast;interleaved=0-1"
                lines = ["RTSP/1.0 200 OK", number, f"Content-Length: {len(body)}"]
                lines += [f"{name}: {value}" for name, value in headers.items()]
                self.wfile.write(("\r\n".join(lines) + "\r\n\r\n" + body).encode())
                if method == "PLAY":
                    self._send()
                    return

        def _request(self) -> list[str]:
            lines = []
            while line := self.rfile.readline().decode().strip():
                lines.append(line)
            return lines

        def _send(self) -> None:
            content = stream.read_bytes()
            for number, start in enumerate(range(0, len(content), _PACKET_BYTES)):
                payload = content[start : start + _PACKET_BYTES]
                header = struct.pack(">BBHII", 0x80, _PAYLOAD_TYPE, number & 0xFFFF, number * 3000, 1)
                packet = header + payload
                self.wfile.write(struct.pack(">cBH", b"$", 0, len(packet)) + packet)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

        def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
            """Say nothing: the client may go away at any time."""

    with Server(("127.0.0.1", 0), Camera) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"rtsp://127.0.0.1:{server.server_address[1]}/camera", asked
        server.shutdown()
        thread.join()
