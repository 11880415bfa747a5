"""The `openai_batch` judge: the plan's unanswered questions through files and batches into the same ledger.

    PairBatch -> missing requests -> split -> submission (journal, provider) -> poll -> merge -> ledger -> BatchOutcome

`BatchCollector` stands where the pool of workers stands for the live judges: same batches in, same outcomes out, same
ledger keys. It runs in the driver: there is nothing to do in parallel but to wait.

Contract: a request is at the provider at most once at a time. A driver that is killed at any moment finds its batches
in the journal (`batch_journal`) with the next run, does not submit their questions again, and fetches their answers.
Failed lines are asked again in a next batch, up to `max_attempts` times.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from morlaif_ray.artifacts import canonical_json
from morlaif_ray.config.judging import FeedbackConfig, OpenAIBatchJudge
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.batch_doubt import record_doubt
from morlaif_ray.feedback.batch_files import (
    BatchRequest,
    Entry,
    affordable,
    merge,
    question_of,
    read_lines,
    request_line,
    split_requests,
)
from morlaif_ray.feedback.batch_journal import BatchJournal, Submission
from morlaif_ray.feedback.batch_provider import BatchProvider, BatchStatus, OpenAIBatchProvider
from morlaif_ray.feedback.client import AttemptError, Question, RawAnswer
from morlaif_ray.feedback.joint import answers_for, joint_question
from morlaif_ray.feedback.judges import judge_identity
from morlaif_ray.feedback.ledger import FailureRow, Ledger, LedgerRow
from morlaif_ray.feedback.openai_requests import max_answer_tokens, request_body
from morlaif_ray.feedback.permits import BudgetReachedError
from morlaif_ray.feedback.prices import Price, estimate_tokens, price_for_budget
from morlaif_ray.feedback.prompting import Prompter, prompter_for
from morlaif_ray.feedback.questions import PairBatch, QuestionPlan
from morlaif_ray.feedback.recording import BatchOutcome, answer_row, outcome_of
from morlaif_ray.feedback.retry import Abort, GiveUp, RetryPolicy, decide
from morlaif_ray.feedback.status import duration

QUEUE_FULL = "token_limit_exceeded"
"""The provider holds as many tokens of ours as it takes: wait until some are done."""
APPEND_ROWS = 5000


class BatchCollector:
    """Opens ledger and provider on entry and closes them on exit; batches under way stay at the provider."""

    def __init__(
        self,
        feedback: FeedbackConfig,
        plan: QuestionPlan,
        ledger_path: Path,
        *,
        seed: int,
        provider: BatchProvider | None = None,
        tell: Callable[[str], None] = lambda _: None,
        sleep: Callable[[float], None] = time.sleep,
        lock_wait_s: float = 15.0,
    ) -> None:
        assert isinstance(feedback.judge, OpenAIBatchJudge)
        self._judge = feedback.judge
        self._feedback = feedback
        self._plan = plan
        self._prompter = prompter_for(feedback)
        self._price = price_for_budget(feedback.judge, feedback.budget_usd, feedback.prices_file)
        self._policy = RetryPolicy(feedback.max_attempts)
        self._provider: BatchProvider = provider or OpenAIBatchProvider(
            feedback.judge, RetryPolicy(max_attempts=8), sleep
        )
        self._tell = tell
        self._sleep = sleep
        self._ledger = Ledger(ledger_path, lock_wait_s=lock_wait_s)
        identity = canonical_json(judge_identity(feedback.judge, seed))
        self._ledger.register(plan.recipe, identity, self._prompter.describe())
        self._journal = BatchJournal(ledger_path)
        self._open: list[Submission] = []
        self._adopted: set[bytes] = set()  # keys that an earlier run has sent
        self._chunks: deque[list[BatchRequest]] = deque()
        self._failed: dict[bytes, str] = {}
        self._recorded: dict[int, int] = {}
        self._on_progress: Callable[[int], None] = lambda _: None
        self._queue_full = False
        self._times_full = 0
        self.num_recorded_before = self._ledger.num_answers()
        """Answers in the ledger when the collector started."""

    def __enter__(self) -> BatchCollector:
        return self

    def __exit__(self, *_: object) -> None:
        self._provider.close()
        self._ledger.close()

    def answer(
        self, batches: Sequence[PairBatch], on_progress: Callable[[int], None] = lambda _: None
    ) -> list[BatchOutcome]:
        """Outcomes in the order of `batches`; returns when every question is answered or given up.

        FeedbackError where the provider refuses, the budget is reached, or ledger or journal cannot be written. What is
        under way then is fetched by the next run.
        """
        self._on_progress = on_progress
        self._adopt()
        fresh = split_requests(
            self._missing(batches),
            self._judge.max_requests_per_file,
            int(self._judge.max_file_mb * 1e6),
        )
        while True:
            self._submit_what_may(fresh)
            if not self._open:
                break
            if not self._look():
                self._sleep(self._judge.poll_s)
        return [self._outcome(batch) for batch in batches]

    @property
    def num_failed(self) -> int:  # questions given up so far
        return len(self._failed)

    def condition(self) -> str:
        """What is at the provider, in one line; empty where nothing is."""
        return _under_way(self._open) if self._open else ""

    def _adopt(self) -> None:
        """Takes over what an earlier run left at the provider, or was about to send there."""
        foreign = self._journal.num_foreign(self._plan.recipe)
        if foreign:
            self._tell(
                f"{foreign} batches of another judge or template are left for a run with those"
            )
        for submission in self._journal.unfinished(self._plan.recipe):
            for request in self._journal.index(submission).values():
                self._adopted.update(entry.key for entry in request.entries)
            if submission.state != "submitted":
                known = self._provider.find(submission.name, submission.created_s)
                if known is not None:
                    submission = self._journal.advance(submission, "submitted", batch_id=known)
                else:
                    submission = self._send(submission)
            self._open.append(submission)
        if self._open:
            number = sum(submission.num_requests for submission in self._open)
            self._tell(f"{len(self._open)} batches of an earlier run found ({number} requests)")

    def _missing(self, batches: Sequence[PairBatch]) -> Iterator[BatchRequest]:
        """The requests whose answers are neither recorded nor under way, lazily: texts are built file by file."""
        for batch in batches:
            questions = self._plan.batch_questions(batch)
            stored = self._ledger.lookup([question.key for question in questions])
            before = len(stored.keys() - self._adopted)  # what is under way counts as it comes in
            self._recorded[batch.index] = before
            self._on_progress(before)
            known = stored.keys() | {q.key for q in questions if q.key in self._adopted}
            for numbers in self._plan.requests(questions, known):
                entries = tuple(
                    _entry(questions[number], batch.pairs[number // self._plan.per_pair].pair_id)
                    for number in numbers
                    if questions[number].key not in known
                )
                question = joint_question([questions[n] for n in numbers])
                try:
                    request = build_request(
                        question, entries, self._judge, self._prompter, self._price
                    )
                except AttemptError as error:
                    self._give_up(BatchRequest(question.key.hex(), b"", entries, 0.0), str(error))
                else:
                    yield request

    def _submit_what_may(self, fresh: Iterator[list[BatchRequest]]) -> None:
        """Fills the open batches up to their limit and the budget; BudgetReachedError when none may follow."""
        while len(self._open) < self._judge.max_open_batches and not (
            self._queue_full and self._open
        ):
            chunk = self._chunks.popleft() if self._chunks else next(fresh, None)
            if chunk is None:
                return
            count = affordable(chunk, self._usd_left())
            if count < len(chunk):
                self._chunks.appendleft(chunk[count:])
            if count == 0:
                if self._open:
                    return  # what is under way may turn out cheaper than estimated
                raise BudgetReachedError(
                    "feedback.budget_usd is reached; answers so far are in the ledger: raise budget_usd and run the "
                    "same command again"
                )
            submission = self._journal.write(self._plan.recipe, chunk[:count])
            self._open.append(self._send(submission))

    def _usd_left(self) -> float:
        if self._feedback.budget_usd is None:
            return float("inf")
        under_way = sum(submission.estimated_usd for submission in self._open)
        return self._feedback.budget_usd - self._ledger.possibly_spent_usd - under_way

    def _send(self, submission: Submission) -> Submission:
        if submission.state == "written":
            file_id = self._provider.upload(self._journal.input_path(submission.name))
            submission = self._journal.advance(submission, "uploaded", file_id=file_id)
        batch_id = self._provider.create(submission.file_id, submission.name, submission.created_s)
        return self._journal.advance(submission, "submitted", batch_id=batch_id)

    def _look(self) -> bool:
        """Looks at every open batch and takes in those that have ended; whether any had."""
        ended = False
        for submission in list(self._open):
            status = self._provider.status(submission.batch_id)
            if status.ended:
                self._open.remove(submission)
                self._take_in(submission, status)
                ended = True
        return ended

    def _take_in(self, submission: Submission, status: BatchStatus) -> None:
        if status.status == "failed" and not status.output_file_id:
            self._refused(submission, list(self._journal.requests(submission)), status)
            return
        self._queue_full, self._times_full = False, 0
        requests = self._journal.index(submission)
        failed = self._read_answers(submission, status, requests)
        done, ledger, recipe = status.status == "completed", self._ledger, self._plan.recipe
        record_doubt(ledger, recipe, submission.name, requests, failed, completed=done)
        fatal, again = "", set[str]()
        for custom_id, error in failed.items():
            step = decide(error, requests[custom_id].attempt, self._policy, 0.0)
            if isinstance(step, Abort):
                fatal = step.message
            elif isinstance(step, GiveUp):
                self._give_up(requests[custom_id], step.reason)
            else:
                again.add(custom_id)
        if again:
            repeated = self._journal.requests(submission, again)
            self._chunks.append([replace(one, attempt=one.attempt + 1) for one in repeated])
        # Last: until here a crash leads back to fetching the same files, which the ledger takes without doubling.
        text = f"{status.status}: {len(requests) - len(failed)} answered, {len(failed)} failed"
        self._journal.advance(submission, "done", outcome=text)
        if self._judge.delete_files:
            files = (submission.file_id, status.output_file_id, status.error_file_id)
            _delete(self._provider, [file for file in files if file], self._tell)
        if fatal:
            raise FeedbackError(fatal)

    def _read_answers(
        self, submission: Submission, status: BatchStatus, requests: dict[str, BatchRequest]
    ) -> dict[str, AttemptError]:
        """Fetches the files and records their answers line by line; why the other requests have none."""
        latency_s = time.time() - submission.created_s
        rows: list[LedgerRow] = []

        def take(request: BatchRequest, answer: RawAnswer) -> None:
            rows.extend(answer_rows(request, answer, self._price, latency_s))
            if len(rows) >= APPEND_ROWS:
                self._record(rows)
                rows.clear()

        lines = _fetched_lines(self._provider, self._journal, submission, status)
        failed = merge(requests, read_lines(lines), self._judge, take)
        self._record(rows)
        return failed

    def _refused(
        self, submission: Submission, requests: list[BatchRequest], status: BatchStatus
    ) -> None:
        """The whole batch was refused before any request was executed: nothing of it is paid."""
        reason = status.error_message or status.error_code or "no reason given"
        self._journal.advance(submission, "done", outcome=f"refused: {reason}")
        if status.error_code == QUEUE_FULL and self._times_full < self._policy.max_attempts:
            self._chunks.append(requests)
            self._queue_full = True
            if not self._open:  # else the next batch that ends makes room
                self._times_full += 1
                self._sleep(self._judge.poll_s)
            return
        raise FeedbackError(
            f"the Batch API refused a batch of {len(requests)} requests: {reason}; answers so far are in the ledger"
        )

    def _record(self, rows: list[LedgerRow]) -> None:
        if rows:
            self._ledger.append(self._plan.recipe, rows)
            self._on_progress(len(rows))

    def _give_up(self, request: BatchRequest, reason: str) -> None:
        self._ledger.append(self._plan.recipe, [], _failure_rows(request, reason))
        self._failed |= {entry.key: reason for entry in request.entries}

    def _outcome(self, batch: PairBatch) -> BatchOutcome:
        questions, recorded = self._plan.batch_questions(batch), self._recorded.get(batch.index, 0)
        stored = self._ledger.lookup([question.key for question in questions])
        return outcome_of(batch.index, questions, stored, self._failed, recorded)


def build_request(
    question: Question,
    entries: tuple[Entry, ...],
    judge: OpenAIBatchJudge,
    prompter: Prompter,
    price: Price,
) -> BatchRequest:
    """AttemptError for a pair that does not fit into the judge's context."""
    messages = prompter.messages(question)
    custom_id = question.key.hex()
    line = request_line(custom_id, request_body(judge, messages, question))
    tokens = estimate_tokens(*(message["content"] for message in messages))
    usd = price.cost_usd(tokens, max_answer_tokens(judge, question))
    return BatchRequest(custom_id, line, entries, usd, strength=question.strength)


def answer_rows(
    request: BatchRequest, answer: RawAnswer, price: Price, latency_s: float
) -> list[LedgerRow]:
    """The ledger rows of one answered request: one, or in joint mode one per member that was missing."""
    question = question_of(request)
    parts = answers_for(answer, [True] * len(request.entries))
    return [
        answer_row(member, entry.pair_id, part, price, latency_s, request.attempt)
        for member, entry, part in zip(
            question.members or (question,), request.entries, parts, strict=True
        )
    ]


def _fetched_lines(
    provider: BatchProvider, journal: BatchJournal, submission: Submission, status: BatchStatus
) -> Iterator[bytes]:
    """The lines of the output file, then of the error file, from our disk."""
    for kind, file_id in (("output", status.output_file_id), ("error", status.error_file_id)):
        if file_id:
            path = journal.fetched_path(submission, kind)
            provider.fetch(file_id, path)
            with path.open("rb") as file:
                yield from file


def _failure_rows(request: BatchRequest, reason: str) -> list[FailureRow]:
    return [
        FailureRow(entry.key, entry.pair_id, entry.principle, entry.order, reason, request.attempt)
        for entry in request.entries
    ]


def _delete(provider: BatchProvider, file_ids: Sequence[str], tell: Callable[[str], None]) -> None:
    """Their answers are in the ledger: a file that stays behind costs nothing but room at the provider."""
    for file_id in file_ids:
        try:
            provider.delete(file_id)
        except FeedbackError as error:
            tell(f"file {file_id} stays at the provider: {error}")


def _under_way(submissions: Sequence[Submission]) -> str:
    number = sum(submission.num_requests for submission in submissions)
    age_s = time.time() - min(submission.created_s for submission in submissions)
    return (
        f"at the provider: {len(submissions)} batches, {number} requests, the oldest for {duration(age_s)} "
        f"(a batch may take a day)"
    )


def _entry(question: Question, pair_id: str) -> Entry:
    return Entry(question.key, pair_id, question.principle, question.order)
