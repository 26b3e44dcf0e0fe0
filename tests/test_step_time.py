"""`scripts/step_time.py`: every phase is timed, and a run is priced by them."""

from pathlib import Path
from typing import Any

import pytest
import step_time
import torch
from glue_samples import write_sst2
from runs import PRUNING, make_trainer, rows
from torch import nn

from hf_vdneuron import fitting_trainer
from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.schedules import Phase
from hf_vdneuron.trainer import VDTrainer


def test_a_run_is_priced_by_its_phases(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {Phase.FINETUNE: 0.5, Phase.SPARSIFY: 1.2, Phase.RECOVER: 0.75}
    monkeypatch.setattr(
        step_time, "time_phases", lambda *_: step_time.Seconds(seconds, divergence=0.06, look=0.1, stage=3.0)
    )
    step_time.main(["--model_name_or_path=M", "--finetune_steps=100", "--sparsify_steps=50", "--recover_steps=20"])
    out = capsys.readouterr().out
    assert ["sparsify", "1.200", "s", "2.40", "50"] in [line.split() for line in out.splitlines()]
    assert ["sparsify", "0.060", "s", "0.12", "50"] in [line.split()[-5:] for line in out.splitlines()]
    assert "KL and EM are 5.0 % of a step of sparsification." in out  # 0.06 / 1.2
    assert ["look", "0.100", "s", "0.20", "51"] in [line.split() for line in out.splitlines()]
    assert ["form", "3.000", "s", "6.00", "2"] in [line.split()[-5:] for line in out.splitlines()]
    assert "A run of 170 steps costs 2.60 times" in out  # (100 * 0.5 + 50 * 1.2 + 20 * 0.75 + 51 * 0.1) / 50
    assert "and 2.17 times with a posterior in closed form" in out  # (100 * 0.5 + 2 * 3 + 70 * 0.75) / 50


def test_each_phase_is_timed_on_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Phase, list[list[int]]] = {phase: [] for phase in Phase}
    units: dict[Phase, int] = {}
    compute_loss = VDTrainer.compute_loss

    def watched(trainer: VDTrainer, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> object:
        if model.training:
            seen[trainer.phase].append(inputs["input_ids"].flatten().tolist())
            units[trainer.phase] = sum(part.num_units for part in find_sublayers(model))
        return compute_loss(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(VDTrainer, "compute_loss", watched)
    monkeypatch.setattr(step_time, "NUM_EXAMPLES", 8)
    monkeypatch.setattr(fitting_trainer, "NUM_EXAMPLES", 8)
    write_sst2(tmp_path, num_rows=200)
    args = step_time.StepTimeArguments(
        model_name_or_path=str(tmp_path / "model"),
        dataset_dir=str(tmp_path / "data"),
        max_length=16,
        turns=2,
        steps=step_time.WARMUP_STEPS + 1,
        use_cpu=True,
    )
    seconds = step_time.time_phases(args, tmp_path / "work")
    assert seconds.steps.keys() == set(Phase)
    assert all(second > 0 for second in [*seconds.steps.values(), seconds.look, seconds.stage])
    assert len(seen[Phase.FINETUNE]) == args.turns * args.steps
    assert seen[Phase.FINETUNE] == seen[Phase.SPARSIFY] == seen[Phase.RECOVER]
    assert units[Phase.RECOVER] < units[Phase.FINETUNE] == units[Phase.SPARSIFY]
    assert seen[Phase.FINETUNE][0] != seen[Phase.FINETUNE][args.steps]  # another turn has other rows


def test_kl_and_em_are_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a KL takes a second, and a step of EM three, or one where it has nothing to move."""
    trainer = make_trainer(tmp_path, **PRUNING)
    trainer.train()
    now = [0.0]
    monkeypatch.setattr(step_time, "read_clock", lambda _: now[0])
    em_step_, kl_divergence = step_time.em_step_, step_time.kl_divergence

    def tick_once(model: nn.Module) -> torch.Tensor:
        now[0] += 1.0
        return kl_divergence(model)

    def tick(model: nn.Module) -> None:
        layers = variational_layers(model).values()
        now[0] += 3.0 if all(layer.statistics is not None for layer in layers) else 1.0
        em_step_(model)

    monkeypatch.setattr(step_time, "em_step_", tick)
    monkeypatch.setattr(step_time, "kl_divergence", tick_once)
    batch = {name: torch.stack([row[name] for row in rows()[:4]]) for name in rows()[0]}
    assert step_time.time_divergence(trainer, batch) == [3.0] * step_time.DIVERGENCE_PAIRS


def test_a_turn_needs_a_timed_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step_time.main(["--model_name_or_path=M", f"--steps={step_time.WARMUP_STEPS}"])
    assert "expected more than the 2 that warm up" in capsys.readouterr().err
