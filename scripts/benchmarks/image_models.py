# SPDX-License-Identifier: Apache-2.0
"""Small image classifiers of transformers for CIFAR-10, which start at random, and the batches that they read."""

from torch import Tensor, no_grad, stack
from transformers import PreTrainedModel

from benchmarks.cifar10 import augment
from benchmarks.classifiers import Recipe


__all__ = ["MODELS", "collate", "image_accuracy", "pair"]

#: Type of a model -> how it is built for images of 32 x 32 pixels.
MODELS = {
    "vit": Recipe(
        {
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "intermediate_size": 384,
            "image_size": 32,
            "patch_size": 4,
        },
        65,
    ),
    "convnext": Recipe({"hidden_sizes": [48, 96, 192], "depths": [2, 2, 2], "num_stages": 3, "patch_size": 2}, 256),
    "resnet": Recipe(
        {"hidden_sizes": [64, 128, 256], "depths": [2, 2, 2], "embedding_size": 64, "layer_type": "basic"}, 64
    ),
}


def pair(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Make the rows that a Trainer reads.

    Args:
        images: Shape `(N, 3, 32, 32)`.
        labels: Shape `(N,)`.

    Returns:
        One row per image.
    """
    return [*zip(images, labels, strict=True)]


def collate(rows: list[tuple[Tensor, Tensor]], *, is_augmented: bool) -> dict[str, Tensor]:
    """Make a batch.

    Args:
        rows: Its images and labels.
        is_augmented: Whether images are shifted and mirrored.

    Returns:
        Keyword arguments of the model.
    """
    images, labels = map(stack, zip(*rows, strict=True))
    return {"pixel_values": augment(images) if is_augmented else images, "labels": labels}


@no_grad()
def image_accuracy(model: PreTrainedModel, images: Tensor, labels: Tensor, *, batch_size: int) -> float:
    """Score a classifier.

    Args:
        model: The classifier; put into evaluation mode.
        images: Standardised images, shape `(N, 3, 32, 32)`, on any device.
        labels: Shape `(N,)`.
        batch_size: Images in a forward.

    Returns:
        Share of the images whose class it tells, in [0, 1].
    """
    model.eval()
    right = 0
    for batch, classes in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        predicted = model(pixel_values=batch.to(model.device)).logits.argmax(-1)
        right += int((predicted.cpu() == classes.cpu()).sum())
    return right / len(labels)
