"""One small model under one update method, without a trainer: what tests of optimizers look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_eff.contracts.cost import Facts, HardwareFacts, PoolFacts, RunFacts
from hf_eff.contracts.memory import OptimizerContext, StepContext
from hf_eff.contracts.spec import MethodSpec
from hf_eff.engines.facts import model_facts
from hf_eff.hardware.memory_meter import MemoryMeter
from hf_eff.registry import build
from hf_eff.testing.tiny import tiny_model

DECAY = 0.1
"""Weight decay of a scene's matrices."""


class UpdateScene:
    """A model, a method and its optimizer.

    Args:
        spec: The method.
        model: What it trains; everything that requires a gradient.
        lr: Learning rate, constant.
        seed: Seed of the run.
        weight_decay: Of matrices; vectors have none.
        adam: Further arguments of the optimizer that ``optim`` would name.
        max_grad_norm: Bound on the gradient's norm; 0 for none.
        options: Options of the method.
    """

    def __init__(
        self,
        spec: MethodSpec,
        model: nn.Module,
        *,
        lr: float = 1e-2,
        seed: int = 0,
        weight_decay: float = DECAY,
        adam: Mapping[str, Any] | None = None,
        max_grad_norm: float = 0.0,
        **options: Any,
    ) -> None:
        self.model = model
        self.method = build(spec, options)
        self.optimizer = self.method.create_optimizer(
            OptimizerContext(
                model=model,
                candidates=frozenset(name for name, p in model.named_parameters() if p.requires_grad),
                decay_names=decayed(model),
                optimizer_class=torch.optim.AdamW,
                optimizer_kwargs={"lr": lr, **(adam or {})},
                weight_decay=weight_decay,
                stock=lambda: torch.optim.AdamW(model.parameters(), lr=lr),
                seed=seed,
                max_grad_norm=max_grad_norm,
            )
        )
        self.method.train_begin(model, 0)

    def differentiate(self, index: int) -> None:
        """Everything of step ``index`` before the optimizer's own step."""
        self.method.step_begin(index)
        context = StepContext(
            model=self.model,
            unwrapped=self.model,
            inputs=batch(index),
            num_items=1,
            micro_step=0,
            micro_steps=1,
            global_step=index,
            stock=stock_step,
            loss=lambda model, inputs, _num_items: model(**inputs).loss,
            mean_over_ranks=lambda value: value,
        )
        self.method.training_step(context)

    def step(self, index: int) -> UpdateScene:
        """Step ``index`` on its own batch."""
        self.differentiate(index)
        self.optimizer.step()
        self.model.zero_grad()
        return self

    def steps(self, *indices: int) -> UpdateScene:
        """Several steps."""
        for index in indices:
            self.step(index)
        return self

    def weights(self) -> dict[str, Tensor]:
        """Copies of all parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def state(self, name: str) -> dict[str, Any]:
        """Optimizer state of a parameter."""
        state: dict[str, Any] = self.optimizer.state[dict(self.model.named_parameters())[name]]
        return state

    def measured(self, steps: int = 2) -> dict[str, float]:
        """Peak bytes of each memory term over the first steps."""
        meter = MemoryMeter(self.model)
        for step in range(steps):
            with meter.forward_backward():
                self.differentiate(step)
            self.optimizer.step()
            meter.observe(self.optimizer)
            self.model.zero_grad()
        return dict(meter.peak_bytes())


def toy(**changes: Any) -> nn.Module:
    """Llama of two layers of 32 units."""
    return tiny_model(layers=2, width=32, **{"attn_implementation": "eager", **changes})


def batch(step: int, rows: int = 2, length: int = 6) -> dict[str, Tensor]:
    """Rows of random tokens, the same at each call with the same step."""
    ids = torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def decayed(model: nn.Module) -> frozenset[str]:
    """Names that get weight decay."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.dim() > 1)


def is_matrix(name: str) -> bool:
    """Whether a parameter of the toy model is a layer's matrix."""
    return "_proj" in name


def stock_step(model: nn.Module, inputs: Mapping[str, Tensor], num_items: int = 1) -> Tensor:
    """Forward and backward as a trainer does them, for ``num_items`` micro-batches."""
    loss: Tensor = model.train()(**inputs).loss / num_items
    loss.backward()
    return loss.detach()


def different(first: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Names of the parameters that are not bitwise as in ``first``."""
    return [name for name, each in model.named_parameters() if not torch.equal(first[name], each.detach())]


def apart(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Largest difference between entries."""
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def facts_of(model: nn.Module, backend: str = "none", **run: Any) -> Facts:
    """Facts of a run on the toy model: rows of 16 tokens, two at a time."""
    return Facts(
        model=model_facts(model),
        pool=PoolFacts(num_rows=100, mean_tokens=16, max_tokens=16),
        hardware=HardwareFacts(backend=backend, world_size=1 if backend == "none" else 2),
        run=RunFacts(**{"batch_size": 2, "length": 16, "max_grad_norm": 0.0, **run}),
    )
