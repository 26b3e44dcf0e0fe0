# SPDX-License-Identifier: Apache-2.0
"""What a run's checkpoints hold beyond what the Trainer writes: teacher, steering, parameters by loadable names."""

import json
import re
import zipfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


__all__ = [
    "has_teacher",
    "is_complete",
    "last_checkpoint",
    "load_steering",
    "load_teacher_",
    "native_names",
    "open_checkpoint",
    "require_complete",
    "save_steering",
    "save_teacher",
]

#: Inside a checkpoint: weights of the teacher, and where the run was going.
TEACHER_FILE, STEERING_FILE = "teacher.safetensors", "steering.json"


def has_teacher(checkpoint: str | Path) -> bool:
    """Tell whether a checkpoint holds a teacher.

    Args:
        checkpoint: Its folder.

    Returns:
        Whether it does.
    """
    return (Path(checkpoint) / TEACHER_FILE).exists()


def save_teacher(teacher: nn.Module, checkpoint: str | Path) -> None:
    """Put a teacher into a checkpoint, as it is the model of a step that is gone.

    Args:
        teacher: The teacher.
        checkpoint: Folder of a checkpoint; made if it is not there yet.
    """
    Path(checkpoint).mkdir(parents=True, exist_ok=True)
    save_model(teacher, str(Path(checkpoint) / TEACHER_FILE))


def load_teacher_(teacher: nn.Module, checkpoint: str | Path) -> None:
    """Take the weights of a teacher from a checkpoint, in place.

    Args:
        teacher: A model of the teacher's class and config.
        checkpoint: Folder of a checkpoint that holds one.
    """
    load_model(teacher, Path(checkpoint) / TEACHER_FILE)


def is_complete(checkpoint: str | Path) -> bool:
    """Tell whether a checkpoint was saved to its end: the Trainer writes its own state last.

    Args:
        checkpoint: Its folder.

    Returns:
        Whether it was.
    """
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(output_dir: str | Path) -> str:
    """Find the checkpoint that a run can go on from, whatever the one before it was doing when it ended.

    Args:
        output_dir: Folder of the run.

    Returns:
        The last complete checkpoint.

    Raises:
        ValueError: If there is none.
    """
    found = {
        int(match[1]): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and is_complete(path)
    }
    if not found:
        raise ValueError(
            f"`{output_dir}` holds no complete checkpoint: expected a folder `{PREFIX_CHECKPOINT_DIR}-...` with a "
            f"readable `{TRAINER_STATE_NAME}`. Start the run anew."
        )
    return str(found[max(found)])


def require_complete(checkpoint: str | Path) -> None:
    """Refuse what is no checkpoint, was being saved when its run ended, or was damaged since.

    Args:
        checkpoint: Its folder.

    Raises:
        ValueError: If it is not complete, or a file of it was cut short.
    """
    if not is_complete(checkpoint):
        raise ValueError(
            f"`{checkpoint}` is no complete checkpoint: it holds no {TRAINER_STATE_NAME} that can be read, which is "
            "saved last. Resume from another folder `checkpoint-...`; in Python, True finds the last complete one."
        )
    for file in sorted(Path(checkpoint).iterdir()):
        if not _is_whole(file):
            raise ValueError(
                f"`{file}` is damaged: expected the file as the run saved it. Copy it again, or resume from another "
                "folder `checkpoint-...`."
            )


def _is_whole(file: Path) -> bool:
    """Tell by its ends whether a file of tensors was cut short, without reading what is between."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return True
        except SafetensorError:
            return False
    # What torch saves is an archive, whose directory comes last.
    return file.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(file)


def open_checkpoint(checkpoint: str | Path) -> Path:
    """Begin a checkpoint: as long as it is being saved, it is not complete, also where an older one lies.

    Args:
        checkpoint: Its folder; made if it is not there yet.

    Returns:
        The folder.
    """
    folder = Path(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    return folder


def save_steering(state: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Put where a run was going into a checkpoint.

    Args:
        state: What `Steering.state` gives.
        checkpoint: Folder of a checkpoint.
    """
    (Path(checkpoint) / STEERING_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")


def load_steering(checkpoint: str | Path) -> dict[str, Any] | None:
    """Read where a run was going from a checkpoint.

    Args:
        checkpoint: Its folder.

    Returns:
        The state; None for a checkpoint without one.
    """
    path = Path(checkpoint) / STEERING_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@contextmanager
def native_names(model: PreTrainedModel) -> Generator[None]:
    """Make a model save its parameters under the names they have in memory, which is how a resumed run reads them.

    By default some models save under older names, and the Trainer then skips those it does not know
    (huggingface/transformers#48805). `from_pretrained` reads either.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    model.__dict__["save_pretrained"] = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.__dict__["save_pretrained"]
