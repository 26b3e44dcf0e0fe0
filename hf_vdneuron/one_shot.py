# SPDX-License-Identifier: Apache-2.0
"""Sparsify without training: a posterior in closed form, a cut and least squares, a few times in turns."""

from copy import deepcopy
from dataclasses import replace
from math import isfinite
from typing import TypeVar

from transformers import PreTrainedModel

from hf_vdneuron.architectures import find_sublayers, is_supported
from hf_vdneuron.budget import Budget, Costs
from hf_vdneuron.config import VDConfig
from hf_vdneuron.curvature import Batches, estimate_curvature
from hf_vdneuron.discovery import discover, few_rows
from hf_vdneuron.evidence import closed_form_evidence
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.reconstruction import reconstruct_
from hf_vdneuron.relevance import unit_relevance
from hf_vdneuron.selection import FREE, Alignment, irremovable_units, keep_within, stages
from hf_vdneuron.targets import BUDGETS, DEFAULT_LENGTH


__all__ = ["sparsify"]

_Model = TypeVar("_Model", bound=PreTrainedModel)


def sparsify(
    model: _Model,
    calibration_data: Batches,
    *,
    target_speedup: float | None = None,
    target_sparsity: float | None = None,
    target_params: int | None = None,
    vd_config: VDConfig | None = None,
    max_length: int = DEFAULT_LENGTH,
    reconstruct: bool = True,
    alignment: Alignment = FREE,
) -> _Model:
    """Remove the heads and neurons that a fine-tuned model needs least, without training it.

    Takes minutes where training takes hours, and loses more for the same size: beyond twice the speed, train what is
    left.

    Args:
        model: A dense, fine-tuned model; it is left as it is. If its type has no row in the table of architectures,
            its heads and neurons are looked for first.
        calibration_data: Batches of a few hundred to a few thousand of its training examples, as keyword arguments of
            its forward, labels among them, on its device.
        target_speedup: Dense over pruned multiply-accumulates of heads and neurons, above 1.
        target_sparsity: Or the share of their weights to remove, between 0 and 1.
        target_params: Or how many parameters the whole model may have.
        vd_config: What to remove from, and by which prior; the defaults suit a pretrained transformer.
        max_length: Tokens of a sequence for which a speed-up is counted.
        reconstruct: Whether what is left is fitted to the dense model's outputs by least squares.
        alignment: Which numbers of heads and neurons a layer may keep.

    Returns:
        A smaller model of the same class, in evaluation mode.

    Raises:
        ValueError: If there is not exactly one target, or it is no number above 0 or out of reach, or a batch has no
            labels; or if there is nothing to remove in the model.
        TypeError: If it is not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"Cannot sparsify a `{type(model).__name__}` in one shot: expected a transformers model.")
    given = dict(zip(BUDGETS, (target_speedup, target_sparsity, target_params), strict=True))
    name, value = _only_target({name: value for name, value in given.items() if value is not None})
    dense, batches = deepcopy(model).eval(), list(calibration_data)
    if not batches:
        raise ValueError("`calibration_data` holds no batch: expected some training examples, with labels.")
    if not is_supported(dense):
        discover(dense, few_rows(batches[0]))
    budget = BUDGETS[name](Costs(dense, length=max_length), value)
    least = irremovable_units(unit_relevance(patch_model_(deepcopy(dense), vd_config)))
    budget.require_reachable(least)
    # What was trained stays as it is: the posterior only says what goes.
    pruned = deepcopy(dense)
    for stage in stages(budget, alignment, now=budget.cost({}), least=budget.cost(least)):
        left = replace(BUDGETS[name](Costs(pruned, length=max_length), value), limit=stage.limit)
        if left.cost({}) > left.limit:  # the stage before may have come further than it had to
            prune_model_(pruned, _choose(pruned, batches, left, vd_config, alignment))
            if reconstruct:
                reconstruct_(pruned, dense, batches)
    return pruned


def _only_target(targets: dict[str, float]) -> tuple[str, float]:
    """Check that one target is given, and that it is a number."""
    if len(targets) != 1:
        named = " and ".join(f"`{name}`" for name in targets) or "none"
        raise ValueError(f"There are several targets or none ({named}): expected exactly one of {', '.join(BUDGETS)}.")
    ((name, value),) = targets.items()
    if not (isfinite(value) and value > 0):
        raise ValueError(f"`{name}` is {value}: expected a finite number above 0.")
    return name, value


def _choose(
    model: PreTrainedModel, batches: Batches, budget: Budget, vd_config: VDConfig | None, alignment: Alignment
) -> RelevanceMask:
    """Choose what to keep by the evidence for it, with a posterior in closed form."""
    patched = patch_model_(deepcopy(model), vd_config)
    evidence = closed_form_evidence(patched, estimate_curvature(patched, batches))
    return keep_within(find_sublayers(patched), evidence, budget, alignment=alignment)
