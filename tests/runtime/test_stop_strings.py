"""Stop texts against a search of the whole, however the text is cut into pieces."""

from __future__ import annotations

import random

import pytest

from flashvlm_export.runtime.stop_strings import StopStrings


@pytest.mark.parametrize(
    "strings", [(), ("ab",), ("aab", "b"), ("aaa",), ("ba", "abb"), ("c",), ("abab", "babb", "aa"), ("abca",)]
)
def test_a_stream_is_cut_where_the_whole_text_is(strings: tuple[str, ...]) -> None:
    chance = random.Random(0)
    found = 0
    for _ in range(400):
        text = "".join(chance.choices("abcd", (5, 4, 2, 1), k=chance.randrange(14)))
        cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randrange(6)))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        stop = StopStrings(strings)
        said = "".join(stop.feed(piece) for piece in pieces) + stop.flush()
        ends = (end for end in range(len(text) + 1) if text[:end].endswith(strings))
        end = next(ends, None) if strings else None
        cut = text if end is None else text[: end - max(len(s) for s in strings if text[:end].endswith(s))]
        assert (said, stop.found) == (cut, end is not None)
        found += stop.found
    assert found > 3 or not strings


def test_nothing_that_may_belong_to_a_stop_text_is_said_early() -> None:
    stop = StopStrings(["\nUSER:", "###"])
    said = [stop.feed(piece) for piece in ("a cat", ".", "\nUS", "A. #", "# no", "\nUSER", ": more", "and more")]
    assert said == ["a cat", ".", "", "\nUSA. ", "## no", "", "", ""]
    assert stop.found
    assert stop.flush() == ""
