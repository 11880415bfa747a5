"""The border to the judge: one question in, the first token's log-probabilities out.

    Question -> FeedbackClient.ask -> RawAnswer            (or AttemptError: this attempt gave no answer)

Whatever the judge is (an API, a model on the cluster, the embedded rules), it answers in the shape of a chat completion
whose only token is A or B, so that one path of parsing, debiasing and storing serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from morlaif_ray.types import Order

AttemptKind = Literal[
    "rate_limit",
    "server",
    "timeout",
    "connection",
    "malformed",
    "bad_request",
    "auth",
    "not_found",
    "quota",
]


@dataclass(frozen=True, slots=True)
class Question:
    """One request: which of two responses is better by one phrase? Produced by `questions`, consumed by clients."""

    prompt: str
    first: str
    """The response shown as A."""
    second: str
    """The response shown as B."""
    principle: str
    """A principle's name, or "general"."""
    phrase: str
    """The phrase put to the judge, e.g. "Which response is more concise?"."""
    order: Order
    """ "ab": `first` is the pair's response_a; "ba": it is response_b."""
    key: bytes
    """Content hash (16 bytes) of everything that decides the answer; see `questions.question_key`."""
    members: tuple[Question, ...] = ()
    """Joint mode: the questions that this one request answers; empty for an ordinary question."""
    strength: bool = False
    """Joint mode: a number from 0 to 100 is asked for instead of a letter."""


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """What came back, unjudged. Produced by clients, consumed by `parsing.parse_answer` and the ledger."""

    top_logprobs: Mapping[str, float]
    """Token text -> log-probability (nats) at the position of the answer; empty where there were none."""
    model: str
    """The model as the provider returned it."""
    prompt_tokens: int
    completion_tokens: int
    refusal: str = ""
    """The provider's refusal text; empty when it did not refuse."""
    cached_tokens: int = 0
    """Those of the prompt tokens that the provider reports as served from its prefix cache."""
    problem: str = ""
    """Why the client found no answer in what came back; empty when it found one."""
    parts: tuple[RawAnswer, ...] = ()
    """Joint mode: one answer per member of the question, the request's tokens all on the first."""


class FeedbackClient(Protocol):
    """A judge. Implementations never retry by themselves: `retry.decide` does."""

    async def ask(self, question: Question) -> RawAnswer:
        """Raises AttemptError when this attempt gave no answer."""
        ...

    async def close(self) -> None:
        """Frees connections; the client is not used afterwards."""
        ...


@runtime_checkable
class HasProcesses(Protocol):
    """What a client may offer besides: processes of its own, without which it is of no use."""

    def when_lost(self, act: Callable[[], None]) -> None:
        """Calls `act`, from a thread, as soon as one of them has died."""
        ...


@runtime_checkable
class AsksMany(Protocol):
    """What a client may offer besides: many questions in one call, which share work (`local_client`)."""

    @property
    def questions_per_call(self) -> int:
        """As many as one call does well with."""
        ...

    async def ask_many(self, questions: Sequence[Question]) -> list[RawAnswer | AttemptError]:
        """One entry per question, in order; AttemptError for those that cannot be asked."""
        ...


class AttemptError(Exception):
    """One attempt failed. What to do about it is decided by `retry.decide`; users never see this class."""

    def __init__(
        self,
        kind: AttemptKind,
        message: str,
        retry_after_s: float | None = None,
        sent: bool = True,
    ) -> None:
        super().__init__(kind, message, retry_after_s, sent)
        self.kind: AttemptKind = kind
        self.message = message
        self.retry_after_s = retry_after_s
        """Seconds that the provider asked to wait; None where it said nothing."""
        self.sent = sent
        """False where the request surely never reached the provider."""

    @property
    def doubt(self) -> str:
        """Why this attempt may have been billed although no answer came; empty where it was not.

        A provider that answered with an error status has not worked; one whose answer was late, cut off or unreadable
        may well have.
        """
        unknown = self.sent and self.kind in ("timeout", "connection", "malformed")
        return f"no readable answer ({self.kind})" if unknown else ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"
