"""Other weights for the time of a forward, while the stored ones stay bitwise untouched.

A parameter is replaced when the module that holds it starts its forward and put back when that forward ends, so that
only the modules at work hold a copy; where a model runs many times an evaluation, copies can be held to its end.
Some parameters are also read elsewhere: by a fused output head, by a tied module, by an adapter that multiplies
matrices itself. Those are replaced for the whole evaluation. The obvious ones are known from the module tree; the rest
is found by watching which tensors the first evaluation reads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hf_eff.engines.module_tree import output_head
from hf_eff.errors import PlanError

Result = TypeVar("Result")
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)  # they have no forward of their own


def unique_parameters(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """The named parameters, each tensor once.

    A tied tensor goes by the alphabetically first of all its names, so that the result does not depend on the order
    of the modules.

    Args:
        model: Holder of the parameters.
        names: Any names that ``model.named_parameters`` knows, aliases included.

    Returns:
        Parameters by name, in alphabetical order.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    wanted = {id(every[name]) for name in names}
    chosen: dict[int, str] = {}
    for name in sorted(every):
        if id(every[name]) in wanted:
            chosen.setdefault(id(every[name]), name)
    return {name: every[name] for name in chosen.values()}


class EphemeralWeights:
    """Evaluates a model with replaced parameters.

    Args:
        model: The model whose forward is evaluated; not compiled, since its hooks must run.
        parameters: What is replaced, each tensor under one name.

    Attributes:
        holds: Whether a replacement, once made, stays until the evaluation ends: a copy of everything, made once.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self._owners = _owners(model, self.parameters)
        self._resident = _read_elsewhere(model, self._owners, self.parameters)
        self._watched = False
        self.holds = False

    @property
    def resident(self) -> frozenset[str]:
        """Names that are replaced for a whole evaluation instead of their module's forward."""
        return frozenset(self._resident)

    def evaluate(self, value: Callable[[str, Tensor], Tensor], function: Callable[[], Result]) -> Result:
        """Call ``function`` with every parameter replaced by ``value(name, stored tensor)``.

        Args:
            value: Gives the replacement, a new tensor of the same shape and type. It is called once per forward of
                the module, or once where ``holds`` is set, and has to return equal numbers each time.
            function: Runs the model, without gradients. Called a second time where the first evaluation shows that
                a parameter is read outside its module's forward.

        Returns:
            What ``function`` returned.

        Raises:
            PlanError: A parameter is read through another tensor on the same memory, which cannot be replaced.
        """
        while not self._watched:
            watch = _ReadWatch(self.parameters)
            with self._replaced(value, watch), watch:
                result = function()
            self._refuse_aliases(watch.read & self._resident)
            self._resident |= watch.read
            if not watch.read:
                self._watched = True
                return result
        with self._replaced(value):
            return function()

    def _refuse_aliases(self, names: Collection[str]) -> None:
        if names:
            raise PlanError(
                f"the model reads {sorted(names)[:3]} through another tensor on the same memory, so that a changed "
                "weight would go unnoticed; freeze these parameters or train them with a first-order method."
            )

    @contextmanager
    def _replaced(self, value: Callable[[str, Tensor], Tensor], watch: _ReadWatch | None = None) -> Iterator[None]:
        stored: dict[str, Tensor] = {}
        handles: list[torch.utils.hooks.RemovableHandle] = []

        def swap(names: Collection[str]) -> None:
            with torch.no_grad(), watch.paused() if watch else nullcontext():
                for name in names:
                    if name not in stored:  # a module may call itself
                        parameter = self.parameters[name]
                        replacement = value(name, parameter.data)
                        stored[name] = parameter.data
                        parameter.data = replacement

        def put_back(names: Collection[str]) -> None:
            for name in names:
                if name in stored:
                    self.parameters[name].data = stored.pop(name)
            # Autocast keeps 16-bit copies of weights by identity: stale once the weight is another one.
            torch.clear_autocast_cache()

        try:
            swap(self._resident)
            for module, names in self._owners.items():
                handles += _hook(module, names - self._resident, swap, put_back, stays=self.holds)
            yield
        finally:
            for handle in handles:
                handle.remove()
            put_back(list(stored))


def _hook(
    module: nn.Module,
    names: Collection[str],
    enter: Callable[[Collection[str]], None],
    leave: Callable[[Collection[str]], None],
    *,
    stays: bool,
) -> list[torch.utils.hooks.RemovableHandle]:
    if not names:
        return []
    before = module.register_forward_pre_hook(lambda *_: enter(names))
    if stays:
        return [before]
    after = module.register_forward_hook(lambda *_: leave(names), always_call=True)
    return [before, after]


def _owners(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[nn.Module, set[str]]:
    """Names of the parameters that each module holds itself."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    owners: dict[nn.Module, set[str]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in names:
                owners[module].add(names[id(parameter)])
    return dict(owners)


def _read_elsewhere(
    model: nn.Module, owners: Mapping[nn.Module, set[str]], parameters: Mapping[str, nn.Parameter]
) -> set[str]:
    """Parameters of the output head, of several modules at once, or of containers without a forward."""
    head = output_head(model)
    in_head = set() if head is None else {id(parameter) for parameter in head.parameters()}
    found = {name for name, parameter in parameters.items() if id(parameter) in in_head}
    seen: set[str] = set()
    for module, names in owners.items():
        found |= names if isinstance(module, _CONTAINERS) else names & seen
        seen |= names
    return found


class _ReadWatch(TorchDispatchMode):
    """Notes which of the stored parameters an operation reads: those were not replaced in time."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.read: set[str] = set()
        spans = [(p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name) for name, p in parameters.items()]
        self._spans = sorted(spans)
        self._active = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the replacements themselves read the stored values."""
        self._active = False
        try:
            yield
        finally:
            self._active = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation unchanged."""
        if self._active:
            for value in tree_iter((args, kwargs)):
                # Subclasses come again as the plain tensors inside them.
                if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided:
                    self._note(value.data_ptr())
        return func(*args, **(kwargs or {}))

    def _note(self, address: int) -> None:
        position = bisect_right(self._spans, address, key=lambda span: span[0]) - 1
        if position >= 0 and address < self._spans[position][1]:
            self.read.add(self._spans[position][2])
