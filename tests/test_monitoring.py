"""What a run logs."""

import torch
from runs import tiny_bert

from hf_vdneuron.masks import RelevanceMask, read_mask
from hf_vdneuron.monitoring import RunningMeans, structure_logs
from hf_vdneuron.patching import patch_model_


def test_means_are_those_since_they_were_last_taken() -> None:
    means = RunningMeans()
    for value in (1.0, 2.0, 6.0):
        means.add("nll", torch.tensor(value))
    means.add("kl", torch.tensor(5.0))
    assert means.take() == {"nll": 3.0, "kl": 5.0}
    assert means.take() == {}
    means.add("nll", torch.tensor(4.0))
    assert means.take() == {"nll": 4.0}


def test_means_hold_one_number_each_however_long_nobody_asks() -> None:
    means, parameter = RunningMeans(), torch.ones((), requires_grad=True)
    for _ in range(100):
        means.add("nll", 2 * parameter)
    (total,) = means._sums.values()
    assert total.shape == ()
    assert not total.requires_grad
    assert means.take() == {"nll": 2.0}


def test_half_precision_is_summed_in_float32() -> None:
    means = RunningMeans()
    for _ in range(1000):
        means.add("nll", torch.tensor(1.0, dtype=torch.bfloat16))
    assert means.take() == {"nll": 1.0}


def test_a_new_run_starts_at_zero() -> None:
    means = RunningMeans()
    means.add("nll", torch.tensor(1.0))
    means.clear()
    assert means.take() == {}


def test_structure_is_that_of_the_mask() -> None:
    model = patch_model_(tiny_bert())
    keep = {path: sides.clone() for path, sides in read_mask(model).keep.items()}
    before = structure_logs(model, RelevanceMask(keep), length=8)
    assert (before["heads"], before["neurons"], before["expected_speedup"]) == (8, 48, 1.0)
    for path, sides in keep.items():
        sides[-1, : 3 if path.endswith("attention") else 10] = False
    after = structure_logs(model, RelevanceMask(keep), length=8)
    assert (after["heads"], after["neurons"]) == (2, 28)
    assert after["expected_speedup"] > 1
