"""A conversation about images: each question is asked with all that was said before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flashvlm_export.runtime.llm.base import SamplingParams
from flashvlm_export.runtime.pipeline import Pipeline
from flashvlm_export.runtime.request import Answer, Exchange, Pruning, Request, Visual
from flashvlm_export.runtime.video import MOST_FRAMES
from flashvlm_export.specs import check_budget


class Chat:
    """Asks one question after the other; ``exchanges`` holds what was said.

    Args:
        vlm: an opened pipeline with a language model; for images that are encoded once, one with selectors. Its engine
            keeps what it computed of the last prompt, where it can.
        pruning: of the images of every question; of the text span ``prompt`` all that was said takes part.
        reselect: choose the visual tokens of every image anew for each question. Otherwise they stay those that the
            question chose with which the image came: the prompt then begins as the last one did.
        system: text of a system message.

    Raises:
        BudgetError: if the budget is out of range whatever is shown.
    """

    def __init__(
        self, vlm: Pipeline, pruning: Pruning | None = None, *, reselect: bool = False, system: str | None = None
    ) -> None:
        self.vlm = vlm
        self.pruning = Pruning() if pruning is None else pruning
        if self.pruning.budget not in (None, "full"):  # what no question can mend
            check_budget(self.pruning.budget, vlm.visual_tokens * (MOST_FRAMES if vlm.inputs.video else 1))
        self.reselect = reselect
        self.system = system
        self.exchanges: list[Exchange] = []

    def ask(
        self,
        question: str,
        images: Sequence[Visual] = (),
        *,
        params: SamplingParams | None = None,
        on_text: Callable[[str], object] = lambda piece: None,
    ) -> Answer:
        """Return the answer to ``question``, which ``images`` come with; ``on_text`` hears it piece by piece.

        A question that fails leaves the conversation as it was.

        Raises:
            FlashVLMError: what :meth:`Pipeline.encode` and :meth:`Pipeline.answer` raise.
        """
        request = Request(images, question, self.system, history=self.exchanges)
        prompt = self.vlm.encode_each([(request, self.pruning)])[0]
        with self.vlm.reusing_prefixes():
            answer = self.vlm.answer(prompt, params, on_text=on_text)
        kept = images if self.reselect else prompt.images[len(prompt.images) - len(images) :]
        self.exchanges.append(Exchange(kept, question, answer.text.strip()))
        return answer
