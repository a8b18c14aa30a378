"""The page in a real browser, against the real server, and against a scripted one where the moment matters.

Cells that are lit are read from the pixels of the canvas: the pictures are white, and what is not kept is dimmed.
"""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import Visit, chromium
from helpers.scripted_server import (
    PAGE,
    Refusal,
    ScriptedServer,
    answer,
    ending,
    scripted_server,
    selection,
    words,
)
from PIL import Image

pytest.importorskip("fastapi", reason="the server needs the extra serve")

from helpers.serving import serving, user

KEY = "sesame"
QUESTION = "Is there a cat?"
FAILED_TO_LOAD = "Failed to load resource"

Open = Callable[..., Visit]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[str]:
    with serving(tiny_bundle, "--precision", "fp32") as process:
        yield process.url


@pytest.fixture
def script() -> Iterator[ScriptedServer]:
    with scripted_server() as opened:
        yield opened


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Open the page; afterwards nothing else was contacted, and the console is empty."""
    with ExitStack() as stack:
        visits = []

        def opened(base: str, *, ready: bool = True, **options: Any) -> Visit:
            context = browser.new_context(**options)
            stack.callback(context.close)
            context.set_default_timeout(20_000)
            visits.append(Visit(context.new_page(), base))
            visits[-1].page.goto(base)
            if ready:
                visits[-1].page.locator("#budget:enabled").wait_for()
            return visits[-1]

        yield opened
        for each in visits:
            each.check()


def white(width: int, height: int | None = None) -> bytes:
    """A white picture; each test has a size of its own, so that the server has not seen it in another."""
    file = io.BytesIO()
    Image.new("RGB", (width, height or width), "white").save(file, "PNG")
    return file.getvalue()


def choose(page: Any, content: bytes, name: str = "white.png", kind: str = "image/png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})
    page.locator("#caption", has_text=name).wait_for()


def ask(page: Any, question: str = QUESTION) -> None:
    page.fill("#question", question)
    page.click("#ask")


def answered(page: Any, count: int = 1) -> None:
    """Wait until so many questions are answered, with their times, and nothing runs."""
    page.locator(f".turns > li:nth-child({count}) .times").wait_for()
    page.locator("#stop").wait_for(state="hidden")


def alert(page: Any) -> str:
    page.locator("#alert:visible").wait_for()
    return page.locator("#alert p").inner_text()


def lit(page: Any, rows: int, columns: int, view: tuple[float, float, float, float] = (0, 0, 1, 1)) -> list[int]:
    """Cells whose middle is as white as the picture; ``view`` is where the grid lies in the canvas."""
    return page.evaluate(
        """([rows, columns, [left, top, right, bottom]]) => {
            const canvas = document.querySelector("#canvas");
            const context = canvas.getContext("2d");
            const cells = [];
            for (let cell = 0; cell < rows * columns; cell++) {
                const x = left + (right - left) * (cell % columns + 0.5) / columns;
                const y = top + (bottom - top) * (Math.floor(cell / columns) + 0.5) / rows;
                const [red, green, blue] = context.getImageData(x * canvas.width, y * canvas.height, 1, 1).data;
                if (Math.min(red, green, blue) > 250) cells.push(cell);
            }
            return cells;
        }""",
        [rows, columns, list(view)],
    )


def wait_until_lit(page: Any, expected: list[int], *grid: Any) -> None:
    """Wait for the cells to have come up, and show what is lit instead if they never do."""
    for _ in range(500):
        if (found := lit(page, *grid)) == expected:
            return
        page.evaluate("() => new Promise(requestAnimationFrame)")
    assert found == expected


def api(base: str, content: bytes, budget: int | str, question: str = QUESTION) -> dict[str, Any]:
    """What the HTTP API answers."""
    body = {"model": model(base)["id"], "messages": [user(question, content)]}
    sent = json.dumps({**body, "token_budget": budget, "selection": True}).encode()
    request = urllib.request.Request(f"{base}/v1/chat/completions", sent, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def model(base: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{base}/v1/models", timeout=60) as response:
        return json.load(response)["data"][0]


def text_of(whole: dict[str, Any]) -> str:
    return whole["choices"][0]["message"]["content"]


def hand_over(page: Any, event: str, content: bytes) -> None:
    """Let an event bring a picture, as the browser does when something is dropped or pasted."""
    page.evaluate(
        """([event, encoded]) => {
            const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "white.png", { type: "image/png" }));
            const options = { bubbles: true, cancelable: true };
            document.body.dispatchEvent(event === "paste"
                ? new ClipboardEvent(event, { ...options, clipboardData: transfer })
                : new DragEvent(event, { ...options, dataTransfer: transfer }));
        }""",
        [event, base64.b64encode(content).decode()],
    )
    page.locator("#canvas:visible").wait_for()


def test_text_that_brings_a_picture_of_itself_is_text(visit: Open, server: str) -> None:
    """As office programs put it into the clipboard."""
    page = visit(server).page
    choose(page, white(60))
    page.fill("#count", "6")
    page.fill("#question", "So")
    page.evaluate(
        """(encoded) => {
            const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.setData("text/plain", "1\\t2");
            transfer.items.add(new File([bytes], "cells.png", { type: "image/png" }));
            const event = new ClipboardEvent("paste", { bubbles: true, cancelable: true, clipboardData: transfer });
            document.querySelector("#question").dispatchEvent(event);
        }""",
        base64.b64encode(white(30)).decode(),
    )
    ask(page)
    answered(page)
    assert page.locator(".answer").text_content() == text_of(api(server, white(60), 6))
    assert "Pasted picture" not in page.locator("body").inner_text()


# ---- what it asks, and what it shows


@pytest.mark.parametrize(("way", "side"), [("choose", 80), ("drop", 81), ("paste", 82)])
def test_an_answer_is_the_apis_for_the_same_bytes(visit: Open, server: str, way: str, side: int) -> None:
    content = white(side)
    page = (opened := visit(server)).page
    choose(page, content) if way == "choose" else hand_over(page, way, content)
    page.fill("#count", "7")
    ask(page)
    answered(page)
    expected = api(server, content, 7)
    assert text_of(expected)
    assert page.locator(".answer").text_content() == text_of(expected)
    (sent,) = opened.asked
    assert sent["messages"] == [user(QUESTION, content)]


@pytest.mark.parametrize("budget", [1, 6])
def test_as_many_cells_are_lit_as_are_kept_and_the_right_ones(visit: Open, server: str, budget: int) -> None:
    page = visit(server).page
    choose(page, content := white(90 + budget))
    wait_until_lit(page, list(range(16)), 4, 4)
    page.fill("#count", str(budget))
    ask(page)
    (image,) = api(server, content, budget)["flashvlm"]["images"]
    assert len(image["kept_indices"]) == budget
    wait_until_lit(page, image["kept_indices"], 4, 4)
    assert page.locator(".kept").text_content().startswith(f"{budget} of 16 tokens")
    assert f"{budget} of 16 visual tokens" in page.get_attribute("#canvas", "aria-label")
    page.click("#lit")
    wait_until_lit(page, list(range(16)), 4, 4)
    page.click("#lit")
    wait_until_lit(page, image["kept_indices"], 4, 4)


def test_the_slider_has_the_models_range(visit: Open, server: str) -> None:
    page, ours = visit(server).page, model(server)["flashvlm"]
    for field in ("#budget", "#count"):
        assert page.get_attribute(field, "min") == "1"
        assert page.get_attribute(field, "max") == str(ours["visual_tokens"])
        assert page.input_value(field) == str(ours["default_budget"])
    page.focus("#budget")
    page.keyboard.press("End")
    assert page.input_value("#count") == str(ours["visual_tokens"])
    page.fill("#count", "1000")
    page.press("#count", "Tab")
    assert page.input_value("#count") == page.input_value("#budget") == str(ours["visual_tokens"])
    assert page.locator("#selector option").all_inner_texts() == ours["selectors"]


def test_a_chosen_selector_is_asked_for(visit: Open, server: str) -> None:
    page = (opened := visit(server)).page
    choose(page, white(83))
    page.select_option("#selector", "divprune")
    ask(page)
    answered(page)
    assert opened.asked[0]["selector"] == "divprune"


def test_both_runs_stand_beside_each_other(visit: Open, server: str) -> None:
    page = (opened := visit(server)).page
    choose(page, content := white(84))
    page.fill("#count", "5")
    page.check("#compare")
    ask(page)
    page.locator("table").wait_for()
    assert page.locator(".kept").all_inner_texts() == ["5 of 16 tokens 31 %", "16 of 16 tokens"]
    wholes = [api(server, content, each) for each in (5, "full")]
    assert page.locator(".answer").all_text_contents() == [text_of(whole) for whole in wholes]
    assert [body["token_budget"] for body in opened.asked] == [5, "full"]
    assert not any("max_tokens" in body for body in opened.asked), "how long an answer is, the server says"
    assert opened.asked[0]["messages"] == opened.asked[1]["messages"]

    pruned, full = page.get_by_role("button", name="Show these tokens on the picture").all()
    assert (pruned.get_attribute("aria-pressed"), full.get_attribute("aria-pressed")) == ("true", "false")
    wait_until_lit(page, wholes[0]["flashvlm"]["images"][0]["kept_indices"], 4, 4)
    full.click()
    wait_until_lit(page, list(range(16)), 4, 4)

    rows = {row[0]: row[1:] for row in (line.split("\t") for line in page.locator("tbody tr").all_inner_texts())}
    assert re.fullmatch(r"[\d.]+ m?s [\d.]+ m?s [\d.]+×", " ".join(rows["first token"]))
    assert {"prefill", "decode", "select", "encode"} <= rows.keys()
    # Encoded for the first run only, which must not count against it.
    assert rows["encode"][1] == "–"
    assert "Not counting the encoding of the picture" in page.locator("figcaption").inner_text()


def test_a_follow_up_continues_and_reuses_the_picture(visit: Open, server: str) -> None:
    page = (opened := visit(server)).page
    choose(page, white(85))
    page.get_by_label("Continue from earlier answers").check()
    ask(page)
    answered(page)
    ask(page, "And a dog?")
    answered(page, 2)
    first, second = (body["messages"] for body in opened.asked)
    said = page.locator(".answer").first.text_content()
    assert second == [*first, {"role": "assistant", "content": said}, {"role": "user", "content": "And a dog?"}]
    before, after = page.locator(".turns > li").all()
    assert "encode" in before.locator("dt").all_inner_texts()
    assert "encode" not in after.locator("dt").all_inner_texts()
    assert "Picture reused" not in before.inner_text()
    assert "Picture reused" in after.inner_text()

    choose(page, white(86), "other.png")
    assert page.locator(".turns > li").count() == 0
    ask(page, "What is new?")
    answered(page)
    assert len(opened.asked[2]["messages"]) == 1


def test_a_question_stands_alone_unless_it_is_to_go_on(visit: Open, server: str) -> None:
    page = (opened := visit(server)).page
    assert not page.get_by_label("Continue from earlier answers").is_checked()
    choose(page, content := white(79))
    ask(page)
    answered(page)
    ask(page, "And a dog?")
    answered(page, 2)
    assert opened.asked[1]["messages"] == [user("And a dog?", content)]
    assert "Picture reused" in page.locator(".turns > li").nth(1).inner_text()


def test_what_is_no_number_leaves_the_budget_as_it_was(visit: Open, script: ScriptedServer) -> None:
    page = (opened := visit(script.base)).page
    page.fill("#count", "7")
    page.press("#count", "Tab")
    for typed, left in (("", "7"), ("-", "7"), ("0", "1"), ("99", "16"), ("3", "3"), ("", "3")):
        page.fill("#count", "")
        page.locator("#count").press_sequentially(typed)
        page.press("#count", "Tab")
        assert page.input_value("#count") == page.input_value("#budget") == left
    choose(page, white(40))
    page.fill("#question", QUESTION)
    page.fill("#count", "")
    page.press("#count", "Enter")
    answered(page)
    assert page.input_value("#count") == "3"
    assert opened.asked[0]["token_budget"] == 3


def test_what_no_stage_took_stands_by_itself(visit: Open, script: ScriptedServer) -> None:
    def slow(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        time.sleep(0.1)  # before any stage
        yield from answer(body)

    page = visit(script.base).page
    script.script = slow
    choose(page, white(40))
    ask(page)
    answered(page)
    terms = page.locator(".legend dt").all_inner_texts()
    times = dict(zip(terms, map(milliseconds, page.locator(".legend dd").all_inner_texts()), strict=True))
    first, whole = times.pop("first token"), times.pop("whole answer")
    assert 100 <= first <= whole
    assert sum(times.values()) == pytest.approx(whole, abs=1.5)  # as rounded
    assert times["elsewhere"] >= 60
    assert "Elsewhere: browser" in page.locator(".times").inner_text()


def milliseconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"ms": 1, "s": 1000}[unit]


def test_a_large_picture_is_made_smaller_first(visit: Open, server: str) -> None:
    page = (opened := visit(server)).page
    choose(page, white(2500, 1250))
    assert page.locator("#caption").inner_text() == "white.png, 2500 × 1250, sent as a smaller JPEG of 2048 × 1024"
    ask(page)
    answered(page)
    url = opened.asked[0]["messages"][0]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")))) as sent:
        assert (sent.format, sent.size) == ("JPEG", (2048, 1024))


def test_the_camera_takes_a_picture(visit: Open, server: str) -> None:
    page = (opened := visit(server)).page
    page.click("#camera-open")
    page.click("#camera-take")
    page.locator("#caption", has_text="Camera picture").wait_for()
    assert page.evaluate("() => document.querySelector('#video').srcObject") is None
    ask(page)
    answered(page)
    assert opened.asked[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")


# ---- what goes wrong


def test_what_is_no_picture_is_refused_and_the_question_stays(visit: Open, server: str) -> None:
    page = (opened := visit(server)).page
    ask(page)
    assert alert(page) == "Choose a picture first."
    page.set_input_files("#file", {"name": "notes.pdf", "mimeType": "application/pdf", "buffer": b"%PDF-1.7"})
    page.locator("#alert", has_text="notes.pdf is not a picture").wait_for()
    assert page.input_value("#question") == QUESTION
    assert opened.asked == []


def test_a_refusal_is_shown_in_the_servers_words_and_the_question_stays(visit: Open, server: str) -> None:
    page = (opened := visit(server)).page
    opened.expected.append(f"{FAILED_TO_LOAD}.*400")
    choose(page, white(87))
    ask(page, long := "cat " * 9000)
    assert "a prompt has at most 4096 tokens of text here" in alert(page)
    assert page.get_attribute("#alert", "role") == "alert"
    assert page.get_by_role("button", name="Try again").count() == 0
    assert page.input_value("#question") == long.strip()
    assert page.locator(".turns > li").count() == 0


def test_asking_again_helps_after_the_server_was_away(visit: Open, server: str) -> None:
    page = (opened := visit(server)).page
    opened.expected.append("ERR_CONNECTION_REFUSED")
    choose(page, white(88))
    page.route("**/chat/completions", lambda route: route.abort("connectionrefused"))
    ask(page)
    assert "cannot be reached" in alert(page)
    assert page.input_value("#question") == QUESTION
    page.unroute("**/chat/completions")
    page.get_by_role("button", name="Try again").click()
    answered(page)
    assert page.locator("#ask").evaluate("button => button === document.activeElement")
    assert page.locator("#alert").is_hidden()
    assert page.input_value("#question") == ""


def test_a_busy_server_says_when_to_come_back(visit: Open, script: ScriptedServer) -> None:
    def busy(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        raise Refusal(503, "64 requests wait already", {"Retry-After": "7"})
        yield {}

    page = (opened := visit(script.base)).page
    opened.expected.append(f"{FAILED_TO_LOAD}.*503")
    script.script = busy
    choose(page, white(40))
    ask(page)
    assert alert(page) == "64 requests wait already\nThe server asks to wait 7 s."


@pytest.mark.parametrize(("status", "offered"), [(400, 0), (404, 0), (413, 0), (408, 1), (429, 1), (500, 1), (503, 1)])
def test_trying_again_is_offered_where_it_can_help(
    visit: Open, script: ScriptedServer, status: int, offered: int
) -> None:
    def refusing(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        raise Refusal(status, "no", {})
        yield {}

    page = (opened := visit(script.base)).page
    opened.expected.append(f"{FAILED_TO_LOAD}.*{status}")
    script.script = refusing
    choose(page, white(40))
    ask(page)
    assert alert(page) == "no"
    assert page.get_by_role("button", name="Try again").count() == offered


@pytest.mark.parametrize(("kind", "offered"), [("invalid_request_error", 0), ("server_error", 1)])
def test_an_error_within_an_answer_says_whether_trying_again_can_help(
    visit: Open, script: ScriptedServer, kind: str, offered: int
) -> None:
    def breaking(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield selection([0])
        yield {"error": {"message": "<b>no</b>", "type": kind, "param": None, "code": None}}

    page = visit(script.base).page
    script.script = breaking
    choose(page, white(40))
    ask(page)
    assert alert(page) == "<b>no</b>"
    assert page.get_by_role("button", name="Try again").count() == offered


def test_what_a_model_says_is_text(visit: Open, script: ScriptedServer) -> None:
    markup = "<img src=x onerror=alert(1)><script>alert(1)</script>"

    def hostile(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield selection([0])
        yield words(markup)
        yield ending(**{markup: 1.0})

    page = visit(script.base).page
    script.script = hostile
    choose(page, white(40))
    ask(page, markup)
    answered(page)
    assert page.locator(".answer").text_content() == page.locator("h3").text_content() == markup
    assert page.locator(".turns :is(img, script)").count() == 0


def test_an_error_within_an_answer_leaves_what_was_heard(visit: Open, script: ScriptedServer) -> None:
    def breaking(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield selection([0])
        yield words("It is")
        yield {"error": {"message": "out of memory", "type": "server_error", "param": None, "code": None}}

    page = (opened := visit(script.base)).page
    script.script = breaking
    choose(page, white(40))
    ask(page)
    assert alert(page) == "out of memory"
    assert page.locator(".answer").text_content() == "It is"
    assert "Not answered." in page.locator(".notes").inner_text()
    assert page.input_value("#question") == QUESTION
    script.script = answer  # what was not answered is no part of the conversation
    page.check("#follow")
    page.get_by_role("button", name="Try again").click()
    answered(page, 2)
    assert len(opened.asked[1]["messages"]) == 1


def test_a_key_is_asked_for_and_kept_for_the_tab(visit: Open, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n", encoding="utf-8")
    with serving(tiny_bundle, "--api-keys", str(tmp_path / "keys")) as process:
        page = (opened := visit(process.url, ready=False)).page
        opened.expected.append(f"{FAILED_TO_LOAD}.*401")
        field = page.get_by_label("This server asks for an API key")
        for key in ("wrong", "sesame – open", KEY):  # the second one no header can carry
            field.wait_for()
            assert "API key" in alert(page)
            assert field.evaluate("field => field === document.activeElement")
            field.fill(key)
            field.press("Enter")
        page.locator("#budget:enabled").wait_for()
        assert field.is_hidden()
        choose(page, white(40))
        ask(page)
        answered(page)
        assert page.evaluate("() => Object.values(sessionStorage)") == [KEY]
        assert page.evaluate("() => localStorage.length") == 0
        assert opened.page.context.cookies() == []


# ---- the moment


def test_kept_tokens_light_up_before_the_first_word_and_stop_ends_the_answer(
    visit: Open, script: ScriptedServer
) -> None:
    go_on = threading.Event()

    def waiting(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield selection([2, 7, 11])
        go_on.wait(60)
        while not script.left.wait(0.02):  # as slow as a large model
            yield words("and ")

    page = (opened := visit(script.base)).page
    script.script = waiting
    choose(page, white(40))
    ask(page)
    wait_until_lit(page, [2, 7, 11], 4, 4)
    waits = page.locator(".answer")
    assert waits.text_content() == ""
    assert waits.get_attribute("aria-live") == "polite"
    assert waits.get_attribute("aria-busy") == "true"
    go_on.set()
    page.locator(".answer", has_text="and and").wait_for()
    page.click("#stop")
    page.locator("#status", has_text="Stopped.").wait_for()
    assert script.left.wait(20)
    assert waits.get_attribute("aria-busy") is None
    assert page.locator("#stop").is_hidden()
    assert page.locator("#alert").is_hidden()
    said = waits.text_content()

    script.script = answer  # what was heard of an answer is part of the conversation
    page.check("#follow")
    ask(page, "And?")
    answered(page, 2)
    assert opened.asked[1]["messages"][1] == {"role": "assistant", "content": said}


def test_escape_before_the_first_chunk_gives_the_question_back(visit: Open, script: ScriptedServer) -> None:
    never = threading.Event()

    def silent(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        never.wait(60)
        yield selection([])

    page = visit(script.base).page
    script.script = silent
    choose(page, white(40))
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    page.locator("#stop:visible").wait_for()
    page.keyboard.press("Escape")
    page.locator("#status", has_text="Stopped.").wait_for()
    never.set()
    assert page.input_value("#question") == QUESTION
    assert page.locator(".turns > li").count() == 0


def test_another_picture_takes_the_place_of_an_answer_that_is_being_written(
    visit: Open, script: ScriptedServer
) -> None:
    def endless(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield selection([0])
        while not script.left.wait(0.02):
            yield words("and ")

    page = (opened := visit(script.base)).page
    script.script = endless
    choose(page, white(40))
    ask(page)
    page.locator(".answer", has_text="and and").wait_for()
    choose(page, white(41), "other.png")
    assert script.left.wait(20)
    page.locator("#stop").wait_for(state="hidden")
    assert page.locator(".turns > li").count() == 0
    wait_until_lit(page, list(range(16)), 4, 4)
    script.script = answer
    ask(page)
    answered(page)
    assert opened.asked[1]["messages"] == [user(QUESTION, white(41))]


def test_one_of_several_grids_is_shown_where_the_encoder_sees_it(visit: Open, script: ScriptedServer) -> None:
    def tiles(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        # An overview, a grid without cells, and tiles; the wide picture is padded above and below to a square.
        yield selection([1, 4 + 5, 4 + 10], [(2, 2), (0, 3), (4, 4)], (0, -0.5, 1, 1.5))
        yield from list(answer({"token_budget": 1}))[1:]

    page = visit(script.base).page
    script.script = tiles
    choose(page, white(80, 40))
    ask(page)
    answered(page)
    assert page.locator(".kept").inner_text() == "3 of 20 tokens 15 %"
    wait_until_lit(page, [5, 10], 4, 4)
    page.get_by_role("radio", name="2 × 2").check(force=True)
    # The lower half of this cell is picture, and white; its upper half is padding.
    wait_until_lit(page, [1], 1, 2, (0, 0.25, 1, 0.5))


def test_what_lies_outside_of_the_encoders_view_is_dimmed(visit: Open, script: ScriptedServer) -> None:
    def cropped(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield selection(list(range(16)), view=(0.25, 0, 0.75, 1))
        yield from list(answer({"token_budget": 1}))[1:]

    page = visit(script.base).page
    script.script = cropped
    choose(page, white(80, 40))
    ask(page)
    wait_until_lit(page, [1, 2], 1, 4)


def test_nothing_moves_for_those_who_asked_for_that(visit: Open, script: ScriptedServer) -> None:
    hold = threading.Event()

    def waiting(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield selection([3])
        hold.wait(60)
        yield ending()

    page = visit(script.base, reduced_motion="reduce").page
    script.script = waiting
    choose(page, white(40))
    ask(page)
    page.locator(".kept", has_text="1 of 16").wait_for()
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert lit(page, 4, 4) == [3]
    assert page.evaluate("() => document.getAnimations().length") == 0
    hold.set()
    answered(page)


# ---- for everybody


def test_all_of_it_works_from_the_keyboard(visit: Open, server: str) -> None:
    page = visit(server).page

    def tab_to(selector: str, key: str = "Tab") -> None:
        for _ in range(20):
            page.keyboard.press(key)
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        pytest.fail(f"{selector} is not reached with {key}")

    with page.expect_file_chooser() as chooser:
        tab_to("#file")
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "white.png", "mimeType": "image/png", "buffer": white(89)})
    page.locator("#caption", has_text="white.png").wait_for()
    tab_to("#budget", "Shift+Tab")
    before = int(page.input_value("#count"))
    page.keyboard.press("ArrowLeft")
    assert int(page.input_value("#count")) == before - 1
    tab_to("#compare")
    page.keyboard.press("Space")
    tab_to("#follow")
    page.keyboard.press("Space")
    assert page.is_checked("#follow")
    tab_to("#question")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Or a dog?")
    page.keyboard.press("Enter")
    page.locator("table").wait_for()
    assert page.locator("h3").text_content() == f"{QUESTION}\nOr a dog?"
    tab_to(".run:nth-child(2) button", "Shift+Tab")
    page.keyboard.press("Enter")
    wait_until_lit(page, list(range(16)), 4, 4)


def test_controls_have_names_and_focus_can_be_seen(visit: Open, server: str) -> None:
    page = visit(server).page
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")]
            .filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent.trim()))
            .map((one) => one.id)"""
    )
    assert nameless == []
    page.focus("#question")
    page.keyboard.press("Tab")
    ring = page.evaluate("() => getComputedStyle(document.activeElement).outline")
    assert "solid 3px" in ring


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(visit: Open, server: str, scheme: str) -> None:
    """Contrast of WCAG 2, level AA: 4.5 of text, 3 of the borders of controls and of the focus ring."""
    page = visit(server, color_scheme=scheme).page

    def luminance(name: str) -> float:
        colour = page.evaluate("name => getComputedStyle(document.documentElement).getPropertyValue(name)", f"--{name}")
        digits = colour.strip().removeprefix("#")
        digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
        channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        darker, lighter = sorted((luminance(one), luminance(other)))
        return (lighter + 0.05) / (darker + 0.05)

    text = [(ink, paper) for ink in ("ink", "muted") for paper in ("paper", "card", "frame")]
    text += [("alert", "alert-paper"), ("ink", "alert-paper"), ("on-action", "action"), ("ink", "none")]
    shapes = [(edge, paper) for edge in ("edge", "focus", "action") for paper in ("paper", "card")]
    assert [pair for pair in text if contrast(*pair) < 4.5] == []
    assert [pair for pair in shapes if contrast(*pair) < 3] == []


@pytest.mark.parametrize(("width", "height"), [(320, 568), (390, 844), (844, 390)])
def test_nothing_sticks_out_on_a_phone(visit: Open, server: str, width: int, height: int) -> None:
    options = {"viewport": {"width": width, "height": height}, "has_touch": True, "is_mobile": True}
    page = visit(server, **options).page

    def check() -> None:
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        right = page.evaluate(
            "() => Math.max(...[...document.querySelectorAll('main *')].map((e) => e.getBoundingClientRect().right))"
        )
        assert right <= width

    check()
    with page.expect_file_chooser() as chooser:
        page.click("#camera-open")  # the phone's own camera
    assert chooser.value.element.get_attribute("capture") == "environment"
    chooser.value.set_files({"name": "tall.png", "mimeType": "image/png", "buffer": white(60, 140)})
    page.locator("#caption", has_text="tall.png").wait_for()
    check()
    page.check("#compare")
    ask(page, "Is there a very_long_word_that_has_no_place_where_a_line_could_break_it_in_two?")
    page.locator("table").wait_for()
    check()


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "reduced_motion": "reduce"}


def clear(page: Any, selector: str) -> bool:
    """Whether the first line of it lies between the picture and the form."""
    return page.evaluate(
        """(selector) => {
            const box = document.querySelector(selector).getBoundingClientRect();
            const at = document.elementFromPoint(box.left + 20, box.top + 12);
            return at !== null && document.querySelector(selector).contains(at);
        }""",
        selector,
    )


def test_on_a_phone_the_verdict_is_in_sight(visit: Open, script: ScriptedServer) -> None:
    page = visit(script.base, **PHONE).page
    choose(page, white(40))
    page.check("#compare")
    for count in (1, 2):
        ask(page)
        answered(page, count)
        page.wait_for_function("() => !document.querySelector('.waiting')")
        assert clear(page, f".turns > li:nth-child({count}) .verdict")


def test_on_a_phone_a_long_error_is_read_from_its_beginning(visit: Open, script: ScriptedServer) -> None:
    def refusing(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        raise Refusal(503, "too much " * 200, {})
        yield {}

    page = (opened := visit(script.base, **PHONE)).page
    opened.expected.append(f"{FAILED_TO_LOAD}.*503")
    choose(page, white(40))
    ask(page)
    answered(page)
    script.script = refusing
    ask(page, "A long question. " * 40)
    alert(page)
    assert clear(page, "#alert p")
    top, bottom = page.evaluate(
        """() => ["#alert", "#window"].map((one) => document.querySelector(one).getBoundingClientRect())
            .map((box, place) => (place ? box.bottom : box.top))"""
    )
    assert top >= bottom  # the picture is in sight too


# ---- the files


def test_the_page_holds_nothing_inline_and_nothing_from_elsewhere() -> None:
    for file in sorted(PAGE.iterdir()):
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|\bstyle=|\bon[a-z]+=\"|<style|javascript:|innerHTML|eval\(", text), file.name
        assert re.findall(r"<script(?![^>]* src=\"page/)", text) == []
    for html in ("index.html", "live.html"):
        names = re.findall(r"(?:href|src)=\"page/([^\"]+)\"", (PAGE / html).read_text(encoding="utf-8"))
        assert names
        assert [name for name in names if not (PAGE / name).is_file()] == []
