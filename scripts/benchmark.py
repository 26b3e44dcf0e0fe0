# SPDX-License-Identifier: Apache-2.0
"""Set the method beside others: one trainer, one budget, one dense start; only the choice of what goes differs.

    python scripts/benchmark.py --model_name_or_path M --dataset_dir DIR

Every task and seed gets one dense checkpoint. From it each method removes heads and neurons, and what is left trains
on until the budget of optimizer steps after the dense checkpoint is spent, equal for all but `fisher_oneshot` and
`vd_oneshot`, which spend none. With `--target_speedups` each method keeps what the speed-up affords; without, `vd`
decides by the dropout-rate rule, and the baselines keep as many heads and neurons of their own choice. `dense_longer`
removes nothing and trains on: what the budget is worth by itself. The dense checkpoint teaches them all or, with
`--no_distillation`, none: those are other runs, with tables and pictures of their own.

Every finished run is a row of `--results_file`, and is skipped from then on. Several processes can share the work.
`--plan` prints what is left to do, `--table` what is there, `--plots DIR` draws it.
"""

import fcntl
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from benchmarks.baselines import RANKINGS, SCORERS, TORCH_PRUNING, Scores, keep_affordable, keep_best
from benchmarks.cell import DENSE, Cell, Courses, Settings, cell_folder
from benchmarks.gates import fold_gates_
from benchmarks.image_cell import CIFAR10, ImageCell
from benchmarks.image_models import MODELS
from benchmarks.learned_gates import LEARNED_GATES
from benchmarks.mask_search import MASK_SEARCHES, ONE_SHOT, search_mask, tune_gates
from benchmarks.measurements import DOORS, commit, latencies, score_in_new_process
from benchmarks.plots import draw_courses, draw_scores
from benchmarks.results import Results, Row, Run, latency_table, lead_table, score_table
from benchmarks.text_cell import TextCell
from transformers import PreTrainedModel, set_seed

from hf_vdneuron.budget import Costs, body_cost, cost_ratio, units_left
from hf_vdneuron.cli import check_counts, one_line_errors, parse_args, print_table
from hf_vdneuron.config import Grouping, PriorType, VDConfig
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.one_shot import sparsify
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.report import environment
from hf_vdneuron.structure import dense_twin
from hf_vdneuron.sublayers import Unit
from hf_vdneuron.targets import speedup_budget


OURS = "vd"
#: Variants of ours, and what it set out from: there a weight shares nothing with its neuron, neither prior nor scale.
VARIATIONAL = {
    OURS: VDConfig(),
    "vd_group": VDConfig(prior=PriorType.GROUP),
    "vd_weight": VDConfig(prior=PriorType.WEIGHT, group_scale=False),
}
#: Ours with one of its defaults changed, to show what it does; run where they are named.
ABLATIONS = {
    "vd_rows": VDConfig(grouping=Grouping.ROWS),
    "vd_coupled": VDConfig(grouping=Grouping.COUPLED),
    "vd_query_key": VDConfig(query_key=True),
    "vd_no_scale": VDConfig(group_scale=False),
}
#: Ours without training a posterior: the first recovers for the whole budget, the second not at all.
CLOSED_FORM, CLOSED_FORM_ONE_SHOT = "vd_closed", "vd_oneshot"
#: Methods that are nothing without a target.
ASK_FOR_TARGET = (CLOSED_FORM, CLOSED_FORM_ONE_SHOT, *LEARNED_GATES)
#: The dense checkpoint, and what becomes of it when it goes on learning from itself for the whole budget.
DENSE_LONGER = "dense_longer"
WHOLE = (DENSE, DENSE_LONGER)
#: Methods that know the layers of text models.
FOR_TEXTS = (ONE_SHOT,)
#: Optimizer steps of a dense checkpoint.
DENSE_STEPS = 400
#: The same for tasks that take longer to learn: after 400 steps on CoLA, MiniLM has a Matthews correlation of 18. On
#: CIFAR-10 models start at random.
MORE_DENSE_STEPS = {"cola": 1500, CIFAR10: 4000}
#: In the order in which they run: without a target, scorers need the counts of ours.
METHODS = (*WHOLE, *VARIATIONAL, *SCORERS, *MASK_SEARCHES, *ASK_FOR_TARGET)
KNOWN_METHODS = (*METHODS, *ABLATIONS)


@dataclass
class BenchmarkArguments:
    """Flags of this script."""

    model_name_or_path: str = field(
        metadata={
            "help": "Pretrained model to start from: a folder, or a Hub name. For images one of "
            f"{', '.join(MODELS)}, which start at random."
        }
    )
    dataset_dir: str | None = field(
        default=None,
        metadata={
            "help": f"Folder with `<task>/{{train,validation}}.parquet`, or `{CIFAR10}/{{train,test}}.parquet`; by "
            "default GLUE comes from the Hub."
        },
    )
    work_dir: str = field(default="out/benchmark", metadata={"help": "Folder for the models."})
    results_file: str = field(
        default=str(Path(__file__).parent / "results" / "benchmark.jsonl"),
        metadata={"help": "Finished runs, one per line."},
    )
    tasks: list[str] = field(default_factory=lambda: ["sst2", "mrpc"], metadata={"help": f"GLUE tasks, or {CIFAR10}."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={
            "help": f"Methods; {', '.join(ASK_FOR_TARGET)} need a target, "
            f"{', '.join(FOR_TEXTS)} is left out on images, and {', '.join(ABLATIONS)} are run if named."
        },
    )
    target_speedups: list[float] = field(
        default_factory=list, metadata={"help": "Speed-ups to ask for; by default the dropout-rate rule decides."}
    )
    max_train_samples: int = field(default=10_000, metadata={"help": "Training rows at most, drawn by seed."})
    max_length: int = field(default=128, metadata={"help": "Tokens to which texts are truncated."})
    dense_steps: int | None = field(
        default=None,
        metadata={
            "help": f"Optimizer steps of the dense checkpoint; by default {DENSE_STEPS}, and "
            f"{', '.join(f'{steps} for {task}' for task, steps in MORE_DENSE_STEPS.items())}."
        },
    )
    sparsify_steps: int = field(default=400, metadata={"help": "Steps of our sparsification."})
    recover_steps: int = field(default=160, metadata={"help": "Steps of our recovery; others recover for both."})
    dense_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the dense checkpoint."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of everything after it."})
    distillation: bool = field(
        default=True, metadata={"help": "Whether the dense checkpoint teaches what is trained after it."}
    )
    bf16: bool = field(default=False, metadata={"help": "Train in mixed precision. Scores are in fp32 always."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU."})
    plan: bool = field(default=False, metadata={"help": "Print what is left to do and what it may take, and stop."})
    table: bool = field(default=False, metadata={"help": "Print the tables of what is there, and stop."})
    plots: str | None = field(default=None, metadata={"help": "Folder to draw what is there in, and stop."})

    def __post_init__(self) -> None:
        """Check the methods, and that the model suits the tasks.

        Raises:
            ValueError: If a count is below 1, a method is unknown, all of them lack the target that they need, or a
                model of images is to read texts.
        """
        if unknown := sorted(set(self.methods) - set(KNOWN_METHODS)):
            raise ValueError(f"`methods` holds {unknown}: expected some of {', '.join(KNOWN_METHODS)}")
        if not self.target_speedups and set(self.methods) <= set(ASK_FOR_TARGET):
            raise ValueError(f"`methods` holds {self.methods}, which need a target: set `target_speedups` too")
        check_counts(self, "dense_steps", "max_train_samples", "max_length")
        if CIFAR10 in self.tasks and set(self.methods) <= set(FOR_TEXTS):
            raise ValueError(
                f"`methods` holds {self.methods}, which know text models alone: name others for {CIFAR10}"
            )
        if CIFAR10 in self.tasks and (len(self.tasks) > 1 or self.model_name_or_path not in MODELS):
            raise ValueError(
                f"`tasks` is {self.tasks}, and `model_name_or_path` {self.model_name_or_path!r}: expected {CIFAR10} "
                f"by itself, with one of {', '.join(MODELS)}"
            )

    def require_packages(self) -> None:
        """Check that what is to run can run.

        Raises:
            ValueError: If a method lacks its package.
        """
        if TORCH_PRUNING in self.methods and find_spec(TORCH_PRUNING) is None:
            raise ValueError(
                f"`methods` holds {TORCH_PRUNING}, whose package is missing: run `pip install -e '.[benchmark]'`, or "
                "name the other methods"
            )

    def settings(self, task: str) -> Settings:
        """Tell what every run of a task depends on.

        Args:
            task: Name of the task.

        Returns:
            The settings.
        """
        given = {known.name: getattr(self, known.name) for known in fields(Settings) if known.name != "model"}
        if self.dense_steps is None:
            given["dense_steps"] = MORE_DENSE_STEPS.get(task, DENSE_STEPS)
        return Settings(model=self.model_name_or_path, **given)

    def missing(self, results: Results) -> Iterator[Run]:
        """List what is not finished, cell by cell.

        Args:
            results: What is.

        Yields:
            The runs, baselines behind the runs that they need.
        """
        wanted = [method for method in KNOWN_METHODS if method in self.methods]
        targets: list[float | None] = [*self.target_speedups] or [None]
        for seed, task in product(self.seeds, self.tasks):
            methods = [method for method in wanted if task != CIFAR10 or method not in FOR_TEXTS]
            runs = [Run(task, seed, method) for method in methods if method in WHOLE]
            runs += [
                Run(task, seed, method, target) for target in targets for method in methods if method not in WHOLE
            ]
            runs = [run for run in runs if run.target_speedup is not None or run.method not in ASK_FOR_TARGET]
            yield from (run for run in runs if results.find(run) is None)


def shrink(cell: Cell, run: Run, results: Results) -> tuple[PreTrainedModel, int, Courses]:
    """Let a method remove what it chooses from the dense checkpoint.

    Args:
        cell: Task and seed.
        run: The run.
        results: Finished runs.

    Returns:
        The model, smaller; the optimizer steps that are left of the budget; and how the posterior was trained, if any.
    """
    model = cell.dense()
    if run.method in WHOLE:
        return model, 0 if run.method == DENSE else cell.settings.budget, {}
    if vd_config := (VARIATIONAL | ABLATIONS).get(run.method):
        model, courses = cell.sparsify(model, vd_config, run.target_speedup)
        return model, cell.settings.recover_steps, courses
    if run.method in ASK_FOR_TARGET and run.target_speedup is not None:
        return shrink_to_target(cell, run.method, model, run.target_speedup)
    mask = choose(cell, run, model, results)
    if run.method == ONE_SHOT:
        fold_gates_(model, tune_gates(model, mask, [*cell.batches(model)]))
    prune_model_(model, mask)
    return model, 0 if run.method == ONE_SHOT else cell.settings.budget, {}


def shrink_to_target(
    cell: Cell, method: str, model: PreTrainedModel, target_speedup: float
) -> tuple[PreTrainedModel, int, Courses]:
    """Let a method that needs a target remove what it chooses.

    Args:
        cell: Task and seed.
        method: Its name.
        model: The dense checkpoint.
        target_speedup: Speed-up to ask for.

    Returns:
        As `shrink`.
    """
    length = cell.length
    if method in (CLOSED_FORM, CLOSED_FORM_ONE_SHOT):
        model = sparsify(model, cell.batches(model), target_speedup=target_speedup, max_length=length)
        return model, cell.settings.budget if method == CLOSED_FORM else 0, {}
    budget = speedup_budget(Costs(model, length=length), target_speedup)
    gates = LEARNED_GATES[method](model, budget, cell.settings.sparsify_steps)
    prune_model_(model, cell.learn(model, gates))
    return model, cell.settings.recover_steps, {}


def choose(cell: Cell, run: Run, model: PreTrainedModel, results: Results) -> RelevanceMask:
    """Let a baseline choose what to keep.

    Args:
        cell: Task and seed.
        run: The run.
        model: The dense checkpoint.
        results: Finished runs; without a target, ours must be among them.

    Returns:
        What it keeps: what the target affords or, without one, as many units as ours.

    Raises:
        ValueError: If ours is missing.
    """
    keep: Callable[[Scores], RelevanceMask]
    if run.target_speedup is not None:
        budget = speedup_budget(Costs(model, length=cell.length), run.target_speedup)
        keep = partial(keep_affordable, model, budget=budget, whatever_it_costs=run.method in RANKINGS)
    else:
        ours = results.find(run._replace(method=OURS))
        if ours is None:
            raise ValueError(
                f"`{run.method}` keeps as many units as `{OURS}`: run `{OURS}` on {run.task}, seed {run.seed} first"
            )
        keep = partial(keep_best, model, counts={unit: ours[f"{unit}s"] for unit in Unit})
    if run.method in MASK_SEARCHES:
        return search_mask(model, cell.batches(model), keep)
    return keep(SCORERS[run.method](model, cell.batches(model), torch.Generator().manual_seed(run.seed)))


def finish(cell: Cell, run: Run, results: Results) -> Row:
    """Do one run.

    Args:
        cell: Task and seed.
        run: The run.
        results: Finished runs.

    Returns:
        Its row.
    """
    set_seed(cell.seed)
    started = time.monotonic()
    model, steps_left, courses = shrink(cell, run, results)
    after_cut = cell.score(model)
    if steps_left:
        cell.recover(model, steps_left)
    seconds = time.monotonic() - started
    name = "-".join(filter(None, [run.method, run.asked]))
    folder = cell.save(model, name)
    # What counts is what was saved.
    model = cell.load(name)
    left = units_left(model)
    full, body = (body_cost(either, length=cell.length) for either in (dense_twin(model), model))
    return {
        **run._asdict(),
        **cell.score(model),
        "score_after_cut": after_cut["score"],
        "score_through": {door: score_in_new_process(cell, folder, flags) for door, flags in DOORS.items()},
        "parameters": model.num_parameters(),
        "body_weights": body.weights,
        "speedup": cost_ratio(full.macs, body.macs),
        **{f"{unit}s": sum(left[unit]) for unit in Unit},
        **{f"{unit}s_per_layer": left[unit] for unit in Unit},
        "latency": latencies(cell, model),
        "courses": courses,
        "seconds": round(seconds, 1),
        "environment": {**environment(cell.device), "threads": str(torch.get_num_threads())},
        "commit": commit(),
    }


@contextmanager
def claim(path: Path) -> Generator[bool]:
    """Claim a cell for this process; a process that dies gives its claim back.

    Args:
        path: Lock file.

    Yields:
        Whether the claim was granted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def work(args: BenchmarkArguments, results: Results) -> None:
    """Do what no other process is doing until nothing is left.

    Args:
        args: Flags.
        results: Where finished runs go.
    """
    work_dir = Path(args.work_dir)
    for task, seed in dict.fromkeys((run.task, run.seed) for run in args.missing(results)):
        with claim(cell_folder(work_dir, args.model_name_or_path, task, seed).with_suffix(".lock")) as granted:
            if not granted:
                continue
            cell_type = ImageCell if task == CIFAR10 else TextCell
            cell = cell_type(
                args.settings(task), task, seed, dataset_dir=args.dataset_dir, work_dir=work_dir, use_cpu=args.use_cpu
            )
            left = [run for run in args.missing(results) if (run.task, run.seed) == (task, seed)]
            for run in left:
                results.add(finish(cell, run, results))


def print_plan(args: BenchmarkArguments, results: Results) -> None:
    """Print the missing runs and what they may take, judging by finished runs of the same task and method.

    Args:
        args: Flags.
        results: Finished runs.
    """
    rows = results.rows()
    lines = []
    for run in args.missing(results):
        known = [row["seconds"] for row in rows if (row["task"], row["method"]) == (run.task, run.method)]
        lines.append([run.task, str(run.seed), run.method, run.asked, f"{fmean(known):.0f} s" if known else "unknown"])
    print_table(["task", "seed", "method", "asked for", "may take"], lines)


@one_line_errors
def main(argv: list[str]) -> None:
    """Run what is missing, then print the tables.

    Args:
        argv: Arguments without the program's name.
    """
    (args,) = parse_args([BenchmarkArguments], argv, description=__doc__)

    def settings(task: str) -> Row:
        # A local folder is no part of what was run.
        return {**asdict(args.settings(task)), "model": Path(args.model_name_or_path).name}

    results = Results(Path(args.results_file), settings)
    if args.plan:
        print_plan(args, results)
        return
    if args.plots is not None:
        draw_courses(results.rows(), Path(args.plots))
        draw_scores(results.rows(), Path(args.plots))
        return
    if not args.table:
        args.require_packages()
        work(args, results)
    rows = results.rows()
    print(score_table(rows), lead_table(rows, CLOSED_FORM), latency_table(rows), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
