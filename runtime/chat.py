"""A conversation about images: each question is asked with all that was said before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flashvlm_export.runtime.images import ImageSource
from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Answer, Exchange, Pipeline, Request
from flashvlm_export.runtime.prompt import Positions, TextSpan
from flashvlm_export.specs import check_budget


class Chat:
    """Asks one question after the other; ``exchanges`` holds what was said.

    Args:
        vlm: an opened pipeline with a language model; for images that are encoded once, one with selectors. Its engine
            keeps what it computed of the last prompt, where it can.
        reselect: choose the visual tokens of every image anew for each question. Otherwise they stay those that the
            question chose with which the image came: the prompt then begins as the last one did.
        budget: visual tokens to keep per image; ``None`` for what the graph was optimised for.
        system: text of a system message.
        text_span: see :meth:`Pipeline.encode`; of ``prompt`` all that was said takes part.
        positions: see :meth:`Pipeline.encode`.
        selector: see :meth:`Pipeline.encode`.

    Raises:
        BudgetError: if ``budget`` is out of range.
    """

    def __init__(
        self,
        vlm: Pipeline,
        *,
        reselect: bool = False,
        budget: int | None = None,
        system: str | None = None,
        text_span: TextSpan = "prompt",
        positions: Positions = "contiguous",
        selector: str | None = None,
    ) -> None:
        self.vlm = vlm
        self.reselect = reselect
        self.budget = None if budget is None else check_budget(budget, vlm.visual_tokens)
        self.system = system
        self.text_span: TextSpan = text_span
        self.positions: Positions = positions
        self.selector = selector
        self.exchanges: list[Exchange] = []

    def ask(
        self,
        question: str,
        images: Sequence[ImageSource] = (),
        *,
        params: SamplingParams | None = None,
        on_text: Callable[[str], object] = lambda piece: None,
    ) -> Answer:
        """Return the answer to ``question``, which ``images`` come with; ``on_text`` hears it piece by piece.

        A question that fails leaves the conversation as it was.

        Raises:
            UsageError: if no image came yet, and what :meth:`Pipeline.encode` and :meth:`Pipeline.answer` raise.
        """
        request = Request(images, question, self.system, history=self.exchanges)
        prompt = self.vlm.encode(
            [request],
            budget=self.budget,
            text_span=self.text_span,
            positions=self.positions,
            selector=self.selector,
        )[0]
        with self.vlm.reusing_prefixes():
            answer = self.vlm.answer(prompt, params, on_text=on_text)
        kept = images if self.reselect else prompt.images[len(prompt.images) - len(images) :]
        self.exchanges.append(Exchange(kept, question, answer.text.strip()))
        return answer
