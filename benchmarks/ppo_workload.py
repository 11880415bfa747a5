"""What both sides of the PPO benchmark work on: random models of a given size, prompts, a panel, and their arithmetic.

Models are GPT-2-like with random weights, made on the spot. One hand-made feature: the policy ends a response with the
same probability at every token (the final layer norm's bias points along EOS's embedding), so that response lengths
vary as in real dialogues; `mean_response_tokens=None` leaves EOS as unlikely as any word and all lengths equal.
Legend: B responses, L sequence tokens, K principles, D width, V vocabulary.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn.functional import linear

from morlaif_ray.artifacts import write_json, write_records, write_table
from morlaif_ray.backbone import build_scratch_model, build_word_tokenizer
from morlaif_ray.backbone.causal import save_pretrained
from morlaif_ray.config import Config, load_config
from morlaif_ray.config.inputs import ScratchModel
from morlaif_ray.cpu_products import fast_products
from morlaif_ray.preference import PreferenceModel
from morlaif_ray.principles import load_principles
from morlaif_ray.types import Prompt

LONGEST_PROMPT = 56
"""Words between the turn markers; real prompts are shorter and longer, so the shortest has 8."""
TURN_TOKENS = 2
NUM_PROMPTS = 512
SETTINGS: dict[str, Any] = {
    "batch_size": 64,
    "num_epochs": 4,
    "max_new_tokens": 64,
    "microbatch_size": 16,
    "learning_rate": 4e-6,
    "kl_coefficient": 0.05,
    "value_coefficient": 1.0,
}
"""PPO settings of both sides."""


@dataclass(frozen=True)
class Size:
    """Shape of policy, critic, reference and every preference model."""

    width: int
    num_layers: int
    num_heads: int
    vocabulary: int

    @property
    def trunk_parameters(self) -> int:
        """Matrix entries that every token meets, embeddings not counted."""
        return self.num_layers * 12 * self.width**2

    @property
    def parameters(self) -> int:
        return self.trunk_parameters + self.vocabulary * self.width


FULL = Size(width=512, num_layers=6, num_heads=8, vocabulary=20_000)
QUICK = Size(width=128, num_layers=4, num_heads=4, vocabulary=8_000)
TINY = Size(width=32, num_layers=2, num_heads=2, vocabulary=300)


@dataclass(frozen=True)
class Workload:
    """A prepared run folder, which also holds what the peer reads (`policy/`, `prompts.json`, ...)."""

    folder: Path
    size: Size
    config: Config
    mean_response_tokens: float | None

    def expected_response_tokens(self) -> float:
        """Mean length of a response that ends with probability h at every token and is cut off at the limit."""
        limit = self.config.policy.max_new_tokens
        if self.mean_response_tokens is None:
            return limit
        hazard = 1.0 / self.mean_response_tokens
        return (1.0 - (1.0 - hazard) ** limit) / hazard


def make_workload(
    folder: Path,
    size: Size,
    *,
    topology: str = "separate",
    dtype: str = "float32",
    mean_response_tokens: float | None = 48.0,
    policy: dict[str, Any] | None = None,
) -> Workload:
    """Writes models, prompts, panel and weights as the stages before PPO would, and the config that goes with them."""
    rng = np.random.default_rng(0)
    words = [f"w{index}" for index in range(size.vocabulary - 3)]
    markers = ["Human:", "Assistant:"]
    tokenizer = build_word_tokenizer(
        [" ".join([*markers, *words])], vocabulary_size=size.vocabulary, max_length=256
    )
    prompts = []
    for _ in range(NUM_PROMPTS):
        chosen = rng.choice(len(words), size=int(rng.integers(8, LONGEST_PROMPT + 1)))
        prompts.append(f"\n\nHuman: {' '.join(words[i] for i in chosen)}\n\nAssistant:")
    _write_policy(folder, size, tokenizer, mean_response_tokens, dtype)
    _write_panel(folder, topology, dtype)
    stage = folder / "0_sft"
    records = [Prompt(f"p{i}", text, "policy") for i, text in enumerate(prompts)]
    write_records(stage / "prompts.parquet", records, Prompt)
    write_json(folder / "prompts.json", [tokenizer(text)["input_ids"] for text in prompts])
    config = _config(folder, dtype, topology, policy or {})
    return Workload(folder, size, config, mean_response_tokens)


def _write_policy(
    folder: Path, size: Size, tokenizer: Any, mean_response_tokens: float | None, dtype: str
) -> None:
    shape = ScratchModel(
        width=size.width,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        max_length=256,
        vocabulary_size=size.vocabulary,
    )
    model = build_scratch_model(shape, tokenizer, seed=0)
    if mean_response_tokens is not None:
        with torch.no_grad():
            eos = model.transformer.wte.weight[tokenizer.eos_token_id]
            # Words' logits scatter around 0 with variance s^2, so the sum of their weights is V*exp(s^2/2).
            spread = float(model.transformer.wte.weight.std()) * math.sqrt(size.width)
            wanted = math.log(len(tokenizer) / (mean_response_tokens - 1.0)) + spread**2 / 2
            model.transformer.ln_f.bias.copy_(wanted * eos / eos.square().sum())
    target = folder / "0_sft" / "model"
    target.parent.mkdir(parents=True)
    save_pretrained(model.to(getattr(torch, dtype)), tokenizer, target)
    (folder / "policy").symlink_to(target.relative_to(folder))


def _write_panel(folder: Path, topology: str, dtype: str) -> None:
    """12 preference models, or one trunk with 12 heads, on the policy's trunk with random heads."""
    stage = folder / "3_preference_models"
    names = [principle.name for principle in load_principles()]
    groups = [names] if topology == "shared_trunk" else [[name] for name in names]
    entries: dict[str, dict[str, Any]] = {}
    for index, heads in enumerate(groups):
        name = "principles" if topology == "shared_trunk" else heads[0]
        model = PreferenceModel.from_backbone(
            str(folder / "0_sft" / "model"), heads, max_length=256, seed=index, dtype=dtype
        )
        model.save(stage / name)
        for head, principle in enumerate(heads):
            entries[principle] = {"folder": name, "head": head}
    moments = {name: {"mean": 0.0, "std": 1.0, "num": 500} for name in names}
    weights = {name: {"weight": 1.0 if i % 4 else -0.5} for i, name in enumerate(names)}
    card = {"principles": names, "models": entries, "baselines": {}, "normaliser": moments}
    write_json(stage / "panel.json", card)
    rng = np.random.default_rng(1)
    write_table(stage / "scores_reference.parquet", {n: list(rng.normal(size=8)) for n in names})
    reward = {"principles": names, "weights": weights, "normaliser": moments}
    (folder / "4_reward").mkdir()
    write_json(folder / "4_reward" / "weights.json", reward)
    # The peer's copies: folders relative to the workload.
    for entry in entries.values():
        entry["folder"] = f"3_preference_models/{entry['folder']}"
    write_json(folder / "panel.json", card)
    write_json(folder / "weights.json", reward)


def _config(folder: Path, dtype: str, topology: str, policy: dict[str, Any]) -> Config:
    max_new_tokens = policy.get("max_new_tokens", SETTINGS["max_new_tokens"])
    document = {
        "name": "ppo-benchmark",
        # Never read: the stages before PPO stand there already.
        "data": {"source": {"kind": "files", "paths": ["prompts.jsonl"]}},
        "model": {
            "kind": "pretrained",
            "path": str(folder / "0_sft" / "model"),
            "dtype": dtype,
            # The longest row that there is, which `plan` goes by; the model has more positions.
            "max_length": LONGEST_PROMPT + TURN_TOKENS + max_new_tokens,
        },
        "sft": {"enabled": False},
        "pairs": {"kind": "sample", "max_new_tokens": max_new_tokens},
        "preference": {"topology": topology, "baselines": [], "last_block_at_end": True},
        "policy": {
            **SETTINGS,
            "arms": [{"name": "ours", "scalarizer": "linear"}],
            "separate_critic": True,
            "adaptive_kl": False,
            # The benchmark ends the loop, not the loop itself.
            "num_steps": 1_000_000,
            "checkpoint_every": 1_000_000,
            "max_restarts": 0,
            "call_timeout_s": 3600.0,
            **policy,
        },
        # Logical CPUs: every process of the plan must be placed at once.
        "cluster": {"num_cpus": 16, "object_store_mb": 700},
        "tracking": {"tracker": "none"},
    }
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(document))), encoding="utf-8")
    return load_config(path, [])


# ---------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class Counts:
    """Floating-point operations that a PPO step cannot do without, by phase (a multiply-add counts two)."""

    generate: float
    reference: float
    value: float
    score: float
    update: float

    @property
    def total(self) -> float:
        return self.generate + self.reference + self.value + self.score + self.update


def step_flops(
    workload: Workload, response_tokens: float, *, shared_trunk: bool, separate_critic: bool
) -> Counts:
    """Of one step whose responses have `response_tokens` tokens on average; padding and recomputation not counted.

    A token costs 2 FLOPs per matrix entry of the trunk and 2*L*D per layer of attention over the L/2 tokens before it
    (scores and values); a scored token 2*V*D more. Backward: twice the forward. The old log-probabilities and values
    are taken as a by-product of sampling (as the peer does), so only the value trunk is counted for them.
    """
    size, policy = workload.size, workload.config.policy
    prompt_tokens = TURN_TOKENS + (8 + LONGEST_PROMPT) / 2
    length = prompt_tokens + response_tokens
    per_token = 2.0 * size.trunk_parameters + 2.0 * size.num_layers * length * size.width
    trunk = policy.batch_size * length * per_token
    head = policy.batch_size * response_tokens * 2.0 * size.vocabulary * size.width
    models = 1 if shared_trunk else 12
    critic = trunk if separate_critic else 0.0
    return Counts(
        generate=trunk + head,
        reference=trunk + head,
        value=critic,
        score=models * trunk,
        update=policy.num_epochs * 3.0 * (trunk + head + critic),
    )


def matmul_peak(dtype: torch.dtype = torch.float32, seconds: float = 3.0) -> float:
    """Best FLOP/s of large matrix products with all cores, of this process, now; by the faster library."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(torch.get_num_threads(), len(_cores())))
    a, b = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 2048).to(dtype)
    transposed = b.t().contiguous()
    best, deadline = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for product in (lambda: a @ b, lambda: linear(a, transposed)):
            started = time.perf_counter()
            with fast_products():
                product()
            best = min(best, time.perf_counter() - started)
    torch.set_num_threads(threads)
    return 2.0 * 2048 * 2048 * 1024 / best


def _cores() -> set[int]:
    import os

    return os.sched_getaffinity(0)
