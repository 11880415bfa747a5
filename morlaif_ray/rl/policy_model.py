"""Policy, value head and reference: what PPO evaluates on a batch of responses.

Only the states before response tokens go through the output layer, so no [B, L, V] logits exist.
Legend: B responses, L sequence tokens, T response tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.tensor_ops import entropy, response_positions, take_positions, token_logprobs


@dataclass(frozen=True)
class TokenBatch:
    """Responses as tensors. Tokens are right-padded; `tokens_BT` are the response tokens themselves."""

    tokens_BL: Tensor
    attention_BL: Tensor
    positions_BT: Tensor
    """Index of the state before each response token."""
    tokens_BT: Tensor
    mask_BT: Tensor
    """True for real response tokens."""

    def rows(self, index: Tensor) -> TokenBatch:
        """The chosen rows, cut to their own longest sequence and response."""
        mask = self.mask_BT[index]
        num_tokens = max(1, int(mask.long().sum(dim=1).max()))
        length = max(1, int(self.attention_BL[index].long().sum(dim=1).max()))
        return TokenBatch(
            self.tokens_BL[index, :length],
            self.attention_BL[index, :length],
            self.positions_BT[index, :num_tokens],
            self.tokens_BT[index, :num_tokens],
            mask[:, :num_tokens],
        )

    @classmethod
    def from_lengths(
        cls, tokens_BL: Tensor, prompt_lengths_B: Tensor, response_lengths_B: Tensor
    ) -> TokenBatch:
        """Builds masks and positions from the lengths of prompts and responses."""
        num_tokens = int(response_lengths_B.max())
        steps_L = torch.arange(tokens_BL.shape[1])
        attention_BL = steps_L < (prompt_lengths_B + response_lengths_B).unsqueeze(1)
        positions_BT = response_positions(prompt_lengths_B, num_tokens)
        mask_BT = torch.arange(num_tokens) < response_lengths_B.unsqueeze(1)
        index_BT = (positions_BT + 1).clamp(max=tokens_BL.shape[1] - 1)
        tokens_BT = tokens_BL.gather(1, index_BT) * mask_BT
        return cls(tokens_BL, attention_BL, positions_BT, tokens_BT, mask_BT)


class PolicyModel(nn.Module):
    """A causal LM and a value function: a linear head on the policy's trunk, or a critic trunk of its own."""

    def __init__(
        self,
        model: Any,
        *,
        separate_critic: bool,
        temperature: float,
        lora: LoraConfig | None = None,
    ) -> None:
        super().__init__()
        settings = model.config.get_text_config()
        width = settings.hidden_size
        self._softcap: float | None = getattr(settings, "final_logit_softcapping", None)  # Gemma 2
        self.critic = copy.deepcopy(_trunk(model)) if separate_critic else None
        self.model = model if lora is None else _with_adapters(model, lora)
        self.value_head = nn.Linear(width, 1)
        # Values start at 0: the first advantages are the rewards themselves.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.temperature = temperature

    def forward(self, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probabilities, values, entropies), each [B, T]; entries outside the mask are meaningless.

        Entropies are for monitoring: computed only where no gradient is recorded, else zeros.
        """
        hidden_BTD = self._states(_trunk(self._base()), batch)
        logits_BTV = self._logits(hidden_BTD, self._base())
        value_states = hidden_BTD if self.critic is None else self._states(self.critic, batch)
        values_BT = self.value_head(value_states.float()).squeeze(-1)
        recording = torch.is_grad_enabled()
        entropies_BT = torch.zeros_like(values_BT) if recording else entropy(logits_BTV)
        return token_logprobs(logits_BTV, batch.tokens_BT), values_BT, entropies_BT

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """Log-probabilities of the response tokens, [B, T]."""
        base = self._base()
        logits_BTV = self._logits(self._states(_trunk(base), batch), base)
        return token_logprobs(logits_BTV, batch.tokens_BT)

    def reference_logprobs(self, batch: TokenBatch, reference: Any | None) -> Tensor:
        """The same under the reference: a frozen copy, or the base with its adapters switched off."""
        if reference is None:
            with self.model.disable_adapter():
                return self.logprobs(batch)
        hidden_BTD = self._states(_trunk(reference), batch)
        return token_logprobs(self._logits(hidden_BTD, reference), batch.tokens_BT)

    def _base(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def _logits(self, hidden_BTD: Tensor, model: Any) -> Tensor:
        logits: Tensor = model.get_output_embeddings()(hidden_BTD)
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits / self.temperature

    @staticmethod
    def _states(trunk: Any, batch: TokenBatch) -> Tensor:
        output = trunk(
            input_ids=batch.tokens_BL, attention_mask=batch.attention_BL.long(), use_cache=False
        )
        return take_positions(output.last_hidden_state, batch.positions_BT)

    def merged_weights(self) -> dict[str, Tensor]:
        """The policy's weights under the plain model's parameter names (adapters merged in a copy)."""
        if not hasattr(self.model, "peft_config"):
            return {name: p.detach() for name, p in self.model.named_parameters()}
        merged = copy.deepcopy(self.model).merge_and_unload()
        return {name: p.detach() for name, p in merged.named_parameters()}

    def plain_model(self) -> Any:
        """The policy as a plain causal LM, for saving."""
        if hasattr(self.model, "peft_config"):
            return copy.deepcopy(self.model).merge_and_unload()
        return self.model


def _trunk(model: Any) -> Any:
    """The decoder below the output layer. `base_model` of a plain transformers model is exactly that."""
    return model.base_model


def _with_adapters(model: Any, lora: LoraConfig) -> Any:
    from peft import LoraConfig as PeftLora
    from peft import TaskType, get_peft_model

    settings = PeftLora(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,  # sampled and trained policy must be the same function
        target_modules=lora.target_modules,
    )
    return get_peft_model(model, settings)
