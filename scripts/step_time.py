# SPDX-License-Identifier: Apache-2.0
"""Time a training step of each phase, in turns, and what a whole run costs beside dense fine-tuning.

    python scripts/step_time.py --model_name_or_path M --dataset_dir DIR --task_name sst2

Every phase sees the same batches, so that only what it does with them differs. The times of one call drift together;
the ratios are what it is for.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarks.baselines import keep_affordable
from benchmarks.cell import TRAIN_BATCH_SIZE, Settings
from benchmarks.text_cell import TextCell
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import Costs
from hf_vdneuron.cli import one_line_errors, parse_args, print_table
from hf_vdneuron.elbo import em_step_, kl_divergence, set_variational_
from hf_vdneuron.fitting_trainer import NUM_EXAMPLES
from hf_vdneuron.latency import read_clock
from hf_vdneuron.masks import RelevanceMask, mask_model_
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.relevance import expected_units
from hf_vdneuron.schedules import Phase
from hf_vdneuron.selection import FREE, stages
from hf_vdneuron.sharding import dense_copy
from hf_vdneuron.steering import steps_between_looks
from hf_vdneuron.targets import cost_ratio_budget, speedup_budget
from hf_vdneuron.trainer import VDTrainer


#: Steps at the start of each turn that are not timed: memory is allocated, kernels are chosen.
WARMUP_STEPS = 2

#: Pairs of steps, with and without KL and EM, in a turn.
DIVERGENCE_PAIRS = 5

#: It does not change how long a step takes.
LEARNING_RATE = 5e-5


@dataclass
class StepTimeArguments:
    """Flags of this script."""

    model_name_or_path: str = field(metadata={"help": "Pretrained model: a folder, or a Hub name."})
    task_name: str = field(default="sst2", metadata={"help": "GLUE task whose rows are trained on."})
    dataset_dir: str | None = field(
        default=None, metadata={"help": "Folder with `<task>/{train,validation}.parquet`; by default the Hub is used."}
    )
    target_speedup: float = field(default=2.0, metadata={"help": "Speed-up to steer the KL for, and to recover at."})
    turns: int = field(default=3, metadata={"help": "Turns of each phase."})
    steps: int = field(default=12, metadata={"help": "Steps of a turn, more than those that warm up."})
    max_length: int = field(default=128, metadata={"help": "Tokens to which texts are truncated."})
    finetune_steps: int = field(default=400, metadata={"help": "Steps of dense fine-tuning in the run to price."})
    sparsify_steps: int = field(default=400, metadata={"help": "Steps of sparsification in it."})
    recover_steps: int = field(default=160, metadata={"help": "Steps of recovery in it."})
    bf16: bool = field(default=False, metadata={"help": "Train in mixed precision."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU."})

    def __post_init__(self) -> None:
        """Check the number of steps.

        Raises:
            ValueError: If no step of a turn would be timed.
        """
        if self.steps <= WARMUP_STEPS:
            raise ValueError(f"`steps` is {self.steps}: expected more than the {WARMUP_STEPS} that warm up")


class StepClock(TrainerCallback):
    """Notes how long optimizer steps take, with EM, and without what is done between them: logs, looks, data."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args: TrainingArguments, *_: Any, **run: Any) -> None:
        """Start the clock.

        Args:
            args: Arguments of the run, which know its device.
            *_: Not used.
            **run: Not used.
        """
        self._started = read_clock(args.device)

    def on_step_end(self, args: TrainingArguments, *_: Any, **run: Any) -> None:
        """Stop the clock.

        Args:
            args: Arguments of the run, which know its device.
            *_: Not used.
            **run: Not used.
        """
        self.seconds.append(read_clock(args.device) - self._started)


@dataclass(frozen=True)
class Seconds:
    """Medians over turns.

    Args:
        steps: Seconds of a step of each phase.
        divergence: Of KL and EM in a step of sparsification.
        look: Of a look of the controller at the posterior.
        stage: Of a posterior in closed form, and of what makes up for a cut by it, where nothing was cut before.
    """

    steps: dict[Phase, float]
    divergence: float
    look: float
    stage: float


def mask_for(model: PreTrainedModel, target_speedup: float, *, length: int) -> RelevanceMask:
    """Choose what meets a target, by chance: it does not change how long a step takes.

    Args:
        model: A dense model.
        target_speedup: The target.
        length: Tokens for which it is asked.

    Returns:
        The mask.
    """
    budget = speedup_budget(Costs(model, length=length), target_speedup)
    random = torch.Generator().manual_seed(0)
    worth = {part.path: torch.rand(part.num_units, generator=random) for part in find_sublayers(model)}
    return keep_affordable(model, worth, budget)


def time_divergence(trainer: VDTrainer, batch: Mapping[str, Tensor]) -> list[float]:
    """Time KL and EM: gradients of the noisy loss with and without them, in turns.

    Args:
        trainer: A trainer that has sparsified; its model is given gradients.
        batch: Keyword arguments of its forward.

    Returns:
        By how many seconds they made each pair of steps differ; the first pair warms up and is left out.
    """
    model = trainer.model.train()
    extra = []
    for _ in range(1 + DIVERGENCE_PAIRS):
        took = []
        for collect_kl in (False, True):
            set_variational_(model, noise=True, collect_kl=collect_kl)
            started = read_clock(trainer.args.device)
            with trainer.accelerator.autocast():
                loss = model(**batch).loss
            if collect_kl:
                loss = loss + kl_divergence(model)  # a weight would cost nothing
            loss.backward()
            em_step_(model)
            took.append(read_clock(trainer.args.device) - started)
        extra.append(took[1] - took[0])
    return extra[1:]


def time_phases(args: StepTimeArguments, work_dir: Path) -> Seconds:
    """Train a few steps in each phase, in turns.

    Args:
        args: Flags.
        work_dir: Folder for what the trainer writes.

    Returns:
        What each takes.
    """
    settings = Settings(
        model=args.model_name_or_path,
        max_train_samples=max(TRAIN_BATCH_SIZE * args.steps, NUM_EXAMPLES),
        max_length=args.max_length,
        dense_steps=args.steps,
        sparsify_steps=args.steps,
        recover_steps=args.steps,
        dense_learning_rate=LEARNING_RATE,
        learning_rate=LEARNING_RATE,
        bf16=args.bf16,
        distillation=True,
    )
    seconds: dict[Phase, list[float]] = {phase: [] for phase in Phase}
    divergences: list[float] = []
    looks: list[float] = []
    stages_taken: list[float] = []
    for turn in range(args.turns):
        cell = TextCell(
            settings, args.task_name, turn, dataset_dir=args.dataset_dir, work_dir=work_dir, use_cpu=args.use_cpu
        )
        batch = next(cell.batches(cell.build()))
        for phase in Phase:
            clock = StepClock()
            model, teacher = cell.build(), cell.build()
            learns = phase is not Phase.FINETUNE
            mask = mask_for(model, args.target_speedup, length=args.max_length)
            if phase is Phase.RECOVER:
                mask_model_(patch_model_(model), mask)
            target = args.target_speedup if phase is Phase.SPARSIFY else None
            trainer = cell.train(
                model, phase, args.steps, teacher=teacher if learns else None, target_speedup=target, callbacks=[clock]
            )
            seconds[phase] += clock.seconds[WARMUP_STEPS:]
            if phase is Phase.SPARSIFY:
                started = read_clock(cell.device)
                expected_units(trainer.model)
                looks.append(read_clock(cell.device) - started)
                divergences += time_divergence(trainer, batch)
            if phase is Phase.FINETUNE:  # whose model is whole, as it is in the first stage
                started = read_clock(cell.device)
                trainer.closed_form_evidence()
                mask_model_(trainer.model, mask)
                trainer.make_up_for_(dense_copy(teacher))
                stages_taken.append(read_clock(cell.device) - started)
    medians = {phase: median(values) for phase, values in seconds.items()}
    return Seconds(medians, median(divergences), median(looks), median(stages_taken))


@one_line_errors
def main(argv: list[str]) -> None:
    """Time the phases, and print what they and a whole run cost, the controller's looks at the posterior included.

    Args:
        argv: Arguments without the program's name.
    """
    (args,) = parse_args([StepTimeArguments], argv, description=__doc__)
    with TemporaryDirectory() as work_dir:
        seconds = time_phases(args, Path(work_dir))
    dense, steps = seconds.steps[Phase.FINETUNE], {phase: getattr(args, f"{phase}_steps") for phase in Phase}
    num_looks = 1 + args.sparsify_steps // steps_between_looks(args.sparsify_steps)
    body = cost_ratio_budget(lambda counts: 1.0, args.target_speedup)
    num_stages = len(stages(body, FREE, now=1.0, least=0.0))
    lines = [[str(phase), seconds.steps[phase], steps[phase]] for phase in Phase]
    lines += [["KL and EM of sparsify", seconds.divergence, steps[Phase.SPARSIFY]]]
    lines += [["look", seconds.look, num_looks], ["stage in closed form", seconds.stage, num_stages]]
    print_table(
        ["", "takes", "against a dense step", "times in a run"],
        [[name, f"{took:.3f} s", f"{took / dense:.2f}", str(count)] for name, took, count in lines],
    )
    trained = sum(steps[phase] * seconds.steps[phase] for phase in Phase) + num_looks * seconds.look
    behind = steps[Phase.SPARSIFY] + steps[Phase.RECOVER]
    closed = steps[Phase.FINETUNE] * dense + num_stages * seconds.stage + behind * seconds.steps[Phase.RECOVER]
    paid = steps[Phase.FINETUNE] * dense
    print(
        f"\nA run of {sum(steps.values())} steps costs {trained / paid:.2f} times its dense fine-tuning, and "
        f"{closed / paid:.2f} times with a posterior in closed form. KL and EM are "
        f"{100 * seconds.divergence / seconds.steps[Phase.SPARSIFY]:.1f} % of a step of sparsification."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
