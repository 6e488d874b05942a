"""lora: frozen weights with trainable low-rank matrices beside them, made by PEFT.

Idea
    Leave a pretrained matrix W [m, n] as it is and learn the product of two thin ones beside it:

        y = W x + (alpha / r) B A x,     A [r, n] random, B [m, r] zero        (Eq. 3)

    so that gradients and optimizer state exist for r (m + n) numbers instead of m n.

Cost      P parameters, A adapter parameters, w bytes per frozen weight
    weights      w P + 4 A bytes
    gradients    4 A bytes
    optimizer    8 A bytes (AdamW)
    activations  about nine tenths of full fine-tuning's: a gradient still passes through every layer,
                 and each adapter saves its input. Dropout above 0 saves more than full fine-tuning.
                 variant="lora_fa" freezes A, so that adapters save r numbers a token instead of their
                 input; variant="velora" saves each input as one number per group of its entries.
    step         forward, input gradients, and weight gradients of the adapters: about 4 P per token

Use when   many cheap variants of one model are wanted, or the base is quantised.
Avoid when activations are what does not fit: checkpointing, top_layers or memory="badam" save those.
Differs    from the paper: adapts every linear layer but the output head, not only attention; A starts from
           a generator seeded by the run, and the global one stays as found.

Paper      LoRA: Low-Rank Adaptation of Large Language Models (2021), arXiv:2106.09685
           LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning (2023),
           arXiv:2308.03303; VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections (2024),
           arXiv:2405.17991
           rsLoRA, scale alpha / sqrt(r): A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA
           (2023), arXiv:2312.03732
Code       huggingface/peft, Apache-2.0, called as a library
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_eff.contracts.cost import Cost, Facts, KeptInputs, TrainableFacts
from hf_eff.contracts.memory import MemoryMethod
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Paper, Traits, knob
from hf_eff.errors import MissingDependencyError, OptionError, OutsideIntendedUseWarning, PlanError
from hf_eff.numerics.adapter_shapes import Adapters
from hf_eff.numerics.memory_terms import training_bytes
from hf_eff.numerics.planned_step import planned_step_flops

if TYPE_CHECKING:
    from torch import nn

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig(MethodConfig):
    """Options of ``memory="lora"``."""

    r: int = knob(16, "Rank of the adapters.", low=1, paper="1 to 64; 4 or 8 in most tables")
    alpha: int = knob(32, "Scale: adapters are multiplied by alpha / r.", low=1, paper="the first r tried")
    dropout: float = knob(0.0, "Dropout on the adapters' input; it costs activations.", low=0, high=0.99, paper="0-0.1")
    target_modules: str | tuple[str, ...] = knob(
        "all-linear",
        "Modules to adapt: 'all-linear' (all but the output head), last parts of their names, or a regular expression.",
        paper="query and value projections",
    )
    top_layers: int | None = knob(None, "Adapt the last layers only, this many; saves activations below.", low=1)
    modules_to_save: tuple[str, ...] = knob((), "Modules trained in full beside the adapters, such as a new head.")
    rslora: bool = knob(False, "Scale by alpha / sqrt(r) instead.")
    variant: Literal["lora", "lora_fa", "velora"] = knob(
        "lora",
        "What saves activations: 'lora_fa' freezes A; 'velora' keeps A's input compressed, so that A's gradient is "
        "approximate.",
        choices=("lora", "lora_fa", "velora"),
    )
    velora_groups: int = knob(64, "Numbers that stand for one token's input of a matrix in 'velora'.", low=1)

    def __post_init__(self) -> None:
        """Check what bounds cannot say.

        Raises:
            OptionError: A regular expression meets ``top_layers``.
        """
        super().__post_init__()
        if isinstance(self.target_modules, str) and "," in self.target_modules:
            names = tuple(name.strip() for name in self.target_modules.split(",") if name.strip())
            object.__setattr__(self, "target_modules", names)
        if self.top_layers is not None and isinstance(self.target_modules, str) and not self.all_linear:
            raise OptionError(f"{self._address('top_layers')} needs target_modules='all-linear' or a list of names.")
        if self.dropout > 0 and self.variant != "lora":
            raise OptionError(
                f"{self._address('dropout')}={self.dropout:g} keeps a mask per adapted matrix, which is as much as "
                f"variant={self.variant!r} saves; set dropout=0 or variant='lora'."
            )

    @property
    def all_linear(self) -> bool:
        """Whether every linear layer but the output head is adapted."""
        return self.target_modules == "all-linear"

    @property
    def adapters(self) -> Adapters:
        """Where the adapters are and how large, for predictions."""
        modules = len(self.target_modules) if isinstance(self.target_modules, tuple) else None
        return Adapters(self.r, modules, self.top_layers, self.variant, self.velora_groups, self.dropout > 0)


class Lora(MemoryMethod):
    """Wraps the model with PEFT; everything else is plain training of what is left trainable.

    Args:
        config: Options.
    """

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        if config.dropout > 0:
            warnings.warn(
                OutsideIntendedUseWarning(
                    f"memory='lora' with dropout={config.dropout:g} keeps a mask and a copy of the input per adapted "
                    "matrix: 1112 MiB of activations where dropout=0 keeps 688 and full fine-tuning 753 (SmolLM2-135M, "
                    "2 x 256 tokens, fp32, r=16); set dropout=0 unless overfitting is the problem."
                ),
                stacklevel=2,
            )

    def prepare_model(self, model: nn.Module, seed: int) -> nn.Module:
        """Wrap the model; the global random state is left as found.

        Raises:
            PlanError: The model has an adapter already, or no module matches.
        """
        import torch
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model

        if getattr(model, "peft_config", None):
            raise PlanError(
                "memory='lora' got a model that already has a PEFT adapter; drop memory='lora' to train that adapter, "
                "or pass the base model."
            )
        options = PeftLoraConfig(
            r=self.config.r,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            target_modules=_targets(model, self.config),
            modules_to_save=list(self.config.modules_to_save) or None,
            use_rslora=self.config.rslora,
            task_type=_task(model),
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
            **_variant_options(self.config),
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # PEFT's initialisation takes no generator; it runs on the CPU
            try:
                wrapped: nn.Module = get_peft_model(model, options)
            except ValueError as error:
                raise PlanError(f"memory='lora' could not adapt {type(model).__name__}: {error}") from error
        if self.config.variant == "lora_fa":
            for name, parameter in wrapped.named_parameters():
                if ".lora_A." in name or ".lora_embedding_A." in name:
                    parameter.requires_grad_(False)
        return wrapped


def _variant_options(config: LoraConfig) -> dict[str, Any]:
    if config.variant != "velora":
        return {}
    import peft

    if not hasattr(peft, "VeloraConfig"):
        raise MissingDependencyError(
            f"memory='lora' with variant='velora' needs peft 0.21 and {peft.__version__} is installed; upgrade peft, "
            "or use variant='lora_fa'."
        )
    # The projection follows each batch, so that a resumed run needs none of the first batch's.
    return {"velora_config": peft.VeloraConfig(num_groups=config.velora_groups, init_type="batch_average")}


def _task(model: nn.Module) -> str | None:
    """PEFT's name of the task, by which it finds new heads and wraps ``generate``."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "generate"):
        return "SEQ_2_SEQ_LM"
    return next((task for ending, task in _TASKS.items() if type(model).__name__.endswith(ending)), None)


def _targets(model: nn.Module, config: LoraConfig) -> Any:
    wanted = config.target_modules
    if config.top_layers is None:
        return wanted if isinstance(wanted, str) else list(wanted)
    from hf_eff.engines.matrices import matrices
    from hf_eff.engines.module_tree import find_blocks

    layers = find_blocks(model)[-config.top_layers :]
    names = [f"{layer}.{matrix.path}" for layer, block in layers for matrix in matrices(block) if matrix.known]
    chosen = [name for name in names if config.all_linear or name.rpartition(".")[2] in wanted]
    if not chosen:
        raise PlanError(f"target_modules={wanted!r} matches nothing in the last {len(layers)} layers.")
    return chosen


def adapt(config: LoraConfig, facts: Facts) -> Facts:
    """Facts of the model once it is wrapped."""
    model = facts.model
    adapters = config.adapters
    sizes = adapters.sizes(model)
    trained = adapters.sizes(model, only_second=True) if config.variant == "lora_fa" else sizes
    lowest = next((index for index, size in enumerate(sizes) if size), len(sizes))
    blocks = tuple(
        dataclasses.replace(block, params=block.params + size, matmul_params=block.matmul_params + size)
        for block, size in zip(model.blocks, sizes, strict=True)
    )
    total = sum(sizes)
    adapted = dataclasses.replace(
        model,
        params=model.params + total,
        blocks=blocks,
        weight_bytes=model.weight_bytes + 4 * total,
        param_bytes=4.0,  # PEFT keeps adapters in fp32 on 16-bit and 4-bit bases
        trainable=TrainableFacts(
            params=sum(trained),
            lowest_block=lowest,
            block_matmul_params=tuple(trained),
            kept_inputs=tuple(
                adapters.kept_inputs(model, block, size) if size else KeptInputs()
                for block, size in zip(model.blocks, sizes, strict=True)
            ),
        ),
        is_peft=True,
    )
    return facts.replace(model=adapted)


def cost(config: LoraConfig, facts: Facts) -> Cost:
    """Bytes and FLOPs of training the adapters on a frozen base."""
    adapted = adapt(config, facts)
    return Cost(step_flops=planned_step_flops(adapted), bytes=training_bytes(adapted))


SPEC = MethodSpec(
    name="lora",
    kind="memory",
    slot="weights",
    summary="Frozen weights with trainable low-rank matrices beside them, made by PEFT.",
    config=LoraConfig,
    build=Lora,
    cost=cost,
    adapt=adapt,
    paper=Paper(title="LoRA: Low-Rank Adaptation of Large Language Models", year=2021, arxiv="2106.09685"),
    traits=Traits(fsdp2=True, deterministic=False, peft=False, streaming=True),
    tiny={"r": 4, "alpha": 8},
    requires={"peft": "peft"},
)
