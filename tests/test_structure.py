"""What removal leaves of a model is found, stored and built again."""

from copy import deepcopy

import pytest
import torch
from models import (
    AUTO_CLASSES,
    CONFIGS,
    HIDDEN,
    NEURONS,
    RAGGED,
    WHOLE_SUBLAYERS,
    KeptUnits,
    batch,
    cut_,
    dense_model,
    keep_units,
    mask_of,
    randomised_,
)
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_vdneuron.masks import RelevanceMask, mask_model_
from hf_vdneuron.modeling_vdneuron import PrunedStructure
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.structure import as_pruned_model_, dense_twin, find_structure


TOLERANCE = 1e-5  # fp32, as promised for pruned against masked models

families = pytest.mark.parametrize("family", CONFIGS)
heads = pytest.mark.parametrize("head", AUTO_CLASSES)
decoders = pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
kept_units = pytest.mark.parametrize("kept", [RAGGED, WHOLE_SUBLAYERS], ids=["ragged", "whole_sublayers"])


def ending_others(model: PreTrainedModel, kept: KeptUnits) -> RelevanceMask:
    """End all other units on the in-side, so that there are constants to fold."""
    return mask_of(keep_units(model, kept, side=0))


@families
@kept_units
def test_removal_leaves_what_was_cut_by_hand(family: str, kept: KeptUnits) -> None:
    pruned = dense_model(family)
    prune_model_(pruned, ending_others(pruned, kept))
    expected = find_structure(cut_(dense_model(family), kept))
    assert find_structure(pruned) == PrunedStructure.from_config(pruned.config) == expected


@heads
def test_structure_does_not_depend_on_the_head(head: str) -> None:
    model = dense_model("bert", head)
    structure = find_structure(
        prune_model_(model, ending_others(model, ((range(4), [0]), ([], range(NEURONS)), RAGGED[0])))
    )
    attention = "encoder.layer.{}.attention"
    assert structure.shapes == {
        "encoder.layer.0.intermediate.dense": (1, HIDDEN),
        "encoder.layer.0.output.dense": (HIDDEN, 1),
        **{f"{attention.format(1)}.self.{name}": (0, HIDDEN) for name in ("query", "key", "value")},
        f"{attention.format(1)}.output.dense": (HIDDEN, 0),
        **{f"{attention.format(2)}.self.{name}": (8, HIDDEN) for name in ("query", "key", "value")},
        f"{attention.format(2)}.output.dense": (HIDDEN, 8),
        "encoder.layer.2.intermediate.dense": (3, HIDDEN),
        "encoder.layer.2.output.dense": (HIDDEN, 3),
    }
    assert structure.attributes == {
        f"{attention.format(1)}.self": {"num_attention_heads": 0, "all_head_size": 0},
        f"{attention.format(2)}.self": {"num_attention_heads": 2, "all_head_size": 8},
    }


@families
def test_a_mask_that_keeps_everything_leaves_the_native_model(family: str) -> None:
    dense = dense_model(family)
    native = type(dense)
    pruned = prune_model_(dense, RelevanceMask({}))
    assert type(pruned) is native
    assert find_structure(pruned) == PrunedStructure({}, {})
    assert not hasattr(pruned.config, "vdneuron")


def test_a_pruned_model_is_pruned_further() -> None:
    model = dense_model("distilbert", "sequence_classification")
    prune_model_(model, ending_others(model, RAGGED))
    first = find_structure(model)
    prune_model_(model, ending_others(model, (([1], [0, 1]), ([], []), ([], []))))
    assert PrunedStructure.from_config(model.config) == find_structure(model)
    layer = "transformer.layer.0.attention.q_lin"
    assert (first.shapes[layer], find_structure(model).shapes[layer]) == ((8, HIDDEN), (4, HIDDEN))


def test_a_patched_model_is_no_pruned_model() -> None:
    model = patch_model_(dense_model("bert"))
    with pytest.raises(ValueError, match="Unpatch the model"):
        as_pruned_model_(model)


def test_finding_out_changes_nothing() -> None:
    model = dense_model("roberta")
    prune_model_(model, ending_others(model, RAGGED))
    config, state, rng = deepcopy(model.config.to_dict()), deepcopy(model.state_dict()), torch.get_rng_state()
    find_structure(model)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def masked_and_pruned_decoder(family: str, implementation: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Decoders whose first layer has no head."""
    config = deepcopy(CONFIGS[family])
    config.update({"is_decoder": True, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0})
    dense = randomised_(AutoModelForCausalLM.from_config(config))
    dense.set_attn_implementation(implementation)
    mask = ending_others(dense, (([], []), ([1], [0]), ([0, 2], [2])))
    return mask_model_(deepcopy(dense), mask), prune_model_(dense, mask)


@decoders
@implementations
def test_decoder_without_heads_in_its_first_layer_generates_the_same(family: str, implementation: str) -> None:
    masked, pruned = masked_and_pruned_decoder(family, implementation)
    prompt = batch()["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = masked.generate(prompt, use_cache=False, **options)
    for cache in ({"use_cache": False}, {"cache_implementation": "dynamic"}):
        generated = pruned.generate(prompt, **cache, **options)
        assert torch.equal(generated.sequences, expected.sequences)
        torch.testing.assert_close(generated.logits, expected.logits, atol=TOLERANCE, rtol=0)


@decoders
@implementations
@torch.no_grad()
def test_decoder_without_heads_in_its_first_layer_counts_what_is_cached(family: str, implementation: str) -> None:
    masked, pruned = masked_and_pruned_decoder(family, implementation)
    prompt, cache = batch()["input_ids"], DynamicCache()
    logits = [pruned(part, past_key_values=cache, use_cache=True).logits for part in prompt.split(2, dim=1)]
    expected = masked(prompt, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=TOLERANCE, rtol=0)


@families
def test_a_dense_twin_has_the_sizes_of_what_was_cut(family: str) -> None:
    dense = dense_model(family, "sequence_classification")
    shapes = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    for model in (patch_model_(deepcopy(dense)), as_pruned_model_(cut_(dense))):
        twin = dense_twin(model)
        assert {name: tensor.shape for name, tensor in twin.state_dict().items()} == shapes
    assert dense.config.vdneuron is not None
