import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_eff import ClassificationError, GenerationObjective
from hf_eff.contracts.memory import BatchShape
from hf_eff.engines.facts import model_facts
from hf_eff.engines.gain_probe import GainProbe
from hf_eff.engines.held_out import (
    HeldOutFunction,
    HeldOutLoss,
    HeldOutMetric,
    HeldOutNumber,
    HeldOutObjective,
    HeldOutReward,
    held_out_of,
    jackknife_values,
)
from hf_eff.errors import CheckpointError, OptionError
from hf_eff.numerics.flops import generation_flops
from hf_eff.testing.tiny import collator, tiny_model, tiny_target, tiny_tokenizer, tokenised


@pytest.fixture(scope="module")
def rows():
    return tokenised(tiny_target(12)).remove_columns(["source"])


def make_probe(rows, quantity, **options):
    return GainProbe(rows, collator(), is_causal_lm=True, quantity=quantity, num_examples=12, **options)


def moved(model, seed=0, size=0.02):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def sentence_means(model, batch):
    """Mean of the logits of each row's labelled tokens: any number a row that the weights decide."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labelled = (batch["labels"] != -100).float()
    return (logits.mean(dim=-1) * labelled).sum(dim=1) / labelled.sum(dim=1)


def test_the_loss_given_by_name_is_the_loss(rows):
    model = tiny_model()
    plain, named = make_probe(rows, None), make_probe(rows, held_out_of("loss", is_causal_lm=True))
    first = plain.read(model), named.read(model)
    moved(model)
    assert first[0] == first[1]
    assert plain.read(model) == named.read(model)
    assert plain.state_dict() == named.state_dict()


@pytest.mark.parametrize("maximise", [False, True])
def test_a_function_is_paired_example_by_example(rows, maximise):
    model, sign = tiny_model(), -1.0 if maximise else 1.0
    probe = make_probe(rows, held_out_of(sentence_means, is_causal_lm=True, maximise=maximise), batch_tokens=90)

    def alone():
        with torch.no_grad():
            return np.array([float(sentence_means(model, collator()([rows[i]]))) for i in range(12)])

    before, first = alone(), probe.read(model)
    moved(model)
    now, second = alone(), probe.read(model)
    difference = sign * (before - now)
    assert first.mean == pytest.approx(sign * before.mean(), rel=1e-4)
    assert second.paired_delta == pytest.approx(difference.mean(), rel=1e-3)
    assert second.paired_se == pytest.approx(difference.std(ddof=1) / math.sqrt(12), rel=1e-3)


def test_one_number_a_batch_is_asked_row_by_row(rows):
    model = tiny_model()
    together = make_probe(rows, HeldOutFunction(lambda model, batch: sentence_means(model, batch).mean()))
    apart = make_probe(rows, HeldOutFunction(sentence_means))
    first = together.read(model), apart.read(model)
    moved(model)
    second = together.read(model), apart.read(model)
    assert first[0].mean == pytest.approx(first[1].mean, rel=1e-4)
    assert second[0].paired_se == pytest.approx(second[1].paired_se, rel=1e-3)


@pytest.mark.parametrize("answer", [[1.0, 2.0], "many", None])
def test_what_is_no_value_a_row_is_refused(rows, answer):
    with pytest.raises(OptionError, match=r"gave 2 values for \d+ rows|must give numbers"):
        make_probe(rows, HeldOutFunction(lambda model, batch: answer)).read(tiny_model())


def test_an_objective_of_a_zeroth_order_run_is_read_row_by_row(rows):
    model, objective = tiny_model(), ClassificationError()
    quantity = held_out_of(objective, is_causal_lm=True)
    assert isinstance(quantity, HeldOutObjective)
    with torch.no_grad():
        expected = np.mean([float(objective(model, collator()([rows[i]]))) for i in range(12)])
    assert make_probe(rows, quantity).read(model).mean == pytest.approx(expected)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=32))
def test_pseudo_values_of_a_mean_are_the_values(values):
    assert jackknife_values(values, lambda part: sum(part) / len(part)) == pytest.approx(values, abs=1e-6)


@given(st.lists(st.floats(1, 100), min_size=2, max_size=80))
def test_the_mean_of_pseudo_values_is_the_metric(values):
    def geometric(part):
        return math.exp(sum(map(math.log, part)) / len(part))

    found = jackknife_values(values, geometric)
    assert found.mean() == pytest.approx(geometric(values), rel=1e-9)
    assert len(found) == min(len(values), 32)
    if len(values) <= 32:
        without = [geometric(values[:i] + values[i + 1 :]) for i in range(len(values))]
        n, centre = len(values), sum(without) / len(values)
        variance = (n - 1) / n * sum((each - centre) ** 2 for each in without)
        assert found.var(ddof=1) / n == pytest.approx(variance, rel=1e-6, abs=1e-9)


class Script:
    """A model whose generated answers a test writes."""

    def __init__(self, model, answers, tokenizer):
        self.model, self.answers, self.tokenizer = model, answers, tokenizer
        self.asked = []
        model.generate = self.generate

    def generate(self, input_ids, attention_mask, **_):
        prompts = [self.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        self.asked += prompts
        texts = [self.tokenizer(self.answers[prompt])["input_ids"] + [2] for prompt in prompts]
        longest = max(map(len, texts))
        return torch.cat([input_ids, torch.tensor([text + [0] * (longest - len(text)) for text in texts])], dim=1)


def corpus_f1(predictions, references):
    """Micro-averaged over characters: no mean of rows."""
    common = sum(len(set(p) & set(r)) for p, r in zip(predictions, references, strict=True))
    return 2 * common / sum(len(set(p)) + len(set(r)) for p, r in zip(predictions, references, strict=True))


def test_a_metric_of_all_texts_has_the_noise_of_the_jackknife(rows):
    tokenizer, model = tiny_tokenizer(), tiny_model()
    target = tiny_target(12)
    gold = {row["prompt"]: row["completion"].strip() for row in target}
    answers = dict.fromkeys(gold, "9")
    script = Script(model, answers, tokenizer)
    probe = make_probe(rows, HeldOutMetric(corpus_f1, tokenizer, max_new_tokens=6, maximise=True))
    order = [row["prompt"] for row in target]

    def metric(leave_out=None):
        kept = [prompt for i, prompt in enumerate(order) if i != leave_out]
        return corpus_f1([answers[prompt] for prompt in kept], [gold[prompt] for prompt in kept])

    def pseudo():
        return np.array([12 * metric() - 11 * metric(i) for i in range(12)])

    first, before = probe.read(model), pseudo()
    assert set(script.asked) == set(order)
    assert first.mean == pytest.approx(-metric())
    for prompt in order[:7]:
        answers[prompt] = gold[prompt]
    second, now = probe.read(model), pseudo()
    assert second.mean == pytest.approx(-metric())
    assert second.paired_delta == pytest.approx(first.mean - second.mean)
    assert second.paired_delta > 0 > second.mean  # a larger metric is a smaller value
    assert second.paired_se == pytest.approx((now - before).std(ddof=1) / math.sqrt(12))
    assert second.num_examples == 12


def test_metrics_by_name_know_their_direction():
    tokenizer = tiny_tokenizer()
    assert held_out_of("f1", is_causal_lm=True, tokenizer=tokenizer).facts() == {
        "name": "f1",
        "better": "larger",
        "noise": "jackknife",
    }

    class Wer:
        name = "wer"

        def compute(self, predictions, references):
            return {"wer": 0.0}

    assert not HeldOutMetric(Wer(), tokenizer).maximise
    assert HeldOutMetric(Wer(), tokenizer, maximise=True).maximise
    quantity = held_out_of(GenerationObjective(tokenizer, "f1", 4), is_causal_lm=True)
    facts, shape = model_facts(tiny_model()), BatchShape(2, 5)
    assert quantity.flops(facts, shape) == generation_flops(facts, shape, 4)
    assert quantity.maximise


def rewards_of(prompts, completions, completion_ids, source, **_):
    return [None if "7" in prompt else float(len(text)) for prompt, text in zip(prompts, completions, strict=True)]


def test_a_reward_is_larger_for_longer_answers_and_none_takes_no_part():
    tokenizer, model, target = tiny_tokenizer(), tiny_model(), tiny_target(6)
    answers = {row["prompt"]: "a" * (i + 1) for i, row in enumerate(target)}
    Script(model, answers, tokenizer)
    quantity = HeldOutReward(rewards_of, tokenizer, max_new_tokens=9, weights=[2.0])
    probe = GainProbe(target.remove_columns("completion"), list, is_causal_lm=True, quantity=quantity)
    first = probe.read(model)
    kept = [prompt for prompt in answers if "7" not in prompt]
    assert 0 < len(kept) < 6
    assert first.num_examples == len(kept)
    assert first.mean == pytest.approx(-2.0 * np.mean([len(answers[prompt]) for prompt in kept]))
    for prompt in answers:
        answers[prompt] += "bb"
    second = probe.read(model)
    assert second.paired_delta == pytest.approx(4.0)
    assert second.paired_se == pytest.approx(0.0, abs=1e-12)


def test_conversations_are_rewarded_as_messages():
    tokenizer, model, seen = tiny_tokenizer(), tiny_model(), {}

    def reward(**given):
        seen.update(given)
        return [1.0] * len(given["prompts"])

    rows = [{"prompt": [{"role": "user", "content": "Hi"}], "key": 3}]
    quantity = HeldOutReward(reward, tokenizer, max_new_tokens=2)
    reading = GainProbe(rows, list, is_causal_lm=True, quantity=quantity).read(model)
    assert reading.mean == -1.0
    assert seen["completions"][0][0]["role"] == "assistant"
    assert seen["key"] == [3]
    assert len(seen["completion_ids"][0]) <= 2


async def later(**_):
    return []


@pytest.mark.parametrize("reward", [later, torch.nn.Linear(1, 1), "accuracy"])
def test_rewards_that_cannot_be_called_like_functions_are_refused(reward):
    with pytest.raises(OptionError, match="plain functions"):
        HeldOutReward(reward, tiny_tokenizer())


def test_a_number_of_the_whole_model_leaves_the_noise_to_the_fit():
    numbers, model = iter([0.25, 0.5]), tiny_model()
    quantity = HeldOutNumber(lambda model: next(numbers), name="accuracy", maximise=True, reading_flops=7.0)
    facts = model_facts(model)
    probe = GainProbe(
        [{}],
        list,
        is_causal_lm=True,
        quantity=quantity,
        forward_flops=lambda rows, length: quantity.flops(facts, BatchShape(rows, length)),
    )
    assert probe.cost_flops == 7.0
    assert probe.read(model).mean == -0.25
    reading = probe.read(model)
    assert (reading.mean, reading.paired_delta, reading.paired_se) == (-0.5, 0.25, None)
    assert quantity.facts()["noise"] == "fit"


def test_a_state_of_another_quantity_is_refused(rows):
    saved = json.loads(json.dumps(make_probe(rows, HeldOutFunction(sentence_means)).state_dict()))
    with pytest.raises(CheckpointError, match="'sentence_means' and this run reads 'loss'"):
        make_probe(rows, None).load_state_dict(saved)
    del saved["quantity"]  # as written before there were others
    make_probe(rows, HeldOutLoss(is_causal_lm=True)).load_state_dict(saved)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("f1", {}, "needs a tokenizer"),
        (3, {}, "must be a function"),
        ("loss", {"maximise": True}, "made smaller"),
        (HeldOutLoss(is_causal_lm=True), {"maximise": True}, "contradicts"),
    ],
)
def test_what_is_no_quantity_is_refused(given, options, message):
    with pytest.raises(OptionError, match=message):
        held_out_of(given, is_causal_lm=True, **options)
