# SPDX-License-Identifier: Apache-2.0
"""Choose what to keep without training: mask search, rearrangement and tuning, for `benchmark.py`.

References:
    Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", 2022, https://arxiv.org/abs/2204.09656
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor, nn

from benchmarks.baselines import Batches, Scores
from benchmarks.gates import gate_gradients, gated
from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.layers import DenseLayer, dense_layer, feature_axis
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.sublayers import Axis, Sublayer


__all__ = ["MASK_SEARCHES", "ONE_SHOT", "rearrange", "search_mask", "solve_gates", "tune_gates"]

#: The method that tunes its mask and is done: nothing is trained.
ONE_SHOT = "fisher_oneshot"

#: Methods whose mask is searched; the other recovers like all.
MASK_SEARCHES = ("fisher", ONE_SHOT)

#: Weight of the squared change of the gates beside the squared error (Kwon 2022, section 4.3).
DAMPING = 1.0

#: A gate beyond this, on either side, hurts more than it helps (Kwon 2022, section 4.3).
LARGEST_GATE = 10.0

#: Iterations of LSMR at most, per unit: CuPy's limit, which the paper's code relies on. SciPy's own is a fifth of it,
#: which a few heads exceed.
ITERATIONS_PER_UNIT = 5

#: How LSMR says that it has not converged: all codes but 0 to 2.
LEAST_FAILURE = 3


def search_mask(model: nn.Module, batches: Batches, keep: Callable[[Scores], RelevanceMask]) -> RelevanceMask:
    r"""Search a mask by the diagonal of the gates' Fisher information, then rearrange it by each sub-layer's block.

    Args:
        model: A dense model.
        batches: Training rows.
        keep: Keeps what the scores :math:`\mathbb E_i (\partial L_i / \partial m_u)^2` (Kwon 2022, eq. 7) say.

    Returns:
        A mask with as many units in each sub-layer as `keep` leaves there. The others end on both sides.
    """
    gradients = gate_gradients(model, batches)
    found = keep({path: slopes.square().mean(0) for path, slopes in gradients.items()})
    return RelevanceMask({
        part.path: rearrange(found.keep[part.path].all(0), gradients[part.path]).expand(len(part.sides), -1)
        for part in find_sublayers(model)
    })


def rearrange(keep: Tensor, gradients: Tensor) -> Tensor:
    r"""Swap units of one sub-layer so that those removed do not add up.

    Minimises :math:`\sum_i (\sum_u (1 - m_u) \, \partial L_i / \partial m_u)^2`, the Fisher information of all gates
    between the removed ones (Kwon 2022, section 4.2). Greedily: each kept unit in turn, the least informative first,
    is put to the removed ones, and whichever of them is then best taken back is kept in its place.

    Args:
        keep: What a search keeps, bool, shape `(num_units,)`, True = keep.
        gradients: Derivative of each example's loss by each gate, shape `(num_examples, num_units)`.

    Returns:
        As many units, bool, shape `(num_units,)`, True = keep.
    """
    information = gradients.double().T @ gradients.double()  # (num_units, num_units)
    alone = information.diagonal()
    removed = ~keep
    with_removed = information[:, removed].sum(1)  # each unit's information with all removed ones together
    for candidate in alone.argsort(stable=True).tolist():
        if not keep[candidate]:
            continue
        removed[candidate] = True
        with_removed += information[candidate]
        # The square of a sum s without its part g is s^2 - 2 s g + g^2.
        back = (alone - 2 * with_removed).masked_fill(~removed, torch.inf).argmin()
        removed[back] = False
        with_removed -= information[back]
    return ~removed


@torch.no_grad()
def tune_gates(model: nn.Module, mask: RelevanceMask, batches: Collection[Mapping[str, Any]]) -> dict[str, Tensor]:
    r"""Find gates for what a mask keeps, so that the pruned model's hidden states are those of the dense one.

    From the first sub-layer to the last, the sum of the sub-layer's output and what bypasses it is fitted:

    .. math:: \min_m \| x' + f(x'; m) - (x + f(x; 1)) \|^2

    with :math:`x` the hidden states of the dense model and :math:`x'` those of the pruned one behind the gates found
    so far (Kwon 2022, section 4.3). The first sub-layer without a good solution keeps gates of 1, and so do those
    behind it. As in the paper's code, padding is left out, and the last sub-layer is fitted where a classifier reads
    it: at the first token.

    Args:
        model: A dense sequence classifier whose sub-layers end in an `nn.LayerNorm`; put into evaluation mode.
        mask: What is kept of it.
        batches: Training rows, read twice for each sub-layer.

    Returns:
        Path of each sub-layer -> gates of its units, shape `(num_units,)`; 0 for what is removed.
    """
    model.eval()
    sublayers = find_sublayers(model)
    gates = {part.path: next(model.parameters()).new_zeros(part.num_units) for part in sublayers}
    for part in sublayers:
        gates[part.path][mask.kept_units(part)] = 1
    for part in sublayers:
        kept = mask.kept_units(part)
        if not len(kept):
            continue
        gram = torch.zeros(len(kept), len(kept), dtype=torch.float64)
        pull = torch.zeros(len(kept), dtype=torch.float64)
        for batch in batches:
            its_gram, its_pull = _normal_equations(model, part, gates, batch, first_only=part is sublayers[-1])
            gram += its_gram
            pull += its_pull
        tuned = solve_gates(gram, pull)
        if tuned is None:
            break
        gates[part.path][kept] = tuned.to(gates[part.path])
    return gates


def solve_gates(gram: Tensor, pull: Tensor) -> Tensor | None:
    r"""Solve for the gates of one sub-layer: :math:`m = 1 + r` with :math:`A^T A \, r = A^T (b - A 1)`, damped.

    Column :math:`u` of :math:`A` is what unit :math:`u` adds to the output, :math:`b` what the output should be. The
    damping is on :math:`r`, so that without evidence a gate stays 1 (Kwon 2022, section 4.3).

    Args:
        gram: :math:`A^T A`, shape `(num_units, num_units)`.
        pull: :math:`A^T (b - A 1)`, shape `(num_units,)`.

    Returns:
        The gates, shape `(num_units,)`; None if the solver does not converge, or one is too large.
    """
    limit = ITERATIONS_PER_UNIT * len(pull)
    change, reason, *_ = lsmr(gram.numpy(), pull.numpy(), damp=DAMPING, maxiter=limit)
    gates = 1 + torch.from_numpy(change)
    return None if reason >= LEAST_FAILURE or gates.abs().max() > LARGEST_GATE else gates


def _normal_equations(
    model: nn.Module, part: Sublayer, gates: Mapping[str, Tensor], batch: Mapping[str, Any], *, first_only: bool
) -> tuple[Tensor, Tensor]:
    """Sum both sides of the equations over the positions of a batch, for the units of one sub-layer: gates are 1."""
    (columns,) = part.out_side.slices
    reader = dense_layer(model, columns.module)
    _, wanted = _emitted_and_total(model, reader, batch)
    with gated(model, gates):
        emitted, found = _emitted_and_total(model, reader, batch)
    read = batch["attention_mask"].bool()
    if first_only:
        read = read & (torch.arange(read.shape[1], device=read.device) == 0)
    kept = gates[part.path].nonzero().flatten()
    features = columns.features(kept).flatten()
    emitted = emitted[read][:, features]  # (positions, num_kept * size)
    weight = reader.weight.movedim(feature_axis(reader, Axis.IN), 0)[features]  # (num_kept * size, hidden)
    # What two features add to the outputs, multiplied and summed over positions and outputs, is the product of these
    # two sums. A unit is the sum of its features.
    gram = (weight @ weight.T) * (emitted.T @ emitted)
    pull = (emitted * ((wanted - found)[read] @ weight.T)).sum(0)
    block = (len(kept), columns.size)
    return gram.view(*block, *block).sum((1, 3)).double().cpu(), pull.view(block).sum(1).double().cpu()


class _Reached(Exception):
    """Ends a forward where all that was asked of it is known."""

    def __init__(self, total: Tensor) -> None:
        super().__init__()
        self.total = total


def _emitted_and_total(model: nn.Module, reader: DenseLayer, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a model until a sub-layer's output and what bypasses it are added up.

    Args:
        model: The model.
        reader: What reads the units of the sub-layer.
        batch: Keyword arguments of its forward.

    Returns:
        What the units emit, and the total: what the next norm gets, at the end of this sub-layer or the start of the
        next.

    Raises:
        ValueError: If there is no norm.
    """
    emitted: list[Tensor] = []

    def at_reader(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        emitted.append(inputs[0])

    def at_norm(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if emitted:
            raise _Reached(inputs[0])

    with ExitStack() as hooks:
        hooks.callback(reader.register_forward_pre_hook(at_reader).remove)
        for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
            hooks.callback(norm.register_forward_pre_hook(at_norm).remove)
        try:
            model(**batch)
        except _Reached as reached:
            return emitted[0], reached.total
    raise ValueError(
        f"No `nn.LayerNorm` follows `{reader}`: expected a transformer with a norm behind each sub-layer."
    )
