"""AI feedback: ask a judge which of two responses is better, per principle, and never pay twice.

    ResponsePair -> Question (x principles x orders) -> FeedbackClient -> RawAnswer -> ParsedAnswer -> Judgement

| module | holds |
| --- | --- |
| `client` | the border: `FeedbackClient`, `Question`, `RawAnswer`, `AttemptError` |
| `judges` | which judges there are: `rules_client` (`measures`, `lexicons`), `openai_client` |
| `prompting` | the messages of a question: `template` (principle last), `fewshot`, `truncation` |
| `openai_requests` | bodies out, answers in, for the live and the batch judge; `openai_errors`, `endpoints` |
| `openai_batch` | the Batch API: `batch_files` (pure), `batch_journal` (on disk), `batch_provider` (I/O) |
| `joint` | several principles in one request; `forecasting`: what a pair will cost |
| `questions` | which questions there are, content keys, batches |
| `asking` | the answering loop; `permits`, `rate`, `breaker`, `concurrency`, `retry`, `prices` decide for it |
| `ledger`, `ledger_schema`, `recording` | the durable store of answers, and the way into it |
| `intents` | requests noted before they are sent, so that a crash leaves no spending unseen |
| `local_client`, `local_scoring`, `vllm_scoring` | the judge in this process, on transformers or on vLLM |
| `status`, `export` | the ledger read beside its writer: for people, and as Parquet |
| `parsing`, `combining`, `assembling` | from log-probabilities to debiased judgements |
| `analysis` | agreement, correlation, position bias, people |

Importing this package loads nothing: the names below come with their first use, so that an actor which needs one small
module (the limiter, the ledger) starts without the judges, pydantic or NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from morlaif_ray.feedback.client import AttemptError, FeedbackClient, Question, RawAnswer
    from morlaif_ray.feedback.judges import JUDGES, build_client

__all__ = ["JUDGES", "AttemptError", "FeedbackClient", "Question", "RawAnswer", "build_client"]

_FROM_JUDGES = ("JUDGES", "build_client")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _FROM_JUDGES:
        from morlaif_ray.feedback import judges

        return getattr(judges, name)
    from morlaif_ray.feedback import client

    return getattr(client, name)
