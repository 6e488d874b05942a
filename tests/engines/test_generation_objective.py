import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5ForConditionalGeneration

from hf_eff import GenerationObjective
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import model_facts
from hf_eff.engines.generation_objective import _exact_match, _word_f1
from hf_eff.errors import DataError, MissingDependencyError, OptionError
from hf_eff.numerics.flops import forward_flops, generation_flops
from hf_eff.testing.tiny import collator, tiny_model, tiny_tokenizer

PROMPTS = ["What is 2 + 2?", "Spell abc:", "Hm"]


def greedy(model, ids, count, end=2):
    """Literally: one forward over everything for each token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids


def batch(tokenizer, pairs, side="right"):
    padder = tiny_tokenizer()
    padder.padding_side = side
    made = []
    for prompt, answer in pairs:
        p, a = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        made.append({"input_ids": p + a, "labels": [-100] * len(p) + a})
    return dict(collator(padder)(made))


@pytest.fixture
def written(tokenizer):
    """A model, and what it writes after each prompt."""
    model = tiny_model(2, 32, seed=5)
    texts = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            new = greedy(model, ids, 4)[len(ids) :]
            texts.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return model, texts


@pytest.mark.parametrize("side", ["left", "right"])
def test_it_compares_what_a_literal_greedy_loop_writes(written, tokenizer, side):
    model, texts = written
    seen = {}

    def metric(predictions, references):
        seen.update(predictions=predictions, references=references)
        return 0.3

    pairs = list(zip(PROMPTS, [" four", "a b c", " "], strict=True))
    with torch.no_grad():
        value = GenerationObjective(tokenizer, metric, max_new_tokens=4)(model, batch(tokenizer, pairs, side))
    assert seen == {"predictions": texts, "references": ["four", "a b c", ""]}
    assert value == pytest.approx(0.7)


def test_settings_of_the_model_that_sample_do_not_matter(written, tokenizer):
    model, texts = written
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, num_beams=2)
    seen = []
    objective = GenerationObjective(tokenizer, lambda predictions, _: seen.extend(predictions) or 1, max_new_tokens=4)
    before = torch.get_rng_state()
    with torch.no_grad():
        objective(model, batch(tokenizer, [(prompt, "x") for prompt in PROMPTS]))
    assert seen == texts
    assert torch.equal(torch.get_rng_state(), before)
    assert model.generation_config.do_sample
    assert model.generation_config.num_beams == 2


def test_an_encoder_decoder_writes_from_its_source(tokenizer):
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(1)
        small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=262, eos_token_id=2, **small)).eval()
    ids = torch.tensor([[10, 11, 12], [13, 14, 0]])
    mask = (ids != 0).long()
    expected = tokenizer.batch_decode(
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3), skip_special_tokens=True
    )
    seen = []
    objective = GenerationObjective(tokenizer, lambda predictions, _: seen.extend(predictions) or 1, max_new_tokens=3)
    objective(model, {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([[20, 2], [21, 2]])})
    assert seen == [text.strip() for text in expected]


@pytest.mark.parametrize("new_tokens", [1, 5])
def test_flops_are_those_of_the_forwards_that_run(tokenizer, new_tokens):
    model = tiny_model(2, 32, seed=5, attn_implementation="eager", tie_word_embeddings=False, eos_token_id=None)
    model.generation_config.eos_token_id = 261  # which it does not write here
    objective = GenerationObjective(tokenizer, lambda predictions, _: float(all(predictions)), new_tokens)
    inputs = batch(tokenizer, [("Spell abc:", "x"), ("Spell xyz:", "x")])
    prompts = BatchShape(2, len(tokenizer("Spell abc:")["input_ids"]))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        objective(model, inputs)
    assert counter.get_total_flops() == generation_flops(model_facts(model), prompts, new_tokens)
    whole = BatchShape(*inputs["input_ids"].shape)
    assert objective.flops(model_facts(model), whole) >= counter.get_total_flops()


def test_flops_of_one_token_are_a_forward_with_one_position_of_the_head():
    facts, shape = model_facts(tiny_model(2, 32)), BatchShape(3, 20)
    saved = 2 * 3 * 19 * facts.head_matmul_params
    assert generation_flops(facts, shape, 1) == forward_flops(facts, shape) - saved


# metrics


def test_metrics_that_need_no_package():
    assert _exact_match(["4", "5", ""], ["4", "6", ""]) == pytest.approx(2 / 3)
    # 2 of 3 words found, of 2 wanted: precision 2/3, recall 1
    assert _word_f1(["the red house"], ["red house"]) == pytest.approx(0.8)
    assert _word_f1(["a a", "", "x"], ["a", "", ""]) == pytest.approx((2 / 3 + 1 + 0) / 3)


class Metric:
    name = "rouge1"

    def __init__(self, **found):
        self.found = found

    def compute(self, *, predictions, references):
        assert len(predictions) == len(references)
        return self.found


def test_an_object_with_compute_gives_the_entry_of_its_name_or_the_only_one(tokenizer):
    for found in ({"rouge1": 0.25, "rouge2": 0.5}, {"score": 0.25}):
        assert GenerationObjective(tokenizer, Metric(**found)).metric(["a"], ["b"]) == 0.25
    with pytest.raises(OptionError, match=r"gives \['p', 'q'\] and none is named 'rouge1'"):
        GenerationObjective(tokenizer, Metric(p=1.0, q=0.0)).metric(["a"], ["b"])


def test_a_metric_is_loaded_by_name(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=lambda name: Metric(rouge1=0.5)))
    assert GenerationObjective(tokenizer, "rouge").metric(["a"], ["b"]) == 0.5

    def offline(name):
        raise ConnectionError("Couldn't reach the Hub. Try again.")

    monkeypatch.setitem(sys.modules, "evaluate", SimpleNamespace(load=offline))
    with pytest.raises(
        OptionError, match=r"metric='rouge' cannot be loaded \(Couldn't reach the Hub\); pass a function"
    ):
        GenerationObjective(tokenizer, "rouge")
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hf_eff\[eval\]'"):
        GenerationObjective(tokenizer, "rouge")


def test_wrong_uses_are_one_sentence(tokenizer):
    with pytest.raises(OptionError, match="max_new_tokens must be at least 1"):
        GenerationObjective(tokenizer, max_new_tokens=0)
    with pytest.raises(OptionError, match="metric must be a name"):
        GenerationObjective(tokenizer, 3)
    inputs = batch(tokenizer, [("a", "b")])
    with pytest.raises(OptionError, match="cannot generate"):
        GenerationObjective(tokenizer)(torch.nn.Linear(1, 1), inputs)
    model = tiny_model(1, 16)
    with pytest.raises(OptionError, match="the metric must give a finite number, got nan"):
        GenerationObjective(tokenizer, lambda *_: float("nan"), 1)(model, inputs)
    with pytest.raises(DataError, match="has no prompt"):
        GenerationObjective(tokenizer)(model, {**inputs, "labels": inputs["input_ids"]})
