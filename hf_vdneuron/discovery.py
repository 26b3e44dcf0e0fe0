# SPDX-License-Identifier: Apache-2.0
"""Find the heads and neurons of a model whose type has no row in the table, and make sure of them."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast
from zlib import crc32

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_vdneuron.architectures import ARCHITECTURES
from hf_vdneuron.dependence import Dependence, randomised_twin
from hf_vdneuron.discovered import Discovery, remember_
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.exactness import run_alike
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.probing import probe_sublayers
from hf_vdneuron.pruning import prunes_exactly
from hf_vdneuron.sublayers import Sublayer, Unit


__all__ = ["discover", "few_rows"]

_LOGGER = logging.getLogger(__name__)

#: Examples that are enough to see what depends on what.
NUM_EXAMPLES = 2

#: Share of the units that a trial removes.
_REMOVED = 0.5


def discover(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Sublayer]:
    """Find what can be removed exactly from a model of any type, and let the model remember it.

    Everything that takes a model of a supported type takes this one from then on, and every removal from it is tried
    on a copy first. What is found by what depends on what is tried out here too: on a copy with random weights, and
    half of the units or all of a block removed, the pruned model has to say what the masked one says.

    Args:
        model: A dense model of a type without a row in the table of architectures; nothing else about it changes. It
            keeps the inputs too, to try removals with.
        inputs: Keyword arguments of its forward pass, on its device; two examples are enough.

    Returns:
        The sub-layers, in the order of the forward pass, each named for the layer that reads its units.

    Raises:
        TypeError: If it is not a transformers model.
        ValueError: If it is patched, its type has a row already, it cannot run on the inputs, or nothing is found.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"Cannot look into a `{type(model).__name__}`: expected a transformers model.")
    if variational_layers(model):
        raise ValueError("The model is patched already: expected a dense one. Call `unpatch_model_` first.")
    if model.config.model_type in ARCHITECTURES:
        raise ValueError(
            f"Model type `{model.config.model_type}` has a row in the table of architectures: expected a type without "
            "one. There is nothing to discover."
        )
    with torch.inference_mode(False), torch.enable_grad():
        inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        twin = randomised_twin(model)
        found = _probe(twin, inputs)
        exact = _exact(twin, [part for part in found if _lies_in_base(model, part)], inputs)
    if not exact:
        raise ValueError(_nothing(model, found))
    remember_(model, Discovery(tuple(exact), dict(inputs)))
    _LOGGER.warning(_notice(model, found, exact))
    return exact


def few_rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Take the first examples of a batch.

    Args:
        batch: Keyword arguments of a forward pass.

    Returns:
        The same, with `NUM_EXAMPLES` entries of whatever has one for each example.
    """
    sizes = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim]

    def is_per_example(value: object) -> bool:
        has_entries = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)
        return has_entries and bool(sizes) and len(cast(Any, value)) == sizes[0]

    return {name: value[:NUM_EXAMPLES] if is_per_example(value) else value for name, value in batch.items()}


def _lies_in_base(model: PreTrainedModel, sublayer: Sublayer) -> bool:
    """Tell whether all of a sub-layer is in the base model, whose sizes alone are saved with it."""
    inside = "" if model.base_model is model else f"{model.base_model_prefix}."
    return all(part.module.startswith(inside) for part in sublayer.slices)


def _probe(twin: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Sublayer]:
    _require_runs(twin, inputs)
    try:
        return probe_sublayers(Dependence(twin, inputs))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # from autograd
        raise ValueError(f"`{type(twin).__name__}` cannot be looked into, as it has no gradients: {error}") from error


def _require_runs(twin: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    try:
        run_alike(twin, inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model says to inputs that it does not know
        raise ValueError(
            f"`{type(twin).__name__}` cannot run on these inputs ({error}): expected the keyword arguments of its "
            f"forward pass, such as `{twin.main_input_name}`."
        ) from error


# ---- Trials ----

Choice = Callable[[Sublayer], Tensor]
"""Says which units of a sub-layer stay, bool of shape `(num_units,)`."""


def _some(sublayer: Sublayer) -> Tensor:
    """Keep about half of the units, not the first one, and the last one."""
    random = torch.Generator().manual_seed(crc32(sublayer.path.encode()))  # blocks lose different ones
    kept = torch.rand(sublayer.num_units, generator=random) > _REMOVED
    kept[0], kept[-1] = False, True
    return kept


def _none(sublayer: Sublayer) -> Tensor:
    """Keep no unit, or as few as there have to be."""
    return torch.arange(sublayer.num_units) < sublayer.minimum


def _exact(twin: PreTrainedModel, found: Sequence[Sublayer], inputs: Mapping[str, Any]) -> list[Sublayer]:
    """Choose those from which units can be removed exactly, and say how many of theirs have to stay."""

    def holds(sublayers: Iterable[Sublayer], choice: Choice) -> bool:
        trial = deepcopy(twin)
        remember_(trial, Discovery(tuple(sublayers), inputs))
        keep = {
            part.path: torch.stack([torch.ones(part.num_units, dtype=torch.bool), choice(part)]) for part in sublayers
        }
        return prunes_exactly(trial, RelevanceMask(keep), inputs)

    if found and holds(found, _some) and holds(found, _none):
        return list(found)
    exact: dict[str, Sublayer] = {}
    for alike in _kinds(found):
        needing = [replace(part, minimum=max(1, part.minimum)) for part in alike]
        for some in (alike, needing):
            if holds(some, _some) and holds(some, _none):
                exact |= {part.path: part for part in some}
                break
    chosen = [exact[part.path] for part in found if part.path in exact]
    return chosen if chosen and holds(chosen, _some) and holds(chosen, _none) else []


def _kinds(sublayers: Iterable[Sublayer]) -> list[list[Sublayer]]:
    """Group the sub-layers that differ in the number of their layer only."""
    kinds: dict[tuple[str, Unit], list[Sublayer]] = {}
    for part in sublayers:
        kinds.setdefault((_kind(part), part.unit), []).append(part)
    return list(kinds.values())


def _kind(sublayer: Sublayer) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", sublayer.path)


# ---- Words ----


def _nothing(model: nn.Module, found: Sequence[Sublayer]) -> str:
    refused = f" What was found, {_list_kinds(found)}, cannot be removed exactly." if found else ""
    return (
        f"Found no heads or neurons to remove in a `{type(model).__name__}`.{refused} Expected linear layers or "
        "convolutions each of whose inputs depends on a row of its own in a layer before, or on a block of rows like "
        "a head, and that nothing else reads. To say where they are, write a row for its model type in "
        "`hf_vdneuron/architectures.py`."
    )


def _notice(model: PreTrainedModel, found: Sequence[Sublayer], exact: Sequence[Sublayer]) -> str:
    counts = Counter({unit: sum(part.num_units for part in exact if part.unit is unit) for unit in Unit})
    names = {part.path for part in exact}
    refused = [part for part in found if part.path not in names]
    left = f" Left alone, as nothing can be removed exactly: {_list_kinds(refused)}." if refused else ""
    return (
        f"Model type `{model.config.model_type}` has no row in the table of architectures. Found "
        f"{counts[Unit.HEAD]} heads and {counts[Unit.NEURON]} neurons in {_list_kinds(exact)}, and tried out that "
        f"removing them is exact.{left}"
    )


def _list_kinds(sublayers: Iterable[Sublayer]) -> str:
    return ", ".join(f"`{kind}`" for kind in dict.fromkeys(map(_kind, sublayers)))
