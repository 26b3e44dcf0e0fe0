# SPDX-License-Identifier: Apache-2.0
"""Where each model type keeps its heads and neurons: one row per layout, and nothing else knows.

To add an architecture, write its row and put its model types into `_ROWS`; patching, pruning and saving then
work for it. `layouts` says what the words of a row mean. Tiny models of it in `tests/zoo.py`, one for each switch of
its config that changes how heads or neurons are computed, get the exactness tests.
"""

from dataclasses import replace

import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_vdneuron.chains import find_chain_sublayers
from hf_vdneuron.discovered import remembered
from hf_vdneuron.layouts import AttentionLayout, ExpertsLayout, FeedForwardLayout, RelativeLayout, Stack
from hf_vdneuron.sublayers import Sublayer


__all__ = ["ARCHITECTURES", "find_sublayers", "is_supported"]

#: What most models call their projections.
_QKV = ("q_proj", "k_proj", "v_proj")

# ---- Encoders ----

_BERT_ATTENTION = AttentionLayout(
    core="attention.self",
    qkv=("query", "key", "value"),
    output="attention.output.dense",
    head_size="attention_head_size",
    heads=("num_attention_heads",),
    widths=("all_head_size",),
)
_BERT_CROSS_ATTENTION = replace(
    _BERT_ATTENTION,
    core="crossattention.self",
    output="crossattention.output.dense",
    name="cross_attention",
    optional=True,
)
_BERT_FEED_FORWARD = FeedForwardLayout("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn")
_BERT = (Stack("encoder.layer", (_BERT_ATTENTION, _BERT_CROSS_ATTENTION, _BERT_FEED_FORWARD)),)

_ROFORMER_ATTENTION = replace(_BERT_ATTENTION, turning=("rotary_value",))
_ROFORMER = (Stack("encoder.layer", (_ROFORMER_ATTENTION, _BERT_CROSS_ATTENTION, _BERT_FEED_FORWARD)),)

_DISTILBERT_ATTENTION = AttentionLayout(
    core="attention",
    qkv=("q_lin", "k_lin", "v_lin"),
    output="attention.out_lin",
    head_size="attention_head_size",
    heads=("n_heads",),
    widths=("dim",),
)
_DISTILBERT_FEED_FORWARD = FeedForwardLayout("ffn.lin1", "ffn.lin2", "ffn.activation")
_DISTILBERT = (Stack("transformer.layer", (_DISTILBERT_ATTENTION, _DISTILBERT_FEED_FORWARD)),)

_MPNET_ATTENTION = replace(_BERT_ATTENTION, core="attention.attn", qkv=("q", "k", "v"), output="attention.attn.o")
_MPNET = (Stack("encoder.layer", (_MPNET_ATTENTION, _BERT_FEED_FORWARD)),)

_ALBERT = (
    Stack(
        "encoder.albert_layer_groups.*.albert_layers",
        (
            replace(_BERT_ATTENTION, core="attention", output="attention.dense"),
            FeedForwardLayout("ffn", "ffn_output", "activation"),
        ),
        shared=("num_hidden_layers", "num_hidden_groups"),
    ),
)

_DEBERTA_ATTENTION = replace(
    _BERT_ATTENTION,
    qkv=("in_proj",),
    interleaved=True,
    positions=("pos_proj", "pos_q_proj"),
    relative=RelativeLayout("max_relative_positions", follow_length=True),
    query_bias="q_bias",
    value_bias="v_bias",
    mixing=("talking_head",),
)
_DEBERTA = (Stack("encoder.layer", (_DEBERTA_ATTENTION, _BERT_FEED_FORWARD)),)

_DEBERTA_V2_ATTENTION = replace(
    _BERT_ATTENTION,
    qkv=("query_proj", "key_proj", "value_proj"),
    positions=("pos_key_proj", "pos_query_proj"),
    relative=RelativeLayout("pos_ebd_size"),
)
_DEBERTA_V2 = (Stack("encoder.layer", (_DEBERTA_V2_ATTENTION, _BERT_FEED_FORWARD)),)

_MODERNBERT_ATTENTION = AttentionLayout(core="attn", qkv=("Wqkv",), output="attn.Wo", head_size="head_dim")
_MODERNBERT = (Stack("layers", (_MODERNBERT_ATTENTION, FeedForwardLayout("mlp.Wi", "mlp.Wo", gate="mlp.Wi"))),)

# ---- Decoders ----

_GPT2_ATTENTION = AttentionLayout(
    core="attn",
    qkv=("c_attn",),
    output="attn.c_proj",
    head_size="head_dim",
    heads=("num_heads",),
    widths=("split_size",),
)
_GPT2_FEED_FORWARD = FeedForwardLayout("mlp.c_fc", "mlp.c_proj", "mlp.act")
_GPT2 = (Stack("h", (_GPT2_ATTENTION, _GPT2_FEED_FORWARD)),)

_GPT_NEO_ATTENTION = replace(
    _GPT2_ATTENTION, core="attn.attention", qkv=_QKV, output="attn.attention.out_proj", widths=()
)
_GPT_NEO = (Stack("h", (_GPT_NEO_ATTENTION, _GPT2_FEED_FORWARD)),)

_GPT_NEOX_ATTENTION = AttentionLayout(
    core="attention", qkv=("query_key_value",), output="attention.dense", head_size="head_size", interleaved=True
)
_GPT_NEOX_FEED_FORWARD = FeedForwardLayout("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.act")
_GPT_NEOX = (Stack("layers", (_GPT_NEOX_ATTENTION, _GPT_NEOX_FEED_FORWARD)),)

_BLOOM_ATTENTION = AttentionLayout(
    core="self_attention",
    qkv=("query_key_value",),
    output="self_attention.dense",
    head_size="head_dim",
    heads=("num_heads",),
    widths=("split_size",),
    interleaved=True,
    mixing=("slow_but_exact",),
)
_BLOOM = (Stack("h", (_BLOOM_ATTENTION, replace(_GPT_NEOX_FEED_FORWARD, activation="mlp.gelu_impl"))),)
_FALCON = (Stack("h", (replace(_BLOOM_ATTENTION, groups=("num_kv_heads",), mixing=()), _GPT_NEOX_FEED_FORWARD)),)

_LLAMA_ATTENTION = AttentionLayout(core="self_attn", qkv=_QKV, output="self_attn.o_proj", head_size="head_dim")
_LLAMA_FEED_FORWARD = FeedForwardLayout("mlp.up_proj", "mlp.down_proj", gate="mlp.gate_proj")
_LLAMA = (Stack("layers", (_LLAMA_ATTENTION, _LLAMA_FEED_FORWARD)),)

_OLMO2 = (Stack("layers", (replace(_LLAMA_ATTENTION, norms=("q_norm", "k_norm")), _LLAMA_FEED_FORWARD)),)

_PHI_ATTENTION = replace(_LLAMA_ATTENTION, output="self_attn.dense")
_PHI_FEED_FORWARD = FeedForwardLayout("mlp.fc1", "mlp.fc2", "mlp.activation_fn")
_PHI = (Stack("layers", (_PHI_ATTENTION, _PHI_FEED_FORWARD)),)

_STARCODER2 = (Stack("layers", (_LLAMA_ATTENTION, _GPT2_FEED_FORWARD)),)

_JINA = (Stack("layers", (_LLAMA_ATTENTION, _PHI_FEED_FORWARD)),)

_PHI3_ATTENTION = replace(_LLAMA_ATTENTION, qkv=("qkv_proj",), groups=("num_key_value_heads",))
_PHI3_FEED_FORWARD = FeedForwardLayout("mlp.gate_up_proj", "mlp.down_proj", gate="mlp.gate_up_proj")
_PHI3 = (Stack("layers", (_PHI3_ATTENTION, _PHI3_FEED_FORWARD)),)

_MIXTRAL = (Stack("layers", (_LLAMA_ATTENTION, ExpertsLayout())),)

# Layers without experts lie between the others; of Qwen 2's mixtures, one expert takes every token.
_QWEN_MOE = (
    Stack(
        "layers",
        (
            _LLAMA_ATTENTION,
            ExpertsLayout(optional=True),
            replace(_LLAMA_FEED_FORWARD, optional=True),
            FeedForwardLayout(
                "mlp.shared_expert.up_proj",
                "mlp.shared_expert.down_proj",
                gate="mlp.shared_expert.gate_proj",
                name="shared_expert",
                optional=True,
            ),
        ),
    ),
)

# ---- Encoders with decoders ----

_BART_ATTENTION = replace(_LLAMA_ATTENTION, output="self_attn.out_proj", heads=("num_heads",))
_BART_CROSS_ATTENTION = replace(
    _BART_ATTENTION, core="encoder_attn", output="encoder_attn.out_proj", name="cross_attention", optional=True
)
_BART_FEED_FORWARD = FeedForwardLayout("fc1", "fc2", "activation_fn")
_BART_DECODER = (_BART_ATTENTION, _BART_CROSS_ATTENTION, _BART_FEED_FORWARD)
_BART = (
    Stack("encoder.layers", (_BART_ATTENTION, _BART_FEED_FORWARD), optional=True),
    Stack("decoder.layers", _BART_DECODER, optional=True),
)
_WHISPER_CROSS_ATTENTION = replace(_BART_CROSS_ATTENTION, memory="config.max_source_positions")
_WHISPER = (
    Stack(
        "encoder.layers",
        (_BART_ATTENTION, _BART_FEED_FORWARD),
        length="encoder.embed_positions.num_embeddings",
        optional=True,
    ),
    Stack("decoder.layers", (_BART_ATTENTION, _WHISPER_CROSS_ATTENTION, _BART_FEED_FORWARD), optional=True),
)
_OPT = (Stack("decoder.layers", (_BART_ATTENTION, _BART_FEED_FORWARD)),)

_T5_ATTENTION = AttentionLayout(
    core="layer.0.SelfAttention",
    qkv=("q", "k", "v"),
    output="layer.0.SelfAttention.o",
    head_size="key_value_proj_dim",
    heads=("n_heads",),
    widths=("inner_dim",),
)
_T5_CROSS_ATTENTION = replace(
    _T5_ATTENTION, core="layer.1.EncDecAttention", output="layer.1.EncDecAttention.o", name="cross_attention"
)


def _t5_feed_forward(path: str) -> tuple[FeedForwardLayout, FeedForwardLayout]:
    """T5 has one kind of block, its successors the other."""
    plain = FeedForwardLayout(f"{path}.wi", f"{path}.wo", f"{path}.act", optional=True)
    gated = FeedForwardLayout(f"{path}.wi_1", f"{path}.wo", gate=f"{path}.wi_0", optional=True)
    return plain, gated


_T5_ENCODER = (_T5_ATTENTION, *_t5_feed_forward("layer.1.DenseReluDense"))
_T5_DECODER = (_T5_ATTENTION, _T5_CROSS_ATTENTION, *_t5_feed_forward("layer.2.DenseReluDense"))
_T5 = (Stack("encoder.block", _T5_ENCODER, optional=True), Stack("decoder.block", _T5_DECODER, optional=True))

# ---- Images and sound ----

#: Of stages each of which halves the height and the width of its map, as they do by default.
_HALVED = 4

_VIT_ATTENTION = AttentionLayout(
    core="attention", qkv=_QKV, output="attention.o_proj", head_size="head_dim", heads=("num_attention_heads",)
)
_VIT = (Stack("layers", (_VIT_ATTENTION, _PHI_FEED_FORWARD)),)

_DINOV2_FEED_FORWARDS = (replace(_PHI_FEED_FORWARD, optional=True), replace(_LLAMA_FEED_FORWARD, optional=True))
_DINOV2 = (Stack("encoder.layer", (_VIT_ATTENTION, *_DINOV2_FEED_FORWARDS)),)

_SWIN_ATTENTION = replace(
    _VIT_ATTENTION,
    bias_table="relative_position_bias.relative_position_bias_table",
    window="relative_position_bias.window_size",
)
_SWIN = (Stack("encoder.layers.*.blocks", (_SWIN_ATTENTION, _PHI_FEED_FORWARD), shrink=_HALVED),)

_SEGFORMER_FEED_FORWARD = replace(_PHI_FEED_FORWARD, depthwise="mlp.dwconv.dwconv")
_SEGFORMER_ATTENTION = replace(_VIT_ATTENTION, reduction="sequence_reduction_ratio")
_SEGFORMER = (Stack("stages.*.blocks", (_SEGFORMER_ATTENTION, _SEGFORMER_FEED_FORWARD), shrink=_HALVED),)

_CONVNEXT = (Stack("encoder.stages.*.layers", (FeedForwardLayout("pwconv1", "pwconv2", "act"),), shrink=_HALVED),)

# A bottleneck has two kinds of inner channels, a basic block one. Those between blocks belong to all of a stage.
_RESNET_CHANNELS = tuple(
    FeedForwardLayout(
        f"layer.{index}.convolution",
        f"layer.{index + 1}.convolution",
        norm=f"layer.{index}.normalization",
        name=f"channels_{index}",
        optional=True,
    )
    for index in range(2)
)
_RESNET = (Stack("encoder.stages.*.layers", _RESNET_CHANNELS, shrink=_HALVED),)

_CLIP_LAYER = (_BART_ATTENTION, _PHI_FEED_FORWARD)
_CLIP_TOWER = (Stack("encoder.layers", _CLIP_LAYER),)
_CLIP = (
    Stack("text_model.encoder.layers", _CLIP_LAYER, optional=True),
    Stack(
        "vision_model.encoder.layers",
        _CLIP_LAYER,
        length="vision_model.embeddings.position_embedding.num_embeddings",
        optional=True,
    ),
)

_WAV2VEC2_ATTENTION = replace(_BART_ATTENTION, core="attention", output="attention.out_proj")
_WAV2VEC2_FEED_FORWARD = FeedForwardLayout(
    "feed_forward.intermediate_dense", "feed_forward.output_dense", "feed_forward.intermediate_act_fn"
)
_WAV2VEC2 = (Stack("encoder.layers", (_WAV2VEC2_ATTENTION, _WAV2VEC2_FEED_FORWARD)),)

#: Model types, one beside another -> where their heads and neurons are.
_ROWS: dict[str, tuple[Stack, ...]] = {
    "albert": _ALBERT,
    "bart marian mbart pegasus": _BART,
    "beit deit vit": _VIT,
    "bert camembert electra roberta xlm-roberta": _BERT,
    "bloom": _BLOOM,
    "clip siglip": _CLIP,
    "clip_text_model clip_vision_model siglip_text_model siglip_vision_model": _CLIP_TOWER,
    "convnext": _CONVNEXT,
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA_V2,
    "dinov2": _DINOV2,
    "distilbert": _DISTILBERT,
    "falcon": _FALCON,
    "gemma gemma2 gemma3_text granite llama mistral nomic_bert qwen2 qwen3 smollm3": _LLAMA,
    "gpt2": _GPT2,
    "gpt_neo": _GPT_NEO,
    "gpt_neox": _GPT_NEOX,
    "hubert wav2vec2": _WAV2VEC2,
    "jina_embeddings_v3": _JINA,
    "mixtral": _MIXTRAL,
    "modernbert": _MODERNBERT,
    "mpnet": _MPNET,
    "mt5 t5": _T5,
    "olmo2": _OLMO2,
    "opt": _OPT,
    "phi": _PHI,
    "phi3": _PHI3,
    "qwen2_moe qwen3_moe": _QWEN_MOE,
    "resnet": _RESNET,
    "roformer": _ROFORMER,
    "segformer": _SEGFORMER,
    "starcoder2": _STARCODER2,
    "swin": _SWIN,
    "whisper": _WHISPER,
}

#: `config.model_type` -> where its heads and neurons are.
ARCHITECTURES = {model_type: stacks for types, stacks in _ROWS.items() for model_type in types.split()}


def is_supported(model: nn.Module) -> bool:
    """Tell whether `find_sublayers` knows where to look in a model.

    Args:
        model: Any model.

    Returns:
        Whether it is a chain, its type has a row in the table, or something was discovered in it.
    """
    if isinstance(model, nn.Sequential) or remembered(model) is not None:
        return True
    return isinstance(model, PreTrainedModel) and model.config.model_type in ARCHITECTURES


def find_sublayers(model: nn.Module) -> list[Sublayer]:
    """Find everything in a model whose units can be removed.

    It reads sizes off the weights, so a patched or an already pruned model is as good as a dense one.

    Args:
        model: A transformers model of a supported type, with or without a head, or one that something was discovered
            in; or a plain PyTorch chain.

    Returns:
        The sub-layers, in the order of the forward pass.

    Raises:
        TypeError: If the model is neither.
        ValueError: If its model type is not in the table and nothing was discovered in it, it is built in another way
            than the table says, or its heads cannot be removed exactly.
    """
    if isinstance(model, nn.Sequential):
        return find_chain_sublayers(model)
    discovery = remembered(model)
    if discovery is not None:
        return discovery.sublayers_now(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"Cannot find heads and neurons in a `{type(model).__name__}`: expected a transformers model or an "
            "`nn.Sequential`."
        )
    stacks = ARCHITECTURES.get(model.config.model_type)
    if stacks is None:
        raise ValueError(
            f"Model type `{model.config.model_type}` is not supported. Supported: {', '.join(sorted(ARCHITECTURES))}. "
            "Let `hf_vdneuron.discover(model, inputs)` find its heads and neurons first, or write its row in "
            "`hf_vdneuron/architectures.py`."
        )
    prefix = model.base_model_prefix
    root = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    try:
        return [sublayer for stack in stacks for sublayer in stack.sublayers(model, root)]
    except AttributeError as error:
        raise ValueError(
            f"transformers {transformers.__version__} builds models of type `{model.config.model_type}` in another "
            f"way than the table of architectures knows ({error}). Expected transformers 5.23 or newer, or a row for "
            "this version in `hf_vdneuron/architectures.py`."
        ) from error
