import pytest
import torch

from hf_eff.engines.forward_only import fixed_noise, forward_only
from hf_eff.testing.tiny import tiny_model


def test_modes_and_cache_are_as_found_also_after_an_error():
    model = tiny_model().train()
    model.model.layers[1].eval()
    model.config.use_cache = True
    modes = {name: module.training for name, module in model.named_modules()}
    with forward_only(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).past_key_values is None
    with pytest.raises(ZeroDivisionError), forward_only(model):
        1 / 0  # noqa: B018
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config.use_cache
    assert torch.is_grad_enabled()


def test_a_cache_that_was_off_stays_off():
    model = tiny_model()
    model.config.use_cache = False
    with forward_only(model):
        pass
    assert not model.config.use_cache


def test_noise_repeats_and_the_global_state_is_kept():
    before = torch.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        with fixed_noise(seed, torch.device("cpu")):
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)
