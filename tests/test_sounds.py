"""`scripts/sounds.py`: each kind of model from start to end, on a few synthetic sounds."""

import json
from pathlib import Path

import numpy as np
import pytest
import sounds
import torch
from benchmarks import classifiers
from benchmarks.classifiers import Recipe
from scipy.io import wavfile
from transformers import AutoModelForAudioClassification

from hf_vdneuron.architectures import find_sublayers


NUM_NAMES = 10
RATE = 8_000

#: The same kinds of models, smaller.
TINY = {
    "whisper": Recipe(
        {**sounds.MODELS["whisper"].sizes, "encoder_layers": 2, "d_model": 16, "encoder_attention_heads": 4}, 50
    ),
    "wav2vec2": Recipe(
        {
            **sounds.MODELS["wav2vec2"].sizes,
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "intermediate_size": 24,
            "conv_dim": (4,) * 7,
        },
        49,
    ),
}


def tone(pitch: float, seconds: float) -> np.ndarray:
    times = np.arange(int(seconds * RATE)) / RATE
    return (2**14 * np.sin(2 * np.pi * pitch * times)).astype(np.int16)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Low tones and high ones, and in each class a file without any sound."""
    folder = tmp_path / "sounds"
    for name, pitch in (("low", 200.0), ("high", 1_500.0)):
        (folder / name / "digits").mkdir(parents=True)
        for number in range(NUM_NAMES):
            wavfile.write(folder / name / "digits" / f"{number}.wav", RATE, tone(pitch + number, 0.4 + 0.2 * number))
        noise = np.random.RandomState(0).randint(-2, 3, RATE)
        wavfile.write(folder / name / "silence.wav", RATE, noise.astype(np.int16))
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds, "MODELS", TINY)
    monkeypatch.setattr(classifiers, "BATCH_SIZE", 4)


def flags(data_dir: Path, results: Path, *more: str) -> list[str]:
    few = ["--epochs", "2", "--seeds", "0", "--use_cpu", "True"]
    return ["--data_dir", str(data_dir), "--results_file", str(results), *few, *more]


def test_each_model_is_trained_cut_and_scored(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "sounds.jsonl"
    sounds.main(flags(data_dir, results))
    runs = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [run["model_type"] for run in runs] == [*TINY]
    assert all(run["speedup"] >= 2 and run["parameters"] < run["dense_parameters"] for run in runs)
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[-2:]] == [*TINY]


@pytest.mark.parametrize("model_type", TINY)
def test_positions_are_those_of_the_first_blocks(model_type: str, data_dir: Path) -> None:
    train, _ = sounds.load_clips(sounds.find_files(data_dir), 100)
    model = classifiers.build_model(AutoModelForAudioClassification.from_config, model_type, TINY[model_type], 2)
    first = find_sublayers(model)[0].out_side.slices[0].module
    seen: list[torch.Size] = []
    model.get_submodule(first).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    extractor = sounds.EXTRACTORS[model_type]
    model(**sounds.collate(train[:3], extractor=extractor, is_augmented=False))
    assert seen[0][:-1] == (3, TINY[model_type].positions)


def test_what_is_held_out_was_heard_in_no_class(data_dir: Path) -> None:
    train, held_out = sounds.load_clips(sounds.find_files(data_dir), 100)
    names = NUM_NAMES + 1
    num_held_out = -(-names // sounds.HELD_OUT_EVERY)
    assert len(train) + len(held_out) == 2 * NUM_NAMES  # and the silent ones in neither
    lengths = [{len(clip.samples) for clip in side} for side in (train, held_out)]  # a name has a length of its own
    assert not lengths[0] & lengths[1]
    assert len(held_out) in {2 * num_held_out, 2 * (num_held_out - 1)}
    assert len(sounds.load_clips(sounds.find_files(data_dir), 5)[0]) == 5


def test_other_data_are_other_jobs(data_dir: Path, tmp_path: Path) -> None:
    results = tmp_path / "sounds.jsonl"
    for number in range(2):
        sounds.main(flags(data_dir, results, "--model_types", "wav2vec2"))
        wavfile.write(data_dir / "low" / f"more-{number}.WAV", RATE, tone(300.0, 1.0))
    runs = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert len({run["data"] for run in runs}) == len(runs) == 2


def test_sounds_come_at_the_rate_of_the_models(data_dir: Path) -> None:
    samples = sounds.read_sound(data_dir / "low" / "digits" / "3.wav")
    assert len(samples) == sounds.SAMPLING_RATE
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) == pytest.approx(203, abs=1)  # Hz, as the sound lasts one second
    assert np.abs(samples).max() == pytest.approx(0.5, rel=0.05)


def test_longer_sounds_are_cut_anywhere_in_training_alone(data_dir: Path) -> None:
    train, held_out = sounds.load_clips(sounds.find_files(data_dir), 100)
    clips = [clip for clip in train + held_out if len(clip.samples) > 1.5 * sounds.NUM_SAMPLES]
    extractor = sounds.EXTRACTORS["wav2vec2"]
    batches = [
        sounds.collate(clips, extractor=extractor, is_augmented=is_augmented)["input_values"]
        for is_augmented in (False, True)
    ]
    whole = extractor([clip.samples[: sounds.NUM_SAMPLES] for clip in clips], sampling_rate=sounds.SAMPLING_RATE)
    assert torch.equal(batches[0], torch.tensor(np.stack(whole["input_values"])))
    assert batches[1].shape == batches[0].shape
    assert not torch.equal(batches[1], batches[0])


def test_short_sounds_are_followed_by_silence(data_dir: Path) -> None:
    clip = sounds.Clip(np.ones(10, np.float32), 1)
    batch = sounds.collate([clip], extractor=sounds.EXTRACTORS["wav2vec2"], is_augmented=True)
    assert batch["input_values"].shape == (1, sounds.NUM_SAMPLES)
    assert batch["input_values"][0, 9:].unique().numel() == 2
    assert batch["labels"].tolist() == [1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no-sound", b"not a sound", "is no WAV file, or half of one"),
        ("cut-short", 20, "is no WAV file, or half of one"),
        ("cut-later", 2_000, "is no WAV file, or half of one"),
        ("stereo", np.zeros((RATE, 2), np.int16), "expected int16 in one channel"),
        ("floats", np.zeros(RATE, np.float32), "expected int16 in one channel"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_files_that_are_none_are_named(
    name: str,
    content: bytes | np.ndarray | None,
    message: str,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = data_dir / "low" / f"{name}.wav"
    if isinstance(content, np.ndarray):
        wavfile.write(file, RATE, content)
    elif isinstance(content, int):
        file.write_bytes((data_dir / "low" / "digits" / "1.wav").read_bytes()[:content])
    else:
        file.write_bytes(content)
    with pytest.raises(SystemExit):
        sounds.main(flags(data_dir, tmp_path / "sounds.jsonl"))
    error = capsys.readouterr().err
    assert str(file) in error
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("folder", "message"), [("low", "holds WAV files in 1 folder(s)"), ("none", "holds no folder at all")]
)
def test_a_folder_without_classes_is_refused(
    folder: str, message: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sounds.main(flags(data_dir / folder, tmp_path / "sounds.jsonl"))
    error = capsys.readouterr().err
    assert f"{message}: expected at least 2 folders of WAV files, one per class" in error


def test_a_class_that_is_never_heard_is_named(data_dir: Path) -> None:
    for file in (data_dir / "high").rglob("*.wav"):
        wavfile.write(file, RATE, np.zeros(RATE, np.int16))
    with pytest.raises(ValueError, match=r"high gives 0 sound\(s\) to train on and 0 to hold out: expected some"):
        sounds.load_clips(sounds.find_files(data_dir), 100)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("target_speedup", "inf", "expected a number from 1"),
        ("num_examples", "-1", "expected at least 1"),
        ("epochs", "0", "expected at least 1"),
        ("finetune_fraction", "1.5", "expected a number between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_named(
    flag: str, value: str, message: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sounds.main(flags(data_dir, tmp_path / "sounds.jsonl", f"--{flag}", value))
    error = capsys.readouterr().err
    assert f"`{flag}` is {value}: {message}" in error
    assert len(error.splitlines()) == 1


def test_unknown_models_are_named(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sounds.main(flags(data_dir, tmp_path / "sounds.jsonl", "--model_types", "alexnet"))
    assert "`model_types` holds ['alexnet']" in capsys.readouterr().err
