"""What trainers that generate may spend on the next step, and forwards that cannot be watched. Both from the arguments.

A step of group-relative policy optimisation writes ``num_generations`` texts a prompt before it trains on them. How
long they get is known only afterwards, so what is known before is a bound from above:

    generation   prompts, and ``max_completion_length`` new tokens a row, from a cache
    scoring      one forward for the log-probabilities of the present weights, one for the reference (``beta`` not 0)
    training     forward and backward of every row, prompt and completion

Prompts count as long as the longest one so far, so a longer one can pass the bound: it is advice, not a guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_eff.contracts.cost import ModelFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.forward_counter import SeenForward
from hf_eff.numerics.flops import forward_flops, generation_flops, recompute_flops, training_flops


@dataclass(frozen=True)
class Rollouts:
    """How a trainer generates, on one process.

    Attributes:
        rows: Completions of one generation.
        times: Generations in one optimizer step, at most.
        new_tokens: Longest completion.
        trained_rows: Rows of one optimizer step.
        forwards: Forwards without gradients over each generated row, at most.
        uses: Optimizer passes over each generated row.
    """

    rows: int
    times: int
    new_tokens: int
    trained_rows: int
    forwards: int
    uses: int

    def bound(self, facts: ModelFacts, prompt_length: int, *, checkpointing: bool = False) -> float:
        """FLOPs of one optimizer step at most, if no prompt is longer than ``prompt_length``."""
        length = prompt_length + self.new_tokens
        generated, trained = BatchShape(self.rows, length), BatchShape(self.trained_rows, length)
        rollout = generation_flops(facts, BatchShape(self.rows, prompt_length), self.new_tokens)
        step = self.times * (rollout + self.forwards * forward_flops(facts, generated))
        step += training_flops(facts, trained)
        step += 2.0 * facts.head_matmul_params * trained.tokens  # a head that keeps no logits works them out twice
        return step + (recompute_flops(facts, trained) if checkpointing else 0.0)


def rollouts_of(args: Any) -> Rollouts | None:
    """Read a trainer's arguments; None when it does not generate."""
    new_tokens, every = getattr(args, "max_completion_length", None), getattr(args, "steps_per_generation", None)
    if new_tokens is None or every is None or getattr(args, "num_generations", None) is None:
        return None
    micro_steps = int(args.gradient_accumulation_steps)
    uses = int(getattr(args, "num_iterations", 1))
    return Rollouts(
        rows=int(args.per_device_train_batch_size * every),
        times=math.ceil(micro_steps / (every * uses)),
        new_tokens=int(new_tokens),
        trained_rows=int(args.per_device_train_batch_size * micro_steps),
        forwards=1 + int(bool(getattr(args, "beta", 0.0))),
        uses=uses,
    )


def unseen_flops(args: Any, seen: Sequence[SeenForward], *, sees_reference: bool, is_peft: bool) -> float:
    """FLOPs of forwards that no hook sees: a reference that the callback was not told of, generation by vLLM.

    The reference is taken to have the policy's shapes. It reads what the policy reads without a cache; a policy with
    an adapter is its own reference and is seen. vLLM's generation counts as one forward over each generated row.

    Args:
        args: The trainer's arguments.
        seen: Forwards that were counted.
        sees_reference: Whether the reference is among the watched models.
        is_peft: Whether the policy carries an adapter.
    """
    whole = [each for each in seen if each.is_policy and each.cached is None]
    trained = math.fsum(each.flops for each in whole if each.trains)
    read = math.fsum(each.flops for each in whole)
    rollouts = rollouts_of(args)
    hidden = not (sees_reference or is_peft)
    if rollouts is None:
        return read if hidden and getattr(args, "precompute_ref_log_probs", None) is False else 0.0
    passes = float(hidden and bool(getattr(args, "beta", 0.0))) + float(bool(getattr(args, "use_vllm", False)))
    return passes * trained / rollouts.uses
