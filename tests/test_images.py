"""`scripts/images.py`: each kind of model from start to end, on a few synthetic images."""

import json
from pathlib import Path

import images
import pytest
import torch
from benchmarks import classifiers, image_models
from cifar_samples import TINY, write_folder
from transformers import AutoModelForImageClassification

from hf_vdneuron.architectures import find_sublayers


NUM_TRAIN, NUM_TEST = 128, 20


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("cifar10"), NUM_TRAIN, NUM_TEST)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MODELS", TINY)
    monkeypatch.setattr(classifiers, "BATCH_SIZE", 16)


def flags(data_dir: Path, results: Path, *more: str) -> list[str]:
    few = ["--num_examples", str(NUM_TRAIN), "--epochs", "2", "--seeds", "0", "--use_cpu", "True"]
    return ["--data_dir", str(data_dir), "--results_file", str(results), *few, *more]


def test_each_model_is_trained_cut_and_scored(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "images.jsonl"
    images.main(flags(data_dir, results))
    runs = {run["model_type"]: run for run in map(json.loads, results.read_text(encoding="utf-8").splitlines())}
    assert runs.keys() == TINY.keys()
    for run in runs.values():
        assert run["speedup"] >= 2
        assert run["parameters"] < run["dense_parameters"]
        scores = [run[name] for name in ("dense_accuracy", "accuracy_after_cut", "accuracy")]
        assert all(score * NUM_TEST % 100 == 0 for score in scores)
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[-3:]] == [*TINY]
    images.main(flags(data_dir, results))  # there is nothing left to do
    assert len(results.read_text(encoding="utf-8").splitlines()) == len(TINY)


@pytest.mark.parametrize("model_type", TINY)
def test_positions_are_those_of_the_first_blocks(model_type: str) -> None:
    model = classifiers.build_model(AutoModelForImageClassification.from_config, model_type, TINY[model_type], 10)
    first = find_sublayers(model)[0].out_side.slices[0].module
    seen: list[torch.Size] = []
    model.get_submodule(first).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    model(torch.zeros(1, 3, 32, 32))
    is_channels_first = model_type == "resnet"
    positions = seen[0][2:] if is_channels_first else seen[0][1:-1]
    assert positions.numel() == TINY[model_type].positions


def test_images_are_augmented_in_training_alone() -> None:
    rows = image_models.pair(torch.randn(8, 3, 32, 32), torch.arange(8))
    plain = image_models.collate(rows, is_augmented=False)
    assert torch.equal(plain["pixel_values"], torch.stack([image for image, _ in rows]))
    assert not torch.equal(image_models.collate(rows, is_augmented=True)["pixel_values"], plain["pixel_values"])


def test_unknown_models_are_named(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        images.main(flags(data_dir, tmp_path / "images.jsonl", "--model_types", "alexnet"))
    assert "`model_types` holds ['alexnet']" in capsys.readouterr().err
