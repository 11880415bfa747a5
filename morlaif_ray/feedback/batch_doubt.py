"""Lines of a batch that the provider worked on and we cannot read: billed, perhaps, although no answer came."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from morlaif_ray.feedback.batch_files import NO_LINE, BatchRequest
from morlaif_ray.feedback.client import AttemptError
from morlaif_ray.feedback.intents import Intent, Settled
from morlaif_ray.feedback.ledger import Ledger


def record_doubt(
    ledger: Ledger,
    recipe: str,
    batch_name: str,
    requests: Mapping[str, BatchRequest],
    failed: Mapping[str, AttemptError],
    *,
    completed: bool,
) -> None:
    """Counts such lines of one batch as possibly spent, at their estimate. Repeating it changes nothing.

    A line that is absent or cut off is in doubt where the batch is `completed`; one that expired was not worked on.
    """
    reasons = {custom_id: _doubt(error, completed) for custom_id, error in failed.items()}
    doubtful = {custom_id: reason for custom_id, reason in reasons.items() if reason}
    intents = [
        Intent(
            _ticket(batch_name, custom_id),
            requests[custom_id].entries[0].key,
            requests[custom_id].estimated_usd,
        )
        for custom_id in doubtful
    ]
    if intents:
        ledger.announce(intents)
        settled = [Settled(i.ticket, r) for i, r in zip(intents, doubtful.values(), strict=True)]
        ledger.append(recipe, [], [], settled)


def _doubt(error: AttemptError, completed: bool) -> str:
    if completed and error.message == NO_LINE:
        return "no readable line in a completed batch"
    return error.doubt


def _ticket(batch_name: str, custom_id: str) -> int:
    """62 bits that are the same whenever the batch is read again."""
    digest = hashlib.sha256(f"{batch_name}/{custom_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
