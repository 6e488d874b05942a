import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_eff import ClassificationError, Objective
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import model_facts
from hf_eff.engines.objectives import as_objective, objective_flops, objective_value
from hf_eff.errors import DataError, OptionError
from hf_eff.numerics.flops import forward_flops
from hf_eff.testing.tiny import collator, tiny_config, tiny_model, tiny_tokenizer

SHAPES = [BatchShape(4, 12), BatchShape(2, 30)]


class Says(nn.Module):
    """Gives the logits it was made with, whatever it is asked."""

    def __init__(self, logits, **config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.logits, self.config = logits, SimpleNamespace(**config)

    def forward(self, **inputs):
        self.inputs = inputs
        return SimpleNamespace(logits=self.logits)


class SaysForCausalLM(Says):
    pass


def one_hot(choices, classes=5):
    return nn.functional.one_hot(torch.tensor(choices), classes).float()


# an objective's value


def test_a_function_a_number_and_a_tensor_will_do():
    model = Says(None)
    for answer in (0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(0.25, dtype=torch.bfloat16)):
        value = objective_value(as_objective(lambda *_, answer=answer: answer), model, {})
        assert value.shape == ()
        assert value.dtype == torch.float64
        assert value == 0.25
    assert objective_value(as_objective(lambda *_: 1 / 3), model, {}) == 1 / 3  # no digit is lost
    assert math.isnan(objective_value(as_objective(lambda *_: math.nan), model, {}))
    assert as_objective(None) is None


@pytest.mark.parametrize("answer", ["0.5", None, torch.zeros(2), {"loss": 1.0}])
def test_what_is_no_number_is_refused(answer):
    with pytest.raises(OptionError, match="objective must return"):
        objective_value(as_objective(lambda *_: answer), Says(None), {})


@pytest.mark.parametrize("given", ["exact_match", 3, ClassificationError])
def test_what_cannot_be_asked_is_refused(given):
    with pytest.raises(OptionError, match="objective must be a function"):
        as_objective(given)


def test_flops_of_a_step_follow_the_objectives_price():
    facts = model_facts(tiny_model(2, 32))
    counts = [4, 2]  # the first micro-batch is also looked at once more

    def of_forwards(shapes):
        return sum(n * forward_flops(facts, shape) for n, shape in zip(counts, shapes, strict=False))

    class Dear(Objective):
        def flops(self, facts, shape):
            return 3.0 * shape.rows

    assert objective_flops(Dear(), facts, SHAPES, of_forwards) == pytest.approx(3.0 * (4 * 4 + 2 * 2))
    assert objective_flops(Objective(), facts, SHAPES, of_forwards) == pytest.approx(of_forwards(SHAPES))
    assert objective_flops(Objective(), facts, [], of_forwards) == 0


# classification


def test_error_of_a_language_model_is_over_answer_tokens_shifted_by_one():
    labels = torch.tensor([[-100, 1, 2, 3], [-100, -100, 4, -100]])
    logits = one_hot([[1, 2, 0, 0], [0, 4, 0, 0]])  # right, right, wrong; right
    model = SaysForCausalLM(logits)
    assert ClassificationError()(model, {"input_ids": labels, "labels": labels}) == 0.25
    assert "labels" not in model.inputs  # the loss is not worked out for nothing


def test_error_of_classifiers_and_of_token_classifiers():
    assert ClassificationError()(Says(one_hot([0, 2, 1])), {"labels": torch.tensor([0, 1, 1])}) == pytest.approx(1 / 3)
    tagged = {"labels": torch.tensor([[1, -100], [2, 3]])}
    assert ClassificationError()(Says(one_hot([[1, 0], [2, 2]])), tagged) == pytest.approx(1 / 3)


def test_error_of_real_heads():
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        classifier = LlamaForSequenceClassification(tiny_config(2, 32, num_labels=3)).eval()
        config = BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        chooser = BertForMultipleChoice(config).eval()
        small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        translator = T5ForConditionalGeneration(T5Config(vocab_size=50, **small)).eval()
        ids = torch.randint(6, 40, (4, 3, 7))
    with torch.no_grad():
        for model, inputs in ((classifier, ids[:, 0]), (chooser, ids)):
            chosen = model(input_ids=inputs).logits.argmax(-1)
            right = {"input_ids": inputs, "labels": chosen}
            wrong = {"input_ids": inputs, "labels": (chosen + 1) % 3}
            assert ClassificationError()(model, right) == 0
            assert ClassificationError()(model, wrong) == 1
        labels = ids[:, 1].contiguous()
        chosen = translator(input_ids=ids[:, 0], labels=labels).logits.argmax(-1)
        error = ClassificationError()(translator, {"input_ids": ids[:, 0], "labels": labels})
        assert error == (chosen != labels).double().mean()


@pytest.mark.parametrize("labels", [None, torch.tensor([-100, -100]), torch.tensor([0.5, 1.0])])
def test_batches_without_choices_are_refused(labels):
    inputs = {} if labels is None else {"labels": labels}
    with pytest.raises(DataError):
        ClassificationError()(Says(one_hot([0, 1])), inputs)


# options


def rows(pairs, tokenizer):
    made = []
    for prompt, answer in pairs:
        p, a = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        made.append({"input_ids": p + a, "labels": [-100] * len(p) + a})
    return dict(collator(tokenizer)(made))


@pytest.mark.parametrize("side", ["left", "right"])
def test_options_are_ranked_by_mean_likelihood(tokenizer, side):
    model, options = tiny_model(2, 32), [" yes", " no", " perhaps"]
    prompts = ["Is it?", "Is it really so?", "Why", "What is 2 + 2?"]

    def likelihood(prompt, option):
        ids = tokenizer(prompt)["input_ids"] + tokenizer(option)["input_ids"]
        scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        count = len(tokenizer(option)["input_ids"])
        return sum(scores[at - 1, ids[at]] for at in range(len(ids) - count, len(ids))) / count

    with torch.no_grad():
        best = [max(options, key=lambda option, prompt=prompt: likelihood(prompt, option)) for prompt in prompts]
        padder = tiny_tokenizer()
        padder.padding_side = side
        objective = ClassificationError(options, tokenizer)
        assert objective(model, rows(zip(prompts, best, strict=True), padder)) == 0
        worse = [options[(options.index(option) + 1) % 3] for option in best]
        mixed = [*best[:1], *worse[1:]]
        assert objective(model, rows(zip(prompts, mixed, strict=True), padder)) == 0.75
    facts, shape = model_facts(model), BatchShape(4, 20)
    longest = max(len(tokenizer(option)["input_ids"]) for option in options)
    assert objective.flops(facts, shape) == forward_flops(facts, BatchShape(12, 20 + longest))
    assert ClassificationError().flops(facts, shape) == forward_flops(facts, shape)


def test_an_answer_that_is_no_option_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"'maybe' is none of the options \['yes', 'no'\]"):
        ClassificationError([" yes", " no"], tokenizer)(tiny_model(1, 16), rows([("Is it?", " maybe")], tokenizer))


@pytest.mark.parametrize("options", [[], ["one"], ["a", "a "], ["a", ""], "ab"])
def test_options_must_be_different_texts(tokenizer, options):
    with pytest.raises(OptionError, match="options must be"):
        ClassificationError(options, tokenizer)
    with pytest.raises(OptionError, match="with a tokenizer"):
        ClassificationError(["a", "b"])
