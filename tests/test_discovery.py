"""Discovery against the table, and on types without a row: found, tried out, trained, pruned, saved, loaded."""

import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import arguments, make_trainer, rows
from strange import strange_batch, strange_model
from torch import Tensor, nn
from transformers import ErnieConfig, ErnieForSequenceClassification, PreTrainedModel
from zoo import ROWS, zoo_batch, zoo_model

from hf_vdneuron import VDConfig, discover, find_sublayers, from_pretrained, patch_model_, prune_model_, sparsify
from hf_vdneuron.budget import Costs, unit_counts
from hf_vdneuron.dependence import Dependence, randomised_twin
from hf_vdneuron.discovered import Discovery, remember_, remembered
from hf_vdneuron.discovery import few_rows
from hf_vdneuron.exactness import tensors_in
from hf_vdneuron.masks import RelevanceMask, mask_model_
from hf_vdneuron.probing import probe_sublayers
from hf_vdneuron.structure import dense_twin
from hf_vdneuron.sublayers import Slice, Sublayer, Unit
from hf_vdneuron.trainer import VDTrainer


TOLERANCE = 1e-5
LENGTH = 8

#: What only a row can say -> the rows.
BEYOND_PROBING = {
    "a head alone is no block among others": ("falcon_multi_query",),
    "a norm over all heads hides which queries and keys are whose": ("olmo2", "olmo2_ungrouped"),
    "a table of biases in each layer stays whole, as the list of kept heads chooses from it": ("beit",),
    "values that turn differ between positions": ("roformer_turning",),
    "experts are no layers": tuple(row for row in ROWS if "moe" in row or "mixtral" in row),
}

#: Type without a row -> heads and neurons of its layers, and how many have to stay.
STRANGE = {
    "biogpt": ([4, 4], [24, 24], 0),
    "cohere": ([2, 2], [24, 24], 0),
    "dinov3_vit": ([4, 4], [24, 24], 0),
    "ernie": ([4, 4], [24, 24], 0),
    "esm": ([4, 4], [24, 24], 0),
    "exaone4": ([2, 2], [24, 24], 0),
    "glm": ([2, 2], [24, 24], 0),
    "gptj": ([4, 4], [64, 64], 0),
    "squeezebert": ([4, 4], [24, 24], 1),
    "xlm": ([4, 4], [64, 64], 1),
    # Nothing says which heads are whose, how to count them, or that a table of biases stays.
    "codegen": ([], [64, 64], 0),
    "olmo3": ([], [24, 24], 0),
    "wavlm": ([], [24, 24], 0),
}

strange = pytest.mark.parametrize("model_type", STRANGE)


def ernie() -> PreTrainedModel:
    torch.manual_seed(0)
    config = ErnieConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ErnieForSequenceClassification(config)


def random_mask(sublayers: list[Sublayer], *, seed: int = 0) -> RelevanceMask:
    random = torch.Generator().manual_seed(seed)
    keep = {}
    for part in sublayers:
        keep[part.path] = torch.ones(2, part.num_units, dtype=torch.bool)
        keep[part.path][1] = torch.rand(part.num_units, generator=random) > 0.5
        keep[part.path][1, : max(1, part.minimum)] = True
    return RelevanceMask(keep)


@torch.no_grad()
def outputs(model: PreTrainedModel) -> list[Tensor]:
    return list(tensors_in(model.eval()(**strange_batch(model))))


def features(sublayer: Sublayer, part: Slice) -> tuple[object, ...]:
    owned = part.features(torch.arange(sublayer.num_units)).flatten().tolist()
    return (part.module, part.parameter, part.axis, tuple(owned))


# ---- Against the table ----


@pytest.mark.parametrize("row", sorted(ROWS.keys() - {row for known in BEYOND_PROBING.values() for row in known}))
def test_probing_finds_what_the_table_says(row: str) -> None:
    model = zoo_model(row)
    found = {part.path: part for part in probe_sublayers(Dependence(randomised_twin(model), zoo_batch(model)))}
    for part in find_sublayers(model):
        probed = found[part.out_side.slices[0].module]
        for name in ("unit", "num_units", "attention", "repeats"):
            assert getattr(probed, name) == getattr(part, name), name
        for one, other in zip(probed.sides, part.sides, strict=True):
            assert features(probed, one.slices[0]) == features(part, other.slices[0])
        assert {features(probed, one) for one in probed.slices} == {features(part, one) for one in part.slices}
        assert set(probed.attributes) == set(part.attributes)


@pytest.mark.parametrize("row", ["falcon_multi_query", "beit", "olmo2"])
def test_rows_beyond_probing_need_to_be_there(row: str) -> None:
    model = zoo_model(row)
    found = {part.path: part for part in probe_sublayers(Dependence(randomised_twin(model), zoo_batch(model)))}
    for part in find_sublayers(model):
        probed = found.get(part.out_side.slices[0].module)
        if part.unit is Unit.HEAD and probed is not None:
            assert {features(probed, one) for one in probed.slices} != {features(part, one) for one in part.slices}


# ---- Types without a row ----


@strange
def test_heads_and_neurons_are_found(model_type: str) -> None:
    model = strange_model(model_type)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = discover(model, strange_batch(model))
    heads, neurons, minimum = STRANGE[model_type]
    assert [part.num_units for part in found if part.unit is Unit.HEAD] == heads
    assert [part.num_units for part in found if part.unit is Unit.NEURON] == neurons
    assert [part.minimum for part in found if part.unit is Unit.HEAD] == [minimum] * len(heads)
    assert find_sublayers(model) == found
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@strange
def test_pruned_equals_masked_and_loads_bit_for_bit(model_type: str, tmp_path: Path) -> None:
    model = strange_model(model_type)
    mask = random_mask(discover(model, strange_batch(model)))
    dense = outputs(model)
    masked = outputs(mask_model_(deepcopy(model), mask))
    assert (masked[0] - dense[0]).abs().max() > 0.01
    costs = Costs(model, length=LENGTH)
    pruned = prune_model_(model, mask)
    for one, other in zip(outputs(pruned), masked, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * max(1, other.abs().max().item()))
    assert pruned.num_parameters() == costs.parameters(unit_counts(costs.sublayers, mask))
    pruned.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is type(pruned)
    assert all(torch.equal(one, other) for one, other in zip(outputs(loaded), outputs(pruned), strict=True))


@strange
def test_pruning_twice_equals_pruning_at_once(model_type: str) -> None:
    model = strange_model(model_type)
    found = discover(model, strange_batch(model))
    first, then = (random_mask(found, seed=seed).keep for seed in (1, 2))
    at_once = prune_model_(deepcopy(model), RelevanceMask(first) & RelevanceMask(then))
    rest = {path: keep[:, first[path].all(0)] for path, keep in then.items()}
    prune_model_(prune_model_(model, RelevanceMask(first)), RelevanceMask(rest))
    assert all(torch.equal(one, other) for one, other in zip(outputs(model), outputs(at_once), strict=True))
    assert find_sublayers(dense_twin(model)) == found


def test_notice_says_what_was_found_and_what_was_not(caplog: pytest.LogCaptureFixture) -> None:
    model = strange_model("olmo3")
    with caplog.at_level(logging.WARNING, "hf_vdneuron"):
        discover(model, strange_batch(model))
    (message,) = caplog.messages
    assert "`olmo3` has no row" in message
    assert "0 heads and 48 neurons in `layers.*.mlp.down_proj`" in message
    assert "Left alone, as nothing can be removed exactly: `layers.*.self_attn.o_proj`" in message


# ---- Automatically ----


def test_trainer_discovers_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, ernie(), target_speedup=2.0, trainer_options={"max_length": LENGTH})
    assert "`ernie` has no row" in caplog.text
    trainer.train()
    pruned = trainer.prune()
    dense = Costs(dense_twin(pruned), length=LENGTH)
    assert dense.macs({}) / Costs(pruned, length=LENGTH).macs({}) >= 2
    trainer.save_model(str(tmp_path / "small"))
    loaded = from_pretrained(tmp_path / "small")
    batch = {"input_ids": torch.stack([row["input_ids"] for row in rows()])}
    assert torch.equal(loaded(**batch).logits, pruned.eval()(**batch).logits)


def test_one_shot_discovers_by_itself() -> None:
    dense = ernie()
    batches = [{name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}]
    small = sparsify(dense, batches, target_speedup=2.0, max_length=LENGTH)
    whole, left = (Costs(model, length=LENGTH).macs({}) for model in (dense_twin(small), small))
    assert whole / left >= 2
    assert remembered(dense) is None


def test_units_of_a_head_stay_as_its_sizes_are_not_saved(tmp_path: Path) -> None:
    """What the pooler makes and the classifier reads could go, and then nothing would load."""
    model = ernie().eval()
    batch = {"input_ids": torch.stack([row["input_ids"] for row in rows()[:2]])}
    mask = random_mask(discover(model, batch))
    assert all(path.startswith("ernie.encoder.") for path in mask.keep)
    prune_model_(model, mask).save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)


def test_what_surrounds_a_discovery_changes_nothing() -> None:
    model = strange_model("ernie")
    expected = discover(model, strange_batch(model))
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    torch.manual_seed(3)
    with torch.no_grad():
        assert discover(model, strange_batch(model)) == expected
    with torch.inference_mode():
        assert discover(model, strange_batch(model)) == expected
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


def test_a_model_that_draws_noise_in_evaluation_is_looked_into() -> None:
    model = strange_model("vit_mae")
    inputs = strange_batch(model)
    before = torch.get_rng_state()
    assert len(discover(model, inputs)) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_the_trainer_evaluates_on_its_own_rows(tmp_path: Path) -> None:
    options = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}
    trainer = make_trainer(tmp_path, ernie(), trainer_options={"eval_dataset": rows()[:3]}, **options)
    assert len(trainer.get_eval_dataloader().dataset) == 3


def test_few_rows_are_those_of_the_first_examples() -> None:
    batch = {
        "input_ids": torch.ones(4, 3),
        "labels": [1, 2, 3, 4],
        "scale": torch.tensor(2.0),
        "positions": torch.ones(3),
    }
    few = few_rows(batch)
    assert [few["input_ids"].shape, few["labels"], few["scale"].ndim] == [(2, 3), [1, 2], 0]
    assert few["positions"].shape == (3,)


# ---- Refused ----


def test_without_data_a_model_without_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`ernie` is not supported.+hf_vdneuron\.discover\(model, inputs\)"):
        VDTrainer(ernie(), arguments(tmp_path))
    with pytest.raises(ValueError, match="`ernie` is not supported"):
        patch_model_(ernie())


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("bitnet", "Found no heads or neurons to remove"), ("rwkv", "cannot be looked into, as it has no gradients")],
)
def test_nothing_to_remove_is_said(model_type: str, message: str) -> None:
    model = strange_model(model_type)
    with pytest.raises(ValueError, match=message):
        discover(model, strange_batch(model))
    assert remembered(model) is None


def test_a_type_with_a_row_needs_no_discovery() -> None:
    with pytest.raises(ValueError, match="Model type `bert` has a row in the table"):
        discover(zoo_model("bert"), zoo_batch(zoo_model("bert")))


def test_inputs_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"cannot run on these inputs.+such as `input_ids`"):
        discover(strange_model("ernie"), {"pixels": torch.ones(2, 3)})


def test_patched_or_foreign_models_are_refused() -> None:
    model = strange_model("ernie")
    discover(model, strange_batch(model))
    with pytest.raises(ValueError, match="patched already"):
        discover(patch_model_(model, VDConfig()), strange_batch(model))
    with pytest.raises(TypeError, match="expected a transformers model"):
        discover(nn.Linear(2, 2), {})


def test_a_removal_that_is_not_exact_is_refused_before_anything_is_cut() -> None:
    """As where what was found is that of another model: here each block makes the neurons that the other one reads."""
    model = strange_model("ernie")
    found = discover(model, strange_batch(model))
    blocks = [part for part in found if part.unit is Unit.NEURON]
    wrong = [
        replace(part, sides=(other.sides[0], part.sides[1])) for part, other in zip(blocks, blocks[::-1], strict=True)
    ]
    remember_(model, Discovery(tuple(wrong), strange_batch(model)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="nothing was cut"):
        prune_model_(model, random_mask(find_sublayers(model)))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
