"""Viewers of the live page: each gets what is newest, and none holds up whoever puts it there.

The page itself is opened in a real browser.
"""

from __future__ import annotations

import http.client
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import Visit, chromium
from PIL import Image

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
        place.put(Shown(b"jpeg", b"with words", {"number": number}))
    with showing(place, settings()) as address:
        first, second = get(address, "/live/events"), get(address, "/live/events")
        for stream in (first, second):
            seen = next_event(stream)
            assert seen["number"] == 999
            assert seen["picture"] == "data:image/jpeg;base64,anBlZw=="
        place.put(Shown(b"other", b"with words", {"number": 1000}))
        assert next_event(first)["number"] == next_event(second)["number"] == 1000
    assert next_event(first) == next_event(second) == {"ended": True}
    assert first.read().strip() == b""


def test_one_viewer_too_many_is_sent_away(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_VIEWERS", 1)
    place: Newest[Shown] = Newest()
    place.put(Shown(b"jpeg", b"with words", {}))
    with showing(place, settings()) as address:
        watching = get(address, "/live.mjpg")
        assert watching.readline() == b"--frame\r\n"
        while watching.readline() != b"\r\n":
            pass
        assert watching.readline() == b"with words\r\n"
        refused = get(address, "/live/events")
        assert refused.status == 503
        error = json.loads(refused.read())["error"]
        assert "watching already" in error["message"]
        assert (error["type"], refused.headers["retry-after"]) == ("server_error", "1")
        for path in ("/none", "/page/none"):
            missing = get(address, path)
            assert (missing.status, json.loads(missing.read())["error"]["type"]) == (404, "invalid_request_error")
        assert get(address, "/health").status == 200


def test_who_leaves_makes_room(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_VIEWERS", 1)
    place: Newest[Shown] = Newest()
    place.put(Shown(b"frame", b"picture", {}))
    with showing(place, settings()) as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=WAIT_S)
        connection.request("GET", "/live.mjpg")
        with connection.getresponse() as watching:
            assert watching.readline() == b"--frame\r\n"
        connection.close()
        deadline_s = time.monotonic() + WAIT_S
        while (status := get(address, "/live.mjpg").status) == 503 and time.monotonic() < deadline_s:
            place.put(Shown(b"frame", b"picture", {}))
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


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """Open the page; afterwards nothing else was contacted, and the console is empty."""
    with ExitStack() as stack:
        visits = []

        def opened(base: str, **options: Any) -> Visit:
            context = browser.new_context(**options)
            stack.callback(context.close)
            context.set_default_timeout(20_000)
            visits.append(Visit(context.new_page(), base))
            visits[-1].page.goto(f"{base}/live")
            return visits[-1]

        yield opened
        for each in visits:
            each.check()


def shown(answer: str, number: int = 1) -> Shown:
    file = io.BytesIO()
    Image.new("RGB", (640, 480), "grey").save(file, "JPEG")
    told = {
        **{"prompt": "Is it <b>red</b>?", "answer": answer, "kept_tokens": 5, "visual_tokens": 16, "reconnects": 0},
        **{"latency_ms": 119.2, "latency_p50_ms": 119.2, "latency_p99_ms": 211.0, "source_fps": None},
        **{"answers_per_second": 8.8, "answered": number, "dropped": 2, "received": number + 2},
    }
    return Shown(file.getvalue(), b"with words", told)


def test_the_page_shows_answers_as_text_and_says_when_it_ends(visit: Callable[..., Visit]) -> None:
    place: Newest[Shown] = Newest()
    with showing(place, settings()) as address:
        page = visit(address).page
        markup = "<img src=x onerror=alert(1)>"
        for number, answer in enumerate([markup, "no", "no", "yes"], 1):
            place.put(shown(answer, number))
            page.locator("#figures", has_text=f"{number} in all").wait_for()
        assert page.locator("#question").text_content() == "Is it <b>red</b>?"
        assert page.locator("#answer").text_content() == "yes"
        assert page.locator("#past li").all_text_contents() == ["no", markup]
        assert page.locator("main img").count() == 1
        assert page.evaluate("() => document.querySelector('#picture').naturalHeight") == 480
    page.locator("#state", has_text="the source is at its end, or the program was stopped").wait_for()


@pytest.mark.parametrize(("width", "height", "beside"), [(1280, 720, True), (390, 844, False)])
def test_the_answer_is_in_sight_without_scrolling(
    visit: Callable[..., Visit], width: int, height: int, beside: bool
) -> None:
    place: Newest[Shown] = Newest()
    place.put(shown("yes"))
    with showing(place, settings()) as address:
        page = visit(address, viewport={"width": width, "height": height}).page
        answer = page.locator("#answer", has_text="yes").bounding_box()
        picture = page.locator("#picture").bounding_box()
        assert answer["y"] + answer["height"] < height
        assert (answer["x"] > picture["x"] + picture["width"]) == beside
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_the_page_asks_for_a_key_until_it_is_right(visit: Callable[..., Visit], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sesame\n", encoding="utf-8")
    place: Newest[Shown] = Newest()
    place.put(shown("yes"))
    with showing(place, settings(api_keys=tmp_path / "keys")) as address:
        page = (opened := visit(address)).page
        opened.expected.append("Failed to load resource.*401")
        field = page.get_by_label("This camera needs an API key")
        for key in ("wrong", "sesame"):
            field.wait_for()
            assert "API key" in page.locator("#state").inner_text()
            field.fill(key)
            field.press("Enter")
        page.locator("#answer", has_text="yes").wait_for()
        assert field.is_hidden()
