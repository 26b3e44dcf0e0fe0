"""`scripts/step_time.py`: every phase is timed, and a run is priced by them."""

from pathlib import Path

import pytest
import step_time
from glue_samples import write_sst2

from hf_vdneuron.schedules import Phase


def test_a_run_is_priced_by_its_phases(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {Phase.FINETUNE: 0.5, Phase.SPARSIFY: 1.2, Phase.RECOVER: 0.75}
    monkeypatch.setattr(step_time, "time_phases", lambda *_: seconds)
    step_time.main(["--model_name_or_path=M", "--finetune_steps=100", "--sparsify_steps=50", "--recover_steps=20"])
    out = capsys.readouterr().out
    assert ["sparsify", "1.200", "s", "2.40", "50"] in [line.split() for line in out.splitlines()]
    assert "costs 2.50 times" in out


def test_each_phase_is_timed_on_the_same_rows(tmp_path: Path) -> None:
    write_sst2(tmp_path)
    args = step_time.StepTimeArguments(
        model_name_or_path=str(tmp_path / "model"),
        dataset_dir=str(tmp_path / "data"),
        max_length=16,
        turns=2,
        steps=step_time.WARMUP_STEPS + 1,
        use_cpu=True,
    )
    seconds = step_time.time_phases(args, tmp_path / "work")
    assert seconds.keys() == set(Phase)
    assert all(second > 0 for second in seconds.values())


def test_a_turn_needs_a_timed_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step_time.main(["--model_name_or_path=M", f"--steps={step_time.WARMUP_STEPS}"])
    assert "expected more than the 2 that warm up" in capsys.readouterr().err
