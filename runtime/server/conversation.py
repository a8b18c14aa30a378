"""From OpenAI's messages to what a pipeline is asked, with everything checked that a client can get wrong.

All of it is done before a request joins the others: what is refused here costs them nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flashvlm_export.runtime.graph_inputs import GraphInputs
from flashvlm_export.runtime.layout import Size
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.request import Exchange, Pruning, Request, tokenized
from flashvlm_export.runtime.server.api_errors import ApiError
from flashvlm_export.runtime.server.pictures import PictureReader
from flashvlm_export.runtime.server.schema import ChatRequest, ImagePart, Message, TextPart
from flashvlm_export.runtime.server.settings import ServerSettings
from flashvlm_export.specs import check_budget

Box = tuple[float, float, float, float]

# Images of the largest size in one conversation: all of them are decoded for it.
_MOST_LARGE_IMAGES = 4


@dataclass(frozen=True)
class Model:
    """What clients are told of the model.

    Attributes:
        inputs: of the bundle.
        name: what they call it.
        visual_tokens: of an image without pruning, at most.
        default_budget: visual tokens that are kept where nothing is said.
        selectors: that may be asked for, the first of which is the default; empty for the fused graph.
    """

    inputs: GraphInputs
    name: str
    visual_tokens: int
    default_budget: int
    selectors: Sequence[str]


@dataclass(frozen=True)
class Asked:
    """What a client asks.

    Attributes:
        request: with pictures as bytes, each of which can be decoded.
        views: left, top, right and bottom of what the encoder sees of each picture, in fractions of it, upright.
    """

    request: Request
    pruning: Pruning
    params: SamplingParams
    views: list[Box]


class Intake:
    """Turns bodies into :class:`Asked`; blocking, for a thread of its own. Thread-safe.

    Args:
        model: that is asked.
        settings: for limits, and what a request gets that does not say.
    """

    def __init__(self, model: Model, settings: ServerSettings) -> None:
        assert model.inputs.prompts is not None  # a pipeline refuses such bundles
        self._prompts = model.inputs.prompts
        self._longest_token = max(map(len, self._prompts.tokenizer.get_vocab()))
        self.model, self.settings = model, settings
        self.pictures = PictureReader(
            settings.image_hosts,
            limit_pixels=int(settings.max_megapixels * 1e6),
            limit_bytes=settings.max_body_mib << 20,
            seconds=settings.slow_seconds,
        )

    def asked(self, body: ChatRequest) -> Asked:
        """Return what ``body`` asks.

        Raises:
            ApiError, FlashVLMError: if it cannot be answered.
        """
        if body.model != self.model.name:
            raise ApiError(
                404,
                f"there is no model {body.model!r} here, only {self.model.name!r}",
                param="model",
                code="model_not_found",
            )
        params, pruning = self._params(body), self._pruning(body)
        system, turns = _turns(body.messages)
        self._check_sizes(body.messages)
        sizes: list[Size] = []
        exchanges = [(self._images(question, sizes), _text(question), answer) for question, answer in turns]
        images, question, _ = exchanges[-1]
        history = [Exchange(shown, text, said or "") for shown, text, said in exchanges[:-1]]
        request = Request(images, question, system, history=history)
        self._check_length(request)
        several = len(sizes) > 1
        views = [self.model.inputs.view_box(size, several=several) for size in sizes]
        return Asked(request, pruning, params, views)

    def _params(self, body: ChatRequest) -> SamplingParams:
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise ApiError(
                400, "max_tokens is the old name of max_completion_tokens: give one of them", param="max_tokens"
            )
        count = body.max_completion_tokens or body.max_tokens or self.settings.answer_tokens
        if count > self.settings.max_answer_tokens:
            raise ApiError(
                400,
                f"an answer has at most {self.settings.max_answer_tokens} tokens here, not {count}",
                param="max_completion_tokens" if body.max_tokens is None else "max_tokens",
                code="invalid_value",
            )
        stop = [body.stop] if isinstance(body.stop, str) else body.stop
        return SamplingParams(count, body.temperature, body.top_k, body.top_p, body.seed, tuple(stop))

    def _pruning(self, body: ChatRequest) -> Pruning:
        if isinstance(body.token_budget, int):
            check_budget(body.token_budget, self.model.visual_tokens)
        budget = self.settings.token_budget if body.token_budget is None else body.token_budget
        if body.selector is not None and body.selector not in self.model.selectors:
            those = f", only {', '.join(self.model.selectors)}" if self.model.selectors else ": the graph has its own"
            message = f"there is no selector {body.selector!r} here{those}"
            raise ApiError(400, message, param="selector", code="invalid_value")
        span, positions = body.text_span or self.settings.text_span, body.positions or self.settings.positions
        return Pruning(budget, span, positions, body.selector)

    def _check_sizes(self, messages: Sequence[Message]) -> None:
        """Refuse more than may be, before any of it is decoded or tokenised."""
        images = sum(isinstance(part, ImagePart) for each in messages for part in _parts(each))
        if images > self.settings.max_images:
            raise ApiError(
                400,
                f"a conversation has at most {self.settings.max_images} images here, not {images}",
                param="messages",
                code="too_many_images",
            )
        length = sum(len(part.text) for each in messages for part in _parts(each) if isinstance(part, TextPart))
        if length > self.settings.max_prompt_tokens * self._longest_token:
            raise self._too_long(f"{length} characters")

    def _check_length(self, request: Request) -> None:
        prompt = tokenized(request, self._prompts)
        count = len(prompt.token_ids) - len(prompt.image_positions)
        if count > self.settings.max_prompt_tokens:
            raise self._too_long(f"{count} tokens of text")

    def _too_long(self, received: str) -> ApiError:
        return ApiError(
            400,
            f"a prompt has at most {self.settings.max_prompt_tokens} tokens of text here, not {received}",
            param="messages",
            code="context_length_exceeded",
        )

    def _images(self, message: Message, sizes: list[Size]) -> list[bytes]:
        images = []
        for part in _parts(message):
            if isinstance(part, ImagePart):
                content, size = self.pictures.read(part.image_url.url)
                images.append(content)
                sizes.append(size)
                self._check_pixels(sum(map(math.prod, sizes)))
        return images

    def _check_pixels(self, count: int) -> None:
        most = _MOST_LARGE_IMAGES * self.pictures.limit_pixels
        if count > most:
            message = f"the images of a conversation have at most {most} pixels together here, not {count}"
            raise ApiError(400, message, param="messages", code="invalid_image")


def _turns(messages: Sequence[Message]) -> tuple[str | None, list[tuple[Message, str | None]]]:
    """Return the system text and each question with its answer; the last has none."""
    if any(isinstance(part, ImagePart) for each in messages if each.role != "user" for part in _parts(each)):
        raise ApiError(400, "only the user shows images", param="messages", code="invalid_value")
    joined = _joined(messages)
    roles = [role for role, _ in joined]
    start = int(roles[0] == "system")
    if roles[start:] != ["user", "assistant"] * ((len(roles) - start) // 2) + ["user"]:
        raise ApiError(
            400,
            "messages alternate between user and assistant, behind those of the system, and end with the user's; "
            f"received {', '.join(roles[:20])}",
            param="messages",
            code="invalid_value",
        )
    system = _text(joined[0][1]).strip() or None if start else None
    said = [message for _, message in joined[start:]]
    answers = [*map(_text, said[1::2]), None]
    return system, list(zip(said[::2], answers, strict=True))


def _joined(messages: Sequence[Message]) -> list[tuple[str, Message]]:
    """Return role and message, where several of one role in a row are one."""
    joined: list[tuple[str, Message]] = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        if joined and joined[-1][0] == role:
            parts = [*_parts(joined.pop()[1]), *_parts(message)]
            message = message.model_copy(update={"content": parts})
        joined.append((role, message))
    return joined


def _parts(message: Message) -> Sequence[TextPart | ImagePart]:
    return [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content


def _text(message: Message) -> str:
    """The words of a message; the chat template puts its images before them, wherever they stood."""
    return "\n".join(part.text for part in _parts(message) if isinstance(part, TextPart))
