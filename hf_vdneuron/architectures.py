# SPDX-License-Identifier: Apache-2.0
"""Where each model type keeps its heads and neurons: one row per layout, and nothing else knows.

To add an architecture, write its row and put its model types into `ARCHITECTURES`; patching, pruning, saving and the
exactness tests then work for it. `layouts` says what the words of a row mean.
"""

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from hf_vdneuron.chains import find_chain_sublayers
from hf_vdneuron.layouts import AttentionLayout, FeedForwardLayout, Stack
from hf_vdneuron.sublayers import Sublayer


__all__ = ["ARCHITECTURES", "find_sublayers"]

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

_DISTILBERT = (
    Stack(
        "transformer.layer",
        (
            AttentionLayout(
                core="attention",
                qkv=("q_lin", "k_lin", "v_lin"),
                output="attention.out_lin",
                head_size="attention_head_size",
                heads=("n_heads",),
                widths=("dim",),
            ),
            FeedForwardLayout("ffn.lin1", "ffn.lin2", "ffn.activation"),
        ),
    ),
)

_MPNET = (
    Stack(
        "encoder.layer",
        (
            replace(_BERT_ATTENTION, core="attention.attn", qkv=("q", "k", "v"), output="attention.attn.o"),
            _BERT_FEED_FORWARD,
        ),
    ),
)

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

_DEBERTA = (
    Stack(
        "encoder.layer",
        (
            replace(
                _BERT_ATTENTION,
                qkv=("in_proj",),
                interleaved=True,
                positions=("pos_proj", "pos_q_proj"),
                query_bias="q_bias",
                value_bias="v_bias",
                mixing=("talking_head",),
            ),
            _BERT_FEED_FORWARD,
        ),
    ),
)

_DEBERTA_V2 = (
    Stack(
        "encoder.layer",
        (
            replace(
                _BERT_ATTENTION,
                qkv=("query_proj", "key_proj", "value_proj"),
                positions=("pos_key_proj", "pos_query_proj"),
            ),
            _BERT_FEED_FORWARD,
        ),
    ),
)

_MODERNBERT = (
    Stack(
        "layers",
        (
            AttentionLayout(core="attn", qkv=("Wqkv",), output="attn.Wo", head_size="head_dim"),
            FeedForwardLayout("mlp.Wi", "mlp.Wo", gate="mlp.Wi"),
        ),
    ),
)

# ---- Decoders ----

_GPT2 = (
    Stack(
        "h",
        (
            AttentionLayout(
                core="attn",
                qkv=("c_attn",),
                output="attn.c_proj",
                head_size="head_dim",
                heads=("num_heads",),
                widths=("split_size",),
            ),
            FeedForwardLayout("mlp.c_fc", "mlp.c_proj", "mlp.act"),
        ),
    ),
)

_GPT_NEO = (
    Stack(
        "h",
        (
            AttentionLayout(
                core="attn.attention",
                qkv=("q_proj", "k_proj", "v_proj"),
                output="attn.attention.out_proj",
                head_size="head_dim",
                heads=("num_heads",),
            ),
            FeedForwardLayout("mlp.c_fc", "mlp.c_proj", "mlp.act"),
        ),
    ),
)

_GPT_NEOX = (
    Stack(
        "layers",
        (
            AttentionLayout(
                core="attention",
                qkv=("query_key_value",),
                output="attention.dense",
                head_size="head_size",
                interleaved=True,
            ),
            FeedForwardLayout("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.act"),
        ),
    ),
)

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
_BLOOM = (
    Stack("h", (_BLOOM_ATTENTION, FeedForwardLayout("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.gelu_impl"))),
)
_FALCON = (
    Stack(
        "h",
        (
            replace(_BLOOM_ATTENTION, groups=("num_kv_heads",), mixing=()),
            FeedForwardLayout("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.act"),
        ),
    ),
)

_LLAMA_ATTENTION = AttentionLayout(
    core="self_attn", qkv=("q_proj", "k_proj", "v_proj"), output="self_attn.o_proj", head_size="head_dim"
)
_LLAMA_FEED_FORWARD = FeedForwardLayout("mlp.up_proj", "mlp.down_proj", gate="mlp.gate_proj")

_LLAMA = (Stack("layers", (_LLAMA_ATTENTION, _LLAMA_FEED_FORWARD)),)

_OLMO2 = (Stack("layers", (replace(_LLAMA_ATTENTION, norms=("q_norm", "k_norm")), _LLAMA_FEED_FORWARD)),)

_PHI = (
    Stack(
        "layers",
        (
            replace(_LLAMA_ATTENTION, output="self_attn.dense"),
            FeedForwardLayout("mlp.fc1", "mlp.fc2", "mlp.activation_fn"),
        ),
    ),
)

_PHI3 = (
    Stack(
        "layers",
        (
            replace(_LLAMA_ATTENTION, qkv=("qkv_proj",), groups=("num_key_value_heads",)),
            FeedForwardLayout("mlp.gate_up_proj", "mlp.down_proj", gate="mlp.gate_up_proj"),
        ),
    ),
)

# ---- Encoders with decoders ----

_BART_ATTENTION = replace(_LLAMA_ATTENTION, output="self_attn.out_proj", heads=("num_heads",))
_BART_CROSS_ATTENTION = replace(
    _BART_ATTENTION,
    core="encoder_attn",
    output="encoder_attn.out_proj",
    name="cross_attention",
    optional=True,
)
_BART_FEED_FORWARD = FeedForwardLayout("fc1", "fc2", "activation_fn")

_OPT = (Stack("decoder.layers", (_BART_ATTENTION, _BART_FEED_FORWARD)),)

_BART = (
    Stack("encoder.layers", (_BART_ATTENTION, _BART_FEED_FORWARD), optional=True),
    Stack("decoder.layers", (_BART_ATTENTION, _BART_CROSS_ATTENTION, _BART_FEED_FORWARD), optional=True),
)

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


_T5 = (
    Stack("encoder.block", (_T5_ATTENTION, *_t5_feed_forward("layer.1.DenseReluDense")), optional=True),
    Stack(
        "decoder.block",
        (_T5_ATTENTION, _T5_CROSS_ATTENTION, *_t5_feed_forward("layer.2.DenseReluDense")),
        optional=True,
    ),
)

#: `config.model_type` -> where its heads and neurons are.
ARCHITECTURES: dict[str, tuple[Stack, ...]] = {
    "albert": _ALBERT,
    "bart": _BART,
    "bert": _BERT,
    "bloom": _BLOOM,
    "camembert": _BERT,
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA_V2,
    "distilbert": _DISTILBERT,
    "electra": _BERT,
    "falcon": _FALCON,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": _GPT2,
    "gpt_neo": _GPT_NEO,
    "gpt_neox": _GPT_NEOX,
    "granite": _LLAMA,
    "llama": _LLAMA,
    "marian": _BART,
    "mbart": _BART,
    "mistral": _LLAMA,
    "modernbert": _MODERNBERT,
    "mpnet": _MPNET,
    "mt5": _T5,
    "olmo2": _OLMO2,
    "opt": _OPT,
    "pegasus": _BART,
    "phi": _PHI,
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "smollm3": _LLAMA,
    "t5": _T5,
    "whisper": _BART,
    "xlm-roberta": _BERT,
}


def find_sublayers(model: nn.Module) -> list[Sublayer]:
    """Find everything in a model whose units can be removed.

    It reads sizes off the weights, so a patched or an already pruned model is as good as a dense one.

    Args:
        model: A transformers model of a supported type, with or without a head, or a plain PyTorch chain.

    Returns:
        The sub-layers, in the order of the forward pass.

    Raises:
        TypeError: If the model is neither.
        ValueError: If its model type is not in the table, or its heads cannot be removed exactly.
    """
    if isinstance(model, nn.Sequential):
        return find_chain_sublayers(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"Cannot find heads and neurons in a `{type(model).__name__}`: expected a transformers model or an "
            "`nn.Sequential`."
        )
    stacks = ARCHITECTURES.get(model.config.model_type)
    if stacks is None:
        raise ValueError(
            f"Model type `{model.config.model_type}` is not supported. Supported: {', '.join(sorted(ARCHITECTURES))}. "
            "To add it, write its row in `hf_vdneuron/architectures.py`."
        )
    prefix = model.base_model_prefix
    root = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    return [sublayer for stack in stacks for sublayer in stack.sublayers(model, root)]
