"""Memory that runs out inside a training step: let go, climb the plan's ladder, do the same micro-batches again."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_eff.contracts.cost import Cost, Facts
from hf_eff.contracts.memory import OptimizerContext, StepContext
from hf_eff.engines.facts import batch_shape
from hf_eff.engines.length_split import split_length
from hf_eff.engines.out_of_memory import can_hold, forget, is_out_of_memory
from hf_eff.engines.row_split import split_rows, train_in_parts
from hf_eff.engines.whole_layers import keep_layers_whole
from hf_eff.errors import MemoryExhaustedError
from hf_eff.options import Chosen, ResolvedOptions, choose
from hf_eff.plan_memory import SHORTEST_SEGMENT, memory_cost, tokens_that_fit

if TYPE_CHECKING:
    from torch import nn

    from hf_eff.contracts.cost import ModelFacts
    from hf_eff.memory import MemoryStack
    from hf_eff.plan import Plan

logger = logging.getLogger(__name__)


class Rescue:
    """Runs the micro-batches of a run, again where memory ran out.

    An attempt that failed leaves nothing: gradients of the whole optimizer step are dropped, the random state is put
    back, and all its micro-batches so far are done again under the next rung. Rows go in parts of fewer and fewer
    tokens first; checkpointing, blockwise updates and shorter segments stay for the rest of the run.

    Args:
        plan: The plan with its ladder.
        stack: The memory methods; rungs are added to it.
        model: Shapes of the model as it trains.
        charge: Called with the micro-batches that are done again, before they are; may refuse.

    Attributes:
        token_limit: Most tokens, padding included, of one part of a micro-batch; None before memory ran out.
        length_limit: Most tokens of a row's segment; None while rows stay whole.
        events: What happened, JSON-able: step, rung, whether it is exact, and the batch that did not fit.
    """

    def __init__(
        self,
        plan: Plan,
        stack: MemoryStack,
        model: ModelFacts,
        charge: Callable[[Sequence[StepContext]], None] = lambda _contexts: None,
    ) -> None:
        self._plan = plan
        self._rungs = {rung.name: rung for rung in plan.ladder}
        # Several processes would have to fail alike to try again together.
        self._tries_again = bool(plan.ladder) and plan.facts.hardware.world_size == 1
        self._limit_bytes: float | None = None
        self._stack = stack
        self._model = model
        self._charge = charge
        self._taken: list[Chosen] = []
        self._window: list[StepContext] = []
        self._random = torch.empty(0)
        self._optimizer_context: Callable[[], OptimizerContext] | None = None
        self._snapshot: Callable[[], Callable[[], None]] = lambda: lambda: None
        self._restore_metrics: Callable[[], None] = lambda: None
        self._layers_whole = False
        self._checkpoint_again: Callable[[], None] = lambda: None
        self.token_limit: int | None = None
        self.length_limit: int | None = None
        self.events: list[dict[str, Any]] = []

    def attach(
        self, optimizer_context: Callable[[], OptimizerContext], metrics_snapshot: Callable[[], Callable[[], None]]
    ) -> None:
        """Connect the trainer.

        Args:
            optimizer_context: Its ``stock()`` returns the optimizer in use.
            metrics_snapshot: Notes what the trainer has counted; what it returns puts that back.
        """
        self._optimizer_context, self._snapshot = optimizer_context, metrics_snapshot

    @property
    def checkpoints(self) -> bool:
        """Whether layers are recomputed because memory ran out."""
        return "checkpointing" in self._names

    @property
    def recomputes(self) -> bool:
        """Whether layers are recomputed now, for whatever reason."""
        return not self._layers_whole and (self._plan.training_facts.run.checkpointing or self.checkpoints)

    @property
    def splits(self) -> bool:
        """Whether the longest micro-batches go in parts."""
        run = self._plan.facts.run
        tokens = run.batch_size * (run.length or self._plan.facts.pool.max_tokens)
        return self.token_limit is not None and self.token_limit < tokens

    @property
    def can_recompute(self) -> bool:
        """Whether layers that are not recomputed now could be."""
        return self._layers_whole or ("checkpointing" in self._rungs and not self.checkpoints)

    @property
    def _names(self) -> list[str]:
        return [chosen.spec.name for chosen in self._taken]

    def expect(self, limit_bytes: float) -> None:
        """Split rows ahead of time, by prediction.

        Args:
            limit_bytes: What model, training state and activations may take together.
        """
        self._limit_bytes = limit_bytes
        self.token_limit = self.expected_limit()

    def expected_limit(self) -> int | None:
        """Tokens of a part that are predicted to fit, at least one; None without a limit."""
        if self._limit_bytes is None or "row_chunks" not in self._rungs:
            return None
        return tokens_that_fit(*self._now(checkpointing=self.recomputes), self._limit_bytes) or 1

    def forecast(self, *, checkpointing: bool) -> Cost:
        """What a whole micro-batch is predicted to cost with the methods in use, layers recomputed or not."""
        return memory_cost(*self._now(checkpointing=checkpointing))[1]

    def _now(self, *, checkpointing: bool) -> tuple[ResolvedOptions, Facts]:
        """Methods in use and the facts of the run, with layers recomputed or kept whole."""
        resolved, facts = self._plan.resolved, self._plan.facts
        memory = [*resolved.memory, *self._taken]
        if not checkpointing:
            memory = [each for each in memory if each.spec.name != "checkpointing"] or [*choose("memory", "full", {})]
            facts = facts.replace(run=dataclasses.replace(facts.run, checkpointing=False))
        elif not self._plan.training_facts.run.checkpointing and not self.checkpoints:
            memory += choose("memory", "checkpointing", {})
        return dataclasses.replace(resolved, memory=tuple(memory)), facts

    # Switched by a governor

    def train_begin(self, model: nn.Module) -> None:
        """The memory methods have begun; put a switch of the run that is resumed back."""
        if self._layers_whole:
            self._checkpoint_again = keep_layers_whole(model)

    def train_end(self) -> None:
        """Before the memory methods end: leave the model's switches to them."""
        if self._layers_whole:
            self._checkpoint_again()

    def switch_checkpointing(self, model: nn.Module, step: int, *, on: bool) -> None:
        """Recompute layers from the next step on, or keep their activations; gradients stay the same.

        Args:
            model: The unwrapped model.
            step: Optimizer steps done.
            on: Whether to recompute.
        """
        if on == self.recomputes:
            return
        if not on:
            self._layers_whole, self._checkpoint_again = True, keep_layers_whole(model)
        elif self._layers_whole:
            self._checkpoint_again()
            self._layers_whole = False
        else:
            self._take("checkpointing")
            self._begin(model, step)
        self.token_limit = self.expected_limit()

    def relax_rows(self) -> None:
        """Let the parts of a micro-batch be as large as predicted to fit, whatever did not fit before."""
        self.token_limit = self.expected_limit()

    # One micro-batch

    def training_step(self, context: StepContext) -> torch.Tensor:
        """The loss of a micro-batch, as ``MemoryStack.training_step`` gives it.

        Raises:
            MemoryExhaustedError: It does not fit, whatever the ladder allows.
        """
        if not self._tries_again:
            return self._attempt(context)
        if context.micro_step == 0:
            self._window.clear()
            self._random = torch.get_rng_state()
            self._restore_metrics = self._snapshot()
        self._window.append(dataclasses.replace(context, inputs=copy.copy(context.inputs)))
        loss = self._tried([context])
        while loss is None:
            self._charge(self._window)
            loss = self._tried(self._window)
        if context.micro_step == context.micro_steps - 1:
            self._window.clear()
        return loss

    def _tried(self, contexts: Sequence[StepContext]) -> torch.Tensor | None:
        """Loss of the last of some micro-batches, or None when memory ran out and a rung was taken."""
        loss = None
        for context in contexts:
            try:
                loss = self._attempt(dataclasses.replace(context, inputs=copy.copy(context.inputs)))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
                forget(error)
            else:
                continue
            self._start_over(context)
            self._climb(context, reason)
            return None
        return loss

    def _attempt(self, context: StepContext) -> torch.Tensor:
        parts = [part for segment in self._segments(context) for part in split_rows(segment, self._num_parts(context))]
        if len(parts) == 1:
            return self._stack.training_step(context)

        def below(model: nn.Module, inputs: Any, num_items: Any, **changes: Any) -> torch.Tensor:
            inner = dataclasses.replace(context, model=model, inputs=inputs, num_items=num_items, **changes)
            return self._stack.training_step(inner)

        return train_in_parts(dataclasses.replace(context, stock=below), parts)

    def _segments(self, context: StepContext) -> list[Any]:
        return [context.inputs] if self.length_limit is None else split_length(context.inputs, self.length_limit)

    def _num_parts(self, context: StepContext) -> int:
        rows = batch_shape(context.inputs, self._model).rows
        return -(-rows // self._part(context)[0])

    def _part(self, context: StepContext) -> tuple[int, int]:
        """Rows and tokens a row, padding included, that a forward sees at one time."""
        shape = batch_shape(context.inputs, self._model)
        length = shape.tokens // shape.rows
        if self.length_limit is not None:
            length = min(length, self.length_limit)
        rows = shape.rows if self.token_limit is None else self.token_limit // max(1, length)
        return max(1, min(rows, shape.rows)), length

    # When it did not fit

    def _start_over(self, context: StepContext) -> None:
        """As if the optimizer step had not begun."""
        context.unwrapped.zero_grad(set_to_none=True)
        self._stack.step_begin(context.global_step)
        torch.set_rng_state(self._random)
        self._restore_metrics()

    def _climb(self, context: StepContext, reason: str) -> None:
        """Take the next rung.

        Raises:
            MemoryExhaustedError: There is none.
        """
        part = self._part(context)
        batch = f"{part[0]} x {part[1]} tokens"
        for climb in (self._switch_back, self._fewer_rows, self._next_method, self._shorter):
            rung = climb(context)
            if rung is not None:
                self._note(context.global_step, rung, batch, reason)
                return
        raise MemoryExhaustedError(
            f"optimizer step {context.global_step} does not fit in memory at {batch} ({reason}); tried "
            f"{[event['rung'] for event in self.events] or 'nothing'}; lower max_length or "
            "per_device_train_batch_size, or use a memory method that holds less ('hf-eff profile' compares them)."
        )

    def _switch_back(self, context: StepContext) -> str | None:
        """Recompute layers again that a governor made whole."""
        if not self._layers_whole:
            return None
        self.switch_checkpointing(context.unwrapped, context.global_step, on=True)
        return "checkpointing"

    def _fewer_rows(self, context: StepContext) -> str | None:
        """Halve the rows of a part, down to one."""
        rows, length = self._part(context)
        if "row_chunks" not in self._rungs or rows == 1 or batch_shape(context.inputs, self._model).packed_lengths:
            return None
        self.token_limit = (rows // 2) * length
        return "row_chunks"

    def _next_method(self, context: StepContext) -> str | None:
        """Add the next method of the ladder to the stack."""
        for name in ("checkpointing", "badam"):
            if name in self._rungs and name not in self._names:
                self._take(name)
                self._begin(context.unwrapped, context.global_step)
                return name
        return None

    def _shorter(self, context: StepContext) -> str | None:
        """Halve the segments of rows."""
        shorter = self._part(context)[1] // 2
        if "length_split" not in self._rungs or shorter < SHORTEST_SEGMENT:
            return None
        self.length_limit = shorter
        if self.token_limit is not None:
            self.token_limit = shorter  # one row at a time was too much, so one segment at a time
        return "length_split"

    def _take(self, name: str) -> None:
        (chosen,) = choose("memory", name, {})
        method = self._stack.add(chosen)
        self._taken.append(chosen)
        self.token_limit = self.expected_limit()  # parts may be larger again
        if name == "badam" and self._optimizer_context is not None:
            method.create_optimizer(self._optimizer_context())

    def _begin(self, model: nn.Module, step: int) -> None:
        """Open the method that was added last, in the middle of the run."""
        self._stack.added[-1].train_begin(model, step)
        self._stack.added[-1].step_begin(step)

    def _note(self, step: int, name: str, batch: str, reason: str) -> None:
        exact = name not in self._rungs or self._rungs[name].exact
        now = {"row_chunks": f"rows go in parts of at most {self.token_limit} tokens"}.get(name, f"{name} from here on")
        if name == "length_split":
            now = f"rows are cut into segments of at most {self.length_limit} tokens"
        self.events.append({"step": step, "rung": name, "exact": exact, "batch": batch, "reason": reason})
        logger.warning(
            "Out of memory at step %d (%s: %s): %s. %s",
            step,
            batch,
            reason,
            now,
            "The result stays the same." if exact else "This changes the result.",
        )

    # The update

    def before_update(self, optimizer: torch.optim.Optimizer, model: nn.Module, step: int) -> None:
        """Look whether the state that the first update makes will fit, and take turns by blocks where it will not.

        Args:
            optimizer: The optimizer about to step.
            model: The unwrapped model.
            step: Optimizer steps done before this one.
        """
        if "badam" not in self._rungs or "badam" in self._names or not self._plan.bytes["optimizer"]:
            return
        updated = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        if not updated or any(each in optimizer.state for each in updated):
            return
        total = sum(each.numel() for each in updated)
        if can_hold((int(self._plan.bytes["optimizer"] * each.numel() / total) for each in updated), updated[0].device):
            return
        self._take("badam")
        self._begin(model, step)
        self._note(step, "badam", "optimizer state", "the first update would not fit")

    # State

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "token_limit": self.token_limit,
            "length_limit": self.length_limit,
            "taken": self._names,
            "layers_whole": self._layers_whole,
            "events": [dict(event) for event in self.events],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the rungs that were taken before the save; the methods' own state comes after."""
        for name in state["taken"]:
            self._take(name)
        self._layers_whole = bool(state.get("layers_whole", False))
        self.token_limit, self.length_limit = state["token_limit"], state["length_limit"]
        self.events = [dict(event) for event in state["events"]]
