"""Patching changes no output, no name, no tie; unpatching leaves nothing behind."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from models import (
    AUTO_CLASSES,
    CHAINS,
    FAMILIES,
    HEADS,
    LAYERS,
    NEURONS,
    Place,
    batch,
    end_by_hand_,
    mask_of,
    mixed_keep,
    outputs,
    places,
    tiny_decoder,
    tiny_model,
)
from torch import Tensor, nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.config import Grouping, PriorType, VDConfig
from hf_vdneuron.elbo import em_step_, kl_divergence, set_variational_, variational_layers
from hf_vdneuron.layers import VariationalLayer
from hf_vdneuron.masks import RelevanceMask, mask_model_
from hf_vdneuron.patching import patch_model_, select_sublayers, unpatch_model_
from hf_vdneuron.pruning import prune_model_


CONFIGS = {
    "defaults": VDConfig(),
    "group_prior": VDConfig(prior=PriorType.GROUP),
    "weight_prior": VDConfig(prior=PriorType.WEIGHT),
    "rows": VDConfig(grouping=Grouping.ROWS),
    "coupled_query_key": VDConfig(grouping=Grouping.COUPLED, query_key=True),
    "no_group_scale": VDConfig(group_scale=False, query_key=True),
}


def matrices(where: dict[str, Place], **chosen: bool) -> set[str]:
    """Paths of the weight matrices of sub-layers: rows and columns, but no companions unless chosen otherwise."""
    chosen = {"rows": True, "columns": True, "companions": False, **chosen}
    found = {"rows": [place.rows for place in where.values()], "columns": [place.columns for place in where.values()]}
    found["companions"] = [path for place in where.values() for path in place.companions]
    return {path for kind, paths in found.items() if chosen[kind] for path in paths}


@torch.no_grad()
def train_(model: nn.Module) -> nn.Module:
    """Move all that patching added, as training would."""
    for layer in variational_layers(model).values():
        layer.log_var.uniform_(-8, -2)
        if layer.group_scale is not None:
            layer.group_scale.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_stay_to_the_last_bit(family: str, config: VDConfig) -> None:
    model = tiny_model(family, "sequence_classification", dtype=torch.float32)
    before = outputs(model, batch())
    assert patch_model_(model, config) is model
    assert torch.equal(outputs(model, batch()), before)


@pytest.mark.parametrize("name", CHAINS)
def test_outputs_of_chains_stay_to_the_last_bit(name: str) -> None:
    chain = CHAINS[name]
    model = chain.model()
    before = outputs(model, chain.inputs())
    assert torch.equal(outputs(patch_model_(model), chain.inputs()), before)


def test_noise_changes_outputs_once_it_is_on() -> None:
    model = patch_model_(tiny_model("bert"))
    model.config.hidden_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    before = outputs(model, batch())
    mask = batch()["attention_mask"].bool()
    assert torch.equal(model.train()(**batch())[0][mask], before)
    set_variational_(model, noise=True, collect_kl=False)
    assert not torch.allclose(model.train()(**batch())[0][mask], before)
    assert torch.equal(outputs(model, batch()), before)


@pytest.mark.parametrize("head", AUTO_CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_keep_name_identity_and_value(family: str, head: str) -> None:
    model = tiny_model(family, head)
    before = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    after = dict(patch_model_(model).named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())
    added = {name.rpartition(".")[0] for name in after.keys() - before.keys()}
    assert added == matrices(places(model))
    assert {name.rpartition(".")[2] for name in after.keys() - before.keys()} == {"log_var", "group_scale"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(VDConfig(grouping="sides"), {}, id="sides"),
        pytest.param(VDConfig(grouping="coupled"), {}, id="coupled"),
        pytest.param(VDConfig(grouping="rows"), {"columns": False}, id="rows"),
        pytest.param(VDConfig(query_key=True), {"companions": True}, id="query_key"),
        pytest.param(
            VDConfig(grouping="rows", query_key=True), {"columns": False, "companions": True}, id="rows_query_key"
        ),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_grouping_chooses_the_matrices(family: str, config: VDConfig, expected: dict[str, bool]) -> None:
    model = tiny_model(family)
    assert set(variational_layers(patch_model_(model, config))) == matrices(places(model), **expected)


@pytest.mark.parametrize(
    ("config", "chosen"),
    [
        pytest.param(VDConfig(neurons=False), lambda path: path.endswith("attention"), id="heads_only"),
        pytest.param(VDConfig(heads=False), lambda path: path.endswith("forward"), id="neurons_only"),
        pytest.param(VDConfig(include=["*.layer.1.*"]), lambda path: ".1." in path, id="include"),
        pytest.param(VDConfig(exclude=["*.layer.1.*"]), lambda path: ".1." not in path, id="exclude"),
        pytest.param(
            VDConfig(include=["*.0.*", "*.2.*"], exclude=["*.2.attention"], heads=True),
            lambda path: ".0." in path or path.endswith("2.feed_forward"),
            id="exclude_from_include",
        ),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_and_switches_choose_sublayers(family: str, config: VDConfig, chosen: Callable[[str], bool]) -> None:
    model = tiny_model(family)
    where = {path: place for path, place in places(model).items() if chosen(path)}
    assert 0 < len(where) < 2 * LAYERS
    assert [sublayer.path for sublayer in select_sublayers(find_sublayers(model), config)] == list(where)
    assert set(variational_layers(patch_model_(model, config))) == matrices(where)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        pytest.param({"include": ["*.layer.0.*", "*.layer.7.*"]}, r"\*\.layer\.7\.\*", id="include"),
        pytest.param({"exclude": ["encoder.attention"]}, r"encoder\.attention", id="exclude"),
    ],
)
def test_pattern_that_matches_nothing_lists_what_could_match(changes: dict[str, list[str]], pattern: str) -> None:
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=f"`{pattern}` matches no sub-layer") as caught:
        patch_model_(model, VDConfig(**changes))
    assert all(path in str(caught.value) for path in places(model))
    assert not variational_layers(model)


def test_choice_that_leaves_nothing_is_refused() -> None:
    model = tiny_model("bert")
    with pytest.raises(ValueError, match=r"leave no sub-layer.*encoder\.layer\.0\.attention"):
        patch_model_(model, VDConfig(exclude=["*"]))


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("is_quantized", True, "quantised: expected plain layers .* quantise what is left"),
        ("peft_config", {"default": object()}, "PEFT-wrapped: expected .* `merge_and_unload\\(\\)`"),
        ("_tp_size", 2, "split over devices .* without `tp_plan`"),
    ],
    ids=["quantised", "peft", "tensor-parallel"],
)
def test_model_without_plain_layers_is_refused(attribute: str, value: object, message: str) -> None:
    model = tiny_model("bert")
    setattr(model, attribute, value)
    with pytest.raises(ValueError, match=message):
        patch_model_(model)
    assert not variational_layers(model)


def test_patched_model_is_not_patched_again() -> None:
    model = patch_model_(tiny_model("bert"), VDConfig(neurons=False))
    with pytest.raises(ValueError, match=r"patched already.*`unpatch_model_`"):
        patch_model_(model, VDConfig(heads=False))


def test_layer_of_a_subclass_is_refused_by_class() -> None:
    class Doubled(nn.Linear):
        """A layer that may compute something else."""

    model = tiny_model("bert")
    model.encoder.layer[1].output.dense.__class__ = Doubled
    with pytest.raises(TypeError, match="`Doubled`"):
        patch_model_(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings_stay_tied(family: str) -> None:
    model = tiny_model(family, "masked_lm")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    patch_model_(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    unpatch_model_(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_forward_hooks_keep_firing() -> None:
    model = tiny_model("bert")
    fired: list[str] = []
    modules = {path: model.get_submodule(path) for path in matrices(places(model))}
    for path, module in modules.items():
        module.register_forward_hook(lambda *_, path=path: fired.append(path))
        module.register_forward_pre_hook(lambda *_, path=path: fired.append(f"before {path}"))
    patch_model_(model)
    assert all(model.get_submodule(path) is module for path, module in modules.items())
    outputs(model, batch())
    assert sorted(fired) == sorted([*modules, *(f"before {path}" for path in modules)])
    fired.clear()
    outputs(unpatch_model_(model), batch())
    assert len(fired) == 2 * len(modules)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_stays_and_log_variances_have_at_least_float32(dtype: torch.dtype) -> None:
    model = patch_model_(tiny_model("bert", dtype=dtype))
    for name, parameter in model.named_parameters():
        added = name.endswith(("log_var", "group_scale"))
        assert parameter.dtype == (torch.promote_types(dtype, torch.float32) if added else dtype)
    assert outputs(model, batch()).dtype == dtype
    unpatch_model_(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_device_stays() -> None:
    model = patch_model_(tiny_model("bert").to("meta"), VDConfig(query_key=True))
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_frozen_parameters_stay_frozen() -> None:
    model = tiny_model("bert").requires_grad_(False)
    model.encoder.layer[0].output.dense.bias.requires_grad_(True)
    patch_model_(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    added = {name for name in trainable if name.endswith(("log_var", "group_scale"))}
    assert trainable - added == {"encoder.layer.0.output.dense.bias"}
    unpatch_model_(model)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "encoder.layer.0.output.dense.bias"
    ]


@pytest.mark.parametrize("training", [True, False])
def test_mode_stays(training: bool) -> None:
    model = tiny_model("bert").train(training)
    assert patch_model_(model).training is training
    assert {module.training for module in unpatch_model_(model).modules()} == {training}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_unpatching_restores_the_dense_model_to_the_last_bit(family: str, config: VDConfig) -> None:
    model = tiny_model(family, "masked_lm")
    dense = deepcopy(model)
    assert unpatch_model_(patch_model_(model, config)) is model
    assert [type(module) for module in model.modules()] == [type(module) for module in dense.modules()]
    assert {name: vars(module).keys() for name, module in model.named_modules()} == {
        name: vars(module).keys() for name, module in dense.named_modules()
    }
    state = model.state_dict()
    assert state.keys() == dense.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in dense.state_dict().items())
    patch_model_(model, config)


def test_unpatching_a_chain_restores_its_classes() -> None:
    chain = CHAINS["nested"]
    model = unpatch_model_(patch_model_(chain.model()))
    assert [type(module) for module in model.modules()] == [type(module) for module in chain.build().modules()]
    assert torch.equal(outputs(model, chain.inputs()), outputs(chain.model(), chain.inputs()))


def test_unpatching_a_dense_model_changes_nothing() -> None:
    model = tiny_model("bert")
    before = outputs(model, batch())
    assert torch.equal(outputs(unpatch_model_(model), batch()), before)


def test_unpatching_leaves_the_mean_under_the_masks() -> None:
    model = patch_model_(tiny_model("bert"))
    scale = torch.linspace(0.5, 1.5, NEURONS)
    path = "encoder.layer.1.feed_forward"
    place = places(model)[path]
    model.get_submodule(place.rows).group_scale.data.copy_(scale)
    keep = mixed_keep(places(model))
    mask_model_(model, mask_of(keep))
    expected = end_by_hand_(tiny_model("bert"), places(model), keep).get_submodule(place.rows).weight
    before = outputs(model, batch())
    unpatch_model_(model)
    torch.testing.assert_close(model.get_submodule(place.rows).weight, expected * scale.unsqueeze(1).double())
    assert torch.equal(outputs(model, batch()), before)


@pytest.mark.parametrize("head", ["sequence_classification", "masked_lm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_reads_the_means_of_a_saved_model(family: str, head: str, tmp_path: Path) -> None:
    model = train_(patch_model_(tiny_model(family, head, dtype=torch.float32)))
    mask_model_(model, mask_of(mixed_keep(places(model))))
    model.save_pretrained(tmp_path)
    plain, info = AUTO_CLASSES[head].from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(outputs(plain, batch()), outputs(model, batch()))
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert info["unexpected_keys"] == model.state_dict().keys() - plain.state_dict().keys()
    assert all(name.startswith(tuple(matrices(places(model)))) for name in info["unexpected_keys"])
    assert "vdneuron" not in json.loads((tmp_path / "config.json").read_text())


def test_state_of_a_trained_model_survives_bit_by_bit() -> None:
    model = train_(patch_model_(tiny_model("bert")))
    mask_model_(model, mask_of(mixed_keep(places(model))))
    other = patch_model_(tiny_model("bert"))
    other.load_state_dict(model.state_dict())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name))


def loop_groups(place: Place, role: str) -> list[int]:
    """Unit of each row or column of one matrix of a sub-layer."""
    size = place.num_columns if role == "columns" else place.num_rows
    return [unit for unit in range(place.num_units) for _ in range(size)]


@pytest.mark.parametrize("grouping", Grouping)
@pytest.mark.parametrize("family", FAMILIES)
def test_prior_groups_cover_exactly_the_slices_of_their_unit(family: str, grouping: Grouping) -> None:
    model = patch_model_(tiny_model(family), VDConfig(grouping=grouping, query_key=True))
    keys: dict[str, list[str]] = {}
    for path, place in places(model).items():
        roles = {"rows": [place.rows], "columns": [place.columns], "companions": list(place.companions)}
        roles["columns"] = [] if grouping is Grouping.ROWS else roles["columns"]
        for role, layer, module in (
            (role, model.get_submodule(module), module) for role, modules in roles.items() for module in modules
        ):
            assert layer.group_axis == (1 if role == "columns" else 0)
            assert layer.prior.feature_group.tolist() == loop_groups(place, role)
            assert layer.prior.num_groups == len(layer.group_scale) == place.num_units
            key = path if grouping is Grouping.COUPLED else f"{path} {role}"
            keys.setdefault(key, []).append(layer.prior.key)
            assert module in variational_layers(model)
    assert all(len(set(shared)) == 1 for shared in keys.values())
    assert len({shared[0] for shared in keys.values()}) == len(keys)


@pytest.mark.parametrize("prior", [PriorType.GROUP, PriorType.MIXTURE])
@pytest.mark.parametrize("grouping", Grouping)
def test_prior_starts_at_the_second_moment_of_its_group(grouping: Grouping, prior: PriorType) -> None:
    model = patch_model_(tiny_model("bert"), VDConfig(grouping=grouping, prior=prior, initial_log_var=-3.0))
    spread = torch.tensor([1.0] if prior is PriorType.GROUP else [2.0, 0.2])
    for place in places(model).values():
        sides = [model.get_submodule(place.rows), model.get_submodule(place.columns)]
        for unit in range(place.num_units):
            weights = [
                sides[0].weight[unit * place.num_rows : (unit + 1) * place.num_rows].flatten(),
                sides[1].weight[:, unit * place.num_columns : (unit + 1) * place.num_columns].flatten(),
            ]
            for layer, own in zip(sides, weights, strict=True):
                if isinstance(layer, VariationalLayer):
                    shared = torch.cat(weights) if grouping is Grouping.COUPLED else own
                    moment = (shared.square() + torch.tensor(-3.0).exp()).mean().float()
                    torch.testing.assert_close(layer.prior.prior_scales[:, unit].square(), spread * moment)


def test_units_of_a_coupled_group_stay_together_through_em() -> None:
    model = train_(patch_model_(tiny_model("bert"), VDConfig(grouping=Grouping.COUPLED))).train()
    set_variational_(model, noise=True, collect_kl=True)
    before = {name: layer.prior.prior_scales.clone() for name, layer in variational_layers(model).items()}
    model(**batch())
    kl_divergence(model).backward()
    em_step_(model)
    for place in places(model).values():
        one, other = model.get_submodule(place.rows).prior, model.get_submodule(place.columns).prior
        assert torch.equal(one.prior_scales, other.prior_scales)
        assert torch.equal(one.mixture_weights, other.mixture_weights)
        assert not torch.equal(one.prior_scales, before[place.rows])


@pytest.mark.parametrize("grouping", Grouping)
def test_in_chains_the_rows_have_the_first_claim(grouping: Grouping) -> None:
    model = patch_model_(CHAINS["lenet_300"].model(), VDConfig(grouping=grouping))
    layers = variational_layers(model)
    # The last layer makes no unit: it is nothing but the out-side of the one before.
    assert list(layers) == (["1", "3"] if grouping is Grouping.ROWS else ["1", "3", "5"])
    assert [layer.group_axis for layer in layers.values()] == [0, 0, 1][: len(layers)]
    keys = [layer.prior.key for layer in layers.values()]
    assert len(set(keys)) == (3 if grouping is Grouping.SIDES else 2)
    assert (keys[1] == keys[-1]) == (grouping is not Grouping.SIDES)


def test_in_chains_a_shared_matrix_has_both_masks() -> None:
    layers = variational_layers(patch_model_(CHAINS["lenet_300"].model()))
    assert [(layer.keep_out is not None, layer.keep_in is not None) for layer in layers.values()] == [
        (True, False),
        (True, True),
        (False, True),
    ]


def test_group_of_a_flattened_channel_holds_all_its_positions() -> None:
    chain = CHAINS["pooling_max"]
    model = patch_model_(chain.model())
    place = chain.places["0"]
    assert model.get_submodule(place.columns).prior.feature_group.tolist() == loop_groups(place, "columns")


def test_cross_attention_can_be_chosen_alone() -> None:
    model = tiny_decoder()
    where = {path: place for path, place in places(model).items() if path.endswith("cross_attention")}
    patch_model_(model, VDConfig(include=["*.cross_attention"]))
    assert set(variational_layers(model)) == matrices(where)
    assert {layer.prior.num_groups for layer in variational_layers(model).values()} == {HEADS}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_reach_what_patching_added() -> None:
    model = patch_model_(tiny_model("bert")).train()
    set_variational_(model, noise=True, collect_kl=True)
    loss = model(**batch())[0].square().mean() + kl_divergence(model)
    loss.backward()
    found = gradients(model)
    assert all(
        grad is not None and grad.isfinite().all() and grad.any()
        for name, grad in found.items()
        if name.endswith(("log_var", "group_scale"))
    )


@pytest.mark.parametrize("prior", ["group", "mixture"])
def test_a_chain_with_an_empty_layer_has_a_finite_divergence(prior: str) -> None:
    chain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    prune_model_(chain, RelevanceMask({"0": torch.zeros(2, 4, dtype=torch.bool)}))
    patch_model_(chain, VDConfig(prior=prior))
    set_variational_(chain, noise=False, collect_kl=True)
    chain.train()(torch.ones(2, 3))
    assert kl_divergence(chain).isfinite()
    em_step_(chain)
    assert all(layer.prior.prior_scales.isfinite().all() for layer in variational_layers(chain).values())
