# SPDX-License-Identifier: Apache-2.0
"""Classify sounds: train small models of transformers on spoken words, then remove what they do not need.

    python scripts/sounds.py --data_dir DIR

`DIR` holds a folder of WAV files per class, such as one per language. Files of the same path below their class are
either all trained on or all held out, so that a word is not recognised for having been heard. Silent ones are left
out. A run is scored on those held out: dense, right after the cut, and in the end. Finished runs are kept in
`--results_file`, and skipped.
"""

import math
import struct
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from benchmarks.classifiers import (
    Arguments,
    Examples,
    Job,
    Recipe,
    Run,
    Settings,
    classify,
    fingerprint,
    run_all,
)
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import Tensor
from transformers import (
    AutoModelForAudioClassification,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from hf_vdneuron.cli import one_line_errors, parse_args


#: Samples per second, those of Whisper (Radford 2022, section 2.2) and wav2vec 2.0 (Baevski 2020, section 4.2).
SAMPLING_RATE = 16_000
SECONDS = 1
NUM_SAMPLES = SAMPLING_RATE * SECONDS
#: Full scale of the 16-bit samples of a file.
FULL_SCALE = 2**15
NUM_MELS = 40
#: What stays below this share of full scale all the time is silence, with a little noise.
SILENCE = 0.01
#: One in so many paths is held out; which ones is said by NumPy's `RandomState(0).permutation`.
HELD_OUT_EVERY, SPLIT_SEED = 5, 0
MIN_CLASSES = 2

#: Type of a model -> how it is built for clips of one second.
MODELS = {
    "whisper": Recipe(
        {
            "num_mel_bins": NUM_MELS,
            "max_source_positions": 50,  # Whisper's second convolution halves the number of windows
            "encoder_layers": 4,
            "d_model": 96,
            "encoder_attention_heads": 6,
            "encoder_ffn_dim": 384,
            "decoder_layers": 0,
            "classifier_proj_size": 96,
        },
        50,
    ),
    "wav2vec2": Recipe(
        {
            "num_hidden_layers": 4,
            "hidden_size": 96,
            "num_attention_heads": 6,
            "intermediate_size": 384,
            "conv_dim": (16, 16, 32, 32, 64, 64, 64),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "classifier_proj_size": 96,
            "layerdrop": 0.0,
            "mask_time_prob": 0.0,
        },
        49,
    ),
}
FeatureExtractor: TypeAlias = WhisperFeatureExtractor | Wav2Vec2FeatureExtractor
#: Type of a model -> what turns samples into its input.
EXTRACTORS: dict[str, FeatureExtractor] = {
    "whisper": WhisperFeatureExtractor(feature_size=NUM_MELS, chunk_length=SECONDS),
    "wav2vec2": Wav2Vec2FeatureExtractor(),
}
RESULTS_FILE = Path(__file__).parent / "results" / "sounds.jsonl"


class Clip(NamedTuple):
    """A sound and its class.

    Args:
        samples: Shape `(T,)`; 1 is full scale.
        label: Its class.
    """

    samples: NDArray[np.float32]
    label: int


def read_sound(path: Path) -> NDArray[np.float32]:
    """Read a file.

    Args:
        path: A WAV file with one channel of 16-bit samples.

    Returns:
        Its samples, shape `(T,)`, 16,000 of them per second; 1 is full scale.

    Raises:
        ValueError: If it is none.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Reached EOF prematurely", wavfile.WavFileWarning)
            rate, samples = wavfile.read(path)
    except (ValueError, struct.error, wavfile.WavFileWarning) as error:
        raise ValueError(f"{path} is no WAV file, or half of one: copy it again ({error})") from error
    if samples.dtype != np.int16 or samples.ndim != 1:
        raise ValueError(
            f"{path} has samples of type {samples.dtype} in the shape {samples.shape}: expected int16 in one channel; "
            "`sox IN -c 1 -b 16 OUT` makes them so"
        )
    common = math.gcd(rate, SAMPLING_RATE)
    return resample_poly(samples / FULL_SCALE, SAMPLING_RATE // common, rate // common).astype(np.float32)


def find_files(data_dir: Path) -> dict[Path, list[Path]]:
    """Find the files of each class.

    Args:
        data_dir: Folder with a folder of WAV files per class.

    Returns:
        Folder of each class -> its files, in alphabetical order.

    Raises:
        ValueError: If there are fewer than two classes.
    """
    folders = sorted(path for path in data_dir.glob("*") if path.is_dir())
    files = {folder: sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".wav") for folder in folders}
    files = {folder: found for folder, found in files.items() if found}
    if len(files) < MIN_CLASSES:
        found = f"WAV files in {len(files)} folder(s)" if data_dir.is_dir() else "no folder at all"
        raise ValueError(
            f"{data_dir} holds {found}: expected at least {MIN_CLASSES} folders of WAV files, one per class"
        )
    return files


def load_clips(files: Mapping[Path, Sequence[Path]], num_examples: int) -> tuple[list[Clip], list[Clip]]:
    """Read what a run trains on and what it is scored on; silent files are left out.

    Args:
        files: Folder of each class -> its files.
        num_examples: Training clips at most.

    Returns:
        Training clips, in random order, and those held out.

    Raises:
        ValueError: If a file is no sound, or there are too few to train on and to hold out some of each class.
    """
    paths = sorted({path.relative_to(folder) for folder, found in files.items() for path in found})
    random = np.random.RandomState(SPLIT_SEED)
    held_out_paths = {paths[index] for index in random.permutation(len(paths))[::HELD_OUT_EVERY]}
    train: list[Clip] = []
    held_out: list[Clip] = []
    for label, (folder, found) in enumerate(files.items()):
        for path in found:
            samples = read_sound(path)
            if np.abs(samples).max(initial=0) >= SILENCE:
                side = held_out if path.relative_to(folder) in held_out_paths else train
                side.append(Clip(samples, label))
    train = [train[index] for index in random.permutation(len(train))[:num_examples]]
    for label, folder in enumerate(files):
        numbers = [sum(clip.label == label for clip in side) for side in (train, held_out)]
        if not all(numbers):
            raise ValueError(
                f"{folder} gives {numbers[0]} sound(s) to train on and {numbers[1]} to hold out: expected some of "
                "both; add files, or raise `num_examples`"
            )
    return train, held_out


def collate(clips: list[Clip], *, extractor: FeatureExtractor, is_augmented: bool) -> dict[str, Tensor]:
    """Make a batch of clips of one second; shorter ones are followed by silence.

    Args:
        clips: Its clips.
        extractor: Turns samples into the input of the model.
        is_augmented: Whether the second is drawn from a longer clip, or is its first.

    Returns:
        Keyword arguments of the model.
    """
    sounds = []
    for clip in clips:
        longest_wait = max(len(clip.samples) - NUM_SAMPLES, 0)
        start = int(torch.randint(longest_wait + 1, ())) if is_augmented else 0
        sounds.append(clip.samples[start : start + NUM_SAMPLES])
    batch = extractor(
        sounds, sampling_rate=SAMPLING_RATE, padding="max_length", max_length=NUM_SAMPLES, return_tensors="pt"
    )
    inputs: dict[str, Any] = {extractor.model_input_names[0]: batch[extractor.model_input_names[0]]}
    return inputs | {"labels": torch.tensor([clip.label for clip in clips])}


@one_line_errors
def main(argv: list[str]) -> None:
    """Run what is missing, and print the table.

    Args:
        argv: Arguments without the program's name.
    """
    arguments, settings = parse_args((Arguments, Settings), argv, description=__doc__)
    model_types = arguments.choose(MODELS)
    files = find_files(arguments.data_dir)
    train, held_out = load_clips(files, settings.num_examples)

    def work(job: Job) -> Run:
        plain = partial(collate, extractor=EXTRACTORS[job.model_type], is_augmented=False)
        examples = Examples(len(files), train, held_out, augment=partial(plain, is_augmented=True), collate=plain)
        recipe = MODELS[job.model_type]
        return classify(job, AutoModelForAudioClassification.from_config, recipe, examples, use_cpu=arguments.use_cpu)

    data = fingerprint(arguments.data_dir, (path for found in files.values() for path in found))
    run_all(model_types, arguments.seeds, settings, data, arguments.results_file or RESULTS_FILE, work)


if __name__ == "__main__":
    main(sys.argv[1:])
