"""Images in `scripts/benchmark.py`: the same methods and doors, on a few synthetic images."""

import json
from collections.abc import Sized
from pathlib import Path
from typing import Any

import benchmark
import pytest
import score_images
import torch
from benchmarks import image_cell, measurements
from benchmarks.cell import Settings
from cifar_samples import TINY, write_folder
from glue_samples import tiny_classifier
from torch import Tensor


NUM_TRAIN, NUM_TEST = 96, 20

METHODS = [name for name in benchmark.METHODS if name not in benchmark.FOR_TEXTS]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "cifar10").mkdir()
    write_folder(folder / "cifar10", NUM_TRAIN, NUM_TEST)
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cell, "MODELS", TINY)
    monkeypatch.setattr(benchmark, "MODELS", TINY)
    monkeypatch.setattr(benchmark, "commit", lambda: "abc")
    monkeypatch.setattr(image_cell, "LATENCY_BATCH_SIZES", (1, 2))
    monkeypatch.setattr(measurements.subprocess, "run", lambda command, **_: score_images.main(command[2:]))


def flags(data_dir: Path, folder: Path, *extra: str) -> list[str]:
    values = {
        "model_name_or_path": "resnet",
        "dataset_dir": data_dir,
        "work_dir": folder / "work",
        "results_file": folder / "results.jsonl",
        "max_train_samples": NUM_TRAIN,
        "dense_steps": 2,
        "sparsify_steps": 3,
        "recover_steps": 2,
        "use_cpu": True,
    }
    return [*(f"--{name}={value}" for name, value in values.items()), "--tasks", "cifar10", "--seeds", "0", *extra]


def test_without_a_target_baselines_keep_as_many_channels(data_dir: Path, tmp_path: Path) -> None:
    benchmark.main(flags(data_dir, tmp_path, "--methods", "vd", "magnitude", "random"))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["vd", "magnitude", "random"]
    assert len({row["neurons"] for row in rows}) == 1


@pytest.mark.parametrize("model", TINY)
def test_every_method_shrinks_a_model_of_images(
    model: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_augmented = {True: 0, False: 0}

    def watch(rows: list[tuple[Tensor, Tensor]], **how: bool) -> dict[str, Tensor]:
        is_augmented[how["is_augmented"]] += 1
        return collate(rows, **how)

    collate = image_cell.collate
    monkeypatch.setattr(image_cell, "collate", watch)
    benchmark.main(flags(data_dir, tmp_path, "--target_speedups", "2", f"--model_name_or_path={model}"))
    assert is_augmented[True] > 0
    rows: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted(row["method"] for row in rows) == sorted(METHODS)
    for row in rows:
        assert row["score_through"] == dict.fromkeys(("hf_vdneuron", "trust_remote_code"), row["score"])
        assert [(timing["batch_size"], timing["length"]) for timing in row["latency"]] == [
            (1, TINY[model].positions),
            (2, TINY[model].positions),
        ]
        assert row["settings"]["model"] == model
        assert row["speedup"] >= 2 or row["method"] in benchmark.WHOLE
    assert "| cifar10 | 2x | vd_closed | 1 |" in capsys.readouterr().out


def test_a_saved_classifier_is_scored(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(flags(data_dir, tmp_path, "--methods", "dense"))
    values = {
        "model_name_or_path": tmp_path / "work" / "resnet" / "cifar10-0" / "dense",
        "data_dir": data_dir / "cifar10",
        "output_dir": tmp_path / "scores",
        "num_examples": NUM_TRAIN,
        "device": "cpu",
    }
    score_images.main([f"--{name}={value}" for name, value in values.items()])
    (row,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert json.loads((tmp_path / "scores" / "eval_results.json").read_text())["score"] == row["score"]
    assert f"accuracy on {NUM_TEST} images: {row['score']:.2%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param(["--model_name_or_path=alexnet"], "`model_name_or_path` 'alexnet': expected cifar10", id="model"),
        pytest.param(["--tasks", "cifar10", "sst2"], "expected cifar10 by itself, with one of vit", id="tasks"),
        pytest.param(["--max_train_samples", "0"], "`max_train_samples` is 0, expected at least 1", id="images"),
        pytest.param(["--methods", "fisher_oneshot"], "which know text models alone", id="method"),
    ],
)
def test_what_is_wrong_is_named(
    changed: list[str], message: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(flags(data_dir, tmp_path, "--methods", "dense", *changed))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results.jsonl").exists()


def test_images_do_not_come_from_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [flag for flag in flags(tmp_path, tmp_path) if not flag.startswith("--dataset_dir")]
    with pytest.raises(SystemExit, match="2"):
        benchmark.main([*given, "--methods", "dense"])
    assert "cifar10 needs `dataset_dir`" in capsys.readouterr().err


def test_curvature_sees_images_as_they_are(data_dir: Path, tmp_path: Path) -> None:
    settings = Settings("resnet", NUM_TRAIN, 128, 2, 3, 2, 1e-3, 1e-3, bf16=False, distillation=True)
    cell = image_cell.ImageCell(settings, "cifar10", 0, dataset_dir=str(data_dir), work_dir=tmp_path, use_cpu=True)
    seen = torch.cat([batch["pixel_values"] for batch in cell.batches(cell.build())])
    assert torch.equal(seen, cell.images.train)


def test_only_classifiers_of_these_images_are_scored(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_classifier(2).save_pretrained(tmp_path / "texts")
    given = [f"--model_name_or_path={tmp_path / 'texts'}", f"--data_dir={data_dir / 'cifar10'}", "--num_examples=96"]
    with pytest.raises(SystemExit, match="2"):
        score_images.main([*given, f"--output_dir={tmp_path / 'out'}", "--device=cpu"])
    assert "reads `input_ids` and tells 2 classes: expected a classifier of images with 10" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_more_images_are_trained_on_than_there_are(data_dir: Path, tmp_path: Path) -> None:
    benchmark.main(flags(data_dir, tmp_path, "--methods", "dense", "--max_train_samples", "1000"))
    assert (tmp_path / "work" / "resnet" / "cifar10-0" / "eval" / "eval_results.json").exists()


def test_torch_pruning_scores_a_convolution_by_its_whole_group(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importance = pytest.importorskip("torch_pruning").importance.GroupTaylorImportance
    members: list[int] = []
    score = importance.__call__

    def watch(self: object, group: Sized) -> Tensor:
        members.append(len(group))
        return score(self, group)

    monkeypatch.setattr(importance, "__call__", watch)
    benchmark.main(flags(data_dir, tmp_path, "--target_speedups", "2", "--methods", "torch_pruning"))
    assert members
    assert min(members) >= len(["convolution", "norm", "reader"])
