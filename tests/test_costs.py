"""What heads and neurons cost is what torch counts while a model runs, to the last product."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from models import randomised_
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, PreTrainedModel
from zoo import ROWS, TEXT, masks, zoo_batch, zoo_model

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import Costs, unit_counts
from hf_vdneuron.pruning import prune_model_


Inputs = dict[str, Any]

TOKENS: Inputs = {"input_ids": torch.arange(4, 16)[None]}
RELATIVE = {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 32}
MAP: Inputs = {"pixel_values": torch.ones(1, 3, 20, 20)}
SWIN = {"image_size": 20, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]}
SEGFORMER = {"hidden_sizes": [16] * 4, "depths": [1, 1, 1, 2], "num_attention_heads": [2] * 4}

#: Whose costs do not follow from weights alone, and in other ways than in the zoo: type, config, one example, and how
#: many tokens, or positions of a map, that has.
UNUSUAL: dict[str, tuple[str, dict[str, Any], Inputs, int]] = {
    "deberta_beyond_its_span": ("deberta", {**RELATIVE, "max_relative_positions": 5}, TOKENS, 12),
    "deberta_of_queries": ("deberta", {**RELATIVE, "pos_att_type": ["c2p"]}, TOKENS, 12),
    "deberta_v2_of_keys": ("deberta-v2", {**RELATIVE, "pos_att_type": "p2c"}, TOKENS, 12),
    "deberta_v3": ("deberta-v2", {**RELATIVE, "position_buckets": 4, "share_att_key": True}, TOKENS, 12),
    "deberta_v3_in_one_way": ("deberta-v2", {**RELATIVE, "share_att_key": True, "pos_att_type": ["c2p"]}, TOKENS, 12),
    "deberta_without_positions": ("deberta-v2", {**RELATIVE, "relative_attention": False}, TOKENS, 12),
    "segformer_of_four_stages": ("segformer", SEGFORMER, {"pixel_values": torch.ones(1, 3, 64, 64)}, 16 * 16),
    "swin_padded": ("swin", {**SWIN, "window_size": 4}, MAP, 10 * 10),
    "swin_within_one_window": ("swin", {**SWIN, "window_size": 5}, MAP, 10 * 10),
}


def alone(model: PreTrainedModel) -> Inputs:
    """One sequence, image or sound without padding."""
    if model.config.model_type in {"convnext", "resnet"}:  # whose maps in the zoo get too small to be halved
        return {"pixel_values": torch.ones(1, 3, 64, 64)}
    inputs = {name: value[:1] for name, value in zoo_batch(model).items() if isinstance(value, Tensor)}
    inputs.pop("attention_mask", None)
    return inputs


def multiply_accumulates(model: PreTrainedModel, inputs: Inputs) -> float:
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops() / 2


def first_positions(model: PreTrainedModel, inputs: Inputs) -> int:
    """Tokens, or the positions of a map at which the first block is read."""
    text = inputs.get("input_ids", inputs["labels"] if "input_features" in inputs else None)
    if text is not None:
        return text.shape[1]
    seen: list[Tensor] = []
    reader = model.get_submodule(find_sublayers(model)[0].out_side.slices[0].module)
    hook = reader.register_forward_hook(lambda *called: seen.append(called[-1]))
    model(**inputs)
    hook.remove()
    channels = 1 if model.config.model_type == "resnet" else -1
    return seen[0].numel() // seen[0].shape[channels]


def require_counted(model: PreTrainedModel, inputs: Inputs, length: int) -> None:
    model.eval().set_experts_implementation("eager")  # torch does not count grouped products
    costs = Costs(model, length=length)
    counted = multiply_accumulates(model, inputs)
    for name, mask in masks(model).items():
        if model.config.model_type == "segformer" and name != "ragged":
            continue  # the convolution that makes its keys fewer goes with the last head
        saved = costs.macs({}) - costs.macs(unit_counts(costs.sublayers, mask))
        left = multiply_accumulates(prune_model_(deepcopy(model), mask), inputs)
        assert saved == counted - left > 0, name


@pytest.mark.parametrize("row", ROWS)
def test_row_costs_what_torch_counts(row: str) -> None:
    model = zoo_model(row)
    inputs = alone(model)
    require_counted(model, inputs, first_positions(model, inputs))


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_model_costs_what_torch_counts(name: str) -> None:
    model_type, settings, inputs, length = UNUSUAL[name]
    config = AutoConfig.for_model(model_type, **settings)
    model = randomised_(AutoModel.from_config(config, attn_implementation="eager"))
    require_counted(model, inputs, length)
