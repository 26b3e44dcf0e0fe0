"""What changes over a run: phases, rates, the weight of the KL term."""

import math

import pytest

from hf_vdneuron.schedules import (
    HOLD_SHARE,
    PRETRAINING_EVIDENCE,
    Decay,
    Phase,
    PhasePlan,
    default_kl_weight,
    kl_weight_at,
    rate_factor,
    variational_rate_factor,
)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("fractions", [(0.3, 0.5, 0.2), (0, 1, 0), (1, 0, 2), (3, 5, 2)], ids=str)
def test_phases_share_all_steps(fractions: tuple[float, ...], num_steps: int) -> None:
    plan = PhasePlan.from_fractions(
        num_steps, **dict(zip(("finetune", "sparsify", "recover"), fractions, strict=True))
    )
    steps = (plan.finetune_steps, plan.sparsify_steps, plan.recover_steps)
    assert sum(steps) == num_steps
    assert min(steps) >= 0
    assert all(abs(got - num_steps * share / sum(fractions)) <= 1 for got, share in zip(steps, fractions, strict=True))


def test_every_step_has_its_place_in_its_phase() -> None:
    plan = PhasePlan(2, 3, 1)
    places = [(str(plan.phase_at(step)), *plan.position(step)) for step in range(7)]
    assert places == [
        ("finetune", 0, 2),
        ("finetune", 1, 2),
        ("sparsify", 0, 3),
        ("sparsify", 1, 3),
        ("sparsify", 2, 3),
        ("recover", 0, 1),
        ("recover", 1, 1),
    ]
    assert plan.phase_at(plan.recover_start) is Phase.RECOVER


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (Decay.CONSTANT, [0.5, 1, 1, 1, 1, 1, 0]),
        (Decay.LINEAR, [0.5, 1, 1, 0.75, 0.5, 0.25, 0]),
        (Decay.COSINE, [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
    ],
    ids=lambda value: str(value) if isinstance(value, Decay) else "",
)
def test_rates_rise_and_fall_in_every_phase(decay: Decay, expected: list[float]) -> None:
    factors = [rate_factor(step, 6, warmup_steps=2, decay=decay) for step in range(7)]
    assert factors == pytest.approx(expected)


@pytest.mark.parametrize("warmup_steps", [0, 1, 5, 60, 100])
@pytest.mark.parametrize("num_steps", [1, 2, 99, 100])
def test_variational_rates_rise_hold_and_fall_to_zero(num_steps: int, warmup_steps: int) -> None:
    factors = [variational_rate_factor(step, num_steps, warmup_steps=warmup_steps) for step in range(num_steps + 1)]
    for step, factor in enumerate(factors[:-1]):
        rise = min(1, (step + 1) / warmup_steps) if warmup_steps else 1
        assert factor == pytest.approx(rise * min(1, 2 * (1 - step / num_steps)))
        assert 0 < factor <= 1
        if warmup_steps <= step + 1 and step <= HOLD_SHARE * num_steps:
            assert factor == 1
    assert factors[-1] == 0


def test_pressure_per_example_does_not_depend_on_the_data() -> None:
    assert default_kl_weight(PRETRAINING_EVIDENCE) == 1
    assert default_kl_weight(5000) / 5000 == pytest.approx(default_kl_weight(70) / 70)


@pytest.mark.parametrize(
    ("ramp", "start", "expected"),
    [
        pytest.param(0.5, 0.01, [0.02, 0.2, 2, 2, 2], id="rises-then-holds"),
        pytest.param(0.5, 1.0, [2] * 5, id="starts-at-the-end"),
        pytest.param(0.0, 0.01, [2] * 5, id="takes-no-time"),
    ],
)
def test_kl_weight_rises_exponentially(ramp: float, start: float, expected: list[float]) -> None:
    weights = [kl_weight_at(step, 4, kl_weight=2.0, ramp=ramp, start=start) for step in range(5)]
    assert weights == pytest.approx(expected)
