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
| `status`, `export` | the ledger read beside its writer: for people, and as Parquet |
| `parsing`, `combining`, `assembling` | from log-probabilities to debiased judgements |
| `analysis` | agreement, correlation, position bias, people |

Importing this package loads neither the API client nor the lexicon libraries.
"""

from morlaif_ray.feedback.client import AttemptError, FeedbackClient, Question, RawAnswer
from morlaif_ray.feedback.judges import JUDGES, build_client

__all__ = ["JUDGES", "AttemptError", "FeedbackClient", "Question", "RawAnswer", "build_client"]
