"""A few synthetic images in the files of CIFAR-10."""

import io
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet


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
