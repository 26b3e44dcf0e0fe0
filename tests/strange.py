"""Tiny models of types that have no row in the table of architectures, each with a batch of its own."""

from typing import Any

import torch
from models import randomised_
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from zoo import GROUPED, SOUND, TEXT, VOCABULARY


_TWO_LAYERS = {"num_hidden_layers": 2}
_TEXT, _GROUPED, _SOUND = ({**sizes, **_TWO_LAYERS} for sizes in (TEXT, GROUPED, SOUND))
_GPT = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "eos_token_id": 1}
_IMAGES = {**_TEXT, "image_size": 16, "patch_size": 4}
_XLM = {"vocab_size": VOCABULARY, "emb_dim": 16, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32}

#: Type -> sizes of its config.
SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("ernie", "esm", "biogpt"), _TEXT),
    "squeezebert": {
        **_TEXT,
        "embedding_size": 16,
        **{f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")},
    },
    **dict.fromkeys(("cohere", "exaone4", "glm", "olmo3"), _GROUPED),
    "gptj": {**_GPT, "rotary_dim": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "dinov3_vit": _IMAGES,
    "vit_mae": {**_IMAGES, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 24},
    "wavlm": _SOUND,
    "xlm": _XLM,
    "rwkv": {**_TEXT, "attention_hidden_size": 16},
    "bitnet": _GROUPED,
}


def strange_model(model_type: str) -> PreTrainedModel:
    """Build a model with biases and norms that are not zero by accident, in evaluation mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES[model_type])
    return randomised_(AutoModel.from_config(config)).eval()


def strange_batch(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two examples."""
    random = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=random)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 200, generator=random)}
    return {"input_ids": torch.arange(4, 20).view(2, 8)}
