"""Two processes are one with their global batch: the same KL, the same gradients, the same masks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_run
import fsdp_run
import pytest
import sharded_step
import torch
from runs import CHECKPOINTING, PRUNING, rows, tiny_bert
from safetensors.torch import load_file

from hf_vdneuron.patching import patch_model_
from hf_vdneuron.persistence import from_pretrained


NUM_PROCESSES = 2

#: Sparsification from the first step on, where the weights are still those that all runs start with, and gradients as
#: they come.
COMPARED = {**PRUNING, "noise": False, "step": 0, "finetune_fraction": 0.0, "max_grad_norm": 0.0}

TOLERANCE = 1e-6

Seen = dict[str, Any]


def launch(folder: Path, **options: Any) -> list[Seen]:
    """Run on several processes, as a user would; what each of them saw."""
    flags = f"--multi_gpu --num_machines 1 --num_processes {NUM_PROCESSES} --mixed_precision no --dynamo_backend no"
    launcher = ["accelerate.commands.launch", *flags.split(), "--main_process_port", "0"]
    return start(launcher, distributed_run.__file__, folder, json.dumps({**options, "ddp_backend": "gloo"}))


def start(launcher: list[str], script: str, folder: Path, *arguments: str) -> list[Seen]:
    """Start a script on several processes; what each of them wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", *launcher, script, str(folder), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(NUM_PROCESSES)]


def alone(folder: Path, **options: Any) -> Seen:
    folder.mkdir(parents=True, exist_ok=True)
    distributed_run.run(folder, options)
    return torch.load(folder / "rank-0.pt", weights_only=True)


#: Heads whose loss is a mean over the examples of a part, and over the tokens of the whole step.
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-part": (1, {}),
    "two-parts-checkpointed": (2, {CHECKPOINTING: True}),
    "tokens-in-two-parts": (2, {"language_model": True, "num_data": 288}),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def without_noise(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, list[Seen]]:
    """One process with batches of 8, and two with batches of 4, in as many parts."""
    folder = tmp_path_factory.mktemp("without_noise")
    parts, kind = request.param
    options = {**COMPARED, **kind, "gradient_accumulation_steps": parts}
    size = 8 // parts
    single = alone(folder / "one", per_device_train_batch_size=size, **options)
    return single, launch(folder / "two", per_device_train_batch_size=size // NUM_PROCESSES, **options)


def test_the_kl_is_exact(without_noise: tuple[Seen, list[Seen]]) -> None:
    single, several = without_noise
    # Without noise a log-variance feels nothing but the KL.
    names = [name for name in single["gradients"] if name.endswith("log_var")]
    assert names
    for seen in several:
        assert [name for name in names if not torch.equal(seen["gradients"][name], single["gradients"][name])] == []
    kl = [next(logs["kl"] for logs in seen["log"] if "kl" in logs) for seen in (single, several[0])]
    assert kl[0] == kl[1] > 0


def test_gradients_are_those_of_the_global_batch(without_noise: tuple[Seen, list[Seen]]) -> None:
    single, several = without_noise
    for seen in several:
        assert seen["gradients"].keys() == single["gradients"].keys()
        for name, expected in single["gradients"].items():
            error = (seen["gradients"][name] - expected).abs().max()
            assert error <= TOLERANCE * max(1.0, expected.abs().max()), name
    assert any(gradient.abs().max() > 1000 * TOLERANCE for gradient in single["gradients"].values())


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_through_the_twin_are_those_of_the_global_batch(parts: int, tmp_path: Path) -> None:
    options = {
        **{"finetune_fraction": 0.0, "sparsify_fraction": 0.0, "recover_fraction": 1.0, "target_speedup": 8.0},
        **{"noise": True, "step": 2, "max_steps": 3, "max_grad_norm": 0.0, "gradient_accumulation_steps": parts},
    }
    size = 8 // parts
    single = alone(tmp_path / "one", per_device_train_batch_size=size, **options)
    several = launch(tmp_path / "two", per_device_train_batch_size=size // NUM_PROCESSES, **options)
    assert not all(keep.any() for keep in single["kept"].values())  # a layer without heads has fewer parameters
    for seen in several:
        assert seen["small_steps"] == 3 * parts
        assert seen["gradients"].keys() == single["gradients"].keys()
        for name, expected in single["gradients"].items():
            torch.testing.assert_close(seen["gradients"][name], expected, rtol=1e-3, atol=1e-5, msg=name)
    assert any(gradient.abs().max() > 1e-3 for gradient in single["gradients"].values())


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(PRUNING, id="rule"),
        pytest.param({**PRUNING, "kl_weight": None, "target_speedup": 1.5}, id="target"),
        pytest.param({"sparsify_fraction": 0.0, "target_speedup": 1.5}, id="in closed form"),
    ],
)
def test_ranks_agree_on_what_is_removed(tmp_path: Path, target: dict[str, float | None]) -> None:
    """All phases, with noise, gradient accumulation and checkpointing on."""
    options = {**target, "noise": True, "step": 0, "per_device_train_batch_size": 2}
    first, second = launch(
        tmp_path, gradient_accumulation_steps=2, eval_strategy="no", **{CHECKPOINTING: True}, **options
    )
    removed = sum(int((~keep).sum()) for keep in first["kept"].values())
    assert 0 < removed < sum(keep.numel() for keep in first["kept"].values())
    assert [path for path, keep in first["kept"].items() if not torch.equal(keep, second["kept"][path])] == []
    different = [name for name, value in first["weights"].items() if not torch.equal(value, second["weights"][name])]
    assert different == []


def test_the_kl_is_exact_where_every_process_holds_a_piece_of_each_weight(tmp_path: Path) -> None:
    expected = sharded_step.step(patch_model_(tiny_bert()), sharded_step.batch())
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(NUM_PROCESSES)]
    for seen in start(launcher, sharded_step.__file__, tmp_path):
        assert torch.equal(seen["kl"], expected["kl"])
        assert seen["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            error = (seen["gradients"][name] - gradient).abs().max()
            assert error <= TOLERANCE * max(1.0, gradient.abs().max()), name
        for part in ("priors", "relevance", "kept"):
            assert [name for name, value in expected[part].items() if not torch.equal(seen[part][name], value)] == []
        assert seen["expected"] == expected["expected"]


#: As a user's config of accelerate has it.
FSDP = (
    f"accelerate.commands.launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    f"--fsdp_transformer_layer_cls_to_wrap BertLayer --fsdp_cpu_ram_efficient_loading false --num_machines 1 "
    f"--num_processes {NUM_PROCESSES} --mixed_precision no --dynamo_backend no --main_process_port 0"
)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(PRUNING, id="trained"),
        pytest.param(
            {"sparsify_fraction": 0.0, "recover_fraction": 2 / 3, "target_speedup": 1.5}, id="in closed form"
        ),
    ],
)
def test_a_sharded_run_is_resumed_pruned_and_saved_whole(tmp_path: Path, how: dict[str, float]) -> None:
    middle = {"save_strategy": "steps", "save_steps": 6}  # in the middle of the sparsification or of the recovery
    options = {**how, **middle, "ddp_backend": "gloo", "per_device_train_batch_size": 4}
    first, second = start(FSDP.split(), fsdp_run.__file__, tmp_path, json.dumps(options))
    assert first["sharded"]
    removed = sum(int((~keep).sum()) for keep in first["kept"].values())
    assert 0 < removed < sum(keep.numel() for keep in first["kept"].values())
    for part in ("kept", "teacher", "whole"):
        assert [name for name, value in first[part].items() if not torch.equal(value, second[part][name])] == []
    assert [name for name, value in first["whole"].items() if not torch.equal(value, first["resumed"][name])] == []
    for seen in (first, second):
        torch.testing.assert_close(seen["pruned"], seen["masked"], rtol=0, atol=1e-5)
    assert first["frozen"]
    assert second["frozen"]
    unpruned = load_file(tmp_path / "unpruned" / "model.safetensors")
    assert [name for name, value in first["whole"].items() if not torch.equal(value, unpruned[name])] == []
    assert (tmp_path / "unpruned" / "vd_config.json").exists()
    model = from_pretrained(tmp_path / "model").eval()
    batch = torch.stack([row["input_ids"] for row in rows()[:8]])
    with torch.no_grad():
        torch.testing.assert_close(model(batch).logits, first["pruned"], rtol=0, atol=0)
