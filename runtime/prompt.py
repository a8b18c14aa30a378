"""From a question to token ids, and from token ids back to text while an answer is written.

Token ids equal those of transformers' ``processor.apply_chat_template(..., add_generation_prompt=True,
tokenize=True)``, but for the images and videos: one placeholder id here, one per visual token there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
import numpy as np
import numpy.typing as npt
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from flashvlm_export.errors import BundleError, ConfigError, PromptError, UsageError
from flashvlm_export.manifest import PromptSettings, TextSpan

Medium = Literal["image", "video"]

# Rendered in place of the question to learn where it goes; private-use characters survive trim and upper.
_MARKER = "\ue0f1\ue0f2\ue0f3"


@dataclass(frozen=True)
class Turn:
    """A question that was answered: what came with it, the user's words, the model's."""

    media: Sequence[Medium]
    question: str
    answer: str


@dataclass(frozen=True, eq=False)
class TokenizedPrompt:
    """A prompt ready for embedding lookup.

    Attributes:
        text: the prompt as it was tokenised, without special tokens that the tokenizer adds.
        token_ids: int64 ``[S]``, one placeholder id per image or video.
        image_positions: indices of the placeholders in ``token_ids``, ascending.
        media: which each of them is.
        question_mask: bool ``[S]``, true for tokens that overlap the user's own last words. Of a prompt that the user
            templated, every token but special ones.
    """

    text: str
    token_ids: npt.NDArray[np.int64]
    image_positions: tuple[int, ...]
    question_mask: npt.NDArray[np.bool_]
    media: tuple[Medium, ...] = ()

    def text_ids(self, span: TextSpan) -> npt.NDArray[np.int64]:
        """Return the ids that guide the selection, int64 ``[L]``; ``L`` may be 0.

        Args:
            span: ``prompt`` for all but the placeholders, ``question`` for the user's words only.

        Raises:
            ConfigError: if ``span`` is neither.
        """
        if span == "question":
            return self.token_ids[self.question_mask]
        if span == "prompt":
            return np.delete(self.token_ids, self.image_positions)
        raise ConfigError("unknown span of the prompt", received=repr(span), expected="prompt or question")


class PromptBuilder:
    """Renders the bundle's chat template and tokenises.

    Args:
        tokenizer_file: ``tokenizer.json``.
        chat_template: Jinja source, rendered in a sandbox; may be empty if only :meth:`raw` is used.
        settings: of the manifest.

    Raises:
        BundleError: if the tokenizer cannot be read or does not know the image placeholder.
    """

    def __init__(self, tokenizer_file: str | Path, chat_template: str, settings: PromptSettings) -> None:
        self.settings = settings
        self.tokenizer = _load_tokenizer(Path(tokenizer_file), settings)
        self._chat_template = chat_template
        self._special_ids = _special_ids(self.tokenizer)

    def chat(
        self,
        question: str,
        media: Sequence[Medium] = ("image",),
        system: str | None = None,
        history: Sequence[Turn] = (),
    ) -> TokenizedPrompt:
        """Return the prompt for a question about images and videos, in the model's chat format.

        Args:
            question: what the user asks; its control tokens, if any, count as such, as in transformers.
            media: what it is about; the template writes a placeholder for each before the question.
            system: text of a system message; empty for none.
            history: what was said before, oldest first; its images come before the question's own.

        Raises:
            PromptError: if the question is empty, the template does not render, or the placeholders in the result
                are not as many as there are images and videos.
            UsageError: if there are videos, and the model takes none.
        """
        _check_text(question, "question")
        for each in (system or "", *(text for turn in history for text in (turn.question, turn.answer))):
            _check_unicode(each, "conversation")
        text = self._render(question, media, system, history)
        start, end = _locate(question, text, self._render(_MARKER, media, system, history))
        return self._tokenize(text, [*(each for turn in history for each in turn.media), *media], (start, end))

    def raw(self, text: str, media: Sequence[Medium] = ("image",)) -> TokenizedPrompt:
        """Return the prompt for ``text`` that already is in the model's format, with a placeholder for each image.

        The tokenizer adds its special tokens, unless ``text`` starts with the start-of-sequence text itself.

        Raises:
            PromptError: if ``text`` is empty or its placeholders are not those of ``media``.
            UsageError: if there are videos, and the model takes none.
        """
        _check_text(text, "prompt")
        return self._tokenize(text, media, None)

    def detokenizer(self) -> StreamingDetokenizer:
        """Return a new detokenizer for one answer."""
        return StreamingDetokenizer(self.tokenizer)

    def _tokenize(self, text: str, media: Sequence[Medium], question: tuple[int, int] | None) -> TokenizedPrompt:
        if "video" in media and self.settings.video_token_id is None:
            raise UsageError(
                "this model takes no videos",
                received=f"{media.count('video')} video(s)",
                expected="images, or a model that does: flashvlm models",
                hint="ask about some of its frames as images",
            )
        bos = self.settings.bos_token
        has_bos = bool(bos) and text.startswith(bos)
        encoding = self.tokenizer.encode(text, add_special_tokens=not has_bos)
        ids = np.array(encoding.ids, np.int64)
        is_video = ids == self.settings.video_token_id
        positions = np.flatnonzero((ids == self.settings.image_token_id) | is_video)
        found: list[Medium] = ["video" if is_video[position] else "image" for position in positions]
        self._check_placeholders("image", self.settings.image_token, found, media, text, question)
        self._check_placeholders("video", self.settings.video_token, found, media, text, question)
        if ids.size == 0:
            raise PromptError("the prompt yields no tokens", received=repr(text[:80]), expected="a question in words")
        if question is None:
            mask = ~np.isin(ids, self._special_ids)
        else:
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            added = np.array(encoding.special_tokens_mask, np.bool_)
            mask = (offsets[:, 0] < question[1]) & (offsets[:, 1] > question[0]) & ~added
        mask[positions] = False
        return TokenizedPrompt(text, ids, tuple(positions.tolist()), mask, tuple(found))

    def _check_placeholders(
        self,
        medium: Medium,
        token: str,
        have: Sequence[Medium],
        want: Sequence[Medium],
        text: str,
        question: tuple[int, int] | None,
    ) -> None:
        found, wanted = have.count(medium), want.count(medium)
        if found == wanted:
            return
        if question is None:
            hint = f"write {token} in the prompt once per {medium}"
        elif token in text[slice(*question)]:
            hint = f"take {token} out of the question: the chat template writes it"
        else:
            hint = f"the chat template does not fit; write the whole prompt, with {token}, and pass it as a raw prompt"
        raise PromptError(
            f"the {medium} placeholders do not match the {medium}s",
            received=f"{found} times {token} in the prompt for {wanted} {medium}(s)",
            expected=f"{wanted} times {token}",
            hint=hint,
        )

    def _render(self, question: str, media: Sequence[Medium], system: str | None, history: Sequence[Turn]) -> str:
        messages = []
        if system:
            _check_text(system, "system message")
            messages.append(_message("system", system))
        for turn in history:
            messages += [_message("user", turn.question, turn.media), _message("assistant", turn.answer)]
        messages.append(_message("user", question, media))
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:  # the template is someone's program: it may raise anything
            raise PromptError(
                "the chat template cannot be rendered",
                received=f"{type(error).__name__}: {error}",
                expected="a template for messages whose content is a list of image and text parts",
                hint="write the whole prompt yourself and pass it with --raw-prompt, or Request(raw=True)",
            ) from error

    @cached_property
    def _template(self) -> jinja2.Template:
        if not self._chat_template.strip():
            raise ValueError("the bundle has no chat template")
        return _environment().from_string(self._chat_template)

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        """Variables a template may use; transformers leaves out those that the tokenizer does not have."""
        settings = self.settings
        pad = None if settings.pad_token_id is None else self.tokenizer.id_to_token(settings.pad_token_id)
        tokens = {
            "bos_token": settings.bos_token,
            "eos_token": settings.eos_token,
            "pad_token": pad,
            "image_token": settings.image_token,
            "video_token": settings.video_token,
        }
        return {name: token for name, token in tokens.items() if token}


class StreamingDetokenizer:
    """Turns the ids of one answer into text as they come.

    What :meth:`feed` and :meth:`flush` return, put together, equals ``tokenizer.decode(ids)`` without special tokens.
    Text is held back while it may still change: an unfinished UTF-8 character, or a run of SentencePiece's byte
    tokens, which decodes as a whole or, if it turns out invalid, not at all. (The tokenizers library's
    ``DecodeStream`` raises an exception or differs on such runs.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._skipped = frozenset(_special_ids(tokenizer).tolist())
        self._byte_ids = frozenset(
            id for byte in range(256) if (id := tokenizer.token_to_id(f"<0x{byte:02X}>")) is not None
        )
        self._ids: list[int] = []
        self._returned = 0  # characters
        # Each piece is decoded behind the one before it, so that it is not taken for the beginning of a sentence.
        self._context_start = self._piece_start = 0

    def feed(self, token_id: int) -> str:
        """Return the text that ``token_id`` completes; may be empty."""
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        if token_id in self._byte_ids:
            return ""
        context = self._decode(self._ids[self._context_start : self._piece_start])
        text = self._decode(self._ids[self._context_start :])
        if len(text) <= len(context) or text.endswith("\ufffd") or not text.startswith(context):
            return ""
        self._context_start, self._piece_start = self._piece_start, len(self._ids)
        self._returned += len(text) - len(context)
        return text[len(context) :]

    def flush(self) -> str:
        """Return what was held back; to be called once, after the last id."""
        rest = self._decode(self._ids)[self._returned :]
        self._returned += len(rest)
        return rest

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _load_tokenizer(path: Path, settings: PromptSettings) -> Tokenizer:
    hint = "export the bundle again: flashvlm export MODEL --output BUNDLE"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise BundleError("the tokenizer cannot be read", received=f"{path}: {error}", hint=hint) from error
    # A file saved in training may cut or fill every prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    known = tokenizer.token_to_id(settings.image_token)
    if known != settings.image_token_id:
        raise BundleError(
            "the tokenizer and the manifest disagree about the image placeholder",
            received=f"{settings.image_token} has id {known} in {path}",
            expected=settings.image_token_id,
            hint=hint,
        )
    return tokenizer


def _special_ids(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    added: Mapping[int, Any] = tokenizer.get_added_tokens_decoder()
    return np.array([id for id, token in added.items() if token.special], np.int64)


def _message(role: str, text: str, media: Sequence[Medium] = ()) -> dict[str, Any]:
    return {"role": role, "content": [*({"type": medium} for medium in media), {"type": "text", "text": text}]}


def _check_text(text: object, name: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"the {name} is empty", received=repr(text), expected="text")
    _check_unicode(text, name)


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the {name} is not valid Unicode",
            received=f"{error.reason} at character {error.start}",
            expected="text in UTF-8",
        ) from None


def _locate(question: str, text: str, marked: str) -> tuple[int, int]:
    """Return where ``text`` holds the question, as character offsets without the white space around it.

    ``marked`` is the same prompt with :data:`_MARKER` for a question: what stands around the marker is the
    template's. What is left may be more than the question, if the template looks into it, or the question changed.
    """
    before, after = marked.split(_MARKER)[0], marked.split(_MARKER)[-1]
    framed = _MARKER in marked and text.startswith(before) and text.endswith(after)
    start, end = (len(before), len(text) - len(after)) if framed else (0, len(text))
    words = question.strip()
    if text.count(words, start, end) == 1:
        start = text.index(words, start, end)
        return start, start + len(words)
    framed_words = text[start:end]
    if not framed or not framed_words.strip():
        raise PromptError(
            "the chat template does not write the question",
            received=repr(text[:200]),
            expected="a prompt that contains the user's text",
            hint="write the whole prompt yourself and pass it with --raw-prompt, or Request(raw=True)",
        )
    return end - len(framed_words.lstrip()), start + len(framed_words.rstrip())


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the sandbox with what Hugging Face chat templates may use (transformers' chat_template_utils)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals["namespace"] = _Namespace
    environment.globals["dict"] = _Dict()
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; it changes nothing in a prompt."""

    tags = {"generation"}  # noqa: RUF012  # Jinja reads it from the class

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's ``namespace`` without underscored names, which could shadow Python's own."""

    def __init__(*args: Any, **values: Any) -> None:  # a template may call namespace(self=...)
        self, *positional = args
        attributes = dict(*positional, **values)
        for name in attributes:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


class _Dict:
    """``dict(...)`` and ``dict.fromkeys`` without the class itself, on which a template could call more."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """Return a dictionary of ``keys``, all with ``value``."""
        return dict.fromkeys(keys, value)


def _refuse_underscore(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
