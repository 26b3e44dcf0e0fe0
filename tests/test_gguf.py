"""A pruned Llama of uniform layout in llama.cpp's format: every size is where other programs look for it."""

from pathlib import Path

import pytest
import torch
from models import randomised_
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.pruning import prune_model_


gguf = pytest.importorskip("gguf")

LAYERS, HEADS, KEYS, HEAD_SIZE, NEURONS = 2, 4, 2, 32, 96


def small_llama() -> PreTrainedModel:
    """Half of its keys and a third of its neurons are gone."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=HEADS * HEAD_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        intermediate_size=NEURONS,
        max_position_embeddings=32,
    )
    model = randomised_(LlamaForCausalLM(config))
    keep = {part.path: torch.ones(2, part.num_units, dtype=torch.bool) for part in find_sublayers(model)}
    for kept in keep.values():
        kept[1, : len(kept[1]) // (2 if len(kept[1]) == KEYS else 3)] = False
    return prune_model_(model, RelevanceMask(keep)).eval()


def in_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Put the two halves that rotate together beside each other, as llama.cpp wants them."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """Convert a model by its config, as llama.cpp's own script does."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        count = heads.get(".".join(name.split(".")[-2:]))
        tensor = value if count is None else in_pairs(value, count)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_uniform_llama_goes_to_gguf_and_back(tmp_path: Path) -> None:
    model = small_llama()
    assert type(model) is LlamaForCausalLM
    write_gguf(model, tmp_path / "model.gguf")
    again = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
        assert getattr(again.config, name) == getattr(model.config, name) < getattr(LlamaConfig(), name)
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
