"""A batch under the policy as a step begins, and under the reference; each rank takes its rows, all get the result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from morlaif_ray.rl.experience import Evaluation, Experience
from morlaif_ray.rl.optimisation import Optimisation, Outputs
from morlaif_ray.rl.policy_model import ReferenceModel, TokenBatch


def measure(
    run: Optimisation,
    reference: ReferenceModel | None,
    tokens: TokenBatch,
    lengths: Sequence[int],
    step: int,
    *,
    keep_first: bool = True,
) -> tuple[Evaluation, list[Outputs]]:
    """The evaluation of the whole batch; and this rank's outputs of the first micro-batches of the step's first
    minibatch, as many as may be kept, with their graph, so that their forward pass need not be made again."""
    first = run.minibatches(len(lengths), step, 0)[0]
    rest = sorted(set(range(len(lengths))).difference(first))
    parts = run.microbatches(first, lengths)
    num_kept = run.num_reusable(parts, lengths) if keep_first else 0
    others = parts[num_kept:] + (run.microbatches(rest, lengths) if rest else [])
    results = torch.zeros(4, *tokens.mask_BT.shape, device=tokens.mask_BT.device)
    # The graphs come last, so that nothing else is computed while they lie there.
    for part in others:
        _evaluate(run, reference, tokens, part, results, keep=False)
    kept = [
        _evaluate(run, reference, tokens, part, results, keep=True) for part in parts[:num_kept]
    ]
    run.ranks.add_up(results)
    return Evaluation(*results.unbind()), kept


def _evaluate(
    run: Optimisation,
    reference: ReferenceModel | None,
    tokens: TokenBatch,
    part: Sequence[int],
    results: Tensor,
    *,
    keep: bool,
) -> Outputs:
    """Fills the part's rows of `results` (log-probabilities, values, entropies, reference); returns the outputs."""
    taken = run.take(tokens, part)
    with torch.no_grad(), run.autocast():
        reference_BT = run.policy.reference_logprobs(taken, reference)
    with torch.set_grad_enabled(keep), run.autocast():
        made = run.policy(taken, with_values=run.has_values, with_entropies=True)
    if part:
        for result, value in zip(results, (*made, reference_BT), strict=True):
            result[list(part), : value.shape[1]] = value.detach()
    return made[0], made[1]


def find_bad_rows(
    run: Optimisation,
    reference: ReferenceModel | None,
    experience: Experience,
    step: int,
    rows: Sequence[int],
) -> list[int]:
    """Of a minibatch's rows those whose own figures are not finite; all of them where none stands out."""
    now, _ = measure(run, reference, experience.tokens, experience.lengths, step, keep_first=False)
    old = experience.old
    # Not the advantages: they are whitened over the batch, so one row's NaN is in all of them.
    figures = torch.stack(
        [
            now.logprobs_BT,
            now.values_BT,
            old.logprobs_BT,
            old.values_BT,
            old.ref_logprobs_BT,
            experience.returns_BT,
        ]
    )
    fine_B = torch.isfinite(figures).all(dim=2).all(dim=0).tolist()
    return [row for row in rows if not fine_B[row]] or list(rows)
