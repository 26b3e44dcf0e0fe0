"""A pruned twin gives the masked model's loss and gradients, and a run through it ends where one without does."""

import logging
from contextlib import nullcontext
from copy import deepcopy
from gc import collect
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from models import CHAINS, mask_of, mixed_keep, outputs
from runs import CHECKPOINTING, PRUNING, make_trainer, rows, tiny_bert
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo import ROWS, masks, zoo_batch, zoo_model

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.config import Grouping, VDConfig
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.masks import RelevanceMask, mask_model_, read_mask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.pruned_twin import PrunedTwin
from hf_vdneuron.recovering_trainer import RecoveringTrainer
from hf_vdneuron.sublayers import Role
from hf_vdneuron.trainer import VDTrainer


#: In float64; but attention that is computed in float32 sums to one no better than that.
EXACT, SUMS_TO_ONE = 1e-10, 1e-7

#: A posterior in closed form after a quarter of the run, and a trained one after two thirds.
CLOSED = {"sparsify_fraction": 0.0, "finetune_fraction": 0.25, "recover_fraction": 0.75, "target_speedup": 1.6}
RUNS = {
    "closed_form": CLOSED,
    "trained_posterior": PRUNING,
    "accumulated": {**CLOSED, "gradient_accumulation_steps": 3},
    "recomputed": {**CLOSED, CHECKPOINTING: True},
    "distilled": {**CLOSED, "distillation_weight": 0.5, "hidden_distillation_weight": 0.5},
    "tolerated": {
        "sparsify_fraction": 0.0,
        "finetune_fraction": 0.25,
        "recover_fraction": 0.75,
        "max_loss_increase": 0.05,
        "num_sizes": 3,
    },
}


def has_twin(model: nn.Module) -> bool:
    """Whether whatever is removed from a model are features of ordinary layers and experts."""
    return all(part.role is not Role.NORM for sublayer in find_sublayers(model) for part in sublayer.slices)


def masked_model(row: str, name: str) -> PreTrainedModel:
    """A patched model in float64 whose groups have scales of their own, under a mask."""
    dense = zoo_model(row).double()
    if any(sublayer.num_experts > 1 for sublayer in find_sublayers(dense)):
        dense.set_experts_implementation("eager")  # as no other one computes in float64
    model = mask_model_(patch_model_(deepcopy(dense)), masks(dense)[name]).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in variational_layers(model).values():
            layer.group_scale.add_(torch.rand(layer.group_scale.shape, generator=generator) - 0.5)
    return model


def double_batch(model: PreTrainedModel) -> dict[str, Any]:
    inputs = zoo_batch(model).items()
    return {name: one.double() if isinstance(one, Tensor) and one.is_floating_point() else one for name, one in inputs}


def take_gradients_(model: nn.Module) -> dict[str, Tensor]:
    """Take the gradients off a model; one that is zero, as some layers keep for what stands still, counts as none."""
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None and one.grad.any()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ["ragged", "first_empty", "all_empty"])
@pytest.mark.parametrize("row", [row for row in ROWS if has_twin(zoo_model(row))])
def test_loss_and_gradients_are_those_of_the_masked_model(row: str, name: str) -> None:
    model = masked_model(row, name)
    inputs = double_batch(model)
    before = model(**inputs).loss.detach()
    twin = PrunedTwin.of_(model)
    assert twin is not None
    assert sum(one.numel() for one in twin.model.parameters()) < sum(one.numel() for one in model.parameters())
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, before, rtol=0, atol=SUMS_TO_ONE)
    loss.backward()
    expected = take_gradients_(model)
    for _ in range(2):  # as nothing is left of a step in the next
        twin.take_over_()
        own = twin.model(**inputs).loss
        torch.testing.assert_close(own, loss, rtol=0, atol=EXACT)
        own.backward()
        twin.hand_back_()
        torch.testing.assert_close(take_gradients_(model), expected, rtol=0, atol=SUMS_TO_ONE)


@pytest.mark.parametrize("row", [row for row in ROWS if not has_twin(zoo_model(row))])
def test_a_model_that_loses_more_than_features_is_left_alone(row: str) -> None:
    dense = zoo_model(row)
    model = mask_model_(patch_model_(deepcopy(dense)), masks(dense)["ragged"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert PrunedTwin.of_(model) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_there_is_no_twin_of_a_model_that_nothing_ends() -> None:
    assert PrunedTwin.of_(patch_model_(tiny_bert())) is None
    assert PrunedTwin.of_(tiny_bert()) is None


def test_units_emit_nothing_any_more_and_stay_ended() -> None:
    model = masked_model("bert", "ragged")
    before = read_mask(model).keep
    assert any((keep[0] != keep[1]).any() for keep in before.values())
    PrunedTwin.of_(model)
    assert all(torch.equal(keep, before[path].all(0).expand_as(keep)) for path, keep in read_mask(model).keep.items())


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_says_what_it_said(name: str) -> None:
    """Its layers in the middle read some units and make others."""
    chain = CHAINS[name]
    model = mask_model_(patch_model_(chain.model()), mask_of(mixed_keep(chain.places, chain.unfoldable))).eval()
    before = outputs(model, chain.inputs())
    twin = PrunedTwin.of_(model)
    if twin is None:  # it has a norm
        assert any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules())
        return
    torch.testing.assert_close(outputs(model, chain.inputs()), before, rtol=0, atol=EXACT)
    twin.take_over_()
    torch.testing.assert_close(outputs(twin.model, chain.inputs()), before, rtol=0, atol=EXACT)


def test_what_forgets_its_mask_has_no_twin() -> None:
    """With a prior over rows alone nothing keeps training from moving the columns of what has ended."""
    dense = tiny_bert()
    model = patch_model_(deepcopy(dense), VDConfig(grouping=Grouping.ROWS))
    assert PrunedTwin.of_(mask_model_(model, masks(dense)["ragged"])) is None


def test_parameters_of_two_names_are_left_alone() -> None:
    dense = tiny_bert()
    first, second = dense.bert.encoder.layer
    second.attention.self.query.weight = first.attention.self.query.weight
    mask = RelevanceMask({path: keep for path, keep in masks(dense)["ragged"].keep.items() if "layer.0" in path})
    assert PrunedTwin.of_(mask_model_(patch_model_(dense), mask)) is None


def test_what_is_thawed_has_gradients() -> None:
    model = masked_model("bert", "ragged")
    twin = PrunedTwin.of_(model.requires_grad_(False))
    assert twin is not None
    for is_trained in (True, False):
        model.requires_grad_(is_trained)
        twin.take_over_()
        cut = [parameter for name, parameter in twin.model.named_parameters() if "dense.weight" in name]
        assert {parameter.requires_grad for parameter in cut} == {is_trained}


def test_the_twin_follows_the_masked_model() -> None:
    model = masked_model("bert", "ragged")
    twin = PrunedTwin.of_(model)
    assert twin is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    inputs = double_batch(model)
    twin.take_over_()
    torch.testing.assert_close(twin.model(**inputs).logits, model(**inputs).logits, rtol=0, atol=EXACT)


def test_a_model_that_cannot_be_pruned_is_trained_under_its_masks(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_bert()
    model.bert.adapter = nn.Linear(2, 2)
    mask_model_(patch_model_(model), masks(model)["ragged"])
    with caplog.at_level(logging.WARNING):
        assert PrunedTwin.of_(model) is None
    assert "adapter" in caplog.text


def run(folder: Path, **options: Any) -> VDTrainer:
    trainer = make_trainer(folder, tiny_bert().double(), trainer_options={"eval_dataset": rows()}, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_where_it_does_without_the_twin(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path / "found", **RUNS[name])
    prepare, twins = RecoveringTrainer._prepare_twin, []

    def leave_alone(*step: Any) -> tuple[object, None, None]:
        """Make a twin all the same, as units stop to emit constants with it."""
        twins.append(prepare(*step).twin)
        return None, None, None

    monkeypatch.setattr(RecoveringTrainer, "_prepare_twin", leave_alone)
    expected = run(tmp_path / "expected", **RUNS[name])
    assert None not in twins[-3:]
    torch.testing.assert_close(found.prune().state_dict(), expected.prune().state_dict(), rtol=0, atol=SUMS_TO_ONE)


class Watch:
    """Width and dtype of what the neurons of a layer say in every forward pass of a training step, of copies too."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, torch.dtype]] = []

    def __call__(self, module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        if module.training and torch.is_grad_enabled():
            self.seen.append((output.shape[-1], output.dtype))

    def __deepcopy__(self, _: dict[int, object]) -> "Watch":
        return self


@pytest.mark.parametrize(
    ("options", "dtype"), [({}, torch.float32), ({"bf16": True}, torch.bfloat16)], ids=["single", "mixed"]
)
def test_only_steps_of_recovery_are_small(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model, watch = tiny_bert(), Watch()
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(watch)
    trainer = make_trainer(tmp_path, model, **CLOSED | {"target_speedup": 10.0}, **options)
    trainer.train()
    left = int(read_mask(trainer.model).keep["bert.encoder.layer.0.feed_forward"].all(0).sum())
    assert left < 24
    # What weighs units, and what is fitted behind a cut, computes no gradients of the model in training.
    assert watch.seen == [(24, dtype)] * 3 + [(left, dtype)] * 9


def test_a_run_can_do_without(tmp_path: Path) -> None:
    model, watch = tiny_bert(), Watch()
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(watch)
    make_trainer(tmp_path, model, **CLOSED | {"target_speedup": 10.0}, recover_pruned=False).train()
    assert watch.seen == [(24, torch.float32)] * 12


@pytest.mark.parametrize("fails", [False, True], ids=["in_the_end", "after_an_error"])
def test_a_run_lets_go_of_its_twin(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[ReferenceType[PrunedTwin]] = []
    hand_back = PrunedTwin.hand_back_

    def watched(twin: PrunedTwin) -> None:
        alive.append(ref(twin))
        hand_back(twin)
        if fails:
            raise RuntimeError("interrupted")

    monkeypatch.setattr(PrunedTwin, "hand_back_", watched)
    trainer = make_trainer(tmp_path, **CLOSED)
    with pytest.raises(RuntimeError, match="interrupted") if fails else nullcontext():
        trainer.train()
    collect()
    assert alive
    assert alive[0]() is None
