"""What engines share that load a checkpoint in Hugging Face layout themselves."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from flashvlm_export.errors import SessionError
from flashvlm_export.files import sha256_of_all
from flashvlm_export.runtime.llm.base import LLMEngine


class CheckpointLLM(LLMEngine):
    """Runs the language model in ``directory``, which is never fetched from anywhere.

    Attributes:
        expected: what the directory has to be, for errors.
    """

    expected: ClassVar[str]

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    @property
    def identity(self) -> str:
        """The engine and a hash over the files of weights; raises :class:`SessionError` if there is no checkpoint."""
        self._require_directory()
        return f"{self.name} {sha256_of_all(sorted(self.directory.glob('*.safetensors')))[:16]}"

    def _require_directory(self) -> None:
        """Raise :class:`SessionError` if there is none: libraries would look for a name in a cache or on the hub."""
        if not self.directory.is_dir():
            raise SessionError(
                "there is no checkpoint at this path", received=str(self.directory), expected=self.expected
            )


def token_ids(of_config: int | list[int] | None) -> tuple[int, ...]:
    """Return what a configuration says in one of the three ways that it may."""
    return tuple([of_config] if isinstance(of_config, int) else of_config or ())
