"""Parts of a transformer found from its module tree: block stacks, input embedding, output head.

Nothing here looks at attribute names such as ``layers`` or ``h``. A block stack is an outermost ``ModuleList`` of
parameter-holding entries of one class; it is found under PEFT, DDP and task-head wrappers alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Repeated layers of a model with their names, in forward order.

    A decoder-only or encoder-only model has one stack: the longest. An encoder-decoder has two, encoder first, each
    the longest of its half. Of equally long stacks the one with more parameters is taken (a vision tower beside a
    language model). A model without a stack gives an empty list.

    Args:
        model: Any module; parameters may live on the meta device.

    Returns:
        Pairs (name as in ``model.named_modules()``, block).
    """
    lists = _outermost_lists(model)
    encoder, decoder = _halves(model)
    if encoder is None or decoder is None:
        return _entries(_longest(lists))
    halves = [_longest([each for each in lists if _inside(each[1], half)]) for half in (encoder, decoder)]
    return [block for half in halves for block in _entries(half)]


def encoder_blocks(model: nn.Module) -> int:
    """How many of ``find_blocks`` belong to the encoder of an encoder-decoder model; 0 for other models."""
    encoder, decoder = _halves(model)
    if encoder is None or decoder is None:
        return 0
    return sum(_inside(block, encoder) for _, block in find_blocks(model))


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Module that turns token ids into vectors, or None when there is none (audio, images)."""
    found = _ask(model, "get_input_embeddings")
    if found is not None:
        return found
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return max(tables, key=lambda table: table.num_embeddings, default=None)


def output_head(model: nn.Module) -> nn.Module | None:
    """Module that turns hidden states into outputs: the language-model head, else the last matrix after the blocks.

    Returns:
        The module, possibly a PEFT wrapper around it; None for a bare backbone.
    """
    found = _ask(model, "get_output_embeddings")
    if found is not None:
        return found
    blocks = find_blocks(model)
    if not blocks:
        return None
    names = [name for name, _ in model.named_modules()]
    last_block = names.index(blocks[-1][0])
    inside = {id(part) for _, block in blocks for part in block.modules()}
    after = list(model.named_modules())[last_block + 1 :]
    linears = [part for _, part in after if isinstance(part, nn.Linear) and id(part) not in inside]
    return linears[-1] if linears else None


def _outermost_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Every ModuleList of parameter-holding entries that lies in no entry of another one."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not nested and all(map(_holds_parameters, module)):
            found.append((name, module))
    return found


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _longest(lists: list[tuple[str, nn.ModuleList]]) -> tuple[str, nn.ModuleList] | None:
    """The longest list whose entries share a class; without such a list (hybrid models), the longest."""
    if len(lists) < 2:
        return lists[0] if lists else None
    alike = [each for each in lists if len({type(entry) for entry in each[1]}) == 1]

    def size(each: tuple[str, nn.ModuleList]) -> tuple[int, int]:
        return len(each[1]), sum(parameter.numel() for parameter in each[1].parameters())

    # A hybrid model's own stack is longer than any uniform list beside it, such as a convolution front end.
    longest, uniform = max(lists, key=size), max(alike, key=size, default=None)
    if uniform is None or len(longest[1]) > 2 * len(uniform[1]):
        return longest
    return uniform


def _entries(stack: tuple[str, nn.ModuleList] | None) -> list[tuple[str, nn.Module]]:
    if stack is None:
        return []
    name, modules = stack
    return [(f"{name}.{index}" if name else str(index), block) for index, block in enumerate(modules)]


def _halves(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Encoder and decoder of an encoder-decoder model, else a pair of None."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None, None
    encoder, decoder = _ask(model, "get_encoder"), _ask(model, "get_decoder")
    if encoder is decoder:  # both answer with the model itself when it has no such part
        return None, None
    return encoder, decoder


def _inside(part: nn.Module, whole: nn.Module) -> bool:
    return any(part is module for module in whole.modules())


def _ask(model: nn.Module, question: str) -> nn.Module | None:
    """Call a transformers accessor where the model, or the model a wrapper holds, has it."""
    for each in (model, getattr(model, "module", None)):
        if not hasattr(each, question):
            continue
        try:
            answer = getattr(each, question)()
        except NotImplementedError:  # the class declares the accessor but has no such part
            continue
        if isinstance(answer, nn.Module):
            return answer
    return None


@contextmanager
def contiguous_head(model: nn.Module) -> Iterator[None]:
    """Inside, the output head sees contiguous hidden states.

    Of a slice of the positions, torch multiplies one row of the batch after the other, with a copy of the head's weight
    for each: several times slower than the whole forward, and gigabytes for a large vocabulary.
    """
    head = output_head(model)
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
