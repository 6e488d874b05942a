"""Facts read off live objects: shapes of a model, its trainable part, a batch, a pool.

What comes out is plain numbers, so that plans and cost functions need no torch.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_eff.contracts.cost import BlockFacts, ModelFacts, PoolFacts
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.gradient_path import trainable_facts
from hf_eff.engines.matrices import (
    attentions,
    backbone_name,
    block_matrices,
    block_repeats,
    logical_sizes,
    matrices,
    outer_matrices,
    text_config,
)
from hf_eff.engines.module_tree import encoder_blocks, find_blocks, input_embedding, output_head
from hf_eff.engines.tensor_facts import with_details
from hf_eff.errors import DataError, OptionError
from hf_eff.hardware.memory_meter import storage_bytes, weight_tensors

BYTES_PER_TOKEN = 4.0
"""Rule of thumb for text that is not tokenised yet; English with a vocabulary of 32k or more."""
_SAMPLE_ROWS = 2000
_QUANTILES = 100

__all__ = [
    "batch_shape",
    "is_causal_lm",
    "model_facts",
    "model_facts_from_config",
    "pool_facts",
    "token_counts",
    "trainable_facts",
]


# -- models ---------------------------------------------------------------------------------------------------------


def model_facts(model: nn.Module) -> ModelFacts:
    """Shapes of a model, PEFT and quantised ones included.

    Args:
        model: Any model; on the meta device nothing is computed or allocated.

    Returns:
        Facts whose ``trainable`` describes the parameters that require gradients now. ``param_bytes`` is the mean
        over those (over all when none does), since gradients take the parameter's type. ``weight_bytes`` counts each
        storage once, with buffers and quantisation constants.
    """
    config, embedding, sizes = text_config(model), input_embedding(model), logical_sizes(model)
    blocks = [block for _, block in find_blocks(model)]
    tables = _tables_outside(model, blocks)
    facts = ModelFacts(
        architecture=backbone_name(model),
        params=sum(sizes.values()),
        blocks=_blocks_facts(model, blocks, sizes),
        head_matmul_params=sum(each.entries for each in outer_matrices(model)),
        embedding_params=sum(sizes[key] for key in tables),
        hidden_size=_size(config, "hidden_size") or _size(embedding, "embedding_dim"),
        vocab_size=_size(config, "vocab_size") or _size(embedding, "num_embeddings"),
        intermediate_size=max(map(_intermediate_size, blocks), default=0),
        weight_bytes=storage_bytes(weight_tensors(model)),
        param_bytes=_bytes_per_parameter(model),
        trainable=trainable_facts(model),
        is_causal_lm=is_causal_lm(model),
        is_encoder_decoder=encoder_blocks(model) > 0,
        is_peft=bool(getattr(model, "peft_config", None)),
        is_quantized=_is_quantized(model),
        tied_embeddings=_tied(model),
        dropout=_dropout(model, config),
        exact_flops=_is_exact(model, config),
    )
    return with_details(facts, model)


def model_facts_from_config(config: Any, *, dtype: torch.dtype | None = None) -> ModelFacts:
    """Shapes of the model that a configuration describes, without its weights.

    Args:
        config: A transformers configuration. The class it names under ``architectures`` is built, else the one for
            sequence-to-sequence, masked or causal language modelling, else the bare backbone.
        dtype: Type of the weights; None for the one the configuration names, float32 without one.

    Raises:
        OptionError: transformers knows no model for the configuration.
    """
    import transformers

    config = copy.deepcopy(config)  # transformers notes the type of the weights in it
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    # The generator stays as found: initialisers may draw from it even where there is nothing to fill.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
        if named and named[0] is not None:
            return model_facts(named[0]._from_config(config, dtype=dtype))  # noqa: SLF001 - what Auto classes call
        try:
            return model_facts(_auto_class(config).from_config(config, dtype=dtype))
        except ValueError as error:
            raise OptionError(f"{type(config).__name__} describes no model that can be trained: {error}") from error


def _blocks_facts(model: nn.Module, blocks: list[nn.Module], sizes: Mapping[int, int]) -> tuple[BlockFacts, ...]:
    repeats, encoders = block_repeats(model), encoder_blocks(model)
    described = []
    for index, (block, found) in enumerate(zip(blocks, block_matrices(model), strict=True)):
        own = attentions(block)
        crossing = {id(each.weight) for attention in own for each in attention.from_encoder}
        described.append(
            BlockFacts(
                params=sum(sizes[key] for key in {id(parameter) for parameter in block.parameters()}),
                matmul_params=sum(each.entries for each in found if id(each.weight) not in crossing),
                attention_width=repeats * sum(each.width for each in own if not each.is_cross),
                stream="encoder" if index < encoders else "decoder",
                cross_width=repeats * sum(each.width for each in own if each.is_cross),
                cross_matmul_params=sum(each.entries for each in found if id(each.weight) in crossing),
            )
        )
    return tuple(described)


def _tables_outside(model: nn.Module, blocks: list[nn.Module]) -> set[int]:
    """Embedding tables outside the blocks, by ``id`` of their weight."""
    inside = {id(part) for block in blocks for part in block.modules()}
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding) and id(part) not in inside]
    return {id(table.weight) for table in tables}


def _is_exact(model: nn.Module, config: Any) -> bool:
    """Whether every matrix is of a known kind and in a place whose cost is known."""
    blocks, names = find_blocks(model), [name for name, _ in model.named_modules()]
    if not blocks or block_repeats(model) > 1 or hasattr(config, "v_head_dim"):
        return False
    before_blocks = set(names[: names.index(blocks[0][0])])
    weight_decomposed = any(len(getattr(part, "lora_magnitude_vector", ())) for part in model.modules())
    return (
        all(attentions(block) for _, block in blocks)
        and all(each.known for each in matrices(model))
        and not any(each.path in before_blocks for each in outer_matrices(model))
        and not weight_decomposed
    )


# -- properties of a model ------------------------------------------------------------------------------------------


def _auto_class(config: Any) -> Any:
    """The Auto class whose model is usually fine-tuned for this configuration."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind = getattr(config, "model_type", None)
    if kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForSeq2SeqLM
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return transformers.AutoModelForMaskedLM
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model has one stack that predicts each next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = backbone_name(model)
    known = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith(("ForCausalLM", "LMHeadModel"))
    return known and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _is_quantized(model: nn.Module) -> bool:
    packed = any(not parameter.is_floating_point() for parameter in model.parameters())
    return packed or getattr(getattr(model, "config", None), "quantization_config", None) is not None


def _tied(model: nn.Module) -> bool:
    weight = getattr(output_head(model), "weight", None)
    return weight is not None and weight is getattr(input_embedding(model), "weight", None)


def _size(owner: Any, name: str) -> int:
    return int(getattr(owner, name, None) or 0)


def _intermediate_size(block: nn.Module) -> int:
    """Widest side of a matrix outside attention; 0 without one."""
    attending = {id(each.weight) for attention in attentions(block) for each in attention.matrices}
    rest = [each for each in matrices(block) if each.known and id(each.weight) not in attending]
    return max((max(each.inputs, each.outputs) for each in rest), default=0)


def _bytes_per_parameter(model: nn.Module) -> float:
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    counted = [parameter for parameter in floating if parameter.requires_grad] or floating
    entries = sum(parameter.numel() for parameter in counted)
    return sum(parameter.numel() * parameter.element_size() for parameter in counted) / entries if entries else 4.0


def _dropout(model: nn.Module, config: Any) -> float:
    """Largest dropout rate, of modules and of attention's functional dropout."""
    rates = [part.p for part in model.modules() if isinstance(part, nn.Dropout)]
    named = [getattr(config, name, None) for name in ("attention_dropout", "dropout", "activation_dropout")]
    return max([*rates, *(rate for rate in named if isinstance(rate, float))], default=0.0)


# -- batches --------------------------------------------------------------------------------------------------------


def batch_shape(inputs: Mapping[str, Any], facts: ModelFacts) -> BatchShape:
    """Shape of one micro-batch as the collator made it.

    Args:
        inputs: Batch with ``input_ids`` or ``inputs_embeds`` (or another first tensor of two or more dimensions), and
            ``labels`` or ``decoder_input_ids`` for an encoder-decoder model. Leading dimensions beyond
            [rows, length], such as the choices of a multiple-choice batch, count as rows.
        facts: The model it is meant for.

    Returns:
        The shape, with ``packed_lengths`` where ``position_ids`` start again inside a row and there is no
        ``attention_mask``: attention kernels for such rows stay inside a document.

    Raises:
        DataError: No tensor tells the length.
    """
    rows, length = _rows_and_length(inputs)
    if not facts.is_encoder_decoder:
        return BatchShape(rows, length, packed_lengths=_packed_lengths(inputs, rows, length))
    for key in ("decoder_input_ids", "labels", "decoder_inputs_embeds"):
        if isinstance(target := inputs.get(key), torch.Tensor) and target.dim() >= 2:
            return BatchShape(rows, target.shape[1], encoder_length=length)
    raise DataError("A batch for an encoder-decoder model needs labels or decoder_input_ids.")


def token_counts(inputs: Mapping[str, Any], is_causal_lm: bool, *, is_encoder_decoder: bool = False) -> dict[str, int]:
    """Tokens of a micro-batch.

    Args:
        inputs: Batch as for ``batch_shape``.
        is_causal_lm: Whether the loss compares each label with the position before it.
        is_encoder_decoder: Whether the model makes decoder inputs from ``labels`` where the batch has none.

    Returns:
        ``paid``: all positions, padding included, of the input and of the decoder's input. ``useful``: the same
        without padding. ``loss``: labels that carry loss.
    """
    rows, length = _rows_and_length(inputs)
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    paid = rows * length
    useful = int((mask != 0).sum()) if isinstance(mask, torch.Tensor) and mask.numel() == paid else paid
    target, target_mask = inputs.get("decoder_input_ids"), inputs.get("decoder_attention_mask")
    if target is None and is_encoder_decoder and isinstance(labels, torch.Tensor):
        target, target_mask = labels, labels != -100
    if isinstance(target, torch.Tensor):
        paid += target.numel()
        useful += int((target_mask != 0).sum()) if isinstance(target_mask, torch.Tensor) else target.numel()
    loss = 0
    if isinstance(labels, torch.Tensor):
        counted = labels[..., 1:] if is_causal_lm and labels.dim() >= 2 else labels
        loss = int((counted != -100).sum())
    return {"paid": paid, "useful": useful, "loss": loss}


def _rows_and_length(inputs: Mapping[str, Any]) -> tuple[int, int]:
    for key, trailing in (("input_ids", 1), ("inputs_embeds", 2)):
        if isinstance(tensor := inputs.get(key), torch.Tensor) and tensor.dim() > trailing:
            shape = tensor.shape[: tensor.dim() - trailing + 1]
            return math.prod(shape[:-1]), shape[-1]
    for tensor in inputs.values():
        if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2:
            return tensor.shape[0], tensor.shape[1]
    raise DataError(f"A batch needs input_ids or inputs_embeds; it has {sorted(inputs)}.")


def _packed_lengths(inputs: Mapping[str, Any], rows: int, length: int) -> tuple[int, ...]:
    """Lengths of the documents inside packed rows; empty when no row holds more than one."""
    positions = inputs.get("position_ids")
    if inputs.get("attention_mask") is not None or not isinstance(positions, torch.Tensor):
        return ()
    if positions.shape != (rows, length) or length == 0:
        return ()
    starts = torch.ones(rows, length, dtype=torch.bool)
    starts[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1).cpu()
    bounds = [*starts.flatten().nonzero().flatten().tolist(), rows * length]
    lengths = tuple(end - start for start, end in itertools.pairwise(bounds))
    return lengths if len(lengths) > rows else ()


# -- pools ----------------------------------------------------------------------------------------------------------


def pool_facts(dataset: Any, reference: Any = None) -> PoolFacts:
    """Size of a pool and of its target set.

    Args:
        dataset: A ``datasets`` dataset, or any indexable collection of mappings. A stream is not read: its number of
            rows is None and its lengths are 0 (unknown).
        reference: The target set, alike; a mapping of several such sets; or None.

    Returns:
        Facts from at most 2,000 evenly spaced rows. Lengths are exact tokens of these rows where they have
        ``input_ids`` or ``length``; otherwise an *estimate*: the UTF-8 bytes of all their text over
        ``BYTES_PER_TOKEN``.
    """
    sets = list(reference.values()) if isinstance(reference, Mapping) else [reference]
    lengths = _sampled_lengths(dataset)
    targets = [length for each in sets for length in _sampled_lengths(each)]
    return PoolFacts(
        num_rows=_num_rows(dataset),
        mean_tokens=sum(lengths) / len(lengths) if lengths else 0.0,
        max_tokens=math.ceil(max(lengths, default=0.0)),
        num_reference=sum(_num_rows(each) or 0 for each in sets),
        mean_reference_tokens=sum(targets) / len(targets) if targets else 0.0,
        columns=_columns(dataset),
        streaming=dataset is not None and _num_rows(dataset) is None,
        length_quantiles=_quantiles(sorted(lengths)),
    )


def _quantiles(ascending: list[float]) -> tuple[float, ...]:
    """At most ``_QUANTILES`` of the values, evenly spaced; all of them where they are few."""
    count = min(len(ascending), _QUANTILES)
    return tuple(ascending[int((index + 0.5) * len(ascending) / count)] for index in range(count))


def _num_rows(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _columns(dataset: Any) -> tuple[str, ...]:
    names = getattr(dataset, "column_names", None)
    if names is None and _num_rows(dataset) and isinstance(row := dataset[0], Mapping):
        names = list(row)
    return tuple(names or ())


def _sampled_lengths(dataset: Any) -> list[float]:
    count = _num_rows(dataset)
    if not count:
        return []
    columns = set(_columns(dataset))
    wanted = next((name for name in ("length", "input_ids") if name in columns), None)
    if wanted and hasattr(dataset, "select_columns"):
        dataset = dataset.select_columns([wanted])  # leaves images and long texts unread
    step = max(1.0, count / _SAMPLE_ROWS)
    rows = (dataset[int(index * step)] for index in range(min(count, _SAMPLE_ROWS)))
    return [_row_length(row) for row in rows]


def _row_length(row: Any) -> float:
    if isinstance(row, Mapping):
        if "input_ids" in row:
            return float(len(row["input_ids"]))
        if isinstance(row.get("length"), int):
            return float(row["length"])
    return _text_bytes(row) / BYTES_PER_TOKEN


def _text_bytes(value: Any) -> int:
    """UTF-8 bytes of all strings in a row, conversations included."""
    if isinstance(value, str):
        return len(value.encode("utf-8"))
    if isinstance(value, Mapping):
        return sum(_text_bytes(each) for each in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_text_bytes(each) for each in value)
    return 0
