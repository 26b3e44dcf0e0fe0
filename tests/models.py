"""Tiny models in which nothing is zero by accident, where their units lie, and units ended or cut out by hand."""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import chain

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    DistilBertConfig,
    ElectraConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.masks import RelevanceMask


LAYERS, HEADS, HEAD_SIZE, NEURONS, HIDDEN, VOCABULARY = 3, 4, 4, 24, 16, 20
FAMILIES = ("bert", "roberta", "distilbert", "electra")
AUTO_CLASSES = {
    "base": AutoModel,
    "sequence_classification": AutoModelForSequenceClassification,
    "masked_lm": AutoModelForMaskedLM,
}
ATTENTIONS = ("eager", "sdpa")
DEVICES = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 16,
}


def tiny_config(family: str, **changes: bool) -> PreTrainedConfig:
    if family == "distilbert":
        return DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=HIDDEN,
            n_layers=LAYERS,
            n_heads=HEADS,
            hidden_dim=NEURONS,
            max_position_embeddings=16,
        )
    if family == "electra":
        return ElectraConfig(**_SHAPE, embedding_size=8)
    return {"bert": BertConfig, "roberta": RobertaConfig}[family](**_SHAPE, **changes)


#: One config of each family.
CONFIGS = {family: tiny_config(family) for family in FAMILIES}


@torch.no_grad()
def randomised_(model: nn.Module, seed: int = 1) -> nn.Module:
    """Draw all parameters and running statistics anew: native initialization makes biases zero and norms neutral."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        is_norm = "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue  # sinusoids, which are not saved
            parameter.normal_(std=0.3, generator=random).add_(float(is_norm and name == "weight"))
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_(generator=random)
            module.running_var.uniform_(0.5, 2.0, generator=random)
    return model.eval()


@cache
def _prototype(family: str, head: str) -> PreTrainedModel:
    return randomised_(AUTO_CLASSES[head].from_config(tiny_config(family)))


def tiny_model(
    family: str, head: str = "base", *, attention: str = "sdpa", dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    """Random model in evaluation mode, the same in every call; float64, so that only real differences show."""
    model = deepcopy(_prototype(family, head)).to(dtype)
    model.set_attn_implementation(attention)
    return model


def dense_model(family: str, head: str = "base") -> PreTrainedModel:
    """Random float32 model in evaluation mode, another one in every call."""
    return randomised_(AUTO_CLASSES[head].from_config(tiny_config(family)), seed=int(torch.randint(2**31, ())))


def tiny_decoder(attention: str = "sdpa") -> PreTrainedModel:
    """BERT that attends to its past and to the states of an encoder."""
    config = tiny_config("bert", is_decoder=True, add_cross_attention=True)
    model = randomised_(BertLMHeadModel(config)).double()
    model.set_attn_implementation(attention)
    return model


def batch() -> dict[str, Tensor]:
    """Two sentences, the second one padded."""
    ids = torch.arange(4, 16).remainder(VOCABULARY).view(2, 6)  # (batch, tokens)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Tensor] | Tensor) -> Tensor:
    """First output at attended positions, in evaluation mode."""
    model.eval()
    if isinstance(inputs, Tensor):
        return model(inputs)
    output = model(**inputs)[0]  # (batch, tokens, ...) or (batch, labels)
    return output[inputs["attention_mask"].bool()] if output.ndim > 2 else output


@dataclass(frozen=True)
class Place:
    """Where a sub-layer keeps its units: unit k owns row and column blocks number k."""

    rows: str
    columns: str
    num_units: int
    num_rows: int = 1
    num_columns: int = 1
    companions: tuple[str, ...] = ()


_BERT_LAYER = {
    "attention": ("attention.self.value", "attention.output.dense", "attention.self.query", "attention.self.key"),
    "feed_forward": ("intermediate.dense", "output.dense"),
}
_CROSS_ATTENTION = tuple(path.replace("attention.", "crossattention.", 1) for path in _BERT_LAYER["attention"])
_BERT_DECODER_LAYER = {
    "attention": _BERT_LAYER["attention"],
    "cross_attention": _CROSS_ATTENTION,
    "feed_forward": _BERT_LAYER["feed_forward"],
}
_DISTILBERT_LAYER = {
    "attention": ("attention.v_lin", "attention.out_lin", "attention.q_lin", "attention.k_lin"),
    "feed_forward": ("ffn.lin1", "ffn.lin2"),
}


def places(model: PreTrainedModel) -> dict[str, Place]:
    """Write down each sub-layer of a tiny dense model, in the order of the forward pass."""
    is_distilbert = model.config.model_type == "distilbert"
    layers = "transformer.layer" if is_distilbert else "encoder.layer"
    is_decoder = getattr(model.config, "add_cross_attention", False)
    blocks = _DISTILBERT_LAYER if is_distilbert else _BERT_DECODER_LAYER if is_decoder else _BERT_LAYER
    root = layers if model.base_model is model else f"{model.base_model_prefix}.{layers}"
    found = {}
    for layer in range(LAYERS):
        for name, modules in blocks.items():
            rows, columns, *companions = (f"{root}.{layer}.{module}" for module in modules)
            sizes = (NEURONS, 1, 1) if name == "feed_forward" else (HEADS, HEAD_SIZE, HEAD_SIZE)
            found[f"{root}.{layer}.{name}"] = Place(rows, columns, *sizes, tuple(companions))
    return found


@torch.no_grad()
def end_by_hand_(model: nn.Module, where: dict[str, Place], keep: dict[str, Tensor]) -> nn.Module:
    """Zero the weights of every unit on the sides that end it, one unit at a time. Biases stay."""
    for path, place in where.items():
        made, read = model.get_submodule(place.rows).weight, model.get_submodule(place.columns).weight
        for unit in range(place.num_units):
            if not keep[path][0, unit]:
                made[unit * place.num_rows : (unit + 1) * place.num_rows] = 0
            if not keep[path][1, unit]:
                read[:, unit * place.num_columns : (unit + 1) * place.num_columns] = 0
    return model


def all_kept(where: dict[str, Place]) -> dict[str, Tensor]:
    return {path: torch.ones(2, place.num_units, dtype=torch.bool) for path, place in where.items()}


def mixed_keep(where: dict[str, Place], unfoldable: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """End units of every kind: kept, in, out, both, by turns."""
    kept = all_kept(where)
    for path, keep in kept.items():
        keep[0, 1::4] = path in unfoldable
        keep[1, 2::4] = False
        keep[:, 3::4] = False
    return kept


#: Fate of a unit -> what is kept of its in-side and its out-side.
FATES = {"kept": (True, True), "in": (False, True), "out": (True, False), "both": (False, False)}


def unit_masks(num_units: int, *, foldable: bool = True, may_be_empty: bool = True) -> st.SearchStrategy[Tensor]:
    """Draw masks of one sub-layer, shape (2, num_units), often with none or all of the units left."""
    fates = [fate for name, fate in FATES.items() if foldable or name != "in"]
    fate = st.sampled_from(fates)
    same = (fate if may_be_empty else st.just(FATES["kept"])).map(lambda one: [one] * num_units)
    each = st.lists(fate, min_size=num_units, max_size=num_units)
    if not may_be_empty:
        each = each.map(lambda several: [FATES["kept"], *several[1:]])
    return st.one_of(each, same).map(lambda several: torch.tensor(several).T.contiguous())


def mask_of(keep: dict[str, Tensor]) -> RelevanceMask:
    return RelevanceMask({path: kept.clone() for path, kept in keep.items()})


#: Heads and neurons that each layer keeps.
KeptUnits = tuple[tuple[Iterable[int], Iterable[int]], ...]
RAGGED: KeptUnits = (([0, 2], [1, 2, 5]), ([], []), ([3], [0]))
WHOLE_SUBLAYERS: KeptUnits = (
    (range(HEADS), range(NEURONS)),
    ([], range(NEURONS)),
    (range(HEADS), []),
)


def units_of(model: PreTrainedModel, kept: KeptUnits) -> Iterator[tuple[str, Place, list[int]]]:
    """Path and place of each sub-layer, and the units that it keeps."""
    for (path, place), units in zip(places(model).items(), chain.from_iterable(kept), strict=True):
        yield path, place, list(units)


def keep_units(model: PreTrainedModel, kept: KeptUnits, *, side: int) -> dict[str, Tensor]:
    """End all other units on one side: 0 for the in-side, where there are constants to fold, 1 for the out-side."""
    keep = {}
    for path, place, units in units_of(model, kept):
        num_units = len(model.get_submodule(place.rows).weight) // place.num_rows  # fewer than at first, if it was cut
        keep[path] = torch.ones(2, num_units, dtype=torch.bool)
        keep[path][side] = torch.isin(torch.arange(num_units), torch.tensor(units))
    return keep


@torch.no_grad()
def cut_(model: PreTrainedModel, kept: KeptUnits = RAGGED) -> PreTrainedModel:
    """Take all other units out. No constants are folded."""
    counts = (
        ("n_heads", "dim") if model.config.model_type == "distilbert" else ("num_attention_heads", "all_head_size")
    )
    for _, place, units in units_of(model, kept):
        for path in (place.rows, *place.companions):
            select_(model.get_submodule(path), 0, units, place.num_rows)
        select_(model.get_submodule(place.columns), 1, units, place.num_columns)
        if place.companions:
            core = model.get_submodule(place.rows.rpartition(".")[0])
            for name, size in zip(counts, (1, HEAD_SIZE), strict=True):
                setattr(core, name, size * len(units))
    return model


def select_(linear: nn.Linear, axis: int, units: list[int], size: int = 1) -> None:
    """Keep the rows or columns of some units only."""
    features = torch.tensor([size * unit + offset for unit in units for offset in range(size)], dtype=torch.long)
    linear.weight = nn.Parameter(linear.weight.index_select(axis, features))
    if axis == 0:
        linear.bias = nn.Parameter(linear.bias[features])
    linear.out_features, linear.in_features = linear.weight.shape


@dataclass(frozen=True)
class Chain:
    """A plain chain, what it reads, where its units lie and which of them cannot be folded."""

    build: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    places: dict[str, Place]
    unfoldable: tuple[str, ...] = ()

    @property
    def has_maps(self) -> bool:
        """Whether it holds convolutions, which torch cannot run without a channel."""
        return len(self.shape) > 2

    def model(self) -> nn.Sequential:
        return randomised_(self.build()).double()

    def inputs(self) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def _lenet_300() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)
    )


def _one_activation_for_all() -> nn.Sequential:
    act = nn.Sigmoid()
    return nn.Sequential(nn.Linear(6, 5), act, nn.Dropout(0.5), nn.Linear(5, 4), act, nn.Linear(4, 3))


def _nested() -> nn.Sequential:
    features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2))
    neck = nn.Sequential(nn.Conv2d(4, 3, 2, stride=2), nn.Tanh(), nn.Dropout2d())
    head = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Softplus(), nn.Linear(5, 2))
    return nn.Sequential(features, nn.Sequential(neck, nn.Identity()), head)


def _zero_padded() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding="same", bias=False),
        nn.Sigmoid(),
        nn.AvgPool2d(3, padding=1),
        nn.Flatten(),
        nn.Linear(12, 2),
    )


def _without_biases() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)
    )


def _one_dimensional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm1d(4, affine=False),
        nn.GELU(),
        nn.AvgPool1d(2),
        nn.Conv1d(4, 4, 3, padding=1, padding_mode="replicate"),
        nn.ELU(),
        nn.AdaptiveAvgPool1d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


#: Pooling of a (batch, channels, 6, 6) map -> positions that it leaves.
POOLINGS = {
    "average": (nn.AvgPool2d(2), 9),
    "average_ceil": (nn.AvgPool2d(4, ceil_mode=True), 4),
    "average_padding_not_counted": (nn.AvgPool2d(4, padding=1, count_include_pad=False), 4),
    "max": (nn.MaxPool2d(2), 9),
    "max_padded": (nn.MaxPool2d(3, padding=1), 4),
    "adaptive_average": (nn.AdaptiveAvgPool2d(4), 16),
    "adaptive_max": (nn.AdaptiveMaxPool2d((1, 2)), 2),
}


def _pooled(name: str) -> Chain:
    pooling, positions = POOLINGS[name]
    return Chain(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.Sigmoid(), deepcopy(pooling), nn.Flatten(), nn.Linear(4 * positions, 3)
        ),
        (2, 2, 8, 8),
        {"0": Place("0", "4", 4, num_columns=positions)},
    )


CHAINS = {
    "lenet_300": Chain(_lenet_300, (3, 2, 3), {"1": Place("1", "3", 5), "3": Place("3", "5", 4)}),
    "one_activation_for_all": Chain(
        _one_activation_for_all, (3, 6), {"0": Place("0", "3", 5), "3": Place("3", "5", 4)}
    ),
    "nested": Chain(
        _nested,
        (2, 2, 10, 10),
        {
            "0.0": Place("0.0", "1.0.0", 4),
            "1.0.0": Place("1.0.0", "2.1", 3, num_columns=4),
            "2.1": Place("2.1", "2.4", 5),
        },
    ),
    "zero_padded": Chain(
        _zero_padded,
        (2, 2, 6, 6),
        {"0": Place("0", "3", 4), "3": Place("3", "7", 3, num_columns=4)},
        unfoldable=("0", "3"),
    ),
    "without_biases": Chain(
        _without_biases, (3, 6), {"0": Place("0", "2", 5), "2": Place("2", "4", 4)}, unfoldable=("2",)
    ),
    "one_dimensional": Chain(
        _one_dimensional, (2, 2, 8), {"0": Place("0", "4", 4), "4": Place("4", "8", 4, num_columns=2)}
    ),
    **{f"pooling_{name}": _pooled(name) for name in POOLINGS},
}


@torch.no_grad()
def trained_posterior_(model: nn.Module) -> nn.Module:
    """Move what patching added, and let about a third of the units lose one of their sides."""
    for layer in variational_layers(model).values():
        layer.log_var.uniform_(-8, -4)
        layer.group_scale.uniform_(0.5, 1.5)
        layer.group_scale[torch.rand(len(layer.group_scale)) < 0.3] = 1e-6
    return model
