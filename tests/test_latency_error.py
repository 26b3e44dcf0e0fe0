"""`scripts/latency_error.py`: what a table predicts is held against the clock."""

from collections.abc import Mapping
from pathlib import Path

import latency_error
import pytest
from glue_samples import write_sst2
from torch import nn

from hf_vdneuron.budget import body_cost


@pytest.mark.parametrize(
    ("slowdown", "off"), [(1.0, "+0.0%"), (1.25, "-20.0%")], ids=["exact", "slower-than-predicted"]
)
def test_a_table_is_held_against_the_clock(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    slowdown: float,
    off: str,
) -> None:
    write_sst2(tmp_path)

    def by_macs(models: Mapping[str, nn.Module], inputs: object) -> dict[str, float]:
        factors = {"pruned": slowdown}
        return {
            name: factors.get(name, 1.0) * (1000 + body_cost(model, length=8).macs) for name, model in models.items()
        }

    monkeypatch.setattr(latency_error, "measure_latency", by_macs)
    monkeypatch.setattr("hf_vdneuron.latency_table.measure_latency", by_macs)
    latency_error.main([
        f"--model_name_or_path={tmp_path / 'model'}",
        "--length=8",
        "--targets",
        "1.2",
        "--batch_sizes",
        "1",
    ])
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == off
