import json

import pytest
import torch
from transformers import BertConfig, LlamaConfig

from hf_eff import measured_step, profile_memory
from hf_eff.contracts.cost import MEMORY_TERMS, HardwareFacts
from hf_eff.errors import OptionError, UnknownMethodError
from hf_eff.hardware import probe
from hf_eff.testing.tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def smollm():
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )


def test_table_of_a_configuration(smollm):
    state = torch.random.get_rng_state()
    table = profile_memory(smollm, memory=["full", "badam"], batch_size=2, max_length=256)
    assert torch.equal(torch.random.get_rng_state(), state)
    full, badam = table.rows
    assert full["memory"] == "full"
    assert full["weights"] == pytest.approx(513 * 2**20, rel=0.002)
    assert full["optimizer"] == pytest.approx(2 * full["gradients"], rel=1e-4)
    assert full["total"] == sum(full[term] for term in MEMORY_TERMS)
    assert full["binding"] == "optimizer"
    assert badam["gradients"] == pytest.approx(13.5 * 2**20, rel=0.01)
    assert badam["activations"] == pytest.approx(532 * 2**20, rel=0.01)  # of the lowest block, the costliest
    assert badam["binding"] == "activations"
    assert badam["total"] < full["total"] / 2


def test_a_model_and_its_configuration_agree():
    model = profile_memory(tiny_model(), memory=["full", "mezo"], max_length=64)
    config = profile_memory(tiny_config(), memory=["full", "mezo"], max_length=64)
    assert model == config
    assert model.rows[1]["gradients"] == model.rows[1]["activations"] == 0


def test_text_has_one_aligned_line_a_method(smollm):
    table = profile_memory(smollm, memory=["full", "mezo"], batch_size=2, max_length=256)
    head, names, *lines = str(table).splitlines()
    assert head == "LlamaForCausalLM, 134.5M parameters, 2 x 256 tokens"
    assert names.split() == ["memory", *MEMORY_TERMS, "total", "binding", "flops"]
    assert [line.split()[0] for line in lines[:2]] == ["full", "mezo"]
    assert "513.13 MiB" in lines[0]
    assert len({line.rindex("iB  ") for line in lines[:2]}) == 1
    assert lines[2:4] == ["", "change first"]
    assert lines[4] == f"full      {table.rows[0]['change']['text']}"


def test_text_of_what_fits(smollm):
    table = profile_memory(smollm, ["full", "mezo"], 2, 256, budget="2GiB", bf16=True, world_size=2)
    head, names, full, mezo, *_rest = str(table).splitlines()
    assert head.endswith("2 x 256 tokens, bf16, 2 processes (ddp), budget 2.00 GiB")
    assert names.split()[-3:] == ["fits", "batch", "length"]
    shown = [f"{row['largest_batch']:,} {row['longest']:,}" for row in table.rows]
    assert " ".join(full.split()[-2:]) == shown[0]
    assert mezo.split()[-3:] == ["yes", *shown[1].split()]
    long = profile_memory(smollm, ["mezo"], 1, 256, budget="60GiB")
    assert str(long).splitlines()[2].endswith("8,192=")  # the model has no more positions


def test_mapping_is_json():
    table = profile_memory(tiny_config(), memory="full", batch_size=3, max_length=8)
    values = json.loads(json.dumps(table.to_dict()))
    assert (values["batch_size"], values["max_length"], len(values["rows"])) == (3, 8, 1)


def test_checkpointing_and_autocast_change_activations(smollm):
    thin = profile_memory(smollm, ["full"], 2, 256, activation_checkpointing=True).rows[0]
    assert thin["activations"] == pytest.approx(133 * 2**20, rel=0.01)
    plain = profile_memory(smollm, ["full"], 32, 256).rows[0]
    half = profile_memory(smollm, ["full"], 32, 256, bf16=True).rows[0]
    assert 0.5 < half["activations"] / plain["activations"] < 0.8  # logits stay in four bytes


def test_composition(smollm):
    lora, both = profile_memory(smollm, memory=["lora", "lora+badam"], batch_size=2, max_length=256).rows
    assert both["weights"] == lora["weights"]
    assert both["optimizer"] < lora["optimizer"] / 10


def test_a_method_that_cannot_run_says_why():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    table = profile_memory(model, memory=["lora", "full"], max_length=8)
    assert "PEFT" in table.rows[0]["refused"]
    assert "PEFT" in str(table)
    assert table.rows[1]["total"] > 0


def test_wrong_input_is_told(smollm):
    with pytest.raises(UnknownMethodError, match="Did you mean 'badam'"):
        profile_memory(tiny_config(), memory=["badm"])
    with pytest.raises(OptionError, match="at least 1"):
        profile_memory(tiny_config(), batch_size=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"budget": "2h"}, "must be an amount of memory here"),
        ({"budget": "1GiB, 2h"}, "must be an amount of memory here"),
        ({"budget": 0}, "above zero"),
        ({"memory_kwargs": {"rank": 3}}, "'rank' is no option of full, lora"),
        ({"memory_kwargs": {"badam": {"switch_every": 3}}}, "'badam' is no option of full, lora"),
        ({"optim": "adamw_trch"}, "Did you mean 'adamw_torch'"),
        ({"dtype": "float8"}, "must be one of"),
        ({"backend": "deepspeed"}, "must be one of"),
        ({"world_size": 0}, r"must be in \[1, inf\]"),
        ({"bf_16": True}, "Did you mean 'bf16'"),
    ],
)
def test_wrong_options_are_told(options, sentence):
    with pytest.raises(OptionError, match=sentence):
        profile_memory(tiny_config(), ["full", "lora"], **options)


def test_a_model_has_its_own_type():
    with pytest.raises(OptionError, match=r"model.to\(...\)"):
        profile_memory(tiny_model(), ["full"], dtype="bfloat16")


def test_rows_under_a_budget():
    table = profile_memory(tiny_config(), ["full", "mezo"], 4, 64, budget="16MiB")
    full, mezo = table.rows
    assert table.budget_bytes == 16 * 2**20
    assert (full["fits"], mezo["fits"]) == (full["total"] <= 16 * 2**20, mezo["total"] <= 16 * 2**20)
    for row in table.rows:
        for size, others in (("largest_batch", {"max_length": 64}), ("longest", {"batch_size": 4})):
            changed = "batch_size" if size == "largest_batch" else "max_length"
            totals = [
                profile_memory(tiny_config(), [row["memory"]], **{changed: amount, **others}).rows[0]["total"]
                for amount in (max(1, row[size]), row[size] + 1)
            ]
            assert row[size] >= 1
            assert totals[0] <= 16 * 2**20
            assert totals[1] > 16 * 2**20 or row["longest_is_model"]


def test_the_longest_row_ends_where_positions_do():
    row = profile_memory(tiny_config(), ["mezo"], 1, 8, budget="4GiB").rows[0]
    assert (row["longest"], row["longest_is_model"]) == (512, True)
    assert row["change"] is None
    row = profile_memory(tiny_config(), ["full"], 1, 8, budget=1.0).rows[0]
    assert (row["largest_batch"], row["longest"], row["fits"]) == (0, 0, False)


def test_time_is_relative_to_full_fine_tuning(smollm):
    table = profile_memory(smollm, ["full", "mezo", "checkpointing"], 2, 256)
    full, mezo, checkpointing = (row["time_factor"] for row in table.rows)
    assert full == 1.0
    assert mezo == pytest.approx(2 / 3, rel=1e-3)
    assert checkpointing > 1.15
    flagged = profile_memory(smollm, ["full"], 2, 256, activation_checkpointing=True)
    assert flagged.rows[0]["time_factor"] == pytest.approx(checkpointing)


# what other estimators leave out


def _outputs_bytes(type_options, vocabulary=50_000, tokens=(2, 128)):
    """Bytes that so many more vocabulary entries add to activations and rest, per entry and token."""
    small, large = (
        profile_memory(tiny_config(vocab_size=size), ["full"], *tokens, **type_options).rows[0]
        for size in (vocabulary, 2 * vocabulary)
    )
    weights = large["weights"] - small["weights"]
    count = vocabulary * tokens[0] * tokens[1]
    return (large["activations"] - small["activations"]) / count, (large["rest"] - small["rest"] - weights) / count


@pytest.mark.parametrize("setting", [{}, {"bf16": True}, {"dtype": "bfloat16"}], ids=["fp32", "bf16", "bf16 weights"])
def test_logits_are_predicted_in_float32(setting):
    """The loss keeps them in four bytes whatever type computes them, and their gradient lies beside them."""
    kept, for_a_moment = _outputs_bytes(setting)
    assert kept >= 4.0
    assert kept + for_a_moment >= 8.0


def test_types_are_predicted(smollm):
    single, autocast, half = (
        profile_memory(smollm, ["full"], 2, 256, **setting).rows[0]
        for setting in ({}, {"bf16": True}, {"dtype": "bfloat16"})
    )
    assert half["weights"] == pytest.approx(single["weights"] / 2, rel=1e-3)
    assert autocast["weights"] == single["weights"]
    assert smollm.dtype is None  # the caller's configuration stays as it was
    assert half["gradients"] == single["gradients"] / 2
    # Measured activations of these three: 753, 653 and 459 MiB.
    assert half["activations"] == pytest.approx(459 * 2**20, rel=0.05)
    assert half["activations"] < 0.65 * single["activations"]


def test_optimizers_are_predicted(smollm):
    adam, sgd, eight_bit = (
        profile_memory(smollm, ["full"], 2, 256, optim=name).rows[0]["optimizer"]
        for name in ("adamw_torch", "sgd", "adamw_bnb_8bit")
    )
    assert sgd == 0
    assert adam / 4 < eight_bit < adam / 2  # bitsandbytes leaves the states of embeddings in 32 bits


def test_processes_are_predicted(smollm):
    alone = profile_memory(smollm, ["full", "badam"], 2, 256).rows
    ddp = profile_memory(smollm, ["full"], 2, 256, world_size=4).rows[0]
    sharded = profile_memory(smollm, ["full"], 2, 256, world_size=4, backend="fsdp2").rows[0]
    assert ddp["weights"] == alone[0]["weights"]
    assert ddp["rest"] > alone[0]["rest"]
    for term in ("weights", "gradients", "optimizer"):
        assert sharded[term] == pytest.approx(alone[0][term] / 4)


def test_host_memory_has_a_column_where_it_is_used(smollm):
    cuda = profile_memory(smollm, ["full", "offload"], 2, 256, device="cuda")
    assert [row["host_bytes"] > 0 for row in cuda.rows] == [False, True]
    assert " host " in str(cuda).splitlines()[1]
    assert " host " not in str(profile_memory(smollm, ["full"], 2, 256, device="cuda"))
    assert "refused" in profile_memory(smollm, ["offload"], 2, 256, device="cpu").rows[0]


def test_options_go_to_the_methods_that_have_them():
    names = ["full", "lora", "lora+badam"]
    plain = profile_memory(tiny_config(), names, 2, 16).rows
    rank = profile_memory(tiny_config(), names, 2, 16, memory_kwargs={"r": 4, "badam": {"switch_every": 3}}).rows
    assert rank[0] == plain[0]
    assert rank[1]["optimizer"] == pytest.approx(plain[1]["optimizer"] / 4, rel=0.01)
    assert rank[2]["optimizer"] < plain[2]["optimizer"]


def test_equal_questions_have_equal_answers():
    first, second = (profile_memory(tiny_config(), ["full", "lora"], 2, 16, budget="3MiB") for _ in range(2))
    assert first == second


# measuring, with the processes replaced; tests/test_measured_step.py starts a real one


@pytest.fixture
def steps(monkeypatch):
    asked = []

    def measure(request, options, batch_size, length, predicted_bytes):
        asked.append((request, options.memory, batch_size, length, predicted_bytes))
        if options.memory == "mezo":
            return {"failed": "ran out of memory: the system ended the process", "out_of_memory": True}
        measured = dict.fromkeys(MEMORY_TERMS, 2.0**20) | {"gradients": 0.0}
        return {"bytes": measured, "total": 6.0 * 2**20, "predicted": dict.fromkeys(MEMORY_TERMS, 1.1 * 2**20)}

    monkeypatch.setattr(measured_step, "measure_step", measure)
    return asked


def test_measured_beside_predicted(steps):
    table = profile_memory(tiny_config(), ["full", "mezo"], 2, 16, measure=True)
    full, mezo = table.rows
    assert [(step[1], *step[2:4]) for step in steps] == [("full", 2, 16), ("mezo", 2, 16)]
    assert steps[0][4] == full["total"]
    assert full["measured"]["error"]["weights"] == pytest.approx(0.1)
    assert full["measured"]["error"]["gradients"] is None
    assert full["measured"]["error"]["total"] == pytest.approx(5.5 / 6 - 1)
    assert mezo["measured"]["out_of_memory"]
    lines = str(table).splitlines()
    place = next(index for index, line in enumerate(lines) if line.startswith("measured"))
    assert [line.split()[0] for line in lines[place + 1 :]] == ["full", "measured", "error", "mezo"]
    assert "+10.0%" in lines[place + 3]
    assert lines[-1].endswith("the system ended the process")
    json.dumps(table.to_dict(), allow_nan=False)


def test_the_process_is_told_what_the_model_is(steps):
    model = tiny_model().to(torch.bfloat16)
    model.model.embed_tokens.requires_grad_(False)
    profile_memory(model, ["full"], 2, 16, measure=True, optim="sgd", activation_checkpointing=True)
    request = steps[0][0]
    assert (request.architecture, request.dtype) == ("LlamaForCausalLM", "bfloat16")
    assert request.frozen == ("model.embed_tokens.weight",)
    assert (request.setting["optim"], request.setting["activation_checkpointing"]) == ("sgd", True)
    profile_memory(tiny_config(), ["full"], 2, 16, measure=True, dtype="float16")
    assert steps[1][0].dtype == "float16"


def test_a_refused_method_is_not_measured(steps):
    assert "measured" not in profile_memory(tiny_config(), ["offload"], 2, 16, measure=True, device="cpu").rows[0]
    assert not steps


def test_what_cannot_be_measured_is_told(steps):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(OptionError, match="without adapters"):
        profile_memory(adapted, ["full"], measure=True)
    with pytest.raises(OptionError, match="leave out world_size"):
        profile_memory(tiny_config(), ["full"], measure=True, world_size=2)
    with pytest.raises(OptionError, match="leave out world_size, backend and device"):
        profile_memory(tiny_config(), ["full"], measure=True, device="tpu")
    classifier = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, architectures=["BertForSequenceClassification"]
    )
    with pytest.raises(OptionError, match="trains on random tokens"):
        profile_memory(classifier, ["full"], measure=True)
    assert not steps


def test_a_step_that_would_not_fit_is_not_started(monkeypatch):
    monkeypatch.setattr(
        measured_step, "hardware_facts", lambda: HardwareFacts(device=probe.device_name(), free_bytes=2**20)
    )
    monkeypatch.setattr(measured_step.subprocess, "run", None)
    row = profile_memory(tiny_config(), ["full"], 2, 16, measure=True).rows[0]
    assert row["measured"]["failed"].startswith("not measured: it is predicted to need ")
    assert row["measured"]["failed"].endswith("and 1.00 MiB are free")
