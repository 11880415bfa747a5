"""The Batch API of an OpenAI-compatible provider: files in, batches, files out. Retries what may be repeated.

`create` is the one call that must not be repeated blindly: after an error of unknown outcome the batch is looked for by
its name first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx2
import openai

from morlaif_ray.config.judging import OpenAIBatchJudge
from morlaif_ray.errors import FeedbackError
from morlaif_ray.feedback.batch_files import ENDPOINT
from morlaif_ray.feedback.client import AttemptError
from morlaif_ray.feedback.openai_client import key_from_environment
from morlaif_ray.feedback.openai_errors import excerpt, explain_status
from morlaif_ray.feedback.retry import Abort, GiveUp, RetryPolicy, decide

NAME_FIELD = "morlaif_submission"
TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})
TRANSFER_TIMEOUT_S = 600.0
"""Longest upload or download of one file."""
CLOCK_SKEW_S = 3600.0
"""Batches created longer than this before a submission cannot be it."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class BatchStatus:
    status: str
    """validating, in_progress, finalizing, completed, failed, expired, cancelling, cancelled."""
    output_file_id: str = ""
    error_file_id: str = ""
    error_code: str = ""
    """Why the whole batch failed: its input was refused."""
    error_message: str = ""

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL


class BatchProvider(Protocol):
    """What the collector needs. FeedbackError from any of these: it cannot go on."""

    def upload(self, path: Path) -> str: ...

    def create(self, file_id: str, name: str, created_s: float) -> str: ...

    def find(self, name: str, created_s: float) -> str | None: ...

    def status(self, batch_id: str) -> BatchStatus: ...

    def fetch(self, file_id: str, path: Path) -> None: ...

    def delete(self, file_id: str) -> None: ...

    def close(self) -> None: ...


class OpenAIBatchProvider:
    """FeedbackError at once where the key's environment variable is not set."""

    def __init__(
        self,
        judge: OpenAIBatchJudge,
        policy: RetryPolicy,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._judge = judge
        self._policy = policy
        self._sleep = sleep
        self._key = key_from_environment(judge.api_key_env)
        self._where = judge.base_url or "the provider's default URL"
        self._client = openai.OpenAI(
            api_key=self._key,
            base_url=judge.base_url,
            max_retries=0,
            timeout=judge.request_timeout_s,
        )

    def upload(self, path: Path) -> str:
        def send() -> str:
            with path.open("rb") as file:
                found = self._client.files.create(
                    file=(path.name, file), purpose="batch", timeout=TRANSFER_TIMEOUT_S
                )
            return str(found.id)

        return self._repeat(send)

    def create(self, file_id: str, name: str, created_s: float) -> str:
        """The batch's id. After an attempt of unknown outcome it is looked for before the next one."""
        attempts = 0

        def send() -> str:
            nonlocal attempts
            attempts += 1
            if attempts > 1 and (known := self.find(name, created_s)) is not None:
                return known
            found = self._client.batches.create(
                input_file_id=file_id,
                endpoint=ENDPOINT,
                completion_window="24h",
                metadata={NAME_FIELD: name},
            )
            return str(found.id)

        return self._repeat(send)

    def find(self, name: str, created_s: float) -> str | None:
        """The batch that was created under this name, if it was."""

        def look() -> str | None:
            for batch in self._client.batches.list(limit=100):  # newest first
                if (batch.metadata or {}).get(NAME_FIELD) == name:
                    return str(batch.id)
                if batch.created_at < created_s - CLOCK_SKEW_S:
                    return None
            return None

        return self._repeat(look)

    def status(self, batch_id: str) -> BatchStatus:
        batch = self._repeat(lambda: self._client.batches.retrieve(batch_id))
        errors = batch.errors.data if batch.errors is not None else None
        first: Any = errors[0] if errors else None
        return BatchStatus(
            batch.status,
            batch.output_file_id or "",
            batch.error_file_id or "",
            (first.code or "") if first else "",
            excerpt(first.message or "", self._key) if first else "",
        )

    def fetch(self, file_id: str, path: Path) -> None:
        """A file of the provider's onto our disk, never whole in memory; one that was cut off is loaded anew."""

        def load() -> None:
            files = self._client.files.with_streaming_response
            with files.content(file_id, timeout=TRANSFER_TIMEOUT_S) as response:
                response.stream_to_file(path)

        try:
            self._repeat(load)
        except OSError as error:
            raise FeedbackError(
                f"{path}: cannot be written ({error.strerror}); free some space or mend its rights and run the same "
                f"command again"
            ) from error

    def delete(self, file_id: str) -> None:
        self._repeat(lambda: self._client.files.delete(file_id))

    def close(self) -> None:
        self._client.close()

    def _repeat(self, call: Callable[[], Result]) -> Result:
        attempt = 0
        while True:
            attempt += 1
            try:
                return call()
            except openai.APITimeoutError:
                error = AttemptError("timeout", f"no answer from {self._where}")
            except openai.APIStatusError as raised:
                error = self._explain(raised)
            except openai.APIConnectionError as raised:
                cause = type(raised.__cause__ or raised).__name__
                error = AttemptError("connection", f"{self._where}: {cause}")
            except httpx2.TransportError as raised:  # a streamed body: the SDK does not wrap it
                error = AttemptError("connection", f"{self._where}: {type(raised).__name__}")
            except (openai.OpenAIError, ValueError) as raised:
                error = AttemptError("malformed", f"{self._where}: {excerpt(raised, self._key)}")
            step = decide(error, attempt, self._policy, 0.5)
            if isinstance(step, Abort):
                raise FeedbackError(step.message)
            if isinstance(step, GiveUp):
                raise FeedbackError(
                    f"the Batch API cannot be used: {step.reason}; the batches under way are written down beside the "
                    f"ledger: run the same command again"
                )
            self._sleep(step.wait_s)

    def _explain(self, raised: openai.APIStatusError) -> AttemptError:
        if raised.status_code == 404:
            return AttemptError(
                "not_found",
                f"{self._where} has no such batch or file, or no Batch API (HTTP 404); correct "
                f"feedback.judge.base_url, or use judge.kind: openai",
            )
        return explain_status(
            raised,
            where=self._where,
            model=self._judge.model,
            key_name=self._judge.api_key_env,
            key=self._key,
        )
