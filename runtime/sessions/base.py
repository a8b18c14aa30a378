"""A visual session: the base class owns the life cycle and the checks, a backend writes three small methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, TypeVar

from flashvlm_export.errors import SessionError
from flashvlm_export.specs import Array, Feeds, GraphSpec

S = TypeVar("S", bound="VisualSession")


@dataclass(frozen=True)
class VisualOutputs:
    """What the visual graph returns.

    Attributes:
        tokens: ``[B, K, D]`` in the graph's floating-point dtype, owned by the caller.
        indices: int64 ``[B, K]``, ascending: which of the N visual tokens they are.
        scores: float32 ``[B, N]``: fused score of every visual token.
    """

    tokens: Array
    indices: Array
    scores: Array


class VisualSession(ABC):
    """Runs one visual graph. Constructing is free; ``open()`` or ``with`` loads the graph.

    Args:
        spec: the graph's contract; inputs are checked against it before every run.
    """

    name: ClassVar[str]

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec
        self._is_open = False

    def open(self) -> None:
        """Load the graph; raises :class:`SessionError` where the backend or device is not there."""
        if not self._is_open:
            self._open()
            self._is_open = True

    def close(self) -> None:
        """Release what ``open`` took; may be called twice."""
        if self._is_open:
            self._is_open = False
            self._close()

    def run(self, feeds: Feeds) -> VisualOutputs:
        """Run the graph on what its contract lists: pixels, text and ``budget``.

        Raises:
            SessionError: if the session is closed, or a name, dtype or shape is not the graph's.
            BudgetError: if the budget is outside of ``1..N``.
        """
        if not self._is_open:
            raise SessionError("the session is not open", hint="call open(), or use it in a with statement")
        self.spec.check_feeds(feeds)
        return self._run(feeds)

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...

    @abstractmethod
    def _run(self, feeds: Feeds) -> VisualOutputs: ...

    def __enter__(self: S) -> S:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
