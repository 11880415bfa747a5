"""Policy, value head and reference: what PPO evaluates on a batch of responses.

Only the states before real response tokens go through the output layer, so no [B, L, V] logits exist.
Legend: B responses, L sequence tokens, T response tokens, N real response tokens of all rows, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from morlaif_ray.backbone import PACKED_ATTENTION, Packing, can_pack, decoder_layers, use_packing
from morlaif_ray.config.inputs import LoraConfig
from morlaif_ray.rl.adapter_transfer import base_checksum, pack
from morlaif_ray.rl.lora_merging import adapted_parameters, merged_parameters
from morlaif_ray.rl.response_rows import is_known, states_at
from morlaif_ray.rl.sharding import whole
from morlaif_ray.rl.token_head import HeadSettings, head_logprobs
from morlaif_ray.rl.weight_broadcast import Announcement
from morlaif_ray.rl.weight_transfer import Array
from morlaif_ray.tensor_ops import entropy, response_positions, token_logprobs


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

    @property
    def lengths_B(self) -> Tensor:
        """Real tokens of each row, prompt and response."""
        return self.attention_BL.long().sum(dim=1)

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
        chunk_tokens: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.how = _head_settings(model, temperature, chunk_tokens)
        _let_pack(model)
        self.critic = copy.deepcopy(model.base_model) if separate_critic else None
        self.base_checksum: int | None = None
        """Of the weights that adapters belong to (`adapter_transfer`); None without adapters."""
        if lora is not None:
            self.base_checksum = base_checksum(model.named_parameters())
        self.model = model if lora is None else _with_adapters(model, lora)
        self.value_head = nn.Linear(model.config.get_text_config().hidden_size, 1)
        # Values start at 0: the first advantages are the rewards themselves.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.eval()  # no dropout: the sampled and the trained policy are the same function
        if gradient_checkpointing:
            for trunk in (model, self.critic):
                _checkpoint_layers(trunk)

    def forward(
        self, batch: TokenBatch, *, with_values: bool = True, with_entropies: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probabilities, values, entropies), each [B, T] float32, 0 outside the mask.

        Values and entropies are zeros where they are not wanted; entropies, for monitoring, carry no gradient.
        """
        base = self._base()
        states_ND = response_states(base.base_model, batch)
        tokens_N = batch.tokens_BT[batch.mask_BT]
        logprobs_N, entropies_N = _logprobs(
            base.get_output_embeddings(), states_ND, tokens_N, self.how, with_entropies
        )
        values_N = None
        if with_values:
            if self.critic is not None:
                states_ND = response_states(self.critic, batch)
            values_N = self.value_head(states_ND.float()).squeeze(-1)
        return (
            _spread(logprobs_N, batch.mask_BT),
            _spread(values_N, batch.mask_BT),
            _spread(entropies_N, batch.mask_BT),
        )

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """Log-probabilities of the response tokens, [B, T]."""
        return model_logprobs(self._base(), batch, self.how)

    def reference_logprobs(self, batch: TokenBatch, reference: nn.Module | None) -> Tensor:
        """The same under the reference: a frozen model, or the base with its adapters switched off."""
        if reference is None:
            with _without_adapters(self.model):
                # The whole module's forward, not a part of it: a sharded model gathers its weights there.
                made: Tensor = self(batch, with_values=False)[0]
            return made
        logprobs_BT: Tensor = reference(batch)
        return logprobs_BT

    def _base(self) -> Any:
        return self.model.get_base_model() if self.has_adapters else self.model

    @property
    def packs(self) -> bool:
        """Whether rows go through the trunk without padding."""
        return packs(self._base().base_model)

    @property
    def has_adapters(self) -> bool:
        return hasattr(self.model, "peft_config")

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights under the plain model's parameter names, whole, adapters merged; one at a time.

        Where the model is sharded every rank must go through all of them: each is gathered when it is asked for.
        """
        if self.has_adapters:
            yield from merged_parameters(self.model)
            return
        for name, parameter in self.model.named_parameters():
            yield name, whole(parameter.detach())

    def sent_weights(self) -> dict[str, Array]:
        """What a rollout worker that holds the base needs: packed adapters, or where there are none all weights."""
        if self.has_adapters:
            return pack(adapted_parameters(self.model))
        return {name: weight.float().cpu().numpy() for name, weight in self.merged_weights()}

    def announce(self, version: int) -> Announcement:
        """What `merged_weights` will yield. A policy with adapters sends these alone, by another way."""
        assert not self.has_adapters, "adapters go through the object store"
        return Announcement.of(version, self.model.named_parameters())

    def help_send(self) -> None:
        """A sharded rank's part in another rank's `sent_weights`, of which it keeps nothing."""
        named: Iterator[Any] = (
            adapted_parameters(self.model) if self.has_adapters else self.merged_weights()
        )
        for _ in named:
            pass


class ReferenceModel(nn.Module):
    """A frozen causal LM whose forward is the log-probabilities of response tokens."""

    def __init__(self, model: Any, temperature: float, chunk_tokens: int | None = None) -> None:
        super().__init__()
        self.how = _head_settings(model, temperature, chunk_tokens)
        _let_pack(model)
        self.model = model
        self.eval().requires_grad_(False)

    def forward(self, batch: TokenBatch) -> Tensor:
        return model_logprobs(self.model, batch, self.how)


def model_logprobs(model: Any, batch: TokenBatch, how: HeadSettings) -> Tensor:
    """Log-probabilities of the response tokens under a causal LM, [B, T]; 0 outside the mask."""
    states_ND = response_states(model.base_model, batch)
    tokens_N = batch.tokens_BT[batch.mask_BT]
    logprobs_N, _ = _logprobs(model.get_output_embeddings(), states_ND, tokens_N, how)
    return _spread(logprobs_N, batch.mask_BT)


def response_states(trunk: Any, batch: TokenBatch) -> Tensor:
    """States before the real response tokens of all rows, one after the other, [N, D].

    No attention mask: a causal model reads from the left, so no real token ever sees the padding on the right, and the
    fast attention kernels take no mask. Embeddings, not ids, so that transformers does not look for padding either.
    On a CPU rows whose attention is known lie one behind another, without padding and without their last tokens, whose
    states nothing reads.
    """
    num_rows, length = batch.tokens_BL.shape
    starts_B = torch.arange(num_rows, device=batch.tokens_BL.device) * length
    tokens_BL, inputs = batch.tokens_BL, {}
    if packs(trunk):
        steps_L, lengths_B = torch.arange(length), batch.lengths_B - 1
        read_BL = steps_L < lengths_B.unsqueeze(1)
        ends_B = lengths_B.cumsum(0)
        starts_B = ends_B - lengths_B
        tokens_BL = tokens_BL[read_BL].unsqueeze(0)
        inputs = {
            "position_ids": steps_L.expand(num_rows, -1)[read_BL].unsqueeze(0),
            "packing": Packing((0, *ends_B.tolist())),
        }
    index_N = (batch.positions_BT + starts_B.unsqueeze(1))[batch.mask_BT]
    return states_at(trunk, trunk.get_input_embeddings()(tokens_BL), index_N, **inputs)


def packs(trunk: Any) -> bool:
    """Whether the trunk computes rows without padding: on a CPU, whole, with attention that is known.

    An accelerator has other costs: there rows stay padded.
    """
    on_cpu = trunk.get_input_embeddings().weight.device.type == "cpu"
    return on_cpu and trunk.config._attn_implementation == PACKED_ATTENTION and is_known(trunk)


def _let_pack(model: Any) -> None:
    settings = model.config
    longest = getattr(settings, "max_position_embeddings", None)
    if longest is not None and can_pack(settings, longest) and is_known(model.base_model):
        use_packing(model)


def _spread(values_N: Tensor | None, mask_BT: Tensor) -> Tensor:
    """[N] back to [B, T]; zeros where there are no values."""
    zeros = torch.zeros(mask_BT.shape, device=mask_BT.device)
    return zeros if values_N is None else zeros.masked_scatter(mask_BT, values_N.float())


def _logprobs(
    head: Any, states_ND: Tensor, tokens_N: Tensor, how: HeadSettings, with_entropies: bool = False
) -> tuple[Tensor, Tensor]:
    if type(head) is nn.Linear:
        return head_logprobs(states_ND, head.weight, head.bias, tokens_N, how, with_entropies)
    # An output layer with adapters of its own, which only its own forward knows.
    logits = _module_logits(head, states_ND, how)
    logprobs_N = token_logprobs(logits, tokens_N)
    with torch.no_grad():
        entropies_N = entropy(logits) if with_entropies else torch.zeros_like(logprobs_N)
    return logprobs_N, entropies_N


def _module_logits(head: Any, states_ND: Tensor, how: HeadSettings) -> Tensor:
    logits: Tensor = head(states_ND)
    if how.softcap is not None:
        logits = how.softcap * torch.tanh(logits / how.softcap)
    return logits / how.temperature


def _head_settings(model: Any, temperature: float, chunk_tokens: int | None) -> HeadSettings:
    settings = model.config.get_text_config()
    softcap = getattr(settings, "final_logit_softcapping", None)  # Gemma 2
    return HeadSettings(temperature, softcap, chunk_tokens)


def _checkpoint_layers(model: Any) -> None:
    """Recomputes each decoder layer in the backward pass. Only the layer itself is switched to training: what lies
    inside it stays in evaluation mode, without dropout."""
    if model is None:
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in decoder_layers(model):
        layer.training = True


@contextmanager
def _without_adapters(model: Any) -> Iterator[None]:
    """PEFT's adapters switched off. Not `disable_adapter`, which also takes their `requires_grad` away for that time:
    FSDP2 copies it when it first gathers a weight, and the adapters would never learn."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


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
