"""Blocks of a model: disjoint, covering, in forward order."""

import pytest
from torch import nn

from hf_eff.engines.block_partition import partition_model
from hf_eff.errors import PlanError
from hf_eff.numerics.trainable_blocks import BlockLayout
from hf_eff.testing.tiny import tiny_model


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def test_one_block_a_layer_and_all_else_frozen():
    model = tiny_model(layers=4)
    partition = partition_model(model, names_of(model))
    assert partition.labels == tuple(f"model.layers.{i}" for i in range(4))
    for index, block in enumerate(partition.blocks):
        assert block == tuple(name for name in names_of(model) if name.startswith(f"model.layers.{index}."))
    assert partition.frozen == ("model.embed_tokens.weight", "model.norm.weight")
    assert partition.always == ()


HEAD = {True: "block", False: "frozen"}


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_candidate_is_in_exactly_one_place(size, embedding, head, tied):
    model = tiny_model(layers=4, tie_word_embeddings=tied)
    places = {"embedding": "block" if embedding else "frozen", **dict.fromkeys(("norm", "head"), HEAD[head])}
    partition = partition_model(model, names_of(model), BlockLayout(layers_per_block=size, **places))
    placed = [name for block in partition.blocks for name in block] + list(partition.frozen)
    assert sorted(placed) == sorted(names_of(model))
    assert len(partition.blocks) == -(-4 // size) + embedding + head
    table = next((i for i, block in enumerate(partition.blocks) if "model.embed_tokens.weight" in block), None)
    # The tensor that embedding and head share belongs to the embedding, or to the head when only that is wanted.
    expected = 0 if embedding else len(partition.blocks) - 1 if head and tied else None
    assert table == expected


def test_layers_beyond_ten_do_not_fall_under_the_first():
    model = tiny_model(layers=12, width=8)
    partition = partition_model(model, names_of(model))
    assert all(name.startswith("model.layers.1.") for name in partition.blocks[1])
    assert len(partition.blocks) == 12


def test_layers_without_candidates_form_no_block():
    model = tiny_model(layers=4)
    candidates = [name for name in names_of(model) if ".1." in name or ".3.mlp" in name]
    partition = partition_model(model, candidates)
    assert partition.labels == ("model.layers.1", "model.layers.3")
    assert sorted(name for block in partition.blocks for name in block) == sorted(candidates)
    assert partition.frozen == ()


def test_always_active_parameters_leave_their_block():
    model = tiny_model(layers=2)
    partition = partition_model(model, names_of(model), BlockLayout(always_active=("model.norm", "layers.1.mlp.")))
    assert set(partition.always) == {name for name in names_of(model) if "layers.1.mlp" in name} | {"model.norm.weight"}


def test_always_active_takes_whole_words_only_and_refuses_strangers():
    model = tiny_model(layers=2)
    assert partition_model(model, names_of(model), BlockLayout(always_active=("norm",))).always == (
        "model.norm.weight",
    )
    with pytest.raises(PlanError, match="always_active='embed'"):
        partition_model(model, names_of(model), BlockLayout(always_active=("embed",)))


def test_a_model_without_layers_is_refused_by_name():
    with pytest.raises(PlanError, match="Linear has no stack of alike layers"):
        partition_model(nn.Linear(3, 3), ["weight"])
    model = tiny_model(layers=2)
    with pytest.raises(PlanError, match="LlamaForCausalLM has no trainable parameter inside its layers"):
        partition_model(model, ["model.norm.weight"])


def test_fingerprint_tells_partitions_apart():
    model = tiny_model(layers=4)
    make = lambda **options: partition_model(model, names_of(model), BlockLayout(**options)).fingerprint  # noqa: E731
    assert make() == make()
    different = [make(), make(layers_per_block=2), make(head="block"), make(always_active=("model.norm",))]
    assert len(set(different)) == 4


# -- parts of layers, groups, names


def test_attention_and_feed_forward_of_a_layer_are_blocks_in_turn():
    model = tiny_model(layers=2)
    partition = partition_model(model, names_of(model), BlockLayout(granularity="attn_mlp"))
    assert partition.labels == tuple(
        f"model.layers.{i} {half}" for i in (0, 1) for half in ("attention", "feed-forward")
    )
    for index in (0, 1):
        inside = [name for name in names_of(model) if f"layers.{index}." in name]
        assert set(partition.blocks[2 * index]) == {name for name in inside if "mlp" not in name}
        assert set(partition.blocks[2 * index + 1]) == {name for name in inside if "mlp" in name}


def test_every_matrix_is_a_block_and_vectors_go_with_the_first_of_their_layer():
    model = tiny_model(layers=2)
    partition = partition_model(model, names_of(model), BlockLayout(granularity="matrix"))
    assert len(partition.blocks) == 2 * 7
    matrices = [[name for name in block if model.get_parameter(name).dim() == 2] for block in partition.blocks]
    assert all(len(own) == 1 for own in matrices)
    vectors = [name for block in partition.blocks for name in block if model.get_parameter(name).dim() == 1]
    assert len(vectors) == 4
    assert all("norm" in name for block in (partition.blocks[0], partition.blocks[7]) for name in block[1:])
    assert [len(block) for block in partition.blocks] == [3, *[1] * 6] * 2


def test_adapters_of_a_matrix_are_one_block():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(layers=2), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    candidates = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    partition = partition_model(model, candidates, BlockLayout(granularity="matrix"))
    assert len(partition.blocks) == 2 * 7
    for block in partition.blocks:
        first, second = block
        assert first.replace("lora_A", "lora_B") == second


def test_groups_may_count_embedding_and_head_as_layers():
    model = tiny_model(layers=4, tie_word_embeddings=False)
    options = {"embedding": "block", "norm": "block", "head": "block", "group_outside": True}
    layouts = {size: BlockLayout(layers_per_block=size, **options) for size in (1, 2, 4, 6)}
    sizes = {size: partition_model(model, names_of(model), layout) for size, layout in layouts.items()}
    assert {size: len(partition.blocks) for size, partition in sizes.items()} == {1: 6, 2: 3, 4: 2, 6: 1}
    assert sizes[4].labels[1] == "model.layers.3 head"
    for partition in sizes.values():
        assert sorted(name for block in partition.blocks for name in block) == sorted(names_of(model))


@pytest.mark.parametrize("tied", [False, True])
def test_what_lies_outside_the_layers_may_always_train(tied):
    model = tiny_model(layers=2, tie_word_embeddings=tied)
    outside = [name for name in names_of(model) if ".layers." not in name]

    def always(**places):
        return set(partition_model(model, names_of(model), BlockLayout(**places)).always)

    assert always(embedding="always", norm="always", head="always") == set(outside)
    assert always(norm="always") == {"model.norm.weight"}
    # The tensor that both share trains with the head where the embedding is frozen.
    assert always(head="always") == {"model.embed_tokens.weight" if tied else "lm_head.weight"}
    assert always(embedding="always") == {"model.embed_tokens.weight"}


def test_custom_blocks_by_name_are_disjoint_and_leave_the_rest_frozen():
    model = tiny_model(layers=3)
    layout = BlockLayout(
        custom=("layers.2 + model.norm", "layers.0.mlp", "embed_tokens"), always_active=("layers.0.mlp.up_proj",)
    )
    partition = partition_model(model, names_of(model), layout)
    assert set(partition.blocks[0]) == {name for name in names_of(model) if "layers.2." in name} | {"model.norm.weight"}
    assert partition.blocks[1] == ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight")
    assert partition.always == ("model.layers.0.mlp.up_proj.weight",)
    assert set(partition.frozen) == {
        n for n in names_of(model) if "layers.1." in n or ("layers.0." in n and "mlp" not in n)
    }
    for wrong in (("layers.9",), ("layers.1", "layers.1.mlp")):
        with pytest.raises(PlanError, match=r"blocks='layers.*matches no trainable parameter that is still free"):
            partition_model(model, names_of(model), BlockLayout(custom=wrong))
