from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from flashvlm_export.errors import BundleError, ConfigError, PromptError
from flashvlm_export.manifest import PromptSettings
from flashvlm_export.runtime.prompt import PromptBuilder, StreamingDetokenizer, Turn

VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WRITES_BOS = "{{ bos_token }}" + VICUNA
# Everything a Hugging Face template may use besides plain Jinja.
RICH = """
{%- set state = namespace(seen=0) %}
{%- for message in messages %}
    {%- if message.role == 'nobody' %}{{ raise_exception('no such role') }}{% continue %}{% endif %}
    {%- generation %}{{ bos_token if loop.first }}[{{ message.role | upper }}]{% endgeneration %}
    {%- for part in message.content %}
        {%- if part.type == 'image' %}{{ '<image>' }}{% set state.seen = state.seen + 1 %}
        {%- else %} {{ part.text | trim }}{{ {'a': '<é>'} | tojson }}{% endif %}
    {%- endfor %}{{ eos_token }}
    {%- if state.seen > 100 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}[ASSISTANT]{{ dict(a=state.seen)['a'] }}{% endif %}
"""
QUESTIONS = [
    "What is in this picture?",
    "Wo ist der Tempel? “Überall” – naïve café",
    "这是什么？ 日本語も 😀👩‍👩‍👧 e\u0301",
    'He said "it\'s a {{ 7 * 7 }} {% if x %} </tag> & \\n"?',
    "one\ntwo\n\n  three\tfour",
    "  spaces around  ",
    "USER",
    "ASSISTANT:",
    "a",
    "the quick brown fox " * 60,
]


def finish(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["USER: what is in this picture? ASSISTANT: a cat on the table"] * 3, trainer)
    return finish(tokenizer)


def sentencepiece() -> Tokenizer:
    """Llama's way: ``▁`` for spaces, one in front, bytes for what the vocabulary does not have."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "\ufffd"]
    pieces += list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789?!.,:'\"é")
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "s")]
    pieces += ["".join(merge) for merge in merges]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return finish(tokenizer)


TOKENIZERS = {"byte_level": byte_level, "sentencepiece": sentencepiece}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def settings_for(tokenizer: Tokenizer, **changes: Any) -> PromptSettings:
    values: dict[str, Any] = {
        "image_token": "<image>",
        "image_token_id": tokenizer.token_to_id("<image>"),
        "bos_token": "<s>",
        "eos_token": "</s>",
        "eos_token_ids": [2],
        "pad_token_id": None,
    }
    return PromptSettings(**(values | changes))


def build(tokenizer: Tokenizer, directory: Path, template: str = VICUNA, **changes: Any) -> PromptBuilder:
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    return PromptBuilder(path, template, settings_for(tokenizer, **changes))


class Oracle:
    """transformers' own processor of a tiny LLaVA checkpoint, and the files that a bundle would hold."""

    def __init__(self, directory: Path) -> None:
        transformers = pytest.importorskip("transformers", reason="the oracle is transformers' LlavaProcessor")
        from helpers.tiny_llava import make_tokenizer

        fast = make_tokenizer()
        fast.backend_tokenizer.save(str(directory / "tokenizer.json"))
        self.path = directory / "tokenizer.json"
        self.settings = PromptSettings(
            image_token="<image>",
            image_token_id=fast.convert_tokens_to_ids("<image>"),
            bos_token=fast.bos_token,
            eos_token=fast.eos_token,
            eos_token_ids=[fast.eos_token_id],
            pad_token_id=fast.pad_token_id,
        )
        self.processor = transformers.LlavaProcessor(
            transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28),
            fast,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=VICUNA,
        )

    def ids(
        self, template: str, question: str, num_images: int, system: str | None, history: Sequence[Turn] = ()
    ) -> list[int]:
        """Ids with each image's four visual tokens folded into one."""
        image = np.zeros((28, 28, 3), np.uint8)
        messages: list[dict[str, Any]] = []
        for turn in [*history, Turn(["image"] * num_images, question, "")]:
            pictures = [{"type": "image", "image": image} for _ in turn.media]
            messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        del messages[-1]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        (expanded,) = self.processor.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        folded: list[int] = []
        run = 0
        for token in list(expanded):
            run = run + 1 if token == self.settings.image_token_id else 0
            if run % 4 in (0, 1):
                folded += [int(token)] if run == 0 or run % 4 == 1 else []
        return folded


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize("template", [VICUNA, WRITES_BOS, RICH], ids=["vicuna", "writes_bos", "rich"])
@pytest.mark.parametrize(("num_images", "system"), [(1, None), (2, None), (1, "You are helpful.")])
def test_chat_equals_transformers(oracle: Oracle, template: str, num_images: int, system: str | None) -> None:
    builder = PromptBuilder(oracle.path, template, oracle.settings)
    for question in QUESTIONS:
        prompt = builder.chat(question, ["image"] * num_images, system)
        assert prompt.token_ids.tolist() == oracle.ids(template, question, num_images, system)


@pytest.mark.parametrize("template", [VICUNA, WRITES_BOS, RICH], ids=["vicuna", "writes_bos", "rich"])
def test_conversations_equal_transformers(oracle: Oracle, template: str) -> None:
    """Images of several turns; the question's words are those of the last turn, also where it was asked before."""
    builder = PromptBuilder(oracle.path, template, oracle.settings)
    again = "which one is older?"
    history = [
        Turn(["image"], "what is this?", "A cat."),
        Turn([], again, "I see one."),
        Turn(["image"] * 2, "and now?", "Two"),
    ]
    for num_images, system in ((0, None), (1, "You are helpful.")):
        prompt = builder.chat(again, ["image"] * num_images, system, history)
        assert prompt.token_ids.tolist() == oracle.ids(template, again, num_images, system, history)
        assert len(prompt.image_positions) == 3 + num_images
        asked = np.flatnonzero(prompt.question_mask)
        assert asked[0] > len(prompt.token_ids) / 2
        assert again in builder.tokenizer.decode(prompt.text_ids("question").tolist())


def test_bos_comes_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    plain = build(tokenizer, tmp_path).chat("what is this?")
    written = build(tokenizer, tmp_path, WRITES_BOS).chat("what is this?")
    assert plain.token_ids.tolist().count(1) == written.token_ids.tolist().count(1) == 1
    assert plain.token_ids[0] == written.token_ids[0] == 1
    raw = build(tokenizer, tmp_path).raw("<s>USER: <image> hi")
    assert raw.token_ids.tolist().count(1) == 1


def test_one_placeholder_per_image(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompt = build(tokenizer, tmp_path).chat("which one is older?", ["image"] * 3)
    image_id = tokenizer.token_to_id("<image>")
    assert prompt.token_ids.dtype == np.int64
    assert len(prompt.image_positions) == 3
    assert [prompt.token_ids[position] for position in prompt.image_positions] == [image_id] * 3
    rest = prompt.text_ids("prompt")
    assert image_id not in rest
    assert len(rest) == len(prompt.token_ids) - 3


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("template", [VICUNA, WRITES_BOS, RICH], ids=["vicuna", "writes_bos", "rich"])
def test_question_ids_are_the_users_words(tokenizer: Tokenizer, template: str, question: str, tmp_path: Path) -> None:
    prompt = build(tokenizer, tmp_path, template).chat(question)
    decoded = tokenizer.decode(prompt.text_ids("question").tolist())
    expected = question.strip()
    if tokenizer.normalizer is not None and tokenizer.token_to_id("▁") is None:
        expected = tokenizer.normalizer.normalize_str(expected)
    # A byte-level token may carry the space in front, and the last one may reach one character further.
    assert expected in decoded
    assert len(decoded.strip()) <= len(expected) + 1
    assert not prompt.question_mask[list(prompt.image_positions)].any()
    assert not prompt.question_mask[0]


def test_question_is_found_although_the_template_changes_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = "<image> user {{ messages[0]['content'][1]['text'] | upper }} end"
    prompt = build(tokenizer, tmp_path, template).chat("the cat")
    assert tokenizer.decode(prompt.text_ids("question").tolist()).strip() == "THE CAT"


def test_question_is_found_although_the_template_depends_on_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "messages[0]['content'][1]['text']"
    template = "<image>{% if 'cat' in " + text + " %} animal:{% endif %} {{ " + text + " }}"
    prompt = build(tokenizer, tmp_path, template).chat("the cat")
    assert tokenizer.decode(prompt.text_ids("question").tolist()).strip() == "the cat"


def test_template_without_the_question_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="does not write the question"):
        build(tokenizer, tmp_path, "<image> hello").chat("the cat")


def test_raw_prompt_masks_only_special_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompt = build(tokenizer, tmp_path).raw("USER: <image> what is this?</s>")
    special = np.isin(prompt.token_ids, [1, 2, tokenizer.token_to_id("<image>")])
    np.testing.assert_array_equal(prompt.question_mask, ~special)
    assert "what is this?" in tokenizer.decode(prompt.text_ids("question").tolist())


def test_prompt_of_an_image_alone_has_no_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.post_processor = None
    tokenizer.normalizer = None
    prompt = build(tokenizer, tmp_path, bos_token="").raw("<image>")
    assert prompt.text_ids("prompt").shape == prompt.text_ids("question").shape == (0,)


def test_truncation_and_padding_of_the_file_are_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    expected = build(tokenizer, tmp_path).chat(QUESTIONS[-1]).token_ids
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=9000)
    np.testing.assert_array_equal(build(tokenizer, tmp_path).chat(QUESTIONS[-1]).token_ids, expected)


@pytest.mark.parametrize("question", ["", "  \n\t", None, 7, "bad \ud800 surrogate"])
def test_question_has_to_be_text(question: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    builder = build(tokenizer, tmp_path)
    for call in (builder.chat, builder.raw):
        with pytest.raises(PromptError, match=r"is empty|not valid Unicode"):
            call(question)


def test_placeholders_have_to_match_the_images(tokenizer: Tokenizer, tmp_path: Path) -> None:
    builder = build(tokenizer, tmp_path)
    with pytest.raises(PromptError, match="2 times <image> in the prompt for 1 image") as caught:
        builder.chat("what does <image> mean?")
    assert "out of the question" in str(caught.value.hint)
    for text in ("no picture", "<image> <image>"):
        with pytest.raises(PromptError, match="placeholders do not match") as caught:
            builder.raw(text)
        assert "once per image" in str(caught.value.hint)
    with pytest.raises(PromptError, match="0 times <image>") as caught:
        build(tokenizer, tmp_path, "{{ messages[0]['content'][1]['text'] }}").chat("hello")
    assert "raw prompt" in str(caught.value.hint)


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{% for %}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ raise_exception('only text') }}",
        "{{ 1 / 0 }}",
        "{% include '/etc/passwd' %}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ ''.__class__.__mro__[1].__subclasses__()() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ strftime_now.__globals__ }}{{ strftime_now.__globals__['json'].x() }}",
        "{{ messages.append(1) }}",
        "{{ range(10**9) }}",
    ],
)
def test_template_that_fails_is_a_prompt_error(template: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    builder = build(tokenizer, tmp_path, template)
    with pytest.raises(PromptError, match="cannot be rendered"):
        builder.chat("what is this?")
    assert builder.raw("<image> hello").image_positions


def test_tokenizer_file_is_checked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="tokenizer cannot be read"):
        PromptBuilder(tmp_path / "none.json", VICUNA, settings_for(tokenizer))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BundleError, match="tokenizer cannot be read"):
        PromptBuilder(tmp_path / "bad.json", VICUNA, settings_for(tokenizer))
    with pytest.raises(BundleError, match="disagree about the image placeholder"):
        build(tokenizer, tmp_path, image_token_id=5)


def test_unknown_span(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown span"):
        build(tokenizer, tmp_path).chat("hello").text_ids("answer")


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = StreamingDetokenizer(tokenizer)
    return [*(detokenizer.feed(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", [*QUESTIONS, "the 😀 is 日本 the is", " leading", "\n\nnewlines\n", "e\u0301\ufffd x"])
def test_stream_equals_decoding_at_once(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_of_any_ids_equals_decoding_at_once(tokenizer: Tokenizer) -> None:
    """Ids at random: broken UTF-8, byte runs cut by special tokens, replacement characters."""
    rng = np.random.default_rng(0)
    for _ in range(1500):
        ids = rng.integers(0, tokenizer.get_vocab_size(), rng.integers(0, 24)).tolist()
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_stream_never_shows_half_a_character_and_does_not_wait_for_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the 😀 is here", add_special_tokens=False).ids
    pieces = stream(tokenizer, ids)
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[-1] == ""
    assert sum(bool(piece) for piece in pieces) >= 5
    assert "".join(pieces[:3]).startswith("th")


def test_stream_skips_special_tokens_and_flushes_once(tokenizer: Tokenizer) -> None:
    detokenizer = StreamingDetokenizer(tokenizer)
    ids = tokenizer.encode("the cat", add_special_tokens=False).ids
    text = "".join(detokenizer.feed(token) for token in [1, *ids, 2])
    assert text + detokenizer.flush() == "the cat"
    assert detokenizer.flush() == ""


def test_stream_flushes_an_unfinished_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the 😀", add_special_tokens=False).ids[:-1]
    pieces = stream(tokenizer, ids)
    assert "\ufffd" not in "".join(pieces[:-1])
    assert "\ufffd" in pieces[-1]
