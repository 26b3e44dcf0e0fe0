"""A report as of a run of six layers with twelve heads and 1,536 neurons each, drawn from a seed."""

from dataclasses import replace
from math import exp
from typing import Any

import numpy as np

from hf_vdneuron.report import (
    Curve,
    DropoutRateReport,
    ModelReport,
    RunReport,
    ScoreReport,
    SpeedReport,
    TrainingReport,
)
from hf_vdneuron.schedules import PhasePlan


LAYERS, HEADS, NEURONS = 6, 12, 1536
PHASES = PhasePlan(300, 500, 200)
STEPS = range(20, 1001, 20)
KEPT_NEURONS = [310, 522, 688, 741, 602, 95]


def curves(rng: np.random.Generator) -> dict[str, Curve]:
    """Curves as they are logged: some over all steps, some in sparsification only."""
    everywhere = list(STEPS)
    later = [step for step in STEPS if step > PHASES.sparsify_start]
    done = [min(1.0, max(0.0, (step - 300) / 500)) for step in everywhere]
    sparsify = [step for step in STEPS if PHASES.sparsify_start < step <= PHASES.recover_start]
    noise = rng.normal(size=len(everywhere))
    return {
        "loss": Curve(everywhere, [0.3 + 0.5 * exp(-step / 150) for step in everywhere]),
        "nll": Curve(
            everywhere,
            [
                0.16 + 0.5 * exp(-step / 110) + 0.12 * share + 0.012 * z
                for step, share, z in zip(everywhere, done, noise, strict=True)
            ],
        ),
        "distillation": Curve(later, [0.05 + 0.14 * exp(-((step - 700) ** 2) / 60000) for step in later]),
        "kl": Curve(sparsify, [1.1 * exp(-(step - 300) / 260) + 0.12 for step in sparsify]),
        "kl_weight": Curve(everywhere, [2e-3 * 30 ** ((s - 300) / 500) if s in sparsify else 0.0 for s in everywhere]),
        "heads": Curve(everywhere, [float(round(72 - 31 * share**1.6)) for share in done]),
        "neurons": Curve(everywhere, [float(round(9216 - 6258 * share**2.2)) for share in done]),
        "irrelevant_weights": Curve(everywhere, [0.01 + 0.71 * share for share in done]),
        "expected_speedup": Curve(everywhere, [1 / (1 - 0.61 * share**2) for share in done]),
        "expected_removal": Curve(sparsify, [(step - 300) / 500 for step in sparsify]),
    }


def dropout_rates(rng: np.random.Generator) -> DropoutRateReport:
    edges = np.log(99) + 0.25 * np.arange(-56, 25)
    counts = {}
    for name, size, center in (("head", 3_500_000, 1.0), ("neuron", 7_000_000, 2.5)):
        values = np.concatenate([rng.normal(center - 3.5, 1.8, 4000), rng.normal(center + 4.5, 1.6, 9000)])
        counts[name] = [int(n * size / 13000) for n in np.histogram(values.clip(edges[0], edges[-1]), edges)[0]]
    return DropoutRateReport([float(edge) for edge in edges], counts, 0.99)


def make_report(**changes: Any) -> RunReport:
    """A report; `changes` replace its fields."""
    rng = np.random.default_rng(0)
    sizes = (8, 9, 10, 7, 5, 2)
    kept = [sorted(rng.choice(HEADS, size, replace=False).tolist()) for size in sizes]
    report = RunReport(
        base_model="sentence-transformers/all-MiniLM-L6-v2",
        task="sst2",
        target="target_speedup 2.5 in macs",
        command="python scripts/sparsify.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 "
        "--task_name sst2 --output_dir minilm-sst2-2.5x --target_speedup 2.5 --max_steps 1000 "
        "--per_device_train_batch_size 32 --learning_rate 1e-4 --bf16 --report_to none",
        dense=ModelReport(0.9037, "bf16 autocast", 22_713_986, 90_855_944, [HEADS] * LAYERS, [NEURONS] * LAYERS),
        pruned=ModelReport(0.8945, "fp32", 16_214_018, 64_856_072, [len(heads) for heads in kept], KEPT_NEURONS),
        kept_heads=kept,
        score_after_cut=0.8819,
        evaluation=ScoreReport({"accuracy": 0.8945}, "validation", 872, 128, 32),
        speedup=SpeedReport(2.56, 2.14, 0.0313, 0.01463, 1, 128),
        training=TrainingReport(PHASES, curves(rng), dropout_rates(rng)),
        seeds={"training": 42, "data order": 42},
        train_seconds=1431.7,
        device="cpu (x86_64)",
        versions={"python": "3.11.7", "hf-vdneuron": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    )
    return replace(report, **changes)
