"""Pruned models that need no structure: which rows of the table have them, that they are exact and load plainly."""

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from strangers import WITHOUT_THE_PACKAGE
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import ROWS, assert_alike, auto_class, logits, masks, zoo_model

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import units_left
from hf_vdneuron.masks import RelevanceMask, mask_model_
from hf_vdneuron.modeling_vdneuron import PrunedModel
from hf_vdneuron.persistence import from_pretrained
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.sublayers import Unit


#: Rows whose config can say how many heads a layer has, whatever their size.
WITH_HEADS = {
    *("gemma", "gemma2", "gemma3_text", "granite", "llama", "llama_biased", "mistral", "phi", "phi3"),
    *("phi3_ungrouped", "qwen2", "qwen3", "smollm3", "starcoder2", "starcoder2_unbiased", "nomic_bert"),
    *("mixtral", "qwen2_moe", "qwen3_moe"),
}
#: Rows whose config cannot even say how many neurons: a ratio, a multiple of the width, or a config within.
NEVER = {"bloom", "clip", "convnext", "dinov2", "dinov2_gated", "siglip", "swin"} | {
    *("resnet_basic", "resnet_bottleneck", "segformer")
}

rows = pytest.mark.parametrize("row", ROWS)


def half(model: nn.Module, *units: Unit) -> RelevanceMask:
    """Ends every other unit of these kinds in each layer."""
    keep = {}
    for sublayer in find_sublayers(model):
        kept = torch.ones(2, sublayer.num_units, dtype=torch.bool)
        if sublayer.unit in units:
            kept[1, 1::2] = False
        keep[sublayer.path] = kept
    return RelevanceMask(keep)


@rows
@pytest.mark.parametrize("units", [(Unit.NEURON,), tuple(Unit)], ids=["neurons", "heads and neurons"])
def test_a_uniform_model_is_stock_where_its_config_can_say_it(row: str, units: tuple[Unit, ...]) -> None:
    model = zoo_model(row)
    mask = half(model, *units)
    masked = mask_model_(deepcopy(model), mask)
    expected = logits(masked)
    pruned = prune_model_(masked, mask)
    is_stock = row in WITH_HEADS if Unit.HEAD in units and ROWS[row].heads > 1 else row not in NEVER
    assert isinstance(pruned, PrunedModel) is not is_stock
    assert (getattr(pruned.config, "vdneuron", None) is None) is is_stock
    if is_stock:
        torch.testing.assert_close(logits(pruned), expected, rtol=0, atol=1e-5)
        # What its config builds is what it is.
        again = type(pruned)(deepcopy(pruned.config))
        again.load_state_dict(pruned.state_dict())
        assert torch.equal(logits(again), logits(pruned))


#: Loads each folder as anybody would, and writes what it says.
STRANGER = (
    f"{WITHOUT_THE_PACKAGE}"
    """
import json, torch, transformers
for folder, auto_class in json.loads(sys.argv[1]):
    model = getattr(transformers, auto_class).from_pretrained(folder, attn_implementation="eager").eval()
    batch = torch.load(folder + "/batch.pt", weights_only=True)
    with torch.no_grad():
        output = model(**batch)
    torch.save(output["logits"], folder + "/logits.pt")
"""
)


def test_a_stranger_loads_them_all(tmp_path: Path) -> None:
    jobs, expected = [], {}
    ids = torch.arange(4, 10)[None]
    for row in sorted(WITH_HEADS):
        model = zoo_model(row)
        pruned = prune_model_(model, half(model, *Unit)).eval()
        folder = tmp_path / row
        pruned.save_pretrained(folder)
        assert sorted(path.suffix for path in folder.iterdir() if path.suffix == ".py") == []
        torch.save({"input_ids": ids}, folder / "batch.pt")
        with torch.no_grad():
            expected[row] = pruned(input_ids=ids).logits
        jobs.append((str(folder), auto_class(row).__name__))
        assert type(from_pretrained(folder)) is type(pruned)
    subprocess.run([sys.executable, "-W", "error", "-c", STRANGER, json.dumps(jobs)], check=True, cwd=tmp_path)
    for row, said in expected.items():
        assert_alike(torch.load(tmp_path / row / "logits.pt", weights_only=True), said, row)


def test_a_number_that_no_config_may_have_stays_in_the_structure(tmp_path: Path) -> None:
    """A llama of width 16 with 3 heads is refused when its config is read."""
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 4, "vocab_size": 20}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).eval()
    keep = {}
    for sublayer in find_sublayers(model):
        keep[sublayer.path] = torch.ones(2, sublayer.num_units, dtype=torch.bool)
        keep[sublayer.path][1, 0] = sublayer.unit is not Unit.HEAD
    pruned = prune_model_(model, RelevanceMask(keep))
    assert set(units_left(pruned)[Unit.HEAD]) == {3}
    assert isinstance(pruned, PrunedModel)
    pruned.save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert_alike(from_pretrained(tmp_path)(ids).logits, pruned(ids).logits)


def test_a_ragged_model_becomes_stock_when_it_is_cut_to_one_size() -> None:
    model = zoo_model("llama")
    ragged = prune_model_(model, masks(model)["ragged"])
    assert isinstance(ragged, PrunedModel)
    least = {unit: min(counts) for unit, counts in units_left(ragged).items()}
    keep = {}
    for sublayer in find_sublayers(ragged):
        kept = torch.ones(2, sublayer.num_units, dtype=torch.bool)
        kept[1, least[sublayer.unit] :] = False
        keep[sublayer.path] = kept
    mask = RelevanceMask(keep)
    expected = logits(mask_model_(deepcopy(ragged), mask))
    even = prune_model_(ragged, mask)
    assert type(even).__module__.startswith("transformers.")
    assert not isinstance(even, PrunedModel)
    assert "vdneuron" not in even.config.to_dict()
    torch.testing.assert_close(logits(even), expected, rtol=0, atol=1e-5)
