"""Every row that can write writes the same with units cut out as with them masked, whatever it keeps in its cache."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from zoo import GENERATING, INSTALLED, ROWS, assert_alike, attentions, masks, zoo_batch, zoo_model

from hf_vdneuron.masks import mask_model_
from hf_vdneuron.pruning import prune_model_


NEW_TOKENS = 6

#: Ways to generate. What is static would be compiled by itself on an accelerator, and says the same without.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without_cache": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "static_beams": {"num_beams": 2, "cache_implementation": "static", "disable_compile": True},
    "sampled": {"do_sample": True},
    "prompt_lookup": {"prompt_lookup_num_tokens": 2},
    "assisted": {"assistant_model": None},  # the dense model: whoever drafts, the tokens are those of the other one
}
#: Rows whose dense model could not go back behind a draft in a sliding window, and since when it can.
SLIDING, SLIDES_BACK = ("gemma2", "gemma3_text", "mistral", "starcoder2"), Version("5.23")
#: Ways that take one prompt at a time: the cache is cut back where the draft was wrong.
DRAFTING = ("prompt_lookup_num_tokens", "assistant_model")


def write(model: PreTrainedModel, **options: Any) -> ModelOutput:
    """Continue two prompts, one of them padded on the left."""
    inputs = zoo_batch(model)
    del inputs["labels"]
    if "attention_mask" in inputs and not model.config.is_encoder_decoder:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    if not options.keys().isdisjoint(DRAFTING):
        inputs = {name: value[:1] for name, value in inputs.items()}
    torch.manual_seed(0)
    return model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        eos_token_id=1,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


@pytest.mark.parametrize(
    ("row", "way"),
    [
        pytest.param(row, way, id=f"{row}-{way}")
        for row in GENERATING
        for way in WAYS
        if (ROWS[row].static or not way.startswith("static"))
        and (way != "assisted" or row not in SLIDING or INSTALLED >= SLIDES_BACK)
    ],
)
def test_pruned_writes_what_masked_does(row: str, way: str) -> None:
    dense = zoo_model(row, "sdpa" if "sdpa" in attentions(row) else "eager")
    options = WAYS[way] | ({"assistant_model": dense} if way == "assisted" else {})
    for name in ("first_empty", "last_empty", "all_empty"):
        mask = masks(dense)[name]
        masked = mask_model_(deepcopy(dense), mask)
        expected = write(masked, **options)
        found = write(prune_model_(masked, mask), **options)
        assert torch.equal(found.sequences, expected.sequences), name
        assert_alike(torch.stack(found.logits), torch.stack(expected.logits), name)
