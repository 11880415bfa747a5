"""Our PPO arithmetic against trl 1.12's on the same tensors. Runs in the peer's environment:

    PYTHONPATH=. .venv-peers/bin/python -m benchmarks.peers.compare_functions

TRL computes rewards, GAE and losses inside `PPOTrainer.train`, so the trainer takes a real step on a tiny model and its
intermediate tensors are recorded through the module functions that it calls; ours are then computed from its inputs.
One convention differs: TRL adds one step after EOS (the score lies there, and a value of its own counts), we put the
score on EOS itself. Given TRL's mask our functions must give TRL's numbers. Whitening: TRL divides by n - 1, we by n;
compared after that factor. Prints a table of maximum absolute differences; exit code 1 where one exceeds its limit.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch
from torch import Tensor
from trl.experimental.ppo import ppo_trainer

from benchmarks.peers.trl_ppo import build_trainer
from benchmarks.ppo_workload import SETTINGS, TINY, make_workload
from morlaif_ray.rl.functional import (
    gae,
    kl_penalty,
    place_rewards,
    ppo_policy_loss,
    ppo_value_loss,
)
from morlaif_ray.tensor_ops import masked_mean, masked_whiten, token_logprobs

LIMIT = 1e-5
"""Float32, sums over some hundred terms of order 1."""
EPOCHS = 3


@dataclass
class Recorded:
    """What one step of the peer computed, in the order in which it did."""

    logits: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """(logits, tokens, log-probabilities): policy and reference without gradient, then every epoch's."""
    values_BL: Tensor | None = None
    score_B: Tensor | None = None
    context_length: int = 0
    whitened: tuple[Tensor, Tensor, Tensor] | None = None
    """(advantages, mask, result)."""
    means: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """(values, mask, result); per epoch: value loss, value clip share, policy loss, policy clip share."""
    orders: list[Any] = field(default_factory=list)
    forwards: list[Any] = field(default_factory=list)


def record_one_step(workload: Path, estimator: str) -> tuple[Any, Recorded]:
    """Lets TRL take one step (3 epochs, one minibatch) and returns its settings and what it computed."""
    settings = {
        **SETTINGS,
        "batch_size": 16,
        "microbatch_size": 16,
        "rollout_batch_size": 16,
        "num_epochs": EPOCHS,
        "max_new_tokens": 24,
        # Large, so that later epochs meet the clip.
        "learning_rate": 3e-3,
        "threads": 1,
        "bf16": False,
        "reward_dtype": "float32",
        "lora_rank": None,
        "max_steps": 1,
        "seed": 0,
        "output_dir": str(workload / "peer"),
    }
    trainer, _, value_model = build_trainer(workload, settings)
    trainer.args.kl_estimator = estimator
    recorded = Recorded()
    # A policy that equals its reference has no KL to compare.
    with torch.no_grad():
        for parameter in trainer.policy_model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    restore = _attach(recorded, value_model)
    try:
        trainer.train()
    finally:
        restore()
    return trainer.args, recorded


def _attach(recorded: Recorded, value_model: Any) -> Any:
    module: Any = ppo_trainer
    names = ("selective_log_softmax", "get_reward", "masked_whiten", "masked_mean", "forward")
    kept = {name: getattr(module, name) for name in names}
    permutation = np.random.permutation
    inside: list[bool] = []

    def log_softmax(logits: Tensor, tokens: Tensor) -> Tensor:
        result: Tensor = kept["selective_log_softmax"](logits, tokens)
        recorded.logits.append((logits.detach().clone(), tokens.clone(), result.detach().clone()))
        return result

    def reward(model: Any, tokens: Tensor, pad: int, context: int) -> Any:
        answer = kept["get_reward"](model, tokens, pad, context)
        recorded.context_length = context
        if model is value_model:
            recorded.values_BL = answer[0].squeeze(-1).clone()
        else:
            recorded.score_B = answer[1].clone()
        return answer

    def whiten(values: Tensor, mask: Tensor, **named: Any) -> Tensor:
        inside.append(True)
        result: Tensor = kept["masked_whiten"](values, mask, **named)
        inside.pop()
        recorded.whitened = (values.clone(), mask.clone(), result.clone())
        return result

    def mean(values: Tensor, mask: Tensor, **named: Any) -> Tensor:
        result: Tensor = kept["masked_mean"](values, mask, **named)
        if not inside:
            recorded.means.append((values.detach().clone(), mask.clone(), result.detach().clone()))
        return result

    def forward(*arguments: Any) -> Any:
        output = kept["forward"](*arguments)
        if torch.is_grad_enabled():
            recorded.forwards.append(output[1].detach().clone())
        return output

    def permute(size: Any) -> Any:
        order = permutation(size)
        recorded.orders.append(order)
        return order

    for name, function in zip(names, (log_softmax, reward, whiten, mean, forward), strict=True):
        setattr(module, name, function)
    np.random.permutation = permute  # type: ignore[assignment]

    def restore() -> None:
        for name, function in kept.items():
            setattr(module, name, function)
        np.random.permutation = permutation

    return restore


def differences(settings: Any, seen: Recorded) -> dict[str, float]:
    """Maximum absolute difference per function, ours from the peer's inputs against the peer's outputs."""
    assert seen.values_BL is not None
    assert seen.score_B is not None
    assert seen.whitened is not None
    found: dict[str, float] = {}
    seen_sizes: dict[str, float] = {}

    def compare(name: str, ours: Tensor, theirs: Tensor) -> None:
        assert bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()), name
        seen_sizes[name] = max(seen_sizes.get(name, 0.0), float(theirs.abs().max()))
        gap = float((ours - theirs).abs().max())
        found[name] = max(found.get(name, 0.0), gap)

    for logits, tokens, result in seen.logits:
        compare("log-probabilities", token_logprobs(logits, tokens), result)
    raw_advantages, mask, whitened = seen.whitened
    lengths = mask.long().sum(1)
    num_tokens = mask.shape[1]
    steps = torch.arange(num_tokens)
    mask_p1 = steps <= lengths.unsqueeze(1)
    old, reference = (seen.logits[i][2] * mask for i in (0, 1))
    values = seen.values_BL[:, seen.context_length - 1 : -1] * mask_p1
    kl = kl_penalty(old, reference, settings.kl_estimator)
    rewards = place_rewards(kl, mask_p1, seen.score_B, settings.kl_coef)
    advantages, returns = gae(rewards, values, mask_p1, settings.gamma, settings.lam)
    compare(f"KL ({settings.kl_estimator}), reward placement and GAE", advantages, raw_advantages)
    assert bool((lengths < num_tokens).any()), "no response ended early: the masks were not tried"
    n = int(mask.sum())
    ours = masked_whiten(raw_advantages, mask) * ((n - 1) / n) ** 0.5
    compare("whitening (n-1 instead of n)", ours, whitened * mask)
    for epoch in range(EPOCHS):
        order = torch.from_numpy(seen.orders[epoch])
        value_loss, _, policy_loss, clip_share = seen.means[4 * epoch : 4 * epoch + 4]
        compare("masked mean", masked_mean(policy_loss[0], policy_loss[1]), policy_loss[2])
        new = seen.logits[2 + epoch][2] * mask[order]
        loss, metrics = ppo_policy_loss(
            new, old[order], (whitened * mask)[order], mask[order], settings.cliprange
        )
        compare("policy loss", loss, policy_loss[2])
        compare("clip fraction", metrics["clipfrac"], clip_share[2])
        predicted = seen.forwards[epoch][:, seen.context_length - 1 : -1].squeeze(-1)
        compare(
            "value loss",
            ppo_value_loss(
                predicted * mask_p1[order],
                values[order],
                returns[order],
                mask_p1[order],
                settings.cliprange_value,
            ),
            0.5 * value_loss[2],
        )
    empty = [name for name, size in seen_sizes.items() if size == 0.0]
    assert not empty, f"nothing but zeros to compare: {empty}"
    found["(clip fraction of the last epoch)"] = float(seen.means[-1][2])
    return found


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="morlaif-compare-"))
    workload = folder / "workload"
    workload.mkdir()
    try:
        torch.manual_seed(0)
        make_workload(workload, TINY, mean_response_tokens=12.0)
        found: dict[str, float] = {}
        for estimator in ("k1", "k3"):
            for name, gap in differences(*record_one_step(workload, estimator)).items():
                found[name] = max(found.get(name, 0.0), gap)
    finally:
        shutil.rmtree(folder)
    print(f"\n{'function':48s} {'max |ours - trl|':>18s}")
    for name, gap in found.items():
        print(f"{name:48s} {gap:18.3g}")
    print(json.dumps(found))
    worst = {name: gap for name, gap in found.items() if gap > LIMIT and not name.startswith("(")}
    if worst:
        print(f"error: more than {LIMIT:g} apart: {', '.join(worst)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
