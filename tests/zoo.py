"""A tiny random model for each row of the table of architectures, or several where a row has several faces."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from models import randomised_
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForZeroShotImageClassification,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.sublayers import Unit


#: How far float32 computations of the same output may lie apart, as promised.
TOLERANCE = 1e-5

HEADS, KEYS, NEURONS, VOCABULARY, TOKENS = 4, 2, 24, 40, 6

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
GROUPED = {**TEXT, "num_key_value_heads": KEYS, "head_dim": 4}
_EXPERTS, _PER_EXPERT = 4, 16
_MOE = {**GROUPED, "num_experts_per_tok": 2, "intermediate_size": _PER_EXPERT}
# What has no experts is as wide as all of them together.
_QWEN_MOE = {
    **_MOE,
    "num_experts": _EXPERTS,
    "moe_intermediate_size": _PER_EXPERT,
    "intermediate_size": _EXPERTS * _PER_EXPERT,
    "shared_expert_intermediate_size": _EXPERTS * _PER_EXPERT,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": NEURONS for side in ("encoder", "decoder")},
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "decoder_start_token_id": 2,
}
_WHISPER = {**_BART, "num_mel_bins": 4, "max_source_positions": 16, "max_target_positions": 32}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": NEURONS,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
_DEBERTA = {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
_GPT_NEO = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": HEADS,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 32,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_MODERNBERT = {**TEXT, "local_attention": 4, "cls_token_id": 2, "sep_token_id": 1}
_GPT2 = {**TEXT, "n_embd": 16, "n_layer": 3, "n_head": HEADS, "n_inner": NEURONS, "n_positions": 32}
_FALCON = {**TEXT, "ffn_hidden_size": NEURONS, "multi_query": False}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 3, "n_head": HEADS}
_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "intermediate_size": NEURONS,
    "image_size": 8,
    "patch_size": 4,
    "layer_scale_init_value": 0.5,
}
_CLIP = {"text_config": TEXT, "vision_config": {**_VIT, "num_hidden_layers": 2}, "projection_dim": 8}
SOUND = {
    **TEXT,
    "conv_dim": [8, 8],
    "conv_kernel": [4, 4],
    "conv_stride": [2, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "classifier_proj_size": 8,
}
_SWIN = {
    "image_size": 8,
    "patch_size": 1,
    "embed_dim": 16,
    "depths": [3],
    "num_heads": [HEADS],
    "window_size": 2,
    "mlp_ratio": 1.5,
    "drop_path_rate": 0.0,
}
_CONVNEXT = {"hidden_sizes": [8, 8], "depths": [1, 2], "num_stages": 2, "layer_scale_init_value": 0.5}
_RESNET = {"hidden_sizes": [16, 16], "depths": [1, 2], "embedding_size": 8}
_SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 2],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 16],
    "num_attention_heads": [HEADS, HEADS],
    "mlp_ratios": [2, 2],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "drop_path_rate": 0.0,
}


@dataclass(frozen=True)
class Row:
    """A tiny model.

    Args:
        model_type: What its config says.
        settings: Sizes and switches of its config.
        heads: Units of each attention block; 0 if there is none.
        neurons: Units of each feed-forward block.
        static: Whether the dense model can generate with a static cache.
    """

    model_type: str
    settings: dict[str, Any] = field(hash=False)
    heads: int = HEADS
    neurons: int = NEURONS
    static: bool = True


_MASKED_LM = {
    "albert": Row("albert", {**TEXT, "embedding_size": 8, "num_hidden_groups": 2}),
    "bert": Row("bert", TEXT),
    "camembert": Row("camembert", TEXT),
    "deberta": Row("deberta", _DEBERTA),
    "deberta_v2": Row("deberta-v2", {**_DEBERTA, "position_buckets": 4}),
    "deberta_v2_shared": Row("deberta-v2", {**_DEBERTA, "share_att_key": True}),
    "distilbert": Row(
        "distilbert",
        {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 3, "n_heads": HEADS, "hidden_dim": NEURONS},
    ),
    "electra": Row("electra", {**TEXT, "embedding_size": 8}),
    "jina": Row("jina_embeddings_v3", TEXT),
    "modernbert": Row("modernbert", _MODERNBERT),
    "modernbert_biased": Row("modernbert", {**_MODERNBERT, "attention_bias": True, "mlp_bias": True}),
    "mpnet": Row("mpnet", TEXT),
    "nomic_bert": Row("nomic_bert", {**TEXT, "type_vocab_size": 2}),
    "roberta": Row("roberta", TEXT),
    "roformer": Row("roformer", {**TEXT, "embedding_size": 8}),
    "roformer_turning": Row("roformer", {**TEXT, "rotary_value": True}),
    "xlm_roberta": Row("xlm-roberta", TEXT),
}
_CAUSAL_LM = {
    "bloom": Row("bloom", _BLOOM, neurons=64),
    "falcon": Row("falcon", {**_FALCON, "bias": True}),
    # The dense model cannot generate with alibi and a static cache.
    "falcon_alibi": Row("falcon", {**_FALCON, "bias": True, "alibi": True, "parallel_attn": False}, static=False),
    "falcon_grouped": Row("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": KEYS}, heads=KEYS),
    "falcon_multi_query": Row("falcon", {**_FALCON, "multi_query": True}, heads=1),
    "gemma": Row("gemma", GROUPED, heads=KEYS),
    "gemma2": Row("gemma2", {**GROUPED, "sliding_window": 4}, heads=KEYS),
    "gemma3_text": Row("gemma3_text", {**GROUPED, "sliding_window": 4}, heads=KEYS),
    "gpt2": Row("gpt2", _GPT2),
    "gpt_neo": Row("gpt_neo", _GPT_NEO),
    "gpt_neox": Row("gpt_neox", TEXT),
    "granite": Row("granite", GROUPED, heads=KEYS),
    "llama": Row("llama", GROUPED, heads=KEYS),
    "llama_biased": Row("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}, heads=KEYS),
    "mistral": Row("mistral", {**GROUPED, "sliding_window": 4}, heads=KEYS),
    "mixtral": Row("mixtral", {**_MOE, "num_local_experts": _EXPERTS}, heads=KEYS, neurons=_EXPERTS * _PER_EXPERT),
    "olmo2": Row("olmo2", GROUPED, heads=KEYS),
    "olmo2_ungrouped": Row("olmo2", {**GROUPED, "num_key_value_heads": HEADS}),
    "opt": Row("opt", {**TEXT, "ffn_dim": NEURONS, "word_embed_proj_dim": 16}),
    "phi": Row("phi", GROUPED, heads=KEYS),
    "phi3": Row("phi3", GROUPED, heads=KEYS),
    "phi3_ungrouped": Row("phi3", {**GROUPED, "num_key_value_heads": HEADS}),
    "qwen2": Row("qwen2", GROUPED, heads=KEYS),
    "qwen2_moe": Row("qwen2_moe", _QWEN_MOE, heads=KEYS, neurons=_EXPERTS * _PER_EXPERT),
    "qwen3": Row("qwen3", GROUPED, heads=KEYS),
    "qwen3_moe": Row("qwen3_moe", {**_QWEN_MOE, "mlp_only_layers": [1]}, heads=KEYS, neurons=_EXPERTS * _PER_EXPERT),
    "smollm3": Row("smollm3", GROUPED, heads=KEYS),
    "starcoder2": Row("starcoder2", {**GROUPED, "sliding_window": 4}, heads=KEYS),
    "starcoder2_unbiased": Row("starcoder2", {**GROUPED, "use_bias": False}, heads=KEYS),
}
_SEQ2SEQ_LM = {
    "bart": Row("bart", _BART),
    "marian": Row("marian", _BART),
    "mbart": Row("mbart", _BART),
    "mt5": Row("mt5", _T5),
    "pegasus": Row("pegasus", _BART),
    "t5": Row("t5", _T5),
    "t5_gated": Row("t5", {**_T5, "feed_forward_proj": "gated-gelu"}),
}
_SPEECH = {"whisper": Row("whisper", _WHISPER)}

_IMAGES = {
    "beit": Row("beit", {**_VIT, "use_relative_position_bias": True, "drop_path_rate": 0.0}),
    "beit_shared": Row("beit", {**_VIT, "use_shared_relative_position_bias": True, "drop_path_rate": 0.0}),
    "convnext": Row("convnext", _CONVNEXT, heads=0, neurons=32),
    "deit": Row("deit", {**_VIT, "architectures": ["DeiTForImageClassification"]}),
    "dinov2": Row("dinov2", {**_VIT, "mlp_ratio": 2}, neurons=32),
    "dinov2_gated": Row("dinov2", {**_VIT, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    "resnet_basic": Row("resnet", {**_RESNET, "layer_type": "basic"}, heads=0, neurons=16),
    "resnet_bottleneck": Row("resnet", {**_RESNET, "layer_type": "bottleneck"}, heads=0, neurons=4),
    "segformer": Row("segformer", _SEGFORMER, neurons=32),
    "swin": Row("swin", _SWIN),
    "vit": Row("vit", _VIT),
}
_SOUND = {"hubert": Row("hubert", SOUND), "wav2vec2": Row("wav2vec2", SOUND)}
_PAIRS = {"clip": Row("clip", _CLIP), "siglip": Row("siglip", _CLIP)}

#: Rows that an older transformers builds in another way, and since when it does not.
SINCE = {"dinov2": Version("5.23"), "dinov2_gated": Version("5.23")}
INSTALLED = Version(transformers.__version__)

ROWS: dict[str, Row] = {
    name: row
    for name, row in {**_MASKED_LM, **_CAUSAL_LM, **_SEQ2SEQ_LM, **_SPEECH, **_IMAGES, **_SOUND, **_PAIRS}.items()
    if name not in SINCE or SINCE[name] <= INSTALLED
}
GENERATING = (*_CAUSAL_LM, *_SEQ2SEQ_LM, *_SPEECH)

_AUTO_CLASSES = {
    **dict.fromkeys(_MASKED_LM, AutoModelForMaskedLM),
    **dict.fromkeys(_CAUSAL_LM, AutoModelForCausalLM),
    **dict.fromkeys(_SEQ2SEQ_LM, AutoModelForSeq2SeqLM),
    **dict.fromkeys(_SPEECH, AutoModelForSpeechSeq2Seq),
    **dict.fromkeys(_IMAGES, AutoModelForImageClassification),
    **dict.fromkeys(_SOUND, AutoModelForAudioClassification),
    **dict.fromkeys(_PAIRS, AutoModelForZeroShotImageClassification),
}


def auto_class(row: str) -> type:
    return _AUTO_CLASSES[row]


@cache
def _prototype(row: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(ROWS[row].model_type, **ROWS[row].settings)
    # Some models cannot change it later on.
    return randomised_(auto_class(row).from_config(config, attn_implementation=attention))


def zoo_model(row: str, attention: str = "eager") -> PreTrainedModel:
    """Float32 model with a language head in evaluation mode, the same in every call."""
    return deepcopy(_prototype(row, attention))


def attentions(row: str) -> list[str]:
    """Ways to attend that the dense model knows; of T5's, one fails on the dense model too."""
    model = _prototype(row, "eager")
    can = {"sdpa": model._supports_sdpa, "flex_attention": model._supports_flex_attn and "t5" not in row}
    return ["eager", *(name for name, supported in can.items() if supported)]


def zoo_batch(model: PreTrainedModel) -> dict[str, Any]:
    """Two sequences, the second one shorter, two images or two sounds, and what the model should say of them."""
    ids = torch.arange(4, 4 + 2 * TOKENS).view(2, TOKENS)
    mask = torch.ones_like(ids).index_put_((torch.tensor(1), torch.tensor([4, 5])), torch.tensor(0))
    random = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 4, 32, generator=random), "labels": ids + 3}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 64, generator=random), "labels": torch.tensor([0, 1])}
    images = torch.randn(2, 3, 8, 8, generator=random)
    if hasattr(model, "vision_model"):
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": images, "return_loss": True}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": images, "labels": torch.tensor([0, 1])}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids + 3}


def answer(output: ModelOutput) -> Tensor:
    """What a model says, by whichever name."""
    return output["logits" if "logits" in output else "logits_per_image"]


def assert_alike(found: Tensor, expected: Tensor, message: str | None = None) -> None:
    """Check that outputs are the same but for rounding: in float64 they are, and 1e-5 of the largest is not much."""
    tolerance = TOLERANCE * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, msg=message)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Logits in evaluation mode, of attended positions if there are some to each."""
    inputs = zoo_batch(model)
    found = answer(model.eval()(**inputs))
    is_masked = found.ndim > 2 and "attention_mask" in inputs and not model.config.is_encoder_decoder
    return found[inputs["attention_mask"].bool()] if is_masked else found


def masks(model: nn.Module) -> dict[str, RelevanceMask]:
    """Masks that end units on either side, and leave several sub-layers, all or none with nothing."""
    sublayers = find_sublayers(model)
    heads = [sublayer.path for sublayer in sublayers if sublayer.unit is Unit.HEAD]
    neurons = [sublayer.path for sublayer in sublayers if sublayer.unit is Unit.NEURON]
    emptied: dict[str, Callable[[str], bool]] = {
        "ragged": lambda path: False,
        "first_empty": lambda path: path in (*heads[:1], neurons[-1]),
        "last_empty": lambda path: path in (*heads[-2:], neurons[0]),
        "all_empty": lambda path: True,
    }
    return {name: _mask(sublayers, is_empty) for name, is_empty in emptied.items()}


def any_mask(model: nn.Module, seed: int) -> RelevanceMask:
    """A random mask, under which each sub-layer is empty with a probability of a quarter."""
    sublayers = find_sublayers(model)
    empty = torch.rand(len(sublayers), generator=torch.Generator().manual_seed(seed)) < 0.25
    chosen = {sublayer.path for sublayer, is_empty in zip(sublayers, empty, strict=True) if is_empty}
    return _mask(sublayers, chosen.__contains__, seed=seed)


def _mask(sublayers: Iterable[Any], is_empty: Callable[[str], bool], *, seed: int = 1) -> RelevanceMask:
    random = torch.Generator().manual_seed(seed)
    keep = {}
    for sublayer in sublayers:
        kept = torch.rand(2, sublayer.num_units, generator=random) > 0.3
        kept[:, 0] = True
        if is_empty(sublayer.path) and not sublayer.minimum:
            kept[torch.randint(2, (sublayer.num_units,), generator=random), torch.arange(sublayer.num_units)] = False
        if not sublayer.foldable:
            kept[1] &= kept[0]
            kept[0] = True
        keep[sublayer.path] = kept
    return RelevanceMask(keep)
