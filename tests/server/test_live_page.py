"""Viewers of the live page: each gets what is newest, and none holds up whoever puts it there."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the page needs FastAPI")
from flashvlm_export.errors import ConfigError
from flashvlm_export.runtime.live.newest import Newest
from flashvlm_export.runtime.server import live
from flashvlm_export.runtime.server.listening import _Server, bound_socket
from flashvlm_export.runtime.server.live import Shown, showing
from flashvlm_export.runtime.server.settings import ServerSettings

WAIT_S = 20.0


Get = Callable[[str, str], http.client.HTTPResponse]


@pytest.fixture
def get() -> Iterator[Get]:
    """Asks for a path of an address; connections are closed at the end."""
    with ExitStack() as stack:

        def ask(address: str, path: str) -> http.client.HTTPResponse:
            connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=WAIT_S)
            stack.callback(connection.close)
            connection.request("GET", path)
            return stack.enter_context(connection.getresponse())

        yield ask


def next_event(stream: http.client.HTTPResponse) -> dict[str, object]:
    while not (line := stream.readline()).startswith(b"data: "):
        assert line, "the stream ended"
    event: dict[str, object] = json.loads(line.removeprefix(b"data: "))
    return event


def settings(**more: object) -> ServerSettings:
    return ServerSettings(bundle=Path("bundle"), port=0, **more)  # type: ignore[arg-type]  # each by its name


def test_a_viewer_gets_the_newest_and_nothing_that_it_missed(get: Get) -> None:
    place: Newest[Shown] = Newest()
    for number in range(1000):  # nobody looks: none is kept but the last
        place.put(Shown(b"jpeg", {"number": number}))
    with showing(place, settings()) as address:
        first, second = get(address, "/live/events"), get(address, "/live/events")
        for stream in (first, second):
            seen = next_event(stream)
            assert seen["number"] == 999
            assert seen["picture"] == "data:image/jpeg;base64,anBlZw=="
        place.put(Shown(b"other", {"number": 1000}))
        assert next_event(first)["number"] == next_event(second)["number"] == 1000
    assert next_event(first) == next_event(second) == {"ended": True}
    assert first.read().strip() == b""


def test_one_viewer_too_many_is_sent_away(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_VIEWERS", 1)
    place: Newest[Shown] = Newest()
    place.put(Shown(b"jpeg", {}))
    with showing(place, settings()) as address:
        watching = get(address, "/live.mjpg")
        assert watching.readline() == b"--frame\r\n"
        refused = get(address, "/live/events")
        assert refused.status == 503
        assert "watching already" in json.loads(refused.read())["error"]["message"]
        assert get(address, "/health").status == 200


def test_who_leaves_makes_room(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_VIEWERS", 1)
    place: Newest[Shown] = Newest()
    place.put(Shown(b"jpeg", {}))
    with showing(place, settings()) as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=WAIT_S)
        connection.request("GET", "/live.mjpg")
        with connection.getresponse() as watching:
            assert watching.readline() == b"--frame\r\n"
        connection.close()
        deadline_s = time.monotonic() + WAIT_S
        while (status := get(address, "/live.mjpg").status) == 503 and time.monotonic() < deadline_s:
            place.put(Shown(b"jpeg", {}))
        assert status == 200


def test_what_is_shown_is_not_for_pages_elsewhere(get: Get) -> None:
    with showing(Newest(), settings()) as address:
        assert get(address, "/health").headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_a_server_that_ends_before_it_listens_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **more: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(_Server, "startup", fail)
    with pytest.raises(ZeroDivisionError), showing(Newest(), settings()):
        raise AssertionError


def test_of_two_that_hold_an_address_only_one_can_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    with bound_socket("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        build = live.build_live_app

        def meanwhile(*given: Any) -> Any:
            other.listen()
            return build(*given)

        monkeypatch.setattr(live, "build_live_app", meanwhile)
        taken = ServerSettings(bundle=Path("bundle"), port=port)
        with pytest.raises(ConfigError, match="cannot listen") as caught, showing(Newest(), taken):
            raise AssertionError
    assert f"127.0.0.1 port {port}" in str(caught.value)
    assert "another --port" in str(caught.value.hint)


def test_an_address_that_is_taken_is_refused() -> None:
    with showing(Newest(), settings()) as address:
        port = int(address.rpartition(":")[2])
        taken = ServerSettings(bundle=Path("bundle"), port=port)
        with pytest.raises(ConfigError, match="cannot listen"), showing(Newest(), taken):
            raise AssertionError
