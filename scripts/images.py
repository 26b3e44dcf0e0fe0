# SPDX-License-Identifier: Apache-2.0
"""Classify images: train small models of transformers on CIFAR-10, then remove what they do not need, in one run each.

    python scripts/images.py --data_dir DIR

`DIR` holds CIFAR-10 as `train.parquet` and `test.parquet`, with encoded images in `img` and their classes in `label`.
A run is scored on all test images: dense, right after the cut, and in the end. Finished runs are kept in
`--results_file`, and skipped.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from benchmarks.cifar10 import NUM_CLASSES, load_images
from benchmarks.classifiers import (
    Arguments,
    Examples,
    Job,
    Run,
    Settings,
    classify,
    fingerprint,
    run_all,
)
from benchmarks.image_models import MODELS, collate, pair
from transformers import AutoModelForImageClassification

from hf_vdneuron.cli import one_line_errors, parse_args


RESULTS_FILE = Path(__file__).parent / "results" / "images.jsonl"


@one_line_errors
def main(argv: list[str]) -> None:
    """Run what is missing, and print the table.

    Args:
        argv: Arguments without the program's name.
    """
    arguments, settings = parse_args((Arguments, Settings), argv, description=__doc__)
    model_types = arguments.choose(MODELS)
    files = fingerprint(arguments.data_dir, arguments.data_dir.glob("*.parquet"))
    data = load_images(arguments.data_dir, settings.num_examples, validate=False, device=torch.device("cpu"))
    examples = Examples(
        num_classes=NUM_CLASSES,
        train=pair(data.train, data.train_labels),
        held_out=pair(data.held_out, data.held_out_labels),
        augment=partial(collate, is_augmented=True),
        collate=partial(collate, is_augmented=False),
    )

    def work(job: Job) -> Run:
        recipe = MODELS[job.model_type]
        return classify(job, AutoModelForImageClassification.from_config, recipe, examples, use_cpu=arguments.use_cpu)

    run_all(model_types, arguments.seeds, settings, files, arguments.results_file or RESULTS_FILE, work)


if __name__ == "__main__":
    main(sys.argv[1:])
