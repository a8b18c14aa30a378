"""Answer normalisation of the VQA evaluation: punctuation, number words, articles, contractions.

After the official script, https://github.com/GT-Vision-Lab/VQA (``vqaEval.py``): its order of steps and its tables.
The script leaves the annotators' answers alone where all of them agree, so that ``t-shirt`` misses ``t-shirt``; here
both sides are always normalised, as in the evaluation of TextVQA.
"""

from __future__ import annotations

import functools
import re

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

# Each is also recognised with any one of its apostrophes missing.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()  # noqa: SIM905  # seventy words: a list of strings is harder to read
_WITHOUT_APOSTROPHE = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place, character in enumerate(word)
    if character == "'"
}


# Annotators of a question mostly agree, and each budget compares with them again.
@functools.lru_cache(maxsize=1 << 16)
def normalise_answer(text: str) -> str:
    """Return ``text`` as the VQA evaluation compares it."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(_WITHOUT_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Drop a mark that stands beside a space, or any in a text with a number such as 1,000; else put a space for it."""
    cleaned = text
    number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or number else " ")
    return _PERIOD.sub("", cleaned)
