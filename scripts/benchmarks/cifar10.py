# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 as parquet files of encoded images: decoded once, standardised, augmented in batches."""

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pyarrow import ArrowInvalid, parquet
from torch import Tensor
from torch.nn import functional as F


__all__ = ["NUM_CLASSES", "NUM_COLOURS", "Images", "augment", "count_images", "load_images", "read_images"]

NUM_COLOURS, NUM_CLASSES = 3, 10
#: Columns of a file.
IMAGE, LABEL = "img", "label"
#: Largest shift of an image in training, in pixels.
MAX_SHIFT = 4
#: Training images are the first of NumPy's `RandomState(0).permutation`, validation images the last.
SPLIT_SEED = 0
NUM_VALIDATION_IMAGES = 5_000


@dataclass(frozen=True)
class Images:
    """Standardised images, each with its label.

    Args:
        train: Training images, shape `(N, 3, 32, 32)`.
        train_labels: Their labels, shape `(N,)`.
        held_out: Images to score on, shape `(M, 3, 32, 32)`.
        held_out_labels: Their labels, shape `(M,)`.
    """

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def _open(path: Path) -> parquet.ParquetFile:
    """Open a file, and see that it holds images with labels."""
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file, or half of one: download it again ({error})") from error
    if lost := sorted({IMAGE, LABEL} - set(file.schema_arrow.names)):
        raise ValueError(f"{path} has the columns {file.schema_arrow.names}: expected {', '.join(lost)} among them")
    return file


def count_images(path: Path) -> int:
    """Count the images of a file.

    Args:
        path: Parquet file with the columns `img` and `label`.

    Returns:
        Their number.

    Raises:
        ValueError: If it is no such file.
    """
    return int(_open(path).metadata.num_rows)


def read_images(path: Path, rows: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
    """Decode images.

    Args:
        path: Parquet file with the columns `img`, of encoded images, and `label`.
        rows: Which rows to read, in their order; all by default.

    Returns:
        Images, uint8, shape `(N, 3, 32, 32)`, and labels, int64, shape `(N,)`.

    Raises:
        ValueError: If it is no such file.
    """
    table = _open(path).read(columns=[IMAGE, LABEL])
    if rows is not None:
        table = table.take(rows)
    decoded = [np.array(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table[IMAGE].to_pylist()]
    return torch.from_numpy(np.stack(decoded)).movedim(-1, 1), torch.tensor(table[LABEL].to_pylist())


def load_images(data_dir: Path, num_examples: int, *, validate: bool, device: torch.device) -> Images:
    """Load what a run trains on and what it is scored on.

    Args:
        data_dir: Folder of the data.
        num_examples: Number of training images.
        validate: Whether to score on training images that are not trained on, instead of the test images.
        device: Where they should lie.

    Returns:
        Images, standardised by colour over the training images.

    Raises:
        ValueError: If there are not so many training images, or a file holds none.
    """
    train_file = data_dir / "train.parquet"
    num_rows = count_images(train_file)
    reserved = NUM_VALIDATION_IMAGES if validate else 0
    if not 0 < num_examples <= num_rows - reserved:
        raise ValueError(f"`num_examples` is {num_examples}: expected 1 to {num_rows - reserved}")
    order = np.random.RandomState(SPLIT_SEED).permutation(num_rows)
    train, train_labels = read_images(train_file, order[:num_examples])
    if validate:
        held_out, labels = read_images(train_file, order[-NUM_VALIDATION_IMAGES:])
    else:
        held_out, labels = read_images(data_dir / "test.parquet")
    pixels = train.to(device, torch.float32)
    std, centre = torch.std_mean(pixels, (0, 2, 3), keepdim=True)

    def standardise(images: Tensor) -> Tensor:
        return (images.to(device, torch.float32) - centre).div_(std).contiguous()

    return Images(standardise(pixels), train_labels.to(device), standardise(held_out), labels.to(device))


def augment(images: Tensor) -> Tensor:
    """Shift each image by up to four pixels each way, over grey, and mirror half of them.

    Args:
        images: Standardised images, shape `(B, C, H, W)`.

    Returns:
        Images of the same shape.
    """
    num, _, height, width = images.shape
    draw = partial(torch.randint, device=images.device)
    example = torch.arange(num, device=images.device)[:, None]
    rows = torch.arange(height, device=images.device) + draw(2 * MAX_SHIFT + 1, (num, 1))
    columns = torch.arange(width, device=images.device) + draw(2 * MAX_SHIFT + 1, (num, 1))
    columns = torch.where(draw(2, (num, 1)) == 1, columns.flip(1), columns)
    padded = F.pad(images, (MAX_SHIFT,) * 4)
    return padded[example[..., None], :, rows[:, :, None], columns[:, None]].movedim(-1, 1).contiguous()
