"""The epochs of one PPO step: minibatches, micro-batches, gradients over ranks, AdamW.

A minibatch is one optimizer step. Each rank takes its share of the minibatch's rows, every term is divided by the
response tokens of the *whole* minibatch, and gradients are summed over ranks, so N ranks do what one big one would.
Legend: B responses, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.length_groups import pass_overhead_tokens
from morlaif_ray.rl.experience import Experience
from morlaif_ray.rl.functional import ppo_policy_loss, ppo_value_loss
from morlaif_ray.rl.microbatches import MicrobatchLimits, num_at_once, plan_microbatches
from morlaif_ray.rl.policy_model import PolicyModel, TokenBatch
from morlaif_ray.rl.ranks import Ranks
from morlaif_ray.rl.sharding import whole
from morlaif_ray.seeding import derive_seed

Outputs = tuple[Tensor, Tensor]
"""Log-probabilities and values of one micro-batch, with their graph."""
SUMS = ("policy_loss", "value_loss", "approx_kl", "clipfrac")


class NotFinite(Exception):
    """A loss or a gradient became NaN or infinite in a minibatch of these rows; no weight was changed by it."""

    def __init__(self, what: str, rows: Sequence[int]) -> None:
        super().__init__(what)
        self.what = what
        self.rows = list(rows)


class Optimisation:
    """Owns the optimizer and the order of rows, which depends on (seed, step, epoch) alone."""

    def __init__(
        self, policy: PolicyModel, config: PolicyConfig, *, seed: int, device: str, ranks: Ranks
    ) -> None:
        self.policy = policy
        self.config = config
        self.seed = seed
        self.device = device
        self.ranks = ranks
        self.limits = MicrobatchLimits(
            config.microbatch_size,
            config.microbatch_tokens,
            pass_overhead_tokens(policy),
            padded=not policy.packs,
        )
        self.has_values = config.advantage == "gae"
        self.names = [name for name, p in policy.named_parameters() if p.requires_grad]
        self.trainable = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trainable,
            lr=config.learning_rate,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def minibatches(self, num_rows: int, step: int, epoch: int) -> list[list[int]]:
        """The epoch's rows in random order, cut into minibatches."""
        rng = np.random.default_rng(derive_seed(self.seed, "minibatches", step, epoch))
        order = rng.permutation(num_rows).tolist()
        size = max(1, num_rows // self.config.num_minibatches)
        return [order[start : start + size] for start in range(0, num_rows, size)]

    def microbatches(self, rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """This rank's micro-batches of the rows. Sharded ranks must all run as many: empty lists fill up."""
        plan = plan_microbatches([lengths[row] for row in rows], self.ranks.size, self.limits)
        mine = [[rows[index] for index in part] for part in plan[self.ranks.rank]]
        if self.config.fsdp:
            mine += [[]] * (max(len(parts) for parts in plan) - len(mine))
        return mine

    def num_reusable(self, parts: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
        """How many micro-batches of the step's first minibatch may keep the graph of their evaluation, from the first
        on, which so is their own forward pass: no weight changes before the first optimizer step.

        As many as together take no more memory than one micro-batch may; none under FSDP, where a backward pass has to
        follow its forward pass.
        """
        return 0 if self.config.fsdp else num_at_once(lengths, parts, self.limits)

    def take(self, tokens: TokenBatch, rows: Sequence[int]) -> TokenBatch:
        """The rows; for none, one row in which nothing counts."""
        if rows:
            return tokens.rows(self._index(rows))
        blank = tokens.rows(self._index([0]))
        return replace(blank, mask_BT=torch.zeros_like(blank.mask_BT))

    def run(self, experience: Experience, step: int, first: Sequence[Outputs]) -> dict[str, float]:
        """All epochs; means over the minibatches. `first`: outputs of the first micro-batches of the first minibatch,
        as many as are known."""
        records: list[dict[str, float]] = []
        for epoch in range(self.config.num_epochs):
            for rows in self.minibatches(len(experience.lengths), step, epoch):
                records.append(self._minibatch(experience, rows, first))
                first = ()
        return {key: float(np.mean([record[key] for record in records])) for key in records[0]}

    def autocast(self) -> AbstractContextManager[object]:
        if not self.config.bf16_autocast:
            return nullcontext()
        return torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16)

    def _minibatch(
        self, experience: Experience, rows: Sequence[int], known: Sequence[Outputs]
    ) -> dict[str, float]:
        """One optimizer step."""
        denominator = experience.tokens.mask_BT[self._index(rows)].sum().float()
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(SUMS), device=self.device)
        for number, part in enumerate(self.microbatches(rows, experience.lengths)):
            tokens = self.take(experience.tokens, part)
            if number < len(known):
                outputs = known[number]
            else:
                with self.autocast():
                    outputs = self.policy(tokens, with_values=self.has_values)[:2]
            loss, terms = self._loss(experience, part, tokens, outputs, denominator)
            if self.config.fsdp:  # FSDP averages over ranks
                loss = loss * self.ranks.size
            loss.backward()
            sums += terms
        self.ranks.add_up(sums)
        if not bool(torch.isfinite(sums).all()):
            raise NotFinite(f"the loss is {float(sums[:2].sum())}", rows)
        if not self.config.fsdp:
            self.ranks.add_up_gradients(self.trainable)
        norm = float(
            whole(
                torch.nn.utils.clip_grad_norm_(
                    self.trainable, self.config.max_grad_norm, foreach=True
                )
            )
        )
        if not np.isfinite(norm):
            raise NotFinite("the gradient is not finite", rows)
        self.optimizer.step()
        return {**dict(zip(SUMS, sums.tolist(), strict=True)), "grad_norm": norm}

    def _loss(
        self,
        experience: Experience,
        rows: Sequence[int],
        tokens: TokenBatch,
        outputs: Outputs,
        denominator: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's part of the minibatch's loss and of the means SUMS."""
        index, width = self._index(rows or [0]), tokens.mask_BT.shape[1]

        def part(full_BT: Tensor) -> Tensor:
            return full_BT[index, :width]

        policy_loss, metrics = ppo_policy_loss(
            outputs[0],
            part(experience.old.logprobs_BT),
            part(experience.advantages_BT),
            tokens.mask_BT,
            self.config.clip_range,
            denominator,
            None if experience.weights_BT is None else part(experience.weights_BT),
        )
        loss, value_loss = policy_loss, torch.zeros_like(policy_loss)
        if self.has_values:
            value_loss = ppo_value_loss(
                outputs[1],
                part(experience.old.values_BT),
                part(experience.returns_BT),
                tokens.mask_BT,
                self.config.value_clip_range,
                denominator,
            )
            loss = policy_loss + self.config.value_coefficient * value_loss
        share = tokens.mask_BT.sum() / denominator
        terms = [policy_loss, value_loss, share * metrics["approx_kl"], share * metrics["clipfrac"]]
        return loss, torch.stack([term.detach() for term in terms])

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.device)
