"""Layers with a posterior: dense without noise, as if weights were sampled with it, and ordinary at the end."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from hf_vdneuron import layers
from hf_vdneuron.functional import Theta, kl_bound, second_moment
from hf_vdneuron.layers import (
    DenseLayer,
    VariationalLayer,
    VDConv1d,
    VDConv2d,
    VDLinear,
    VDTransposedLinear,
    dense_layer,
    feature_axis,
    make_dense_,
    make_variational_,
)
from hf_vdneuron.priors import GaussianMixturePrior, GroupGaussianPrior, WeightPrior
from hf_vdneuron.sublayers import Axis


Build = Callable[[], DenseLayer]
Shape = tuple[int, ...]

# A dense layer of 4 inputs and 6 outputs, and the shape of one example.
LAYERS: dict[str, tuple[Build, Shape]] = {
    "linear": (lambda: nn.Linear(4, 6), (4,)),
    "linear_without_bias": (lambda: nn.Linear(4, 6, bias=False), (4,)),
    "linear_on_tokens": (lambda: nn.Linear(4, 6), (3, 4)),
    "transposed": (lambda: Conv1D(6, 4), (4,)),
    "transposed_on_tokens": (lambda: Conv1D(6, 4), (3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (4, 5)),
    "conv1d_strided": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, bias=False), (4, 7)),
    "conv1d_same": (lambda: nn.Conv1d(4, 6, 3, padding="same"), (4, 5)),
    "conv1d_circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (4, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 2), (4, 3, 3)),
    "conv2d_strided": (lambda: nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (4, 4, 5)),
    "conv2d_reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 3, 3)),
    "conv2d_replicate": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 0), padding_mode="replicate"), (4, 3, 3)),
}
layer_cases = pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS)

# One of each class.
CLASSES = {name: LAYERS[name] for name in ("linear", "transposed", "conv1d", "conv2d")}
class_cases = pytest.mark.parametrize(("build", "shape"), CLASSES.values(), ids=CLASSES)

axis_cases = pytest.mark.parametrize("axis", Axis)

NUM_GROUPS = 2


def variational(
    layer: DenseLayer,
    *,
    axis: Axis = Axis.OUT,
    log_var: float = -4.0,
    group_scale: bool = True,
    masked: tuple[Axis, ...] = (),
) -> VariationalLayer:
    """The layer with a posterior, its features dealt out to two groups in turn; noise and KL are on."""
    group_axis = feature_axis(layer, axis)
    feature_group = torch.arange(layer.weight.shape[group_axis]) % NUM_GROUPS
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    prior = GaussianMixturePrior(feature_group, num_groups=NUM_GROUPS, key="test", dtype=dtype)
    made = make_variational_(
        layer, prior, group_axis=group_axis, log_var=log_var, group_scale=group_scale, masked=masked
    )
    made.noise, made.collect_kl = True, True
    return made.train()


def trained(layer: DenseLayer, **kwargs: object) -> VariationalLayer:
    """A variational layer whose every parameter has moved away from where it started."""
    made = variational(layer, **kwargs)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        made.prior.prior_scales.copy_(torch.tensor([[0.9, 0.7], [0.1, 0.2]]))
        made.prior.mixture_weights.copy_(torch.tensor([[0.3, 0.6], [0.7, 0.4]]))
    return made


def dense_twin(layer: VariationalLayer, build: Build) -> DenseLayer:
    """An ordinary layer that holds the posterior mean."""
    dense = build().to(layer.weight.dtype)
    dense.load_state_dict({name: layer.state_dict()[name] for name in dense.state_dict()})
    return dense


def drop_(layer: VariationalLayer) -> None:
    """End output features 1 and 4 and input feature 2."""
    layer.keep_out[[1, 4]] = False
    layer.keep_in[2] = False


def features_last(values: Tensor, layer: DenseLayer) -> Tensor:
    return values.movedim(1, -1) if isinstance(layer, nn.Conv1d | nn.Conv2d) else values


# What it computes


@layer_cases
@axis_cases
def test_fresh_layer_computes_what_the_dense_one_did(build: Build, shape: Shape, axis: Axis) -> None:
    dense, inputs = build().double(), torch.randn(5, *shape, dtype=torch.float64)
    expected = dense(inputs)
    layer = variational(dense, axis=axis, masked=tuple(Axis))
    layer.noise = False
    torch.testing.assert_close(layer(inputs), expected)


@layer_cases
def test_weight_gradient_is_that_of_autograd(build: Build, shape: Shape) -> None:
    dense, inputs = build().double(), torch.randn(5, *shape, dtype=torch.float64)
    outputs = dense(inputs)
    output_gradient = torch.randn_like(outputs)
    (expected,) = torch.autograd.grad(outputs, dense.weight, output_gradient)
    torch.testing.assert_close(variational(dense).weight_gradient(inputs, output_gradient), expected)


@layer_cases
def test_tiny_variance_gives_the_dense_output(build: Build, shape: Shape) -> None:
    dense, inputs = build().double(), torch.randn(5, *shape, dtype=torch.float64)
    expected = dense(inputs)
    torch.testing.assert_close(variational(dense, log_var=-60.0)(inputs), expected, rtol=0, atol=1e-10)


@layer_cases
@axis_cases
def test_evaluation_is_the_dense_layer_with_the_mean(build: Build, shape: Shape, axis: Axis) -> None:
    layer = trained(build().double(), axis=axis).eval()
    inputs = torch.randn(5, *shape, dtype=torch.float64)
    torch.testing.assert_close(layer(inputs), dense_twin(layer, build)(inputs))
    assert torch.equal(layer(inputs), layer(inputs))
    assert layer.kl is layer.statistics is None


@axis_cases
def test_mean_is_scaled_group_by_group(axis: Axis) -> None:
    layer = trained(nn.Linear(4, 6).double(), axis=axis)
    for row in range(6):
        for column in range(4):
            group = (row if axis is Axis.OUT else column) % NUM_GROUPS
            expected = layer.weight[row, column] * layer.group_scale[group]
            assert layer.mean[row, column].item() == pytest.approx(expected.item(), rel=1e-15)


@layer_cases
def test_noise_has_the_variance_of_random_weights(build: Build, shape: Shape) -> None:
    layer = trained(build().double())
    dense, inputs = dense_twin(layer, build), torch.randn(1, *shape, dtype=torch.float64)

    # Outputs are linear in the weights, so their variance is exactly sum J^2 s^2.
    jacobian = jacrev(lambda weight: functional_call(dense, {"weight": weight}, inputs))(dense.weight.detach())
    variance = (jacobian.square() * layer.log_var.exp()).flatten(dense(inputs).ndim).sum(-1)
    torch.manual_seed(7)
    noise = layer(inputs) - dense(inputs)
    torch.manual_seed(7)
    torch.testing.assert_close(noise, variance.sqrt() * torch.randn_like(variance), rtol=1e-9, atol=1e-12)


@layer_cases
def test_noisy_outputs_are_distributed_like_those_of_sampled_weights(build: Build, shape: Shape) -> None:
    draws = 4000
    layer = trained(build().double())
    dense, inputs = dense_twin(layer, build), torch.randn(1, *shape, dtype=torch.float64)
    std = (layer.log_var / 2).exp()
    with torch.no_grad():
        weights = dense.weight + std * torch.randn(draws, *std.shape, dtype=std.dtype)
        sampled = vmap(lambda weight: functional_call(dense, {"weight": weight}, inputs[0]))(weights)
        noisy = layer(inputs.expand(draws, *shape))
    # Both are Gaussian, with these standard errors; five of them are one false alarm in 10^6.
    error = (sampled.var(0) / draws).sqrt() * 2**0.5
    assert ((noisy.mean(0) - sampled.mean(0)).abs() < 5 * error + 1e-12).all()
    assert ((noisy.var(0) / sampled.var(0)).log().abs() < 5 * (4 / draws) ** 0.5).all()


def test_noise_is_drawn_per_position() -> None:
    layer = trained(nn.Linear(4, 6).double())
    same = torch.randn(1, 1, 4, dtype=torch.float64).expand(2, 3, 4)
    noisy = layer(same)
    assert noisy.flatten(0, 1).unique(dim=0).shape[0] == 6


# Gradients and the KL


@layer_cases
@pytest.mark.parametrize("group_scale", [True, False], ids=["group_scale", "no_group_scale"])
def test_gradients_reach_the_posterior_and_the_bias_and_nothing_else(
    build: Build, shape: Shape, group_scale: bool
) -> None:
    layer = trained(build().double(), group_scale=group_scale, masked=tuple(Axis))
    likelihood = layer(torch.randn(5, *shape, dtype=torch.float64)).square().sum()
    posterior = {"weight", "log_var"} | ({"group_scale"} if group_scale else set())
    bias = set() if layer.bias is None else {"bias"}
    names, parameters = zip(*layer.named_parameters(), strict=True)
    assert set(names) == posterior | bias
    # Likelihood and KL each reach the posterior by itself; only the likelihood reaches the bias.
    for loss, reached in ((likelihood, posterior | bias), (layer.kl, posterior)):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        found = {name: grad for name, grad in zip(names, gradients, strict=True) if grad is not None}
        assert found.keys() == reached
        assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())
    assert not any(buffer.requires_grad for buffer in layer.buffers())


@class_cases
@axis_cases
def test_kl_and_statistics_are_those_of_the_mean_network(build: Build, shape: Shape, axis: Axis) -> None:
    layer = trained(build().double(), axis=axis)
    layer(torch.randn(2, *shape, dtype=torch.float64))
    turns = torch.arange(layer.weight.shape[layer.group_axis]) % NUM_GROUPS
    theta = Theta(layer.prior.mixture_weights[:, turns], layer.prior.prior_scales[:, turns])
    bound, statistics = kl_bound(layer.mean, layer.log_var, theta, layer.group_axis)
    assert torch.equal(layer.kl, bound)
    for found, per_feature in zip(layer.statistics, statistics, strict=True):
        by_group = [per_feature[:, group::NUM_GROUPS].sum(1) for group in range(NUM_GROUPS)]
        torch.testing.assert_close(found, torch.stack(by_group, 1))


@class_cases
def test_masked_weights_have_no_part_in_the_divergence_from_the_weight_prior(build: Build, shape: Shape) -> None:
    layer = trained(build().double(), masked=tuple(Axis))
    layer.prior = WeightPrior(layer.prior.feature_group, num_groups=NUM_GROUPS, key="test")
    drop_(layer)
    layer(torch.randn(2, *shape, dtype=torch.float64))
    kept = layer.mean != 0
    assert 0 < kept.sum() < kept.numel()
    expected = (1 + layer.mean[kept] ** 2 / layer.log_var[kept].exp()).log().sum() / 2
    torch.testing.assert_close(layer.kl, expected)
    layer.kl.backward()
    assert not layer.log_var.grad[~kept].any()
    assert layer.log_var.grad[kept].all()
    assert layer.weight.grad.isfinite().all()


def test_gradient_of_the_group_scale_sums_that_of_its_weights() -> None:
    layer = trained(nn.Linear(4, 6).double())
    layer(torch.randn(2, 4, dtype=torch.float64))
    layer.kl.backward()
    by_mean = (layer.weight.grad / layer.group_scale.detach().repeat(3)[:, None]) * layer.weight.detach()
    expected = torch.stack([by_mean[group::NUM_GROUPS].sum() for group in range(NUM_GROUPS)])
    torch.testing.assert_close(layer.group_scale.grad, expected)


@pytest.mark.parametrize(("training", "collect_kl"), [(True, False), (False, True)], ids=["not_asked", "evaluation"])
def test_no_kl_is_left_unless_asked_for_in_training(training: bool, collect_kl: bool) -> None:
    layer = trained(nn.Linear(4, 6)).train(training)
    layer.collect_kl = collect_kl
    layer(torch.randn(2, 4))
    assert layer.kl is layer.statistics is None


@pytest.mark.parametrize(
    ("noise", "collect_kl"), [(False, False), (True, False), (False, True)], ids=["plain", "noise", "kl"]
)
def test_frozen_posterior_stays_in_the_graph_with_a_gradient_of_zero(noise: bool, collect_kl: bool) -> None:
    layer = trained(nn.Linear(4, 6).double())
    inputs = torch.randn(2, 4, dtype=torch.float64)
    layer.noise, layer.collect_kl, layer.frozen = noise, collect_kl, True
    outputs = layer(inputs)
    if not noise:
        assert torch.equal(outputs, layer.eval()(inputs))
    (outputs.square().sum() + (layer.kl if collect_kl else 0)).backward()
    assert not layer.log_var.grad.any()
    assert not layer.group_scale.grad.any()
    assert layer.weight.grad.any()
    assert layer.bias.grad.any()


# Masks


@layer_cases
@axis_cases
@pytest.mark.parametrize("group_scale", [True, False], ids=["group_scale", "no_group_scale"])
def test_masks_end_weights_and_their_noise_but_no_bias(
    build: Build, shape: Shape, axis: Axis, group_scale: bool
) -> None:
    layer = trained(build().double(), axis=axis, group_scale=group_scale, masked=tuple(Axis))
    drop_(layer)
    inputs = torch.randn(5, *shape, dtype=torch.float64)
    ended = features_last(layer(inputs), layer)[..., [1, 4]]
    bias = torch.zeros(2, dtype=torch.float64) if layer.bias is None else layer.bias[[1, 4]]
    torch.testing.assert_close(ended, bias.expand_as(ended), rtol=0, atol=1e-13)

    noise_of_input_2 = layer.var.select(feature_axis(layer, Axis.IN), 2)
    noise_of_output_0 = layer.var.select(feature_axis(layer, Axis.OUT), 0)
    assert not noise_of_input_2.any()
    assert noise_of_output_0.count_nonzero() == noise_of_output_0.numel() * 3 / 4
    altered = inputs.clone()
    features_last(altered, layer)[..., 2] += 10
    torch.testing.assert_close(layer.eval()(altered), layer(inputs))


def test_masks_exist_only_where_asked_for() -> None:
    layer = variational(nn.Linear(4, 6), masked=(Axis.IN,))
    assert layer.keep_out is None
    assert layer.keep_in.dtype == torch.bool
    assert layer.keep_in.tolist() == [True] * 4


# Precision


@class_cases
def test_bfloat16_weights_keep_a_float32_posterior(build: Build, shape: Shape) -> None:
    layer = trained(build().to(torch.bfloat16), masked=tuple(Axis))
    outputs = layer(torch.randn(3, *shape, dtype=torch.bfloat16))
    assert outputs.dtype == layer.mean.dtype == layer.weight.dtype == torch.bfloat16
    assert layer.log_var.dtype == layer.group_scale.dtype == layer.var.dtype == torch.float32
    assert layer.kl.dtype == torch.float32
    (outputs.float().square().sum() + layer.kl).backward()
    assert all(parameter.grad.dtype == parameter.dtype for parameter in layer.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def variance_of(layer: VariationalLayer, inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Mean and variance of the outputs, as the layer computes them."""
    given: list[Tensor] = []
    monkeypatch.setattr(layers, "local_reparameterization", lambda mean, var: given.extend([mean, var]) or mean)
    layer(inputs)
    return given[0], given[1]


def exact_variance(build: Build, layer: VariationalLayer, inputs: Tensor) -> Tensor:
    """The same variance, in float64."""
    parameters = {"weight": layer.var.double(), "bias": torch.zeros(6, dtype=torch.float64)}
    return functional_call(build().double(), parameters, inputs.double().square())


@class_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_variance_goes_along_with_bfloat16_autocast(
    build: Build, shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, inputs = trained(build()), torch.randn(3, *shape, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, var = variance_of(layer, inputs, monkeypatch)
    assert (mean.dtype, var.dtype, layer.kl.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    # Inputs, squares, variances and the sum are rounded to 8 bits each; all terms have one sign, so none cancel.
    rounding = torch.finfo(torch.bfloat16).eps / 2
    torch.testing.assert_close(var.double(), exact_variance(build, layer, inputs), rtol=6 * rounding, atol=0)


@pytest.mark.parametrize("size", [1e-3, 1e3], ids=["squares-vanish-in-float16", "squares-overflow-in-float16"])
def test_variance_leaves_float16_autocast(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = trained(nn.Linear(4, 6)), size * torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.float16):
        mean, var = variance_of(layer, inputs, monkeypatch)
    assert (mean.dtype, var.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(var.double(), exact_variance(lambda: nn.Linear(4, 6), layer, inputs), rtol=1e-5, atol=0)


CASTS = {
    "bfloat16": (nn.Module.bfloat16, torch.bfloat16, torch.float32),
    "float16": (nn.Module.half, torch.float16, torch.float32),
    "moved": (lambda layer: layer.to("cpu", torch.bfloat16), torch.bfloat16, torch.float32),
    "float64": (nn.Module.double, torch.float64, torch.float64),
}


@class_cases
@pytest.mark.parametrize(("cast", "dtype", "wide"), CASTS.values(), ids=CASTS)
def test_a_later_cast_never_narrows_the_posterior(
    build: Build, shape: Shape, cast: Callable[[nn.Module], nn.Module], dtype: torch.dtype, wide: torch.dtype
) -> None:
    layer = trained(build(), masked=tuple(Axis))
    (layer(torch.randn(3, *shape)).square().sum() + layer.kl).backward()
    before = {name: value.clone() for name, value in (*layer.named_parameters(), *layer.named_buffers())}
    gradient = layer.log_var.grad.clone()
    cast(layer)
    assert layer.weight.dtype is layer.weight.grad.dtype is layer.bias.dtype is dtype
    for name in ("log_var", "group_scale", "prior.prior_scales", "prior.mixture_weights"):
        value = layer.get_parameter(name) if name in dict(layer.named_parameters()) else layer.get_buffer(name)
        assert value.dtype is wide, name
        assert torch.equal(value, before[name].to(wide)), name
    assert layer.log_var.grad.dtype is wide
    assert torch.equal(layer.log_var.grad, gradient.to(wide))
    assert layer.keep_out.dtype is torch.bool


def test_a_cast_layer_trains_on() -> None:
    layer = trained(nn.Linear(4, 6)).bfloat16()
    (layer(torch.randn(3, 4, dtype=torch.bfloat16)).float().square().sum() + layer.kl).backward()
    assert layer.kl.dtype is torch.float32
    assert all(parameter.grad.dtype is parameter.dtype for parameter in layer.parameters())


def test_a_layer_moves_to_another_device_as_a_whole() -> None:
    layer = variational(nn.Linear(4, 6), masked=tuple(Axis)).to("meta")
    devices = {value.device.type for value in (*layer.parameters(), *layer.buffers())}
    assert devices == {"meta"}


# Saving, loading, copying


@class_cases
@axis_cases
def test_saved_weight_is_the_mean(build: Build, shape: Shape, axis: Axis) -> None:
    layer = trained(build(), axis=axis, masked=tuple(Axis))
    drop_(layer)
    state = layer.state_dict()
    assert torch.equal(state["weight"], layer.mean)
    assert not state["weight"].requires_grad
    assert torch.equal(state["direction"], layer.weight)
    dense = build()
    report = dense.load_state_dict(state, strict=False)
    assert report.missing_keys == []
    inputs = torch.randn(2, *shape)
    torch.testing.assert_close(dense(inputs), layer.eval()(inputs))


@class_cases
@axis_cases
@pytest.mark.parametrize("group_scale", [True, False], ids=["group_scale", "no_group_scale"])
def test_state_goes_round_bit_equal(build: Build, shape: Shape, axis: Axis, group_scale: bool) -> None:
    options = {"axis": axis, "group_scale": group_scale, "masked": tuple(Axis)}
    layer, other = trained(build(), **options), variational(build(), **options)
    drop_(layer)
    state = layer.state_dict()
    keys = list(state)
    other.load_state_dict(state)
    assert list(state) == keys
    assert state.keys() == other.state_dict().keys()
    assert all(torch.equal(values, other.state_dict()[name]) for name, values in state.items())
    assert torch.equal(other.mean, layer.mean)
    if group_scale:
        assert torch.equal(other.weight, layer.weight)
    inputs = torch.randn(2, *shape)
    assert torch.equal(other.eval()(inputs), layer.eval()(inputs))


@class_cases
def test_dense_checkpoint_loads_into_a_fresh_layer(build: Build, shape: Shape) -> None:
    dense, layer = build(), variational(build())
    report = layer.load_state_dict(dense.state_dict(), strict=False)
    assert report.unexpected_keys == []
    inputs = torch.randn(2, *shape)
    torch.testing.assert_close(layer.eval()(inputs), dense(inputs))


@class_cases
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_layer_is_copied_in_the_middle_of_training(
    build: Build, shape: Shape, copier: Callable[[VariationalLayer], VariationalLayer]
) -> None:
    layer = trained(build(), masked=tuple(Axis))
    inputs = torch.randn(2, *shape)
    layer(inputs)
    other = copier(layer)
    assert type(other) is type(layer)
    assert other.kl is other.statistics is None
    assert layer.kl is not None
    torch.manual_seed(7)
    expected = layer(inputs)
    torch.manual_seed(7)
    assert torch.equal(other(inputs), expected)
    assert torch.equal(other.kl, layer.kl)
    assert set(map(id, other.parameters())).isdisjoint(map(id, layer.parameters()))


# Patching one layer


@class_cases
@pytest.mark.parametrize("group_scale", [True, False], ids=["group_scale", "no_group_scale"])
def test_layer_keeps_its_identity_there_and_back(build: Build, shape: Shape, group_scale: bool) -> None:
    layer = build()
    layer.weight.requires_grad_(False)
    calls: list[object] = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    dense_class, weight, bias = type(layer), layer.weight, layer.bias
    attributes, state = set(vars(layer)), list(layer.state_dict())

    made = variational(layer, group_scale=group_scale, masked=tuple(Axis))
    assert made is layer
    assert isinstance(made, VariationalLayer)
    assert isinstance(made, dense_class)
    assert made.weight is weight
    assert made.bias is bias
    assert not made.weight.requires_grad
    assert made.bias.requires_grad

    made(torch.randn(2, *shape))
    dense = make_dense_(made)
    assert dense is layer
    assert type(dense) is dense_class
    assert dense.weight is weight
    assert dense.bias is bias
    assert not dense.weight.requires_grad
    assert set(vars(dense)) == attributes
    assert list(dense.state_dict()) == state
    assert list(dense.modules()) == [dense]
    dense(torch.randn(2, *shape))
    assert calls == ["forward", "forward"]


@class_cases
@axis_cases
def test_dense_again_it_holds_the_mean_under_the_masks(build: Build, shape: Shape, axis: Axis) -> None:
    layer = trained(build(), axis=axis, masked=tuple(Axis)).eval()
    drop_(layer)
    inputs = torch.randn(2, *shape)
    mean, expected = layer.mean.detach().clone(), layer(inputs)
    dense = make_dense_(layer)
    assert torch.equal(dense.weight, mean)
    torch.testing.assert_close(dense(inputs), expected)


def test_each_dense_class_has_its_variational_one() -> None:
    made = [type(variational(build())) for build, _ in CLASSES.values()]
    assert made == [VDLinear, VDTransposedLinear, VDConv1d, VDConv2d]


def test_start_has_the_given_variance_and_neutral_scales() -> None:
    layer = variational(nn.Linear(4, 6), log_var=-7.5)
    assert torch.equal(layer.log_var, torch.full((6, 4), -7.5))
    assert torch.equal(layer.group_scale, torch.ones(NUM_GROUPS))
    assert variational(nn.Linear(4, 6), group_scale=False).group_scale is None


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Bilinear(2, 2, 2),
        lambda: NonDynamicallyQuantizableLinear(4, 6),
        lambda: weight_norm(nn.Linear(4, 6)),
        lambda: variational(nn.Linear(4, 6)),
    ],
    ids=["other_class", "subclass", "parametrised", "variational"],
)
def test_unsupported_layer_is_refused(build: Callable[[], nn.Module]) -> None:
    layer = build()
    before = type(layer)
    prior = GaussianMixturePrior(torch.arange(6), num_groups=6, key="test")
    with pytest.raises(TypeError, match=rf"`{before.__name__}` variational: expected exactly one of Conv1D, Conv1d"):
        make_variational_(layer, prior, group_axis=0, log_var=-10.0, group_scale=True, masked=())
    assert type(layer) is before


def test_module_that_can_hold_no_posterior_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    assert dense_layer(model, "0") is model[0]
    with pytest.raises(TypeError, match="Module `1` is a `ReLU`: expected one of Conv1D"):
        dense_layer(model, "1")


@class_cases
def test_initial_statistics_are_sums_over_features(build: Build, shape: Shape) -> None:
    layer = trained(build().double(), axis=Axis.IN)
    moments = second_moment(layer.mean, layer.log_var).movedim(layer.group_axis, 0)
    found = layer.initial_statistics()
    for feature, members in enumerate(moments):
        assert found.resp[0, feature].item() == members.numel()
        assert found.moment[0, feature].item() == pytest.approx(members.sum().item(), rel=1e-12)


def test_dense_checkpoint_resets_the_group_scale() -> None:
    layer = nn.Linear(3, 2)
    prior = GroupGaussianPrior(torch.arange(2), num_groups=2, key="key")
    make_variational_(layer, prior, group_axis=0, log_var=-10.0, group_scale=True, masked=())
    layer.group_scale.data.fill_(3.0)
    weight = torch.randn(2, 3)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(2)}, strict=False)
    assert torch.equal(layer.mean, weight)
