"""Tiny models of each family, cut by hand or by a mask to the units that are listed, and dense ones that mask them."""

from collections.abc import Iterable
from copy import deepcopy
from itertools import chain

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.masks import RelevanceMask


HEADS, HEAD_SIZE, NEURONS, HIDDEN, LAYERS, VOCABULARY = 4, 4, 6, 16, 3, 20
ALL = (range(HEADS), range(NEURONS))

#: Heads and neurons that each layer keeps.
KeptUnits = tuple[tuple[Iterable[int], Iterable[int]], ...]
RAGGED: KeptUnits = (([0, 2], [1, 2, 5]), ([], []), ([3], [0]))
WHOLE_SUBLAYERS: KeptUnits = (ALL, ([], range(NEURONS)), (range(HEADS), []))

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 16,
}
CONFIGS = {
    "bert": BertConfig(**_SHAPE),
    "roberta": RobertaConfig(**_SHAPE),
    "distilbert": DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=HIDDEN,
        n_layers=LAYERS,
        n_heads=HEADS,
        hidden_dim=NEURONS,
        max_position_embeddings=16,
    ),
    "electra": ElectraConfig(**_SHAPE, embedding_size=8),
}
AUTO_CLASSES = {
    "sequence_classification": AutoModelForSequenceClassification,
    "base": AutoModel,
    "masked_lm": AutoModelForMaskedLM,
}

#: Path of the layers, of the attention module, and of its and the feed-forward block's matrices.
_BERT = (
    "encoder.layer",
    "attention.self",
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
    ("num_attention_heads", "all_head_size"),
)
_DISTILBERT = (
    "transformer.layer",
    "attention",
    ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attention.out_lin",
    "ffn.lin1",
    "ffn.lin2",
    ("n_heads", "dim"),
)


def dense_model(family: str, auto_class: type = AutoModel) -> PreTrainedModel:
    """Random weights throughout: native initialization makes all biases zero."""
    return randomized_(auto_class.from_config(deepcopy(CONFIGS[family])))


def randomized_(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    ids = torch.arange(2, 14).remainder(config.vocab_size).view(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def first_output(model: PreTrainedModel) -> torch.Tensor:
    """Logits, or the hidden states of a model without a head, at attended positions."""
    batch = inputs(model.config)
    output = model(**batch)[0]  # (2, 6, *) or (2, labels)
    return output[batch["attention_mask"].bool()] if output.ndim > 2 else output


@torch.no_grad()
def cut_(model: PreTrainedModel, kept: KeptUnits = RAGGED) -> PreTrainedModel:
    """Keep only these heads and neurons of each layer. No constants are folded."""
    layers, attention, makers, reader, into, out, attributes = _parts(model)
    for layer, (heads, neurons) in zip(model.base_model.get_submodule(layers), kept, strict=True):
        rows = _features(heads)
        for path in makers:
            select_(layer.get_submodule(path), 0, rows)
        select_(layer.get_submodule(reader), 1, rows)
        select_(layer.get_submodule(into), 0, list(neurons))
        select_(layer.get_submodule(out), 1, list(neurons))
        for name, value in zip(attributes, (len(rows) // HEAD_SIZE, len(rows)), strict=True):
            setattr(layer.get_submodule(attention), name, value)
    return model


def mask_of(model: PreTrainedModel, kept: KeptUnits = RAGGED) -> RelevanceMask:
    """Say the same to `prune_model_`. The other units end on the in-side, so there are constants to fold."""
    masks = {}
    for sublayer, units in zip(find_sublayers(model), chain.from_iterable(kept), strict=True):
        masks[sublayer.path] = torch.ones(2, sublayer.num_units, dtype=torch.bool)
        masks[sublayer.path][0] = torch.isin(torch.arange(sublayer.num_units), torch.tensor(list(units)))
    return RelevanceMask(masks)


@torch.no_grad()
def masked(model: PreTrainedModel, kept: KeptUnits = RAGGED) -> PreTrainedModel:
    """Copy a dense model whose other heads and neurons are read with zero weights."""
    model = deepcopy(model)
    layers, _, _, reader, _, out, _ = _parts(model)
    for layer, (heads, neurons) in zip(model.base_model.get_submodule(layers), kept, strict=True):
        for path, columns in ((reader, _features(heads)), (out, list(neurons))):
            weight = layer.get_submodule(path).weight
            weight[:, [column for column in range(weight.shape[1]) if column not in columns]] = 0
    return model


def _parts(model: PreTrainedModel) -> tuple:
    return _DISTILBERT if model.config.model_type == "distilbert" else _BERT


def _features(heads: Iterable[int]) -> list[int]:
    return [HEAD_SIZE * head + offset for head in heads for offset in range(HEAD_SIZE)]


def select_(linear: nn.Linear, axis: int, features: list[int]) -> None:
    index = torch.tensor(features, dtype=torch.long)
    linear.weight = nn.Parameter(linear.weight.index_select(axis, index))
    if axis == 0:
        linear.bias = nn.Parameter(linear.bias[index])
    linear.out_features, linear.in_features = linear.weight.shape
