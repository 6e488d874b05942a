"""Facts a plan is made from, and the cost a method predicts from them. Plain numbers, no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """One repeated layer of a model.

    Attributes:
        params: Parameters in the layer, norms and biases included.
        matmul_params: Entries of its weight matrices that multiply every token.
        attention_width: heads x head_dim summed over its attention products; 0 without attention.
        stream: ``"decoder"`` or ``"encoder"``: whose sequence length it sees.
        cross_width: Same as ``attention_width`` for attention from decoder to encoder states.
    """

    params: int
    matmul_params: int
    attention_width: int = 0
    stream: str = "decoder"
    cross_width: int = 0
    cross_matmul_params: int = 0
    score_heads: int = 0
    """Heads whose attention probabilities are kept for the backward; 0 with a fused kernel."""
    keeps_normalised: bool = True
    """Whether a trained norm keeps its normalised states (RMS norms do; layer norms compute them again)."""
    activation_copies: int = 1
    """States of the feed-forward's width that its activation function keeps: more than its input where it is made of
    several operations."""


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """Trained parameters of equal shape in equal places of several blocks.

    Attributes:
        name: Name, with ``{}`` for the block's number.
        shape: Shape of each.
        bytes: Bytes per entry.
        kind: ``"linear"`` (weight of a linear layer), ``"embedding"`` or ``"other"``.
        blocks: Indices of the blocks that hold one, in forward order; empty for one parameter outside the blocks.
    """

    name: str
    shape: tuple[int, ...]
    bytes: float = 4.0
    kind: str = "other"
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class KeptInputs:
    """What one block keeps for the backward only because trained matrices read it, in values per token.

    Attributes:
        states: Distinct states that trained matrices read and nothing else keeps.
        copies: The same under autocast, where each matrix casts its input for itself.
        each: Inputs of all trained matrices, as adapters of another type than their base keep them.
        inner: Outputs of the first of two adapter matrices.
        masks: Dropout masks of adapters.
        adapters: Not kept: entries of the block's adapters, frozen ones included, which widen no state.
    """

    states: int = 0
    copies: int = 0
    each: int = 0
    inner: int = 0
    masks: int = 0
    adapters: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainableFacts:
    """Which parts of a model receive updates, in the detail that decides the backward's cost.

    Attributes:
        params: Trainable parameters.
        lowest_block: Index of the first block whose input gradients are needed; ``-1`` when
            something before the blocks trains (embeddings), ``len(blocks)`` when only parts after
            them train.
        block_matmul_params: Per block, trainable entries of matrices that multiply every token.
        head_matmul_params: The same for the output head.
    """

    params: int
    lowest_block: int
    block_matmul_params: tuple[int, ...]
    head_matmul_params: int = 0
    kept_inputs: tuple[KeptInputs, ...] = ()
    """Per block; empty where it is not known which matrices train, and taken for all of a block."""
    tensors: tuple[TensorFacts, ...] = ()
    """The trained parameters; empty where only their number is known."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Shapes of a model, in units of parameters. ``blocks`` are in forward order."""

    architecture: str
    params: int
    blocks: tuple[BlockFacts, ...]
    head_matmul_params: int
    embedding_params: int
    hidden_size: int
    vocab_size: int
    intermediate_size: int = 0
    weight_bytes: int = 0
    param_bytes: float = 4.0
    trainable: TrainableFacts | None = None
    is_causal_lm: bool = True
    is_encoder_decoder: bool = False
    is_peft: bool = False
    is_quantized: bool = False
    tied_embeddings: bool = False
    dropout: float = 0.0
    exact_flops: bool = True
    """False when a module of unknown cost was met and FLOPs are an estimate."""


@dataclass(frozen=True, kw_only=True)
class PoolFacts:
    """Size of the candidate pool and of the target (reference) set. ``None`` means unknown."""

    num_rows: int | None
    mean_tokens: float
    max_tokens: int
    num_reference: int = 0
    mean_reference_tokens: float = 0.0
    columns: tuple[str, ...] = ()
    streaming: bool = False
    length_quantiles: tuple[float, ...] = ()
    """Lengths of rows at evenly spaced probabilities, ascending; empty when only their mean is known."""


@dataclass(frozen=True, kw_only=True)
class HardwareFacts:
    """What the run may use. ``flops_per_second`` is measured or None, never guessed."""

    device: str = "cpu"
    total_bytes: int = 0
    free_bytes: int = 0
    cores: int = 1
    world_size: int = 1
    backend: str = "none"
    """``"none"``, ``"ddp"``, ``"fsdp2"``, ``"fsdp1"`` or ``"deepspeed"``."""
    flops_per_second: float | None = None
    energy_source: str = "unavailable"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The training arguments that a plan depends on."""

    trainer: str = "trainer"
    """``"trainer"`` or ``"sft"``."""
    batch_size: int = 8
    """Rows per device and micro-batch."""
    accumulation: int = 1
    max_steps: int = -1
    epochs: float = 3.0
    length: int = 0
    """Tokens per row after padding and truncation; 0 when unknown."""
    compute_bytes: float = 4.0
    """Bytes per activation element."""
    checkpointing: bool = False
    checkpoint_every: int = 1
    """With checkpointing: every so many layers are checkpointed, the others kept whole."""
    row_chunks: int = 1
    """Parts that a micro-batch's rows are split into, one forward and backward each."""
    loss_tokens: int = 0
    """Tokens whose logits exist at one time; 0 for all of a micro-batch."""
    offload: bool = False
    """Whether what autograd keeps waits in host memory instead of the accelerator's."""
    packing: bool = False
    padding_free: bool = False
    by_length: bool = False
    """Whether rows of a batch are of similar length."""
    fp16: bool = False
    bf16: bool = False
    max_grad_norm: float = 1.0
    optim: str = "adamw_torch"
    optim_args: str = ""
    """Options of the optimizer, as in ``TrainingArguments``: ``"rank=64,scale=2"``."""
    optim_target_modules: str | tuple[str, ...] = ()
    """Modules that a low-rank optimizer projects: names, or one pattern."""
    optimizer_bytes: float | None = None
    """Bytes of optimizer state per trainable parameter; None for what ``optim`` takes."""
    auto_find_batch_size: bool = False
    custom_optimizer: bool = False
    objective_forwards: float | None = None
    """Forwards that one value of an objective without gradient costs; None where the loss is trained on."""
    holds_weights: bool = False
    """Whether such a value keeps a copy of the trained weights while it is worked out."""
    load_best_model: bool = False
    """Whether the best checkpoint's weights are loaded at the end."""
    lr_scheduler: str = "linear"
    learning_rate: float = 5e-5
    remove_unused_columns: bool = True
    price_per_hour: float | None = None
    ddp_find_unused_parameters: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything ``make_plan`` and a method's ``cost`` may look at.

    ``proxy`` is the smaller model that scores the pool, if there is one; the cost of a method that uses it is asked
    for with the proxy as ``model`` and the model that is trained as ``trained``.
    """

    model: ModelFacts
    pool: PoolFacts
    hardware: HardwareFacts = field(default_factory=HardwareFacts)
    run: RunFacts = field(default_factory=RunFacts)
    proxy: ModelFacts | None = None
    trained: ModelFacts | None = None

    def replace(self, **changes: Any) -> Facts:
        """Copy with some parts changed."""
        return dataclasses.replace(self, **changes)


MEMORY_TERMS = ("weights", "gradients", "optimizer", "activations", "rest")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method predicts it will spend.

    Attributes:
        flops: FLOPs spent once (selection: scoring and warm-up; governor: all probes).
        step_flops: Mean FLOPs of one optimizer step over the whole run (memory methods).
        tokens: Tokens processed once, beside training steps.
        disk_bytes: Bytes written outside checkpoints.
        bytes: Peak bytes per memory term, keys of ``MEMORY_TERMS``. The five add up to an upper
            estimate of the peak during training.
        host_bytes: Of an accelerator's run: bytes that wait in host memory instead, such as offloaded
            optimizer state. On a CPU they are in ``bytes``, because there is no other memory.
    """

    flops: float = 0.0
    step_flops: float = 0.0
    tokens: float = 0.0
    disk_bytes: float = 0.0
    bytes: Mapping[str, float] = field(default_factory=dict)
    host_bytes: float = 0.0

    @property
    def peak_bytes(self) -> float:
        """Sum of the memory terms."""
        return float(sum(self.bytes.values()))
