"""Arguments of a run: ranges, refusals, division into phases."""

from pathlib import Path
from typing import Any

import pytest
from runs import CHECKPOINTING
from transformers import HfArgumentParser

from hf_vdneuron.config import VDConfig
from hf_vdneuron.schedules import Decay, PhasePlan
from hf_vdneuron.training_args import VDTrainingArguments


NAN, INF = float("nan"), float("inf")

TRAINED = {"target_speedup": 2.0, "sparsify_fraction": 0.5}


@pytest.mark.parametrize(
    ("options", "plan", "removes"),
    [
        pytest.param({}, PhasePlan(300, 500, 200), True, id="by the rule"),
        pytest.param({"target_speedup": 2.0}, PhasePlan(300, 0, 700), True, id="to a target"),
        pytest.param({"max_loss_increase": 0.1}, PhasePlan(300, 0, 700), True, id="within a tolerance"),
        pytest.param(TRAINED, PhasePlan(300, 500, 200), True, id="to a target by a trained posterior"),
        pytest.param({"target_params": 9, "recover_fraction": 0}, PhasePlan(1000, 0, 0), True, id="no recovery"),
        pytest.param({"sparsify_fraction": 0}, PhasePlan(300, 0, 700), False, id="without a cut"),
    ],
)
def test_defaults_divide_a_run(tmp_path: Path, options: dict[str, Any], plan: PhasePlan, removes: bool) -> None:
    args = VDTrainingArguments(output_dir=str(tmp_path), **options)
    assert args.phase_plan(1000) == plan
    assert args.removes is removes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsify_fraction": -0.1}, "`sparsify_fraction` is -0.1: expected a number of at least 0"),
        ({"finetune_fraction": NAN}, "`finetune_fraction` is nan"),
        ({"recover_fraction": INF}, "`recover_fraction` is inf"),
        ({"finetune_fraction": 0, "sparsify_fraction": 0, "recover_fraction": 0}, "all 0: expected one above 0"),
        ({"kl_ramp": 1.5}, "`kl_ramp` is 1.5"),
        ({"kl_ramp": NAN}, "`kl_ramp` is nan"),
        ({"kl_start": 0.0}, "`kl_start` is 0.0"),
        ({"kl_start": 1.5}, "`kl_start` is 1.5"),
        ({"kl_start": 0.1, **TRAINED}, "`kl_start` is 0.1, but with a target the KL weight is steered"),
        ({"kl_ramp": 0.1, **TRAINED}, "`kl_ramp` is 0.1, but with a target the KL weight is steered"),
        ({"kl_weight": 0.1, "target_params": 9}, "`kl_weight` is 0.1, but the posterior is not trained"),
        ({"log_var_distance": 1.0, "max_loss_increase": 0.1}, "`log_var_distance` is 1.0, but the posterior is not"),
        ({"kl_weight": -1.0}, "`kl_weight` is -1.0"),
        ({"kl_weight": NAN}, "`kl_weight` is nan"),
        ({"kl_weight": INF}, "`kl_weight` is inf"),
        ({"log_var_distance": INF}, "`log_var_distance` is inf"),
        ({"group_scale_distance": 0.0}, "`group_scale_distance` is 0.0"),
        ({"dropout_rate_threshold": 0.0}, "`dropout_rate_threshold` is 0.0: expected a number between 0 and 1"),
        ({"dropout_rate_threshold": 1.0}, "`dropout_rate_threshold` is 1.0: expected a number between 0 and 1"),
        ({"dropout_rate_threshold": NAN}, "`dropout_rate_threshold` is nan"),
        ({"distillation_weight": -0.5}, "`distillation_weight` is -0.5"),
        ({"distillation_weight": NAN}, "`distillation_weight` is nan"),
        ({"distillation_temperature": 0.0}, "`distillation_temperature` is 0.0"),
        ({"num_data": 0}, "`num_data` is 0"),
        ({"target_speedup": 1.0}, "`target_speedup` is 1.0: expected a number above 1"),
        ({"target_sparsity": 1.0}, "`target_sparsity` is 1.0: expected a number between 0 and 1"),
        ({"target_params": 0}, "`target_params` is 0: expected a number of at least 1"),
        ({"latency_batch_size": 0}, "`latency_batch_size` is 0"),
        ({"round_heads_to": 0, "target_speedup": 2.0}, "`round_heads_to` is 0: expected a number of at least 1"),
        ({"layout": "square", "target_speedup": 2.0}, "`layout` is 'square': expected free or uniform"),
        ({"layout": "uniform"}, "the dropout-rate rule, which decides without a target, looks at no numbers"),
        ({"save_sizes": True, "target_speedup": 2.0}, "no tolerance that looks at several sizes"),
        ({"speedup_from": "flops"}, "`speedup_from` is 'flops': expected macs or latency"),
        (
            {"target_speedup": 2.0, "target_params": 9},
            "`target_speedup` and `target_params` are set: expected at most one",
        ),
        ({"lr_scheduler_type": "polynomial"}, "`lr_scheduler_type` is `polynomial`"),
        (
            {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
            "use_reentrant=True",
        ),
    ],
    ids=lambda value: "-".join(map(str, next(iter(value.items())))) if isinstance(value, dict) else "",
)
def test_values_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VDTrainingArguments(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("kl_ramp", 0), ("kl_ramp", 1), ("kl_start", 1), ("distillation_weight", 0), ("distillation_weight", 1)],
)
def test_closed_ranges_include_their_ends(tmp_path: Path, name: str, value: float) -> None:
    assert getattr(VDTrainingArguments(output_dir=str(tmp_path), **{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("linear", Decay.LINEAR),
        ("cosine", Decay.COSINE),
        ("constant", Decay.CONSTANT),
        ("constant_with_warmup", Decay.CONSTANT),
    ],
)
def test_scheduler_types_have_a_decay_per_phase(tmp_path: Path, name: str, decay: Decay) -> None:
    assert VDTrainingArguments(output_dir=str(tmp_path), lr_scheduler_type=name).decay is decay


def test_every_field_is_a_flag(tmp_path: Path) -> None:
    parser = HfArgumentParser([VDTrainingArguments, VDConfig])
    flags = ["--output_dir", str(tmp_path), "--kl_weight", "0.5", "--prior", "group", "--exclude", "a*", "b*"]
    args, config = parser.parse_args_into_dataclasses(flags)
    assert args.kl_weight == 0.5
    assert config == VDConfig(prior="group", exclude=["a*", "b*"])


@pytest.mark.parametrize(
    ("flags", "goal"),
    [
        ([], "dropout rate above 0.99"),
        (["--target_speedup", "2"], "target_speedup 2 in macs"),
        (["--target_speedup", "1.5", "--speedup_from", "latency"], "target_speedup 1.5 in latency"),
        (["--target_sparsity", "0.6"], "target_sparsity 0.6"),
        (["--target_params", "2000000"], "target_params 2,000,000"),
    ],
    ids=["rule", "macs", "latency", "sparsity", "parameters"],
)
def test_the_goal_is_told_in_words(tmp_path: Path, flags: list[str], goal: str) -> None:
    (args,) = HfArgumentParser(VDTrainingArguments).parse_args_into_dataclasses([
        "--output_dir",
        str(tmp_path),
        *flags,
    ])
    assert args.goal == goal


def test_a_share_of_steps_between_logs_is_no_share_between_evaluations(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "load_best_model_at_end": True}
    args = VDTrainingArguments(str(tmp_path), **options)
    assert (args.logging_steps, args.eval_steps, args.save_steps) == (0.02, 500, 500)
    assert VDTrainingArguments(str(tmp_path), eval_steps=7).eval_steps == 7


def test_hidden_states_need_a_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`hidden_distillation_weight` is 2, but `distillation_weight` is 0"):
        VDTrainingArguments(str(tmp_path), hidden_distillation_weight=2.0, distillation_weight=0.0)
