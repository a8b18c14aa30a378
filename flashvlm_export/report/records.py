"""What ``report.json`` holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from flashvlm_export.errors import ConfigError
from flashvlm_export.evaluation.results import Results

SCHEMA_VERSION = 1
# Backend and precision of what everything else is compared with.
PYTORCH = ("PyTorch CPU", "fp32")


@dataclass(frozen=True)
class Environment:
    """Where it was measured.

    Attributes:
        processor: model of the CPU.
        cores: that this process may use.
        memory_bytes: of the machine.
        gpu: name of the first GPU, if any.
        system: operating system and Python.
        versions: of the packages that ran.
    """

    processor: str
    cores: int
    memory_bytes: int
    gpu: str | None
    system: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Subject:
    """What was measured.

    Attributes:
        bundle: its directory's name.
        model: that was exported.
        manifest_sha256: of the bundle's manifest, which holds the hash of every file.
        selector: name and settings in one line.
        visual_tokens: of one image before pruning.
        decoder: precision of the language model, ``None`` where only the visual side was measured.
    """

    bundle: str
    model: str
    manifest_sha256: str
    selector: str
    visual_tokens: int
    decoder: str | None


@dataclass(frozen=True)
class Settings:
    """How it was measured.

    Attributes:
        budgets: visual tokens kept per image; kept sets are judged at the first, and the last keeps all.
        rounds: that count, after ``warm_up`` that do not.
        warm_up: rounds.
        max_tokens: longest answer, in tokens.
        threads: of every backend.
    """

    budgets: list[int]
    rounds: int
    warm_up: int
    max_tokens: int
    threads: int


@dataclass(frozen=True)
class Parity:
    """One backend and precision against PyTorch in float32, over all examples.

    Attributes:
        cosine: of visual tokens before pruning, mean over patches, of the image where it is least.
        worst_token_cosine: of the single visual token where it is least.
        max_error: largest error of a visual token's value, kept or not pruned, relative to the largest magnitude.
        score_error: largest error of a fused score (0 to 1).
        iou: intersection over union of the kept sets, mean over images.
        important_iou: the same for the part that is chosen by score.
        coverage: largest cosine of a patch to a kept one, mean, divided by the same for PyTorch's kept set.
        same_answers: of ``answers``, how many have PyTorch's very tokens.
        answers: greedy answers compared; 0 without a language model.
    """

    backend: str
    precision: str
    cosine: float
    worst_token_cosine: float
    max_error: float
    score_error: float
    iou: float
    important_iou: float
    coverage: float
    same_answers: int
    answers: int


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds."""

    p50_ms: float
    p90_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Latency:
    """One backend, precision and budget.

    Attributes:
        stages: in the order in which they run; ``visual`` of a fused graph is ``vision`` and ``selection`` at once.
        time_to_first_token: all stages up to the first token; without a language model, up to the pruned prompt.
        tokens_per_s: while decoding; 0 without a language model.
        prompt_tokens: that the language model reads, mean.
    """

    backend: str
    precision: str
    budget: int
    stages: dict[str, Percentiles]
    time_to_first_token: Percentiles
    tokens_per_s: float
    prompt_tokens: float


@dataclass(frozen=True)
class Example:
    """One image with a question, and what was answered at each budget, by backend and precision."""

    image: str
    question: str
    answers: dict[str, dict[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One requirement: ``measured`` has to be at least ``required``; what failed to run measured 0."""

    name: str
    measured: float
    required: float
    passed: bool


@dataclass(frozen=True)
class Report:
    """Everything.

    Attributes:
        schema_version: of this record.
        created: when, in UTC.
        environment: where.
        subject: what.
        settings: how.
        parity: a row for each backend and precision but PyTorch.
        latency: a row for each of these, PyTorch too, and each budget.
        peak_memory_bytes: by backend and precision: largest resident memory of its process, over all budgets.
        examples: questions and answers.
        not_run: by backend and precision, why it is not available on this machine.
        failed: the same for what is available and did not work.
        checks: what was required.
        passed: whether every check did.
        accuracy: what an evaluation of this bundle found, if given.
    """

    schema_version: int
    created: str
    environment: Environment
    subject: Subject
    settings: Settings
    parity: list[Parity]
    latency: list[Latency]
    peak_memory_bytes: dict[str, int]
    examples: list[Example]
    not_run: dict[str, str]
    failed: dict[str, str]
    checks: list[Check]
    passed: bool
    accuracy: Results | None = None

    def find(self, backend: str, precision: str, budget: int) -> Latency:
        """Return one row of the latencies."""
        for row in self.latency:
            if (row.backend, row.precision, row.budget) == (backend, precision, budget):
                return row
        raise ConfigError("the report has no such row", received=f"{backend} {precision} {budget}")
