"""The PPO learner: owns policy, value, reference, optimizer, KL controller and reward scale.

    learner = PPOLearner(model_path, config.policy, seed=0)
    metrics = learner.update(batch, reward_B)

One call is one PPO step (ALGORITHMS.md section 5). Its only randomness is the order of minibatches, which depends on
(seed, step); so state on disk plus the step number reproduce the rest of a run bit for bit.
With several ranks every rank makes the same calls with the same arguments; all end with the same state.
Legend: B responses, T response tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from morlaif_ray.backbone import load_causal_lm, load_tokenizer, save_pretrained
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.cpu_products import fast_products
from morlaif_ray.errors import ArtifactError, NumericalError
from morlaif_ray.rl.checkpoints import CheckpointFolder, Snapshot
from morlaif_ray.rl.controllers import AdaptiveKLController, RunningScale, learning_rate_at
from morlaif_ray.rl.experience import make_experience, row_lengths, to_tokens
from morlaif_ray.rl.failures import describe_rows, write_failure
from morlaif_ray.rl.functional import explained_variance, kl_penalty
from morlaif_ray.rl.measuring import find_bad_rows, measure
from morlaif_ray.rl.optimisation import NotFinite, Optimisation
from morlaif_ray.rl.policy_model import PolicyModel, ReferenceModel, TokenBatch
from morlaif_ray.rl.ranks import Ranks
from morlaif_ray.rl.sharding import shard
from morlaif_ray.seeding import derive_seed
from morlaif_ray.tensor_ops import masked_mean
from morlaif_ray.types import Float32Array, FloatArray, RolloutBatch, UpdateMetrics


class PPOLearner:
    """See the module docstring. Runs on one process per rank; `device` is "cpu" or a CUDA device."""

    def __init__(
        self,
        model_path: str,
        config: PolicyConfig,
        *,
        seed: int,
        dtype: str = "float32",
        device: str = "cpu",
        num_steps: int | None = None,
        ranks: Ranks | None = None,
        failure_dir: Path | None = None,
    ) -> None:
        """`num_steps`: length of the schedule, else `config.num_steps`. `failure_dir`: where the samples of a step
        that became NaN are written; None: nowhere."""
        self.config = config
        self.seed = seed
        self.device = device
        self.ranks = ranks or Ranks()
        self.step = 0
        self.notes: list[str] = []
        """One line for each thing that a person should know, such as a damaged checkpoint that was passed over."""
        self.loop_state: dict[str, Any] = {}
        """What the loop around the learner had saved in the checkpoint that was loaded; empty where there was none."""
        self._num_steps = num_steps or config.num_steps
        self._failure_dir = failure_dir
        self._model_path = model_path
        self._rewards: list[float] = []
        self._last_reward: float | None = None
        self.tokenizer = load_tokenizer(model_path)
        self.policy, self.reference = self._load_models(dtype)
        self.optimisation = Optimisation(
            self.policy, config, seed=seed, device=device, ranks=self.ranks
        )
        self.kl_controller = AdaptiveKLController(
            config.kl_coefficient, config.kl_target, config.kl_horizon, config.adaptive_kl
        )
        self.reward_scale = RunningScale()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.optimisation.optimizer

    def _load_models(self, dtype: str) -> tuple[PolicyModel, ReferenceModel | None]:
        config = self.config
        model = load_causal_lm(self._model_path, dtype=dtype)
        num_rows = model.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > num_rows:
            raise ArtifactError(
                f"{self._model_path}: the tokenizer has {len(self.tokenizer)} tokens and the model only {num_rows}; "
                f"save the tokenizer that the model was trained with"
            )
        reference: ReferenceModel | None = None
        if config.lora is None:  # with adapters the base is the reference
            reference = ReferenceModel(
                copy.deepcopy(model), config.temperature, config.logprob_chunk_tokens
            )
        # LoRA's A matrices are drawn from the global generator.
        torch.manual_seed(derive_seed(self.seed, "adapters"))
        policy = PolicyModel(
            model,
            separate_critic=config.separate_critic,
            temperature=config.temperature,
            lora=config.lora,
            chunk_tokens=config.logprob_chunk_tokens,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        for module in (policy, reference):
            if module is not None and config.fsdp:
                shard(module, self.device)  # and moves it there, part by part
            elif module is not None:
                module.to(self.device)
        return policy, reference

    # ------------------------------------------------------------ one step

    @fast_products()
    def update(
        self,
        batch: RolloutBatch,
        reward_B: FloatArray,
        scores: Mapping[str, FloatArray] | None = None,
    ) -> UpdateMetrics:
        """One PPO step on a rollout batch and its scalar rewards.

        NumericalError on a reward, loss or gradient that is not finite, before it changes a weight; the samples are
        written to `failure_dir` with `scores` (name -> value per response), which serve nothing else.
        """
        bad = np.flatnonzero(~np.isfinite(reward_B)).tolist()
        if bad:
            what = f"reward {bad[0]} is not finite"
            raise self._failure(what, "", batch, reward_B, scores, bad)
        tokens, lengths = self._to_tokens(batch), row_lengths(batch)
        scaled_B = self._scale(reward_B)
        old, first = measure(self.optimisation, self.reference, tokens, lengths, self.step)
        engine = torch.from_numpy(np.array(batch.logprobs_BT)).to(self.device)
        coefficient = self.kl_controller.coefficient
        experience, engine_metrics = make_experience(
            tokens, lengths, old, scaled_B, engine, self.config, coefficient
        )
        rate = self._set_learning_rate()
        try:
            losses = self.optimisation.run(experience, self.step, first)
        except NotFinite as error:
            rows = find_bad_rows(
                self.optimisation, self.reference, experience, self.step, error.rows
            )
            remedy = "; lower policy.learning_rate"
            raise self._failure(error.what, remedy, batch, reward_B, scores, rows) from None
        mask = tokens.mask_BT
        k1_B = (kl_penalty(old.logprobs_BT, old.ref_logprobs_BT) * mask).sum(dim=1)
        k3_B = (kl_penalty(old.logprobs_BT, old.ref_logprobs_BT, "k3") * mask).sum(dim=1)
        self.kl_controller.update(float(k1_B.mean()), len(batch))
        self.step += 1
        self._rewards.append(float(np.mean(reward_B)))
        return UpdateMetrics(
            reward_mean=float(np.mean(reward_B)),
            scaled_reward_mean=float(scaled_B.mean()),
            kl_mean=float(k1_B.mean()),
            kl_k3_mean=float(k3_B.mean()),
            kl_coefficient=coefficient,
            entropy=float(masked_mean(old.entropies_BT, mask)),
            explained_variance=explained_variance(old.values_BT, experience.returns_BT, mask),
            learning_rate=rate,
            response_length_mean=float(np.mean(batch.response_lengths_B)),
            truncated_share=float(np.mean(batch.truncated_B)),
            **losses,
            **engine_metrics,
        )

    def _to_tokens(self, batch: RolloutBatch) -> TokenBatch:
        return to_tokens(batch, self.device)

    def _scale(self, reward_B: FloatArray) -> Tensor:
        """clip(R / running std, +-reward_clip); the running std includes this batch."""
        if self.config.scale_reward:
            self.reward_scale.update(reward_B.tolist())
            reward_B = reward_B / self.reward_scale.std
        limit = self.config.reward_clip
        return torch.tensor(
            np.clip(reward_B, -limit, limit), dtype=torch.float32, device=self.device
        )

    @fast_products()
    def logprobs(self, batch: RolloutBatch) -> Float32Array:
        """Log-probabilities [B, T] (nats) of the response tokens under the current policy; 0 beyond the length."""
        logprobs_BT: Float32Array = self._evaluate(self._to_tokens(batch))[0].cpu().numpy()
        return logprobs_BT

    def _evaluate(self, tokens: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and entropies of a batch under the policy of now."""
        with torch.no_grad(), self.optimisation.autocast():
            made: tuple[Tensor, Tensor, Tensor] = self.policy(tokens, with_entropies=True)
        return made

    def _reference(self, tokens: TokenBatch) -> Tensor:
        with torch.no_grad():
            return self.policy.reference_logprobs(tokens, self.reference)

    def _set_learning_rate(self) -> float:
        rate = learning_rate_at(
            self.step,
            peak=self.config.learning_rate,
            warmup_steps=self.config.warmup_steps,
            num_steps=self._num_steps,
            schedule=self.config.schedule,
        )
        self.optimisation.set_learning_rate(rate)
        return rate

    def _failure(
        self,
        what: str,
        remedy: str,
        batch: RolloutBatch,
        reward_B: FloatArray,
        scores: Mapping[str, FloatArray] | None,
        rows: Sequence[int],
    ) -> NumericalError:
        where = ""
        if self._failure_dir is not None:
            path = self._failure_dir / f"not_finite_step_{self.step}.jsonl"
            if self.ranks.rank == 0:
                write_failure(path, describe_rows(batch, reward_B, scores, rows))
            where = f"; the samples are in {path}"
        return NumericalError(f"PPO step {self.step}: {what}{remedy}{where}")

    # ------------------------------------------------------------ weights and state

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        """The policy's weights by plain parameter name, as float32 arrays for the rollout workers."""
        return {name: w.float().cpu().numpy() for name, w in self.policy.merged_weights()}

    def help_gather(self) -> None:
        """A sharded rank's part in another rank's `weights`, of which it keeps nothing."""
        for _ in self.policy.merged_weights():
            pass

    def save(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face folder (rank 0; sharded ranks must all call)."""
        if self.ranks.rank != 0:
            if self.config.fsdp:
                self.help_gather()
            return
        plain = self.policy.model
        if self.config.fsdp or self.policy.has_adapters:
            full = {name: weight.cpu() for name, weight in self.policy.merged_weights()}
            plain = load_causal_lm(self._model_path, dtype=str(next(iter(full.values())).dtype)[6:])
            plain.load_state_dict(full, strict=False)  # tied weights are named once
        save_pretrained(plain, self.tokenizer, folder)

    def save_checkpoint(self, folder: Path, loop_state: Mapping[str, Any] | None = None) -> None:
        """Everything that the next step depends on, published atomically (rank 0; sharded ranks must all call).

        `loop_state`: plain values that the loop around the learner must find again with the same step.
        """
        if self._rewards:
            self._last_reward = float(np.mean(self._rewards))
            self._rewards = []
        run = self.optimisation
        extra = {
            "step": self.step,
            "kl_controller": self.kl_controller.state(),
            "reward_scale": self.reward_scale.state(),
            "loop": dict(loop_state or {}),
        }
        snapshot = Snapshot.take(run.names, run.trainable, run.optimizer, extra)
        if self.ranks.rank == 0:
            self._checkpoints(folder).publish(snapshot, self.step, self._last_reward)

    def load_checkpoint(self, folder: Path) -> bool:
        """Restores the newest whole checkpoint; False where there is none; ArtifactError where none can be used."""
        found = self._checkpoints(folder).load(self.notes.append, tidy=self.ranks.rank == 0)
        if found is None:
            return False
        run = self.optimisation
        found.snapshot.put_back(found.path, run.names, run.trainable, run.optimizer)
        extra = found.snapshot.extra
        self.step = int(extra["step"])
        self.kl_controller.restore(extra["kl_controller"])
        self.reward_scale.restore(extra["reward_scale"])
        self.loop_state = dict(extra.get("loop", {}))  # an older checkpoint has none
        self._last_reward, self._rewards = found.reward, []
        return True

    def _checkpoints(self, folder: Path) -> CheckpointFolder:
        return CheckpointFolder(folder, self.config, self.seed)
