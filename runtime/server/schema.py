"""The body of ``POST /v1/chat/completions``: OpenAI's fields, and a few of our own.

A field that is not listed is refused, as OpenAI does, and one that would change the answer and is not obeyed. ``null``
counts as not given. Source: OpenAI's API reference, "Create chat completion".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flashvlm_export.manifest import Positions, TextSpan


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class TextPart(_Strict):
    """Words of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture is; ``detail`` is taken and has no effect: ``token_budget`` says how much of it is kept."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Strict):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


StopText = Annotated[str, Field(min_length=1, max_length=200)]
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """What one side said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=256)] = ""
    name: str | None = None
    # What clients send back of an answer.
    tool_calls: list[Any] = Field([], max_length=0)
    annotations: list[Any] = Field([], max_length=0)


class StreamOptions(_Strict):
    """Whether a stream ends with an event of token counts; padding against listeners is not added."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(_Strict):
    """Text is the only one."""

    type: Literal["text"]


class ChatRequest(_Strict):
    """One question, with all that was said before it."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=256)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2, description="0, the default, is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] = []

    # Only as far as that is what happens anyway.
    n: Literal[1] = 1
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    presence_penalty: float = Field(0.0, ge=0, le=0)
    logprobs: Literal[False] = False
    response_format: ResponseFormat | None = None
    logit_bias: dict[str, float] = Field({}, max_length=0)
    modalities: list[Literal["text"]] | None = None
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "none"
    # Of no effect on an answer.
    parallel_tool_calls: bool = False
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    store: Literal[False] = False
    metadata: dict[str, str] | None = Field(None, max_length=16)

    # Ours.
    top_k: int = Field(0, ge=0, description="choose among the K likeliest tokens; 0 for all")
    token_budget: int | Literal["full"] | None = Field(None, description="visual tokens to keep of each image")
    selector: str | None = Field(None, description="which chooses them")
    text_span: TextSpan | None = Field(None, description="text that guides the choice")
    positions: Positions | None = Field(None, description="where kept tokens stand in the prompt")
    selection: bool = Field(False, description="say which visual tokens were kept")
