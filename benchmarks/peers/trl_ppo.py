"""TRL 1.12's PPOTrainer on the benchmark's workload, one step at a time. Runs in the peer's environment.

    .venv-peers/bin/python -m benchmarks.peers.trl_ppo WORKLOAD SETTINGS.json

Protocol over pipes: it prints {"ready": ...}; then for every line "go" it takes one PPO step and prints one JSON line
with the seconds of the step and of its phases; "stop" or the end of input ends it. Everything else goes to stderr.
The trainer itself is not touched: its module's helper functions are wrapped by timers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Panel(nn.Module):
    """K preference models as one trunk: its "hidden state" is the K scores of every position, [B, L, K]."""

    def __init__(self, models: list[Any], columns_K: Tensor) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.register_buffer("columns_K", columns_K)

    def forward(self, **inputs: Any) -> Any:
        inputs["output_hidden_states"] = False
        scores = [
            model.score(getattr(model, model.base_model_prefix)(**inputs).last_hidden_state)
            for model in self.models
        ]
        heads_BLH = torch.cat(scores, dim=-1).float()
        return _Output((heads_BLH.index_select(-1, self.columns_K),))


class _Output:
    def __init__(self, hidden_states: tuple[Tensor, ...]) -> None:
        self.hidden_states = hidden_states


class PanelReward(nn.Module):
    """The panel and the linear scalarizer over normalised scores, as PPOTrainer wants a reward model to look."""

    base_model_prefix = "panel"

    def __init__(self, panel: Panel, mean_K: Tensor, std_K: Tensor, weights_K: Tensor) -> None:
        super().__init__()
        self.panel = panel
        self.register_buffer("mean_K", mean_K)
        self.register_buffer("std_K", std_K)
        self.register_buffer("weights_K", weights_K)

    def score(self, scores_BLK: Tensor) -> Tensor:
        normalised = (scores_BLK - self.mean_K) / self.std_K
        return (normalised * self.weights_K).sum(-1, keepdim=True)


class PhaseTimers:
    """Seconds per phase of the step under way."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.response_tokens = 0

    def wrap(
        self, function: Callable[..., Any], phase_of: Callable[..., str]
    ) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **named)
            self.seconds[phase_of(*arguments)] += time.perf_counter() - started
            return result

        return timed

    def attach(self, value_model: Any) -> None:
        """Puts the timers around the functions that the trainer calls."""
        module: Any = ppo_trainer
        truncate = module.truncate_response

        def counted(stop_id: int, pad_id: int, responses: Tensor) -> Tensor:
            shortened: Tensor = truncate(stop_id, pad_id, responses)
            self.response_tokens += int((shortened != pad_id).sum())
            return shortened

        module.truncate_response = counted
        module.batch_generation = self.wrap(module.batch_generation, lambda *_: "generate")
        module.forward = self.wrap(
            module.forward,
            lambda *_: "(update: forward)" if torch.is_grad_enabled() else "reference",
        )
        module.get_reward = self.wrap(
            module.get_reward, lambda model, *_: "value" if model is value_model else "score"
        )


class OneStepAtATime(TrainerCallback):  # type: ignore[misc]
    """Reports a step when it is done and waits for the next "go"."""

    def __init__(self, timers: PhaseTimers, answer: Callable[[dict[str, Any]], None]) -> None:
        self._timers = timers
        self._answer = answer
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._answer({"ready": True, "threads": torch.get_num_threads(), "pid": os.getpid()})
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        seconds = time.perf_counter() - self._started
        phases = dict(self._timers.seconds)
        rollout = sum(phases.get(name, 0.0) for name in ("generate", "reference", "value", "score"))
        phases["update"] = seconds - rollout
        metrics = state.log_history[-1] if state.log_history else {}
        self._answer(
            {
                "seconds": seconds,
                "phases": phases,
                "response_tokens": self._timers.response_tokens,
                "reward": metrics.get("objective/scores"),
                "kl": metrics.get("objective/kl"),
            }
        )
        self._wait()

    def _wait(self) -> None:
        if sys.stdin.readline().strip() != "go":
            os._exit(0)
        self._timers.seconds.clear()
        self._timers.response_tokens = 0
        self._started = time.perf_counter()


def main() -> None:
    # The trainer prints; the protocol keeps standard output for itself.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    workload = Path(sys.argv[1])
    settings = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    trainer, timers, value_model = build_trainer(workload, settings)
    timers.attach(value_model)
    trainer.add_callback(
        OneStepAtATime(timers, lambda message: print(json.dumps(message), file=channel, flush=True))
    )
    trainer.train()


def build_trainer(workload: Path, settings: dict[str, Any]) -> tuple[Any, PhaseTimers, Any]:
    """PPOTrainer with the workload's policy, a value model, a reference copy and the panel as its reward model."""
    policy_folder = str(workload / "policy")
    tokenizer = AutoTokenizer.from_pretrained(policy_folder, padding_side="left")
    dtype = torch.float32
    policy = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=dtype)
    reference = None
    if settings["lora_rank"] is None:
        reference = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=dtype)
    value = AutoModelForSequenceClassification.from_pretrained(
        policy_folder, num_labels=1, dtype=dtype
    )
    prompts = json.loads((workload / "prompts.json").read_text(encoding="utf-8"))
    trainer = PPOTrainer(
        args=trainer_config(settings),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=load_panel(workload, getattr(torch, settings["reward_dtype"])),
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[:2]}),
        peft_config=_adapters(settings["lora_rank"]),
    )
    return trainer, PhaseTimers(), value


def trainer_config(settings: dict[str, Any]) -> Any:
    """The workload's PPO settings in TRL's names."""
    micro = settings["microbatch_size"]
    return PPOConfig(
        output_dir=settings["output_dir"],
        per_device_train_batch_size=micro,
        # Of the whole batch; `num_mini_batches` then divides it into optimizer steps.
        gradient_accumulation_steps=settings["batch_size"] // micro,
        num_mini_batches=settings.get("num_minibatches", 1),
        num_ppo_epochs=settings["num_epochs"],
        total_episodes=settings["batch_size"] * settings["max_steps"],
        local_rollout_forward_batch_size=settings["rollout_batch_size"],
        response_length=settings["max_new_tokens"],
        stop_token="eos",
        temperature=1.0,
        learning_rate=settings["learning_rate"],
        kl_coef=settings["kl_coefficient"],
        vf_coef=settings["value_coefficient"],
        seed=settings["seed"],
        bf16=settings["bf16"],
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        num_sample_generations=0,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )


def load_panel(workload: Path, dtype: torch.dtype) -> PanelReward:
    """The saved preference models (plain Hugging Face folders) and the linear reward over them."""
    card = json.loads((workload / "panel.json").read_text(encoding="utf-8"))
    weights = json.loads((workload / "weights.json").read_text(encoding="utf-8"))
    names = card["principles"]
    folders = list(dict.fromkeys(card["models"][name]["folder"] for name in names))
    models = [
        AutoModelForSequenceClassification.from_pretrained(str(workload / f), dtype=dtype)
        for f in folders
    ]

    first_head = {}
    num_heads = 0
    for folder, model in zip(folders, models, strict=True):
        first_head[folder] = num_heads
        num_heads += model.config.num_labels
    places = [first_head[card["models"][n]["folder"]] + card["models"][n]["head"] for n in names]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    reward = PanelReward(
        Panel(models, torch.tensor(places)),
        column([weights["normaliser"][name]["mean"] for name in names]),
        column([weights["normaliser"][name]["std"] for name in names]),
        column([weights["weights"][name]["weight"] for name in names]),
    )
    return reward.eval().requires_grad_(False)


def _adapters(rank: int | None) -> Any:
    if rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, lora_dropout=0.0)


if __name__ == "__main__":
    main()
