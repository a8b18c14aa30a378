"""Every exception this package raises on purpose.

::

    FlashVLMError
    ├── UsageError            the call itself is wrong: command-line exit code 2
    │   ├── BudgetError       token budget outside 1..N, or not a whole number
    │   ├── PromptError       empty question, or placeholders that do not match the images
    │   └── ConfigError       unknown model, selector, precision, or a setting out of range
    ├── DatasetError          questions that cannot be used: broken lines, missing images, unknown metrics
    ├── JournalError          recorded answers of another bundle, or being written by another process
    ├── EvaluationError       questions that the model could not answer
    ├── ImageError            an image that cannot be read, or is not safe to read
    ├── VideoError            a video that cannot be read, or has not the frames that are asked for
    ├── CheckpointError       source weights: not found, incomplete, or of the wrong shape
    ├── BundleError           a bundle that is missing, damaged, half-written or too new
    ├── ExportError           the exported graph did not pass a check
    ├── CalibrationError      images that give no usable ranges, or an INT8 graph outside its tolerance
    ├── TargetError           the engine cannot be built on this machine
    ├── SessionError          a backend that is missing, or inputs it cannot take
    ├── LLMError              the language model cannot answer
    │   └── PromptTooLongError  prompt and answer do not fit into its context
    ├── QueueFullError        as many requests wait as may
    ├── ReportError           a check of a report that failed
    ├── WorkerError           a process that measures and ended, or raised what it should not
    ├── StorageError          not enough disk space, or a path that cannot be written
    └── DependencyError       an optional package is not installed

Each message says what was received, what was expected, and what to do next.
"""

from __future__ import annotations


def install_hint(extra: str) -> str:
    """Return how to install what an extra of this package stands for."""
    return f"in a clone of flashvlm-export: pip install '.[{extra}]'"


class FlashVLMError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: one sentence: what went wrong, on what.
        received: the offending value or state.
        expected: what would have been accepted.
        hint: what to do next, preferably a command.
    """

    exit_code = 1

    def __init__(self, what: str, *, received: object = None, expected: object = None, hint: str | None = None) -> None:
        self.what = what
        self.received = received
        self.expected = expected
        self.hint = hint
        lines = [what]
        if received is not None:
            lines.append(f"  received: {received}")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if hint is not None:
            lines.append(f"  what to do: {hint}")
        super().__init__("\n".join(lines))


class UsageError(FlashVLMError):
    """The call itself is wrong; nothing was read or written."""

    exit_code = 2


class BudgetError(UsageError):
    """The token budget is not a whole number in ``1..N``."""


class PromptError(UsageError):
    """The prompt is empty, too long, or its image placeholders do not match the images."""


class ConfigError(UsageError):
    """A name or setting that does not exist, or a value outside its range."""


class DatasetError(FlashVLMError):
    """A data set, or a published file that one is made from, cannot be used; the message names each line."""


class JournalError(FlashVLMError):
    """The recorded answers of an output directory are not this run's to continue."""


class EvaluationError(FlashVLMError):
    """Some questions could not be answered; the answers to the others are kept."""


class ImageError(FlashVLMError):
    """An image that cannot be decoded, or is too large to decode safely."""


class VideoError(FlashVLMError):
    """A video that cannot be read, has broken frames, or not as many as are asked for."""


class CheckpointError(FlashVLMError):
    """The source checkpoint is not there, incomplete, or not of the family it was taken for."""


class BundleError(FlashVLMError):
    """The bundle is missing, damaged, half-written, or written by a newer version."""


class ExportError(FlashVLMError):
    """The exported graph did not pass a check; no bundle was written."""


class TargetError(FlashVLMError):
    """The engine cannot be built on this machine: it lacks the device, or the memory."""


class CalibrationError(FlashVLMError):
    """The images give no usable ranges, or the INT8 graph did not pass a check; the bundle is as it was."""


class SessionError(FlashVLMError):
    """A backend is not available, or was fed inputs that its graph does not take."""


class LLMError(FlashVLMError):
    """The language model engine cannot take this prompt or these settings, or failed."""


class PromptTooLongError(LLMError):
    """The prompt, or prompt and answer together, take more positions than the language model has."""


class QueueFullError(FlashVLMError):
    """As many requests are waiting as may; nothing became of this one, which can be asked again later."""


class ReportError(FlashVLMError):
    """A check of a report failed; the report was written."""


class WorkerError(FlashVLMError):
    """A process that measures ended, or raised what it should not."""


class StorageError(FlashVLMError):
    """Not enough disk space, or a path that cannot be written."""


class DependencyError(FlashVLMError):
    """An optional package that this step needs is not installed."""
