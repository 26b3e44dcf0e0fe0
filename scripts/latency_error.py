# SPDX-License-Identifier: Apache-2.0
"""Hold the speed-up that a latency table predicts against the clock, for structures chosen by it at random.

    python scripts/latency_error.py --model_name_or_path M

The machine has to be quiet: what else runs on it changes from one measurement to the next.
"""

import sys
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import AutoModel, PreTrainedModel

from hf_vdneuron.budget import Costs, cost_ratio, unit_counts
from hf_vdneuron.cli import one_line_errors, parse_args, print_table
from hf_vdneuron.latency import measure_latency, text_inputs
from hf_vdneuron.latency_table import LatencyTable, measure_latency_table
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.relevance import unit_relevance
from hf_vdneuron.selection import keep_within
from hf_vdneuron.structure import dense_twin
from hf_vdneuron.targets import cost_ratio_budget


@dataclass
class LatencyErrorArguments:
    """Flags of this script."""

    model_name_or_path: str = field(metadata={"help": "Pretrained model: a folder, or a Hub name."})
    targets: list[float] = field(default_factory=lambda: [1.5, 2.0, 3.0], metadata={"help": "Speed-ups to ask for."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "Sequences in a forward."})
    length: int = field(default=128, metadata={"help": "Tokens of each."})
    seed: int = field(default=0, metadata={"help": "Seed of the structures."})
    device: str = field(default="cpu", metadata={"help": "Where to measure."})


def measured_speedup(
    dense: PreTrainedModel, table: LatencyTable, target: float, *, generator: torch.Generator
) -> tuple[float, float]:
    """Cut a model as a run would that asks for a speed-up, with relevances left to chance, and time it.

    Layers differ in how relevant they are, as they do in trained posteriors.

    Args:
        dense: A dense model.
        table: Its latencies.
        target: Speed-up to ask for.
        generator: Source of the chance.

    Returns:
        Predicted and measured speed-up.
    """
    model = patch_model_(dense_twin(dense))
    costs = Costs(model, length=table.length)
    relevance = {
        path: values * torch.rand(1, generator=generator) * torch.rand(values.shape[1], generator=generator)
        for path, values in unit_relevance(model).items()
    }
    mask = keep_within(costs.sublayers, relevance, cost_ratio_budget(partial(table.predict, costs.sublayers), target))
    counts = unit_counts(costs.sublayers, mask)
    inputs = text_inputs(batch_size=table.batch_size, length=table.length, device=dense.device)
    seconds = measure_latency({"dense": dense, "pruned": prune_model_(model, mask)}, inputs)
    predicted = cost_ratio(table.predict(costs.sublayers, {}), table.predict(costs.sublayers, counts))
    return predicted, cost_ratio(seconds["dense"], seconds["pruned"])


@one_line_errors
def main(argv: list[str]) -> None:
    """Measure tables, and print how far they are off.

    Args:
        argv: Arguments without the program's name.
    """
    (args,) = parse_args([LatencyErrorArguments], argv, description=__doc__)
    dense = AutoModel.from_pretrained(args.model_name_or_path).to(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    lines = []
    for batch_size in args.batch_sizes:
        table = measure_latency_table(
            dense, text_inputs(batch_size=batch_size, length=args.length, device=dense.device)
        )
        for target in args.targets:
            predicted, measured = measured_speedup(dense, table, target, generator=generator)
            error = f"{measured / predicted - 1:+.1%}"
            lines.append([str(batch_size), str(args.length), f"{predicted:.3f}x", f"{measured:.3f}x", error])
    print_table(["batch", "tokens", "predicted", "measured", "off by"], lines)


if __name__ == "__main__":
    main(sys.argv[1:])
