from hf_eff.contracts.governor import Governor, ProbeReading, Telemetry
from hf_eff.governor.none import NONE, SPEC, NONEConfig, cost


def test_adds_nothing_to_the_neutral_governor():
    policy = SPEC.build(NONEConfig())
    looks = [Telemetry(step, 5, {"flops": 9.0}, {"flops": 5.0}, 9.0, 5.0) for step in range(1, 6)]
    assert not any(policy.next_probe(look, 0.0) for look in looks)
    assert {policy.observe(look).action for look in looks} == {"continue"}
    assert policy.state_dict() == {}
    # The trainer leaves out telemetry and messages between ranks for a governor that overrides neither.
    assert NONE.next_probe is Governor.next_probe
    assert NONE.observe is Governor.observe


def test_a_rising_loss_does_not_matter():
    reading = ProbeReading(mean=9.0, paired_delta=-5.0, paired_se=0.01, num_examples=8)
    assert NONE(NONEConfig()).observe(Telemetry(1, 5, {}, {}, 1.0, 5.0, probe=reading)).action == "continue"


def test_costs_nothing():
    assert cost(NONEConfig(), None).flops == 0.0
