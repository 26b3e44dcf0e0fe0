# SPDX-License-Identifier: Apache-2.0
"""Make a loaded model variational in place, and ordinary again."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.config import Grouping, PriorType, VDConfig
from hf_vdneuron.elbo import init_priors_, variational_layers
from hf_vdneuron.experts import ExpertMatrix
from hf_vdneuron.layers import VDExpertMatrix, dense_layer, feature_axis, make_dense_, make_variational_
from hf_vdneuron.priors import GaussianMixturePrior, GroupGaussianPrior, Prior, WeightPrior
from hf_vdneuron.sublayers import Axis, Role, SideName, Slice, Sublayer
from hf_vdneuron.variational_experts import join_, leave_


__all__ = ["patch_model_", "select_sublayers", "unpatch_model_"]

PRIORS: dict[PriorType, type[Prior]] = {
    PriorType.GROUP: GroupGaussianPrior,
    PriorType.MIXTURE: GaussianMixturePrior,
    PriorType.WEIGHT: WeightPrior,
}


#: Attribute that tells that the layers of a model are not its own plain ones -> how they became so, and the way out.
_NOT_PLAIN = {
    "is_quantized": ("quantised", "load it without a quantization config, and quantise what is left after pruning"),
    "peft_config": ("PEFT-wrapped", "merge its adapters with `merge_and_unload()`, or add them to the pruned model"),
    "tp_size": ("split over devices by tensor parallelism", "load it without `tp_plan`"),
}


@dataclass(frozen=True)
class _Claim:
    """A sub-layer's wish that a weight matrix share a prior named `key`."""

    key: str
    part: Slice
    sublayer: Sublayer

    def feature_group(self) -> Tensor:
        """Tell the unit of each feature, shape `(num_features,)`: of a fused matrix, in all slices that it holds."""
        units = torch.arange(self.sublayer.num_units)
        held = [
            part for part in self.sublayer.matrices if (part.module, part.axis) == (self.part.module, self.part.axis)
        ]
        num_features = self.sublayer.num_units * sum(part.size for part in held)
        return torch.stack([part.spread(units, num_features, elsewhere=-1) for part in held]).amax(0)


def _claims(sublayer: Sublayer, config: VDConfig) -> Iterator[_Claim]:
    """List the slices of a sub-layer that become variational, in-side first."""
    coupled = config.grouping is Grouping.COUPLED
    for side in sublayer.sides:
        if side.name is SideName.IN or config.grouping is not Grouping.ROWS:
            key = sublayer.path if coupled else f"{sublayer.path}.{side.name.value}"
            for part in side.slices:
                yield _Claim(key, part, sublayer)
    if config.query_key:
        key = sublayer.path if coupled else f"{sublayer.path}.query_key"
        for part in sublayer.companions:
            if part.role in (Role.QUERY, Role.KEY):
                yield _Claim(key, part, sublayer)


def _assign(sublayers: list[Sublayer], config: VDConfig) -> dict[str, _Claim]:
    """Give each weight matrix its one prior."""
    # In a chain a matrix is the out-side of one layer and the in-side of the next. Its rows are what makes a neuron,
    # so the in-side's claim goes first.
    claims = [claim for sublayer in sublayers for claim in _claims(sublayer, config)]
    claims.sort(key=lambda claim: claim.part.axis is Axis.IN)
    assigned: dict[str, _Claim] = {}
    for claim in claims:
        assigned.setdefault(claim.part.module, claim)
    return assigned


def _require_plain(model: nn.Module) -> None:
    """Refuse a model whose weights are packed, wrapped or in pieces."""
    for attribute, (state, way_out) in _NOT_PLAIN.items():
        if getattr(model, attribute, None):
            raise ValueError(f"The model is {state}: expected plain layers of whole weights. Please {way_out}.")


def select_sublayers(sublayers: list[Sublayer], config: VDConfig) -> list[Sublayer]:
    """Choose the sub-layers that a config makes variational.

    Args:
        sublayers: All sub-layers of a model.
        config: Patterns and units to choose by. Patterns follow `fnmatch` on the sub-layer's path.

    Returns:
        The chosen ones, in order.

    Raises:
        ValueError: If a pattern matches nothing, or nothing is left to choose.
    """
    paths = [sublayer.path for sublayer in sublayers]
    for pattern in (*(config.include or ()), *config.exclude):
        if not any(fnmatch(path, pattern) for path in paths):
            raise ValueError(f"Pattern `{pattern}` matches no sub-layer. There are: {', '.join(paths)}.")
    chosen = [
        sublayer
        for sublayer in sublayers
        if sublayer.unit in config.units
        and sublayer.num_units > 0
        and (config.include is None or any(fnmatch(sublayer.path, pattern) for pattern in config.include))
        and not any(fnmatch(sublayer.path, pattern) for pattern in config.exclude)
    ]
    if not chosen:
        raise ValueError(
            f"`include`, `exclude`, `heads` and `neurons` leave no sub-layer of {len(paths)}. There are: "
            f"{', '.join(paths)}."
        )
    return chosen


def patch_model_(model: nn.Module, config: VDConfig | None = None) -> nn.Module:
    """Make a model's heads and neurons variational, in place.

    Every patched layer stays the object it was, with its parameters, hooks, ties and device, and computes what it
    did until noise is switched on. Load the model first: parameters that `from_pretrained` does not find in a
    checkpoint are left uninitialised.

    Args:
        model: A transformers model of a supported type, or a plain PyTorch chain.
        config: What to patch and how; the defaults suit a pretrained transformer.

    Returns:
        The same model.

    Raises:
        TypeError: If the model or one of its layers is of an unsupported type.
        ValueError: If it is patched already, quantised, PEFT-wrapped or split over devices, or a pattern matches
            nothing.
    """
    config = config or VDConfig()
    _require_plain(model)
    if variational_layers(model):
        raise ValueError("The model is patched already: call `unpatch_model_` first to patch it in another way.")
    sublayers = select_sublayers(find_sublayers(model), config)
    masked: dict[str, set[Axis]] = {}
    for part in (part for sublayer in sublayers for side in sublayer.sides for part in side.slices):
        masked.setdefault(part.module, set()).add(part.axis)
    for path, claim in _assign(sublayers, config).items():
        layer = dense_layer(model, path)
        prior = PRIORS[config.prior](claim.feature_group(), num_groups=claim.sublayer.num_units, key=claim.key)
        variational = make_variational_(
            layer,
            prior.to(layer.weight.device),
            group_axis=feature_axis(layer, claim.part.axis),
            log_var=config.initial_log_var,
            group_scale=config.group_scale,
            masked=tuple(masked.get(path, ())),
        )
        if isinstance(variational, VDExpertMatrix):
            join_(variational)
    init_priors_(model)
    return model


def unpatch_model_(model: nn.Module) -> nn.Module:
    """Make a patched model ordinary again, in place; each weight becomes its posterior mean under the masks.

    Args:
        model: A patched model, or one without variational layers, which is left as it is.

    Returns:
        The same model.
    """
    for layer in variational_layers(model).values():
        dense = make_dense_(layer)
        if isinstance(dense, ExpertMatrix):
            leave_(dense)
    return model
