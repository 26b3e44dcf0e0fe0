# SPDX-License-Identifier: Apache-2.0
"""Score an image classifier that `benchmark.py` saved, pruned or not, on the test images of CIFAR-10.

    python scripts/score_images.py --model_name_or_path M --data_dir DIR --num_examples 10000 --output_dir E

`DIR` holds CIFAR-10 as `train.parquet` and `test.parquet`. Writes `E/eval_results.json`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from benchmarks.cifar10 import NUM_CLASSES, load_images
from benchmarks.image_models import image_accuracy
from transformers import AutoModelForImageClassification

import hf_vdneuron
from hf_vdneuron.cli import check_counts, choose_device, one_line_errors, output_folder, parse_args, write_json
from hf_vdneuron.report import environment


RESULTS_FILE = "eval_results.json"


@dataclass
class ScoreArguments:
    """Flags of this script."""

    model_name_or_path: str = field(metadata={"help": "A trained classifier: a folder, or a name on the Hub."})
    data_dir: Path = field(metadata={"help": "Folder with the data."})
    output_dir: str = field(metadata={"help": f"Folder for {RESULTS_FILE}."})
    num_examples: int = field(metadata={"help": "Images that it was trained on, by which all are standardised."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images in a forward."})
    device: str | None = field(default=None, metadata={"help": "Where to compute, such as cpu or cuda:0."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Load with transformers alone, and run the code that comes with the model."}
    )

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            ValueError: If one is below 1.
        """
        check_counts(self, "num_examples", "per_device_eval_batch_size")


@one_line_errors
def main(argv: list[str]) -> None:
    """Score the model, and write the result.

    Args:
        argv: Arguments without the program's name.

    Raises:
        ValueError: If the model is no classifier of such images.
    """
    (args,) = parse_args([ScoreArguments], argv, description=__doc__)
    with output_folder(args.output_dir) as folder:
        device = choose_device(args.device)
        # What can be wrong with the data is found before the weights are loaded.
        data = load_images(args.data_dir, args.num_examples, validate=False, device=torch.device("cpu"))
        if args.trust_remote_code:
            model = AutoModelForImageClassification.from_pretrained(args.model_name_or_path, trust_remote_code=True)
        else:
            model = hf_vdneuron.from_pretrained(args.model_name_or_path)
        if (model.main_input_name, model.config.num_labels) != ("pixel_values", NUM_CLASSES):
            raise ValueError(
                f"`model_name_or_path` reads `{model.main_input_name}` and tells {model.config.num_labels} classes: "
                f"expected a classifier of images with {NUM_CLASSES}"
            )
        share = image_accuracy(
            model.to(device), data.held_out, data.held_out_labels, batch_size=args.per_device_eval_batch_size
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RESULTS_FILE, {"score": share, "environment": environment(device)})
    print(f"accuracy on {len(data.held_out):,} images: {share:.2%}")


if __name__ == "__main__":
    main(sys.argv[1:])
