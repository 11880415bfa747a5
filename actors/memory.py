"""How much memory one process of the plan needs: documented formulas, no measurement, no torch.

Legend: P parameters, b bytes per weight (float32 4, bfloat16 2), T trainable parameters, n layers, w width,
V vocabulary, s sequences at once, l tokens per sequence, f shards (ranks or GPUs that divide the weights).

    weights           P*b / f
    gathered (f > 1)  (2*V*w + 3*P/n)*b the embeddings, which stay whole, and three layers: one computed, one fetched
                                        ahead, one message; of further copies the embeddings; where the model itself is
                                        trained (2*V*w + 2*P/n)*b of gradients not yet divided; each at most P*b
    gradients, Adam   T*3*b_T / f       torch.optim.AdamW keeps its moments in the parameter's type; LoRA's are float32
    activations       s*l*n*17*w*b      Korthikanti et al. 2022 without the attention matrix (fused: never stored)
                      s*l*(n + 17)*w*b  with gradient checkpointing: a layer's inputs, plus one layer in full
    logits            s*l_out*V*12      float32 logits, log-probabilities and their gradient, of the scored tokens
    KV cache          2*n*w*b*s*l / f   an upper bound: grouped queries need less
    LoRA              T = 18*rank*n*w   all linear layers of a transformer block; 6*rank*n*w for named modules

On a GPU 10% for fragmentation and 1 GB for the CUDA context come on top; on the host what a Python process with
torch holds. 1 GB = 2**30 bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from morlaif_ray.config.inputs import LoraConfig, ModelConfig, ScratchModel
from morlaif_ray.config.judging import JudgeConfig, LocalJudge
from morlaif_ray.config.learning import PolicyConfig
from morlaif_ray.vllm_environment import pooling_cache_bytes

GB = float(2**30)
CUDA_CONTEXT_GB = 1.0
FRAGMENTATION = 1.10
CLIENT_GB = 0.2
"""An API client or the embedded judge."""
JUDGED_GROUPS, JUDGED_LENGTH = 3, 4096
"""A local judge's pass: prompts whose caches lie side by side, tokens of each where max_length says nothing."""
PROCESS_GB = 0.52
"""A Ray actor with torch and transformers, before any weight. Measured: 533 MB resident, of which 362 its own and 170
shared libraries' pages, which count for every process; an actor without them has 125."""
PRODUCT_SHAPES = 64
"""For so many shapes generated code is kept (`cpu_products`)."""
MOST_CODE_MB = 5.0
"""Per shape. Measured: 2 MB at a width of 128, 5 MB at 512 (docs/performance.md); nothing wider was."""
VLLM_PROCESS_GB = 0.3
"""What an actor holds in addition once an engine runs in it, without its cache (measured: 774 MB resident with 32 MB of
cache and a tiny model, 30 more after some passes)."""
LEARNER_PROCESS_GB = 0.61
"""The same for the learner, with what torch loads at the first optimizer step (measured: docs/ppo.md)."""
HOST_ALLOCATOR = 1.05
"""What the allocator of a learner on a CPU holds beside its tensors (measured: docs/ppo.md)."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the formulas need to know of a model."""

    num_parameters: float
    num_layers: int
    width: int
    vocabulary_size: int
    bytes_per_weight: int


@dataclass(frozen=True, slots=True)
class Load:
    """What is in flight at once: `sequences` of `length` tokens, `scored` of which meet the vocabulary."""

    sequences: int
    length: int
    scored: int = 0


KNOWN_SHAPES: dict[str, tuple[float, int, int, int]] = {
    "gpt2": (0.1244e9, 12, 768, 50257),
    "gpt2-medium": (0.3548e9, 24, 1024, 50257),
    "gpt2-large": (0.7740e9, 36, 1280, 50257),
    "gpt2-xl": (1.5576e9, 48, 1600, 50257),
    "google/gemma-2b": (2.506e9, 18, 2048, 256000),
    "google/gemma-7b": (8.538e9, 28, 3072, 256000),
    "meta-llama/Llama-2-7b-hf": (6.738e9, 32, 4096, 32000),
    "meta-llama/Llama-2-13b-hf": (13.016e9, 40, 5120, 32000),
    "meta-llama/Llama-2-70b-hf": (68.977e9, 80, 8192, 32000),
}
"""(parameters, layers, width, vocabulary) by hub id, from the models' own configs."""


def shape_of(model: ModelConfig) -> ModelShape | None:
    """Computed for a scratch model, else the config's fields for `plan`, else KNOWN_SHAPES; None if unknown."""
    if isinstance(model, ScratchModel):
        width, layers = model.width, model.num_layers
        block = 12 * width * width + 13 * width
        embeddings = (model.vocabulary_size + model.max_length) * width
        return ModelShape(
            embeddings + layers * block + 2 * width, layers, width, model.vocabulary_size, 4
        )
    known = shape_of_hub_id(model.path, model.dtype)
    given = (model.num_parameters, model.num_layers, model.width, model.vocabulary_size)
    if known is None and None in given:
        return None
    fallback = known or ModelShape(0.0, 0, 0, 0, 0)
    return ModelShape(
        model.num_parameters or fallback.num_parameters,
        model.num_layers or fallback.num_layers,
        model.width or fallback.width,
        model.vocabulary_size or fallback.vocabulary_size,
        2 if model.dtype == "bfloat16" else 4,
    )


def shape_of_hub_id(path: str, dtype: str) -> ModelShape | None:
    if path not in KNOWN_SHAPES:
        return None
    parameters, layers, width, vocabulary = KNOWN_SHAPES[path]
    return ModelShape(parameters, layers, width, vocabulary, 2 if dtype == "bfloat16" else 4)


def branched(shape: ModelShape, num_branches: int, branch_blocks: int | None) -> ModelShape:
    """With the last `branch_blocks` blocks (None: a quarter, as in `preference.branch_blocks`) once per branch.

    All branches are weights and activations of one pass. A block has an equal share of what the embeddings leave.
    """
    blocks = branch_blocks or max(1, shape.num_layers // 4)
    added = (num_branches - 1) * blocks
    embeddings = shape.vocabulary_size * shape.width
    block = (shape.num_parameters - embeddings) / shape.num_layers
    return replace(
        shape,
        num_parameters=shape.num_parameters + added * block,
        num_layers=shape.num_layers + added,
    )


def weights_gb(shape: ModelShape, shards: int = 1) -> float:
    return shape.num_parameters * shape.bytes_per_weight / shards / GB


def trainable_parameters(shape: ModelShape, lora: LoraConfig | None) -> float:
    if lora is None:
        return shape.num_parameters
    per_layer = 18 if lora.target_modules == "all-linear" else 6
    return per_layer * lora.rank * shape.num_layers * shape.width


def training_gb(
    shape: ModelShape,
    load: Load,
    *,
    lora: LoraConfig | None = None,
    checkpointing: bool = False,
    shards: int = 1,
    frozen_copies: int = 0,
    on_gpu: bool = False,
) -> float:
    """Memory of one training process. `frozen_copies`: further copies of the weights that it holds (a reference)."""
    bytes_trained = shape.bytes_per_weight if lora is None else 4
    states = trainable_parameters(shape, lora) * 3 * bytes_trained / shards / GB
    layers = shape.num_layers + 17 if checkpointing else 17 * shape.num_layers
    tokens = load.sequences * load.length
    activations = tokens * layers * shape.width * shape.bytes_per_weight / GB
    logits = load.sequences * load.scored * shape.vocabulary_size * 12 / GB
    held = (1 + frozen_copies) * weights_gb(shape, shards) + states + activations + logits
    return _with_overhead(held, on_gpu)


def learner_gb(shape: ModelShape, policy: PolicyConfig, max_length: int) -> float:
    """Memory of one rank of the PPO learner with micro-batches of full length.

    Weights of policy, frozen reference (none with adapters: the base is it) and, where configured, a critic; what
    `fsdp` gathers of them; gradients and two moments of what is trained; activations of one micro-batch, a critic's
    too; and of its response tokens the log-softmax over the vocabulary with the logits that it is made from, 8
    bytes each.
    """
    shards = policy.learner_ranks if policy.fsdp else 1
    on_gpu = policy.learner_gpus_per_rank > 0
    copies = 1 + int(policy.lora is None) + int(policy.separate_critic)
    bytes_trained = shape.bytes_per_weight if policy.lora is None else 4
    trained = trainable_parameters(shape, policy.lora) * bytes_trained
    if policy.separate_critic:
        trained += shape.num_parameters * shape.bytes_per_weight
    share = math.ceil(policy.batch_size / policy.num_minibatches / policy.learner_ranks)
    rows: float = min(policy.microbatch_size, share)
    if policy.microbatch_tokens is not None:
        rows = min(rows, max(1.0, policy.microbatch_tokens / max_length))
    layers = 17 * shape.num_layers
    if policy.gradient_checkpointing:
        layers = shape.num_layers + 17
    bytes_computed = 2 if policy.bf16_autocast else shape.bytes_per_weight
    activations = rows * max_length * layers * shape.width * bytes_computed
    scored = rows * policy.max_new_tokens
    if policy.logprob_chunk_tokens is not None:
        scored = min(scored, policy.logprob_chunk_tokens)
    held = (
        copies * weights_gb(shape, shards)
        + _gathered_gb(shape, policy, copies)
        + 3 * trained / shards / GB
        + (1 + int(policy.separate_critic)) * activations / GB
        + scored * shape.vocabulary_size * 8 / GB
    )
    if on_gpu:
        return _with_overhead(held, on_gpu)
    return held * HOST_ALLOCATOR + _products_gb(shape, scored, bytes_computed) + LEARNER_PROCESS_GB


def _products_gb(shape: ModelShape, scored: float, bytes_computed: int) -> float:
    """What oneDNN holds for float32 products (`cpu_products`): code for the shapes that it met, and the output layer's
    inputs, gradient and weights in its own order. Nothing of it where torch's own products are used."""
    if bytes_computed != 4:
        return 0.0
    copied = (scored + 2 * shape.width) * shape.vocabulary_size * 4
    code_mb = PRODUCT_SHAPES * min(MOST_CODE_MB, 1.0 + shape.width / 128)
    return (code_mb * 2**20 + copied) / GB


def _gathered_gb(shape: ModelShape, policy: PolicyConfig, copies: int) -> float:
    """What a sharded rank holds beside its slices while it computes; 0 where nothing is sharded. Not measured."""
    if not policy.fsdp:
        return 0.0
    embeddings = 2 * shape.vocabulary_size * shape.width
    layer = shape.num_parameters / shape.num_layers

    def at_most_all(parameters: float) -> float:
        return min(parameters, shape.num_parameters)

    gathered = at_most_all(embeddings + 3 * layer) + (copies - 1) * at_most_all(embeddings)
    if policy.lora is None or policy.separate_critic:
        gathered += at_most_all(embeddings + 2 * layer)
    return gathered * shape.bytes_per_weight / GB


def generation_gb(
    shape: ModelShape, load: Load, *, copies: int = 1, shards: int = 1, on_gpu: bool = False
) -> float:
    """Memory of a process that generates: weights, the KV cache of what is in flight, the last tokens' logits.

    `copies`: 2 where it keeps the base beside the weights that adapters were merged into.
    """
    cache = 2 * shape.num_layers * shape.width * shape.bytes_per_weight
    cache_gb = cache * load.sequences * load.length / shards / GB
    logits = load.sequences * shape.vocabulary_size * 12 / GB
    return _with_overhead(copies * weights_gb(shape, shards) + cache_gb + logits, on_gpu)


def scoring_gb(
    shape: ModelShape, load: Load, *, num_models: int = 1, on_gpu: bool = False
) -> float:
    """Memory of a process that scores texts with `num_models` models: their weights and one layer's activations."""
    activations = load.sequences * load.length * 17 * shape.width * shape.bytes_per_weight / GB
    return _with_overhead(num_models * weights_gb(shape) + activations, on_gpu)


def pooling_gb(
    shape: ModelShape,
    load: Load,
    *,
    cache_mb: int | None,
    num_models: int = 1,
    on_gpu: bool = False,
) -> float:
    """`scoring_gb` by vLLM's engines: each has its own cache of keys and values (`preference.vllm.kv_cache_mb`)."""
    per_token = 2 * shape.num_layers * shape.width * shape.bytes_per_weight
    cache = pooling_cache_bytes(cache_mb, load.length, per_token, on_gpu=on_gpu)
    held = scoring_gb(shape, load, num_models=num_models, on_gpu=on_gpu) + num_models * cache / GB
    return held if on_gpu else held + VLLM_PROCESS_GB


def judging_gb(judge: JudgeConfig) -> float:
    """Memory of one feedback worker: a client's, or a local judge's with the caches of the pairs of one pass."""
    if not isinstance(judge, LocalJudge):
        return CLIENT_GB
    dtype = "float32" if judge.dtype == "float32" else "bfloat16"  # float16 has as many bytes
    shape = shape_of_hub_id(judge.model, dtype)
    if shape is None:
        return math.nan
    load = Load(JUDGED_GROUPS, judge.max_length or JUDGED_LENGTH)
    on_gpu = judge.gpus_per_worker > 0
    return generation_gb(shape, load, shards=judge.slices if on_gpu else 1, on_gpu=on_gpu)


def _with_overhead(held_gb: float, on_gpu: bool) -> float:
    return held_gb * FRAGMENTATION + CUDA_CONTEXT_GB if on_gpu else held_gb + PROCESS_GB
