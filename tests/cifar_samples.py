"""A few synthetic images in the files of CIFAR-10, and tiny models that read them."""

import io
from pathlib import Path

import numpy as np
import pyarrow
from benchmarks.classifiers import Recipe
from PIL import Image
from pyarrow import parquet


#: The same kinds of models, smaller.
TINY = {
    "vit": Recipe(
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 24,
            "image_size": 32,
            "patch_size": 8,
        },
        17,
    ),
    "convnext": Recipe({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4}, 64),
    "resnet": Recipe({"hidden_sizes": [16, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}, 64),
}


def picture(index: int, label: int) -> np.ndarray:
    """Draw an image that no other resembles, whose brightness tells its class."""
    noise = np.random.RandomState(index).randint(0, 16, (32, 32, 3))
    return (noise + 23 * label).astype(np.uint8)


def write_images(file: Path, numbers: range) -> None:
    """Write images with all classes in turn."""
    rows = []
    for index in numbers:
        encoded = io.BytesIO()
        Image.fromarray(picture(index, index % 10)).save(encoded, format="png")
        rows.append({"img": {"bytes": encoded.getvalue(), "path": None}, "label": index % 10})
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def write_folder(folder: Path, num_train: int, num_test: int) -> Path:
    """Write training and test images, none of them twice."""
    write_images(folder / "train.parquet", range(num_train))
    write_images(folder / "test.parquet", range(num_train, num_train + num_test))
    return folder
