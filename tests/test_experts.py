"""Experts as matrices and with a posterior, against a loop over experts made of plain linear layers."""

from collections.abc import Iterator
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from runs import CHECKPOINTING
from test_modeling_vdneuron_structure import refuse, skeleton
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo import ROWS, TOLERANCE, logits, masks, zoo_batch, zoo_model

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import Costs, unit_counts, units_left
from hf_vdneuron.config import VDConfig
from hf_vdneuron.curvature import estimate_curvature
from hf_vdneuron.elbo import kl_divergence, set_variational_, variational_layers
from hf_vdneuron.experts import DOWN, GATE_UP, ExpertMatrix, find_module
from hf_vdneuron.masks import RelevanceMask, mask_model_
from hf_vdneuron.modeling_vdneuron import PrunedStructure
from hf_vdneuron.modeling_vdneuron_experts import experts_config
from hf_vdneuron.one_shot import sparsify
from hf_vdneuron.patching import patch_model_, unpatch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.selection import Alignment
from hf_vdneuron.sublayers import Sublayer, Unit
from hf_vdneuron.variational_experts import VDExperts


MIXTURES = [row for row in ROWS if row in ("mixtral", "qwen2_moe", "qwen3_moe")]
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
EXPERTS, LAYER = 4, "model.layers.0.mlp.experts"

rows = pytest.mark.parametrize("row", MIXTURES)


def mixtures(model: nn.Module) -> list[Sublayer]:
    return [part for part in find_sublayers(model) if part.num_experts > 1]


def in_double(row: str) -> PreTrainedModel:
    """In float64, which grouped products do not know."""
    model = zoo_model(row).double()
    model.set_experts_implementation("eager")
    return model


class PlainExperts(nn.Module):
    """The oracle: a list of gated blocks, each of three linear layers, and a loop over tokens and their experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
        self.gates, self.ups, self.downs = (
            nn.ModuleList(_linear(weight) for weight in weights) for weights in (gate, up, experts.down_proj.detach())
        )

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        outputs = []
        for token, experts, shares in zip(hidden, index.tolist(), weights, strict=True):
            blocks = [(self.gates[e], self.ups[e], self.downs[e]) for e in experts]
            read = [down(F.silu(gate(token)) * up(token)) for gate, up, down in blocks]
            outputs.append(sum(share * one for share, one in zip(shares, read, strict=True)))
        return torch.stack(outputs)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def with_plain_experts(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose experts are linear layers."""
    plain = deepcopy(model)
    for part in mixtures(plain):
        block = plain.get_submodule(part.sides[0].slices[0].module.removesuffix(f".experts.{GATE_UP}"))
        block.experts = PlainExperts(block.experts)
    return plain


def by_expert(experts: PlainExperts) -> Iterator[tuple[str, nn.Module, int]]:
    for name, layers in (("gates", experts.gates), ("ups", experts.ups), ("downs", experts.downs)):
        yield from ((name, layer, expert) for expert, layer in enumerate(layers))


# ---- The matrix ----


@pytest.mark.parametrize("matrix", [GATE_UP, DOWN])
def test_matrix_is_that_of_all_experts_side_by_side(matrix: str) -> None:
    model = zoo_model("mixtral")
    experts, found = model.get_submodule(LAYER), find_module(model, f"{LAYER}.{matrix}")
    assert isinstance(found, ExpertMatrix)
    if matrix == GATE_UP:
        halves = experts.gate_up_proj.chunk(2, dim=1)
        expected = torch.cat([half[expert] for half, expert in product(halves, range(EXPERTS))])
    else:
        expected = torch.cat(list(experts.down_proj), dim=1)
    assert torch.equal(found.weight, expected)
    assert torch.equal(found.stored(found.weight), found.parameter)
    for expert in range(EXPERTS):
        assert torch.equal(found.of_expert(found.weight, expert), found.parameter[expert])
    assert torch.equal(found(torch.eye(expected.shape[1])).T, expected)


def test_units_own_their_gate_their_row_and_their_column() -> None:
    model = zoo_model("mixtral")
    (sublayer, *_) = mixtures(model)
    per_expert = sublayer.num_units // EXPERTS
    unit = torch.tensor([2 * per_expert + 5])  # neuron 5 of expert 2
    experts = model.get_submodule(LAYER)
    gate, up = experts.gate_up_proj[2].chunk(2)
    for part, expected in zip(sublayer.slices, (up[5], experts.down_proj[2, :, 5], gate[5]), strict=True):
        weight = find_module(model, part.module).weight
        feature = int(part.features(unit))
        assert torch.equal(weight[feature] if part.axis == "out" else weight[:, feature], expected)


@rows
def test_plain_experts_are_a_good_oracle(row: str) -> None:
    model = zoo_model(row)
    torch.testing.assert_close(logits(with_plain_experts(model)), logits(model), rtol=0, atol=TOLERANCE)


# ---- Cutting ----


@rows
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["ragged", "first_empty", "all_empty"])
def test_pruned_equals_masked_by_every_implementation(row: str, implementation: str, name: str) -> None:
    dense = zoo_model(row)
    mask = masks(dense)[name]
    expected = logits(with_plain_experts(mask_model_(deepcopy(dense), mask)))
    dense.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(mask_model_(deepcopy(dense), mask)), expected, rtol=0, atol=TOLERANCE)
    patched = mask_model_(patch_model_(deepcopy(dense)), mask)
    torch.testing.assert_close(logits(patched), expected, rtol=0, atol=TOLERANCE)
    for model in (prune_model_(dense, mask), prune_model_(patched, mask)):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=TOLERANCE)


@rows
def test_experts_keep_as_many_as_the_one_that_keeps_most(row: str) -> None:
    dense = zoo_model(row)
    mask = masks(dense)["ragged"]
    before = mixtures(dense)
    pruned = prune_model_(deepcopy(dense), mask)
    for sublayer, after in zip(before, mixtures(pruned), strict=True):
        kept = mask.keep[sublayer.path].all(0).view(EXPERTS, -1)
        most = int(kept.sum(1).max())
        assert kept.sum(1).min() < most < kept.shape[1]
        assert after.num_units == EXPERTS * most == unit_counts([sublayer], mask)[sublayer.path]
        path = sublayer.sides[0].slices[0].module.removesuffix(f".{GATE_UP}")
        whole, cut = dense.get_submodule(path), pruned.get_submodule(path)
        assert cut.intermediate_dim == most
        for expert in range(EXPERTS):
            columns = cut.down_proj[expert]
            read = columns.any(0)
            assert torch.equal(columns[:, read], whole.down_proj[expert][:, kept[expert]])
            gates, neurons = (half[expert][kept[expert]] for half in whole.gate_up_proj.chunk(2, dim=1))
            assert torch.equal(
                cut.gate_up_proj[expert].unflatten(0, (2, most))[:, read], torch.stack([gates, neurons])
            )


def test_costs_count_the_experts_that_work() -> None:
    model = zoo_model("mixtral")
    costs = Costs(model, length=8)
    (sublayer, *_) = mixtures(model)
    one_less_each = {sublayer.path: sublayer.num_units - EXPERTS}
    # Three weights for each pair of a neuron and a hidden feature, of four experts of which two work.
    assert costs.parameters({}) - costs.parameters(one_less_each) == 3 * 16 * EXPERTS
    assert costs.macs({}) - costs.macs(one_less_each) == 8 * 3 * 16 * 2


@rows
@pytest.mark.parametrize("step", [1, 8])
def test_selection_takes_as_many_from_each_expert(row: str, step: int) -> None:
    dense = zoo_model(row)
    alignment = Alignment(round_neurons_to=step)
    small = sparsify(dense, [zoo_batch(dense)], target_speedup=1.7, max_length=8, alignment=alignment)
    counts = [part.num_units // EXPERTS for part in mixtures(small)]
    assert any(count < part.num_units // EXPERTS for count, part in zip(counts, mixtures(dense), strict=True))
    assert all(count % step == 0 for count in counts)
    for part in mixtures(small):
        # Nothing is left that is not read: no room went to waste.
        assert find_module(small, part.out_side.slices[0].module).weight.any(0).all()


@pytest.mark.parametrize(("row", "name"), [("mixtral", "intermediate_size"), ("qwen3_moe", "moe_intermediate_size")])
@pytest.mark.parametrize("left", [8, 6])
def test_equal_numbers_are_an_ordinary_checkpoint_if_it_runs_anywhere(row: str, name: str, left: int) -> None:
    model = zoo_model(row)
    mask = RelevanceMask({
        part.path: torch.stack([
            torch.ones(part.num_units, dtype=torch.bool),
            torch.arange(part.num_units) % 16 < left,
        ])
        for part in mixtures(model)
    })
    expected = logits(mask_model_(deepcopy(model), mask))
    prune_model_(model, mask)
    assert (type(model) is type(zoo_model(row))) == (left == 8)
    assert getattr(model.config, name) == (8 if left == 8 else 16)
    assert hasattr(model.config, "vdneuron") == (left != 8)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=TOLERANCE)
    assert logits(model.bfloat16()).isfinite().all()


def test_grouped_products_are_left_to_even_numbers() -> None:
    config = zoo_model("mixtral").config
    assert config._experts_implementation == "grouped_mm"
    for neurons, dtype, is_even in [
        (8, torch.bfloat16, True),
        (4, torch.bfloat16, False),
        (4, torch.float32, True),
        (0, torch.float32, False),
    ]:
        seen = experts_config(config, torch.empty(2, 3, neurons, dtype=dtype))
        assert seen._experts_implementation == ("grouped_mm" if is_even else "eager")
        assert seen.hidden_size == config.hidden_size
    config._experts_implementation = "batched_mm"
    assert experts_config(config, torch.empty(2, 3, 5)) is config


GATE_UP_SHAPE, DOWN_SHAPE = "layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    "changes",
    [
        {GATE_UP_SHAPE: None},
        {DOWN_SHAPE: None},
        {GATE_UP_SHAPE: [EXPERTS, 20, 16]},
        {GATE_UP_SHAPE: [EXPERTS, 17, 16]},
        {GATE_UP_SHAPE: [3, 16, 16]},
        {GATE_UP_SHAPE: [EXPERTS, 16, 15]},
        {DOWN_SHAPE: [EXPERTS, 15, 8]},
        {GATE_UP_SHAPE: [EXPERTS, 64, 16], DOWN_SHAPE: [EXPERTS, 16, 32]},
        {DOWN_SHAPE: [EXPERTS, 128]},
    ],
    ids=str,
)
def test_damaged_shapes_of_experts_are_refused(changes: dict[str, Any]) -> None:
    model = zoo_model("mixtral")
    prune_model_(model, masks(model)["ragged"])
    honest = model.config.vdneuron
    fitting = {**honest["shapes"], GATE_UP_SHAPE: [EXPERTS, 16, 16], DOWN_SHAPE: [EXPERTS, 16, 8]}
    native = skeleton(model)
    PrunedStructure.from_json({**honest, "shapes": fitting}).apply_(native)
    assert native.layers[0].mlp.experts.intermediate_dim == 8
    hostile = {path: shape for path, shape in {**fitting, **changes}.items() if shape is not None}
    refuse({**honest, "shapes": hostile}, model)


@pytest.mark.parametrize("name", ["ragged", "first_empty"])
def test_a_pruned_mixture_can_be_exported(name: str) -> None:
    model = zoo_model("mixtral", "sdpa")
    prune_model_(model, masks(model)[name])
    model.config.use_cache = False
    inputs = {key: zoo_batch(model)[key] for key in ("input_ids", "attention_mask")}
    program = torch.export.export(model, (), inputs).module()
    others = {key: value.flip(0) for key, value in inputs.items()}
    torch.testing.assert_close(program(**others).logits, model(**others).logits, rtol=0, atol=TOLERANCE)


# ---- The posterior ----


def variational_experts() -> tuple[VDExperts, tuple[Tensor, Tensor, Tensor]]:
    """Experts with a posterior of some width, in training mode, and tokens with where they go."""
    model = patch_model_(in_double("mixtral")).train()
    experts = model.get_submodule(LAYER)
    assert isinstance(experts, VDExperts)
    random = torch.Generator().manual_seed(3)
    for layer in (experts.gate_up, experts.down):
        layer.log_var.data.uniform_(-6, -3, generator=random)
        layer.group_scale.data.uniform_(0.5, 1.5, generator=random)
    hidden = torch.randn(3, 16, dtype=torch.float64, generator=random)
    weights = torch.rand(3, 2, dtype=torch.float64, generator=random)
    return experts, (hidden, torch.tensor([[0, 2], [3, 1], [2, 3]]), weights)


def test_noise_has_the_moments_of_random_weights() -> None:
    experts, (hidden, index, weights) = variational_experts()
    experts.down.noise = True
    draws = torch.stack([experts(hidden, index, weights) for _ in range(4000)]).detach()
    scale = experts.down.group_scale.detach().view(EXPERTS, 1, -1)
    variances = torch.stack(list(experts.down.var.detach().chunk(EXPERTS, dim=1)))
    means, spread = [], []
    for token, chosen, shares in zip(hidden, index, weights, strict=True):
        gates, ups = experts.gate_up.stored(experts.gate_up.mean).detach()[chosen].chunk(2, dim=1)
        neurons = F.silu(gates @ token) * (ups @ token)  # (k, neurons)
        reading = (experts.down_proj.detach() * scale)[chosen]
        means.append((shares[:, None] * torch.einsum("ehn,en->eh", reading, neurons)).sum(0))
        spread.append((shares[:, None] ** 2 * torch.einsum("ehn,en->eh", variances[chosen], neurons**2)).sum(0))
    expected, variance = torch.stack(means), torch.stack(spread)
    assert ((draws.mean(0) - expected).abs() < 5 * (variance / 4000).sqrt()).all()
    torch.testing.assert_close(draws.var(0), variance, rtol=0.15, atol=0)


@pytest.mark.parametrize("noisy", [GATE_UP, DOWN])
def test_without_variance_noise_changes_nothing(noisy: str) -> None:
    experts, inputs = variational_experts()
    expected = experts(*inputs)
    layer = getattr(experts, noisy)
    layer.log_var.data.fill_(-60)
    layer.noise = True
    torch.testing.assert_close(experts(*inputs), expected, rtol=0, atol=1e-9)


def test_every_token_may_meet_every_expert() -> None:
    experts, inputs = variational_experts()
    expected = experts.eval()(*inputs)
    experts.at_once = True
    torch.testing.assert_close(experts(*inputs), expected, rtol=0, atol=1e-12)


@rows
def test_curvature_is_that_of_single_tokens_and_experts(row: str) -> None:
    dense = in_double(row)
    batch = zoo_batch(dense)
    patched = patch_model_(deepcopy(dense))
    curvature = estimate_curvature(patched, [batch])
    assert not any(experts.at_once for experts in patched.modules() if isinstance(experts, VDExperts))
    expected = {path: torch.zeros_like(value) for path, value in curvature.weights.items()}
    plain = with_plain_experts(dense)
    found = {path: module for path, module in plain.named_modules() if isinstance(module, PlainExperts)}
    for path, experts in found.items():
        gate_up, down = (variational_layers(patched)[f"{path}.{name}"] for name in (GATE_UP, DOWN))
        total = {
            name: torch.zeros(EXPERTS, *layers[0].weight.shape).double() for name, layers in experts.named_children()
        }

        def note(layer: nn.Module, inputs: tuple[Tensor], outputs: Tensor, *, into: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                into.add_(torch.outer(gradient**2, inputs[0].detach() ** 2))

            outputs.register_hook(add)

        for name, layer, expert in by_expert(experts):
            layer.register_forward_hook(lambda *call, into=total[name][expert]: note(*call, into=into))
        # The loss of a batch is a mean over examples, each of which depends on its own tokens only.
        (2 * plain(**batch).loss).backward()
        expected[f"{path}.{GATE_UP}"] = gate_up.flat(torch.cat([total["gates"], total["ups"]], dim=1)) / 2
        expected[f"{path}.{DOWN}"] = down.flat(total["downs"]) / 2
        for name in (GATE_UP, DOWN):
            torch.testing.assert_close(
                curvature.weights[f"{path}.{name}"], expected[f"{path}.{name}"], rtol=1e-4, atol=1e-9
            )


@rows
def test_scores_are_derivatives_of_single_examples(row: str) -> None:
    model = patch_model_(in_double(row))
    batch = zoo_batch(model)
    curvature = estimate_curvature(model, [batch])
    logits_of = model(**{**batch, "labels": None}).logits
    labels, mask = batch["labels"], torch.ones_like(batch["labels"])[:, 1:]
    for example in range(2):
        # A mean over the tokens of both, so that an example's part is doubled.
        nll = F.cross_entropy(logits_of[example, :-1].float(), labels[example, 1:], reduction="sum") / mask.sum() * 2
        for path, layer in variational_layers(model).items():
            (gradient,) = torch.autograd.grad(nll, layer.group_scale, retain_graph=True)
            torch.testing.assert_close(
                curvature.scores[path][example].double(), gradient.double(), rtol=1e-4, atol=1e-6
            )


@rows
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_the_same_by_every_implementation(row: str, implementation: str) -> None:
    model = patch_model_(zoo_model(row)).train()
    model.set_experts_implementation(implementation)
    set_variational_(model, noise=False, collect_kl=True)
    model(**zoo_batch(model)).loss.backward()
    plain = with_plain_experts(unpatch_model_(patch_model_(zoo_model(row))))
    plain.train()(**zoo_batch(plain)).loss.backward()
    for path, experts in plain.named_modules():
        if isinstance(experts, PlainExperts):
            gradient = torch.stack([down.weight.grad for down in experts.downs if down.weight.grad is not None])
            reached = torch.tensor([down.weight.grad is not None for down in experts.downs])
            found = model.get_submodule(path).down_proj.grad
            torch.testing.assert_close(found[reached], gradient, rtol=1e-4, atol=1e-6)
            assert not found[~reached].any()


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = patch_model_(zoo_model("mixtral")).train()
        set_variational_(model, noise=True, collect_kl=True)
        if checkpointing:
            getattr(model, f"{CHECKPOINTING}_enable")()
        torch.manual_seed(0)
        loss = model(**zoo_batch(model), use_cache=False).loss
        (loss + 1e-3 * kl_divergence(model)).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


@rows
def test_mean_leaves_under_native_names(row: str, tmp_path: object) -> None:
    model = patch_model_(zoo_model(row))
    for layer in variational_layers(model).values():
        layer.group_scale.data.uniform_(0.5, 1.5)
    twin = patch_model_(zoo_model(row))
    twin.load_state_dict(model.state_dict())
    own = dict(twin.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in model.named_parameters())
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.rpartition(".")[0] for name in info["unexpected_keys"])
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=TOLERANCE)
    assert type(unpatch_model_(model).get_submodule("model.layers.0.mlp")) is type(
        loaded.get_submodule("model.layers.0.mlp")
    )


@rows
def test_a_pruned_model_is_patched_and_cut_again(row: str) -> None:
    model = zoo_model(row)
    prune_model_(model, masks(model)["first_empty"])
    before = logits(model)
    patched = patch_model_(deepcopy(model), VDConfig(heads=False))
    torch.testing.assert_close(logits(patched), before, rtol=0, atol=TOLERANCE)
    assert [type(module) for module in unpatch_model_(patched).modules()] == [type(part) for part in model.modules()]
    mask = RelevanceMask({
        part.path: torch.stack([torch.ones(part.num_units, dtype=torch.bool), torch.arange(part.num_units) % 3 > 0])
        for part in mixtures(model)
    })
    expected = logits(mask_model_(deepcopy(model), mask))
    torch.testing.assert_close(logits(prune_model_(model, mask)), expected, rtol=0, atol=TOLERANCE)
    assert units_left(model)[Unit.NEURON] == [
        part.num_units for part in find_sublayers(model) if part.unit is Unit.NEURON
    ]


def test_other_experts_are_refused() -> None:
    model = zoo_model("mixtral")
    experts = model.get_submodule(LAYER)
    experts.__class__ = type("OtherExperts", (type(experts),), {})
    with pytest.raises(TypeError, match="Cannot make a `OtherExperts` variational"):
        patch_model_(model)
