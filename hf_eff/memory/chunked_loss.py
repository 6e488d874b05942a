"""chunked_loss: next-token cross entropy a chunk of tokens at a time, so that the logits never exist as a whole.

Idea
    The loss needs each token's scores over the vocabulary, z = W x + b, for a moment only. Take the last hidden
    states x in chunks; from each make scores, loss, and at once the gradients

        dL/dx = W^T (softmax(z) - y),     dL/dW += (softmax(z) - y) x^T

    so that the backward starts from these. Nothing is computed twice; tokens without a label are left out.

Cost      T tokens, V vocabulary, h hidden size, c tokens of a chunk
    weights, gradients, optimizer   as without; the head's gradient exists from the forward on
    activations                     a h T instead of 4 V T: 96 MiB become 1 MiB for SmolLM2 at 512 tokens
    rest                            c (a + 4) V instead of about T (2 a + 4) V
    step                            the same products; less where prompts carry no loss

Use when   the vocabulary is large beside the layers, or layers are checkpointed and the logits are what is left.
Avoid when TRL's SFTTrainer trains: it has a fused head of its own, which is then left at work.
Differs    from the papers: a plain torch function, no kernels; the weight's gradient is added up in fp32.
           Models that cap or scale their logits, label smoothing and losses of one's own are refused at the first
           step, by comparing with the model's own loss on a piece of it.

Paper      Cut Your Losses in Large-Vocabulary Language Models (2024), arXiv:2411.09009
           Liger Kernel: Efficient Triton Kernels for LLM Training (2024), arXiv:2410.10989
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import MemoryMethod, StepContext
from hf_eff.contracts.spec import MethodConfig, MethodSpec, Paper, Traits, knob
from hf_eff.numerics.memory_terms import training_bytes
from hf_eff.numerics.planned_step import planned_step_flops

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_eff.engines.loss_in_chunks import ChunkedHead

_logger = logging.getLogger(__name__)
_TRL_TOKENS, _TRL_ENTRIES = 4096, 32768


@dataclass(frozen=True, kw_only=True)
class ChunkedLossConfig(MethodConfig):
    """Options of ``memory="chunked_loss"``."""

    chunk_tokens: int = knob(1024, "Tokens whose logits exist at one time.", low=1, unit="tokens")


class ChunkedLoss(MemoryMethod):
    """Puts the chunked head in place for each training step; between steps the model is as it was.

    Args:
        config: Options.
    """

    def __init__(self, config: ChunkedLossConfig) -> None:
        self.config = config
        self._head: ChunkedHead | None = None
        self._agrees: bool | None = None

    def train_begin(self, model: nn.Module, global_step: int) -> None:
        """Find the head.

        Raises:
            PlanError: There is no plain linear head, or the model's loss is of another kind.
        """
        from hf_eff.engines.loss_in_chunks import ChunkedHead

        self._head, self._agrees = ChunkedHead(model, self.config.chunk_tokens), None

    def training_step(self, context: StepContext) -> torch.Tensor:
        """Train a micro-batch on the chunked loss; the first one with labels is compared with the model's own.

        Raises:
            PlanError: The loss is not the plain next-token cross entropy of the model.
        """
        if self._head is not None and self._agrees is None:
            self._agrees = self._head.agrees(context)
            if self._agrees is False:
                _logger.info(
                    "memory='chunked_loss' leaves the loss to the fused head of the trainer, which has no logits."
                )
        if self._head is None or not self._agrees:
            return super().training_step(context)
        with self._head.active():
            return super().training_step(context)

    def train_end(self) -> None:
        """Let go of the model."""
        self._head, self._agrees = None, None


def adapt(config: ChunkedLossConfig, facts: Facts) -> Facts:
    """Facts of a run whose logits exist in chunks. TRL's own head takes 4096 tokens x 32768 entries at a time."""
    tokens = config.chunk_tokens
    if facts.run.trainer == "sft":
        tokens = max(1, round(_TRL_TOKENS * min(1.0, _TRL_ENTRIES / max(1, facts.model.vocab_size))))
    return facts.replace(run=dataclasses.replace(facts.run, loss_tokens=tokens))


def cost(config: ChunkedLossConfig, facts: Facts) -> Cost:
    """Bytes without the logits of a whole micro-batch."""
    return Cost(step_flops=planned_step_flops(facts), bytes=training_bytes(adapt(config, facts)))


SPEC = MethodSpec(
    name="chunked_loss",
    kind="memory",
    slot="activations.loss",
    summary="Next-token cross entropy a chunk of tokens at a time, so that the logits never exist as a whole.",
    config=ChunkedLossConfig,
    build=ChunkedLoss,
    cost=cost,
    adapt=adapt,
    paper=Paper(title="Cut Your Losses in Large-Vocabulary Language Models", year=2024, arxiv="2411.09009"),
    traits=Traits(needs_causal_lm=True, streaming=True),
    tiny={"chunk_tokens": 16},
)
