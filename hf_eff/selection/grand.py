"""grand: Keep the rows with the largest gradient norm early in training.

Idea
    A row from which much is learned has a large gradient. Average its norm over models early in training:

        score[n] = mean over models of the norm of the gradient of row n's loss

    Models are the checkpoints of short warm-ups of a LoRA, from one or more fresh adapters. ``params`` says with
    respect to what the gradient is taken:

        lora        the adapter's factors
        lm_head     the output head, sum over s, t of <e_s, e_t> <h_s, h_t>: no backward through the model
        last_block  the last layer of the stack
        full        every weight

    The norms come from slopes and inputs of each layer; no gradient is kept.

Cost      N pool rows, T mean tokens, F forward FLOPs of a row, A adapter parameters, M models, h width, V vocabulary
    flops  M*N*(F + x) and 2*F + 6*A*T for each warm-up row;  x = F + 6*A*T (lora), 2*T*T*(h + V) (lm_head),
           2*T*h*V and 4*T for each weight of the block (last_block), 2*F (full)
    disk   4 bytes a row and model, 12*A of each checkpoint

Use when
    The pool is clean and has easy, repeated rows to drop: the score finds what is not learned yet.

Avoid when
    The pool is noisy: wrong labels have the largest gradients of all; ``skip_hardest`` leaves the top out.
    At initialisation (``warmup_epochs=0``) the score is void: the published result there did not
    reproduce (arXiv:2303.14753), and the factor B of a fresh LoRA is zero, so that the gradient of A is zero and
    that of B sees its input through a random A.

Differs
    The paper averages ten or more networks; here one adapter's checkpoints by default. Norms are of each
    row's mean loss a token, which favours short answers; see ``reduction``.

Paper
    Deep Learning on a Data Diet: Finding Important Examples Early in Training (2021), arXiv:2107.07075
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from hf_eff.contracts.cost import Cost, Facts, ModelFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.contracts.selection import Picks, SelectionContext
from hf_eff.contracts.spec import MethodSpec, Paper, Traits, knob
from hf_eff.engines.adapter import Adapter, temporary_adapter
from hf_eff.engines.datastore import FeatureStore, model_fingerprint, pool_fingerprint, tensors_fingerprint
from hf_eff.engines.facts import model_facts
from hf_eff.engines.ghost import gradient_parts, parameter_modules, squared_norms
from hf_eff.engines.gradient_features import fill_store
from hf_eff.engines.gradient_method import TINY_WARMUP, WarmupConfig, adapter_size
from hf_eff.engines.gradient_trace import train_adapter, with_hashes
from hf_eff.engines.module_tree import find_blocks, input_embedding, output_head
from hf_eff.engines.scoring import scoring_mode
from hf_eff.engines.warmup import WarmupCheckpoint
from hf_eff.errors import DataError, PlanError
from hf_eff.numerics.example_loss import Reduction
from hf_eff.numerics.flops import forward_flops
from hf_eff.numerics.ranking import rank

_PARAMS = ("lora", "lm_head", "last_block", "full")


@dataclass(frozen=True, kw_only=True)
class GrandConfig(WarmupConfig):
    """Options of ``selection="grand"``."""

    params: str = knob("lora", "What the gradient is taken of.", choices=_PARAMS, paper="full")
    num_adapters: int = knob(1, "Fresh adapters, each with a warm-up of its own.", low=1, paper="10 networks")
    skip_hardest: float = knob(0.0, "Share of the scored rows left out at the top.", low=0.0, high=0.99)
    warmup_epochs: int = knob(2, "Epochs of warm-up, each a checkpoint.", low=0, unit="epochs", paper="10 to 20")
    learning_rate: float | None = knob(1e-4, "Peak rate of the warm-up; None: the run's.", low=0.0, paper="0.1")

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter takes part: as what is differentiated, or as what is trained."""
        return self.params == "lora" or bool(self.warmup_epochs and self.warmup_fraction)


class Grand:
    """Ranks by the norm of each row's own gradient."""

    def __init__(self, config: GrandConfig) -> None:
        self.config = config

    def select(self, context: SelectionContext) -> Picks:
        """Choose rows of ``context.pool``, hardest first.

        Raises:
            BudgetExceededError: The next batch would pass a limit; it was not computed.
            DataError: No row is valid or has a finite gradient, or too few are left below the hardest.
            ManifestError: ``context.store_dir`` holds norms of other rows, options or another model.
            PlanError: The gradient of a module's parameters has no known form.
        """
        context = context.by_proxy()
        config, pool = self.config, with_hashes(context.pool)
        limit = config.limit(pool)  # refuses an impossible size before anything is computed
        context = replace(context, pool=pool)
        with scoring_mode(context.model):
            known = {"model": model_fingerprint(context.model)}
            norms = [each for number in range(config.num_adapters) for each in self._norms(context, number, known)]
        scores = np.mean(norms, axis=0)
        order = rank(scores, descending=True, ties=pool.row_hash)
        if not len(order):
            raise DataError("no row of the pool has a finite gradient; check the model's weights and dtype.")
        skipped = int(config.skip_hardest * len(order))
        if skipped and not config.num_tokens and len(order) - skipped < limit:
            raise DataError(
                f"skip_hardest={config.skip_hardest} leaves {len(order) - skipped} of {len(order)} rows, and {limit} "
                "are asked for; lower one of the two."
            )
        positions = config.take(order[skipped:], pool)
        return Picks(
            positions=positions,
            scores=scores,
            reasons=[f"gradient norm {scores[row]:.3g}" for row in positions],
            notes={"params": config.params, "models": len(norms), "skipped": skipped, "num_scored": len(order)},
        )

    def _norms(self, context: SelectionContext, number: int, known: Mapping[str, Any]) -> Iterator[np.ndarray]:
        """Take the norms at each checkpoint of one adapter.

        Yields:
            [N] norms, NaN where there is none.
        """
        config, seed = self.config, context.seed + number
        place = context.store_dir / f"adapter-{number}" if context.store_dir else None
        facts = model_facts(context.model)
        scope = temporary_adapter(context.model, config.lora_shape, seed) if config.has_adapter else nullcontext()
        with scope as adapter:
            checkpoints: Sequence[WarmupCheckpoint | None] = [None]
            if adapter is not None:
                checkpoints = train_adapter(
                    context,
                    adapter,
                    config.warmup_settings(context, seed),
                    config.warmup_fraction,
                    batch_tokens=config.gradient_tokens,
                    folder=place and place / "warmup",
                    header=known,
                )
            for epoch, checkpoint in enumerate(checkpoints):
                about = {**known, "rows": pool_fingerprint(context.pool), **self._recipe()}
                if adapter is not None and checkpoint is not None:
                    adapter.load(checkpoint.weights)
                    about["weights"] = tensors_fingerprint(checkpoint.weights)
                folder = place and place / f"checkpoint-{epoch}"
                store = FeatureStore.open(folder, rows=len(context.pool), width=1, dtype="float32", header=about)
                self._score(context, adapter, facts, store)
                yield np.where(store.done, store.norms.astype(np.float64), np.nan)

    def _recipe(self) -> dict[str, Any]:
        return {"params": self.config.params, "reduction": self.config.reduction, "dtype": self.config.dtype}

    def _score(
        self, context: SelectionContext, adapter: Adapter | None, facts: ModelFacts, store: FeatureStore
    ) -> None:
        """Fill the store with norms."""
        config, model = self.config, context.model
        modules = _modules(model, adapter, config.params)
        size = adapter.num_params if adapter else 0

        def flops(rows: int, length: int) -> float:
            return _flops(config.params, facts, context.forward_flops(rows, length), size, BatchShape(rows, length))

        def norms(batch: Mapping[str, Any], _: int) -> Tensor:
            parts = gradient_parts(
                model,
                modules,
                batch,
                is_causal_lm=context.is_causal_lm,
                reduction=cast("Reduction", config.reduction),
                compute_dtype=config.compute_dtype,
            )
            return squared_norms(parts).clamp(min=0).sqrt()[:, None]

        paid = replace(context, forward_flops=flops, batch_tokens=min(config.gradient_tokens, context.batch_tokens))
        model.requires_grad_(False)
        for module in modules.values():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
        handle = _cut_below_head(model) if config.params == "lm_head" else None
        try:
            fill_store(paid, context.pool, store, norms, "Gradient norms")
        finally:
            if handle is not None:
                handle.remove()


def _modules(model: Any, adapter: Adapter | None, params: str) -> dict[str, nn.Module]:
    """Modules whose own parameters are differentiated."""
    if params == "lora" and adapter is not None:
        return dict(adapter.factors)
    blocks, head = find_blocks(model), output_head(model)
    if params == "last_block" and blocks:
        found = parameter_modules(blocks[-1][1], blocks[-1][0])
    elif params == "lm_head" and head is not None:
        found = parameter_modules(head, "head")
    elif params == "full":
        found = parameter_modules(model)
    else:
        raise PlanError(f"params={params!r} finds no such part in {type(model).__name__}; use params='lora'.")
    return {name: module for name, module in found.items() if ".lora_" not in name}


def _cut_below_head(model: Any) -> Any:
    """Keep no graph of the model below a head that shares its weight with the input embedding."""
    embedding = input_embedding(model)
    return embedding.register_forward_hook(lambda _module, _inputs, output: output.detach()) if embedding else None


def _flops(params: str, model: ModelFacts, forward: float, adapter: int, shape: BatchShape) -> float:
    """FLOPs of the norms of a batch whose forward takes ``forward``."""
    rows, length = shape.rows, shape.length
    if params == "lora":
        return 2 * forward + 6.0 * adapter * rows * length
    head = model.hidden_size * model.vocab_size
    if params == "lm_head":
        pairs = 2.0 * length * length * (model.hidden_size + model.vocab_size)
        return forward + rows * min(pairs, 2.0 * length * head)
    if params == "last_block":
        block = model.blocks[-1]
        through = 2.0 * length * head + 4.0 * length * block.matmul_params + 8.0 * block.attention_width * length**2
        return forward + rows * through
    return 3 * forward


def cost(config: GrandConfig, facts: Facts) -> Cost:
    """Closed form of the module's head, with the adapter's size estimated from the widths of attention."""
    rows, length = facts.pool.num_rows or 0, max(1, math.ceil(facts.pool.mean_tokens))
    adapter = adapter_size(facts, config.lora_r) if config.has_adapter else 0
    forward, shape = forward_flops(facts.model, BatchShape(1, length)), BatchShape(1, length)
    scored = config.num_checkpoints * rows
    warmup = config.warmup_rows(rows)
    flops = warmup * (2 * forward + 6.0 * adapter * length)
    flops += scored * _flops(config.params, facts.model, forward, adapter, shape)
    disk = config.num_checkpoints * (9.0 * rows + 12.0 * adapter * bool(warmup))
    times = config.num_adapters
    return Cost(flops=times * flops, tokens=times * (warmup + scored) * float(length), disk_bytes=times * disk)


SPEC = MethodSpec(
    name="grand",
    kind="selection",
    slot="pool",
    summary="Keep the rows with the largest gradient norm early in training.",
    config=GrandConfig,
    build=Grand,
    cost=cost,
    paper=Paper(
        title="Deep Learning on a Data Diet: Finding Important Examples Early in Training",
        year=2021,
        arxiv="2107.07075",
    ),
    traits=Traits(deterministic=False, needs_model=True, uses_proxy=True),
    tiny={"fraction": 0.5, **TINY_WARMUP},
    requires={"peft": "peft"},
)
