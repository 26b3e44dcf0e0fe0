"""`scripts/vgg.py` and its images: a tiny network on a few synthetic images, and nothing mixes settings."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import vgg
from benchmarks import cifar10
from benchmarks.chain_runs import Course
from benchmarks.jobs import append_run, read_runs
from cifar_samples import write_folder
from pyarrow import parquet
from torch import Tensor, nn

from hf_vdneuron.chains import find_chain_sublayers
from hf_vdneuron.config import VDConfig
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.relevance import unit_relevance


CPU = torch.device("cpu")
#: Two channels in the narrowest layers, 16 in the widest.
WIDTH = 1 / 32
NUM_TRAIN, NUM_TEST, NUM_VALIDATION = 40, 20, 10
REAL_IMAGES = Path(__file__).parents[2] / "shared" / "data" / "image" / "cifar10_jpeg"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("cifar10"), NUM_TRAIN, NUM_TEST)


@pytest.fixture(autouse=True)
def few_validation_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "NUM_VALIDATION_IMAGES", NUM_VALIDATION)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "new_folder" / "vgg.jsonl"


def flags(data_dir: Path, results: Path, *more: str) -> list[str]:
    few = ["--width", str(WIDTH), "--num_examples", "30", "--epochs", "1", "--dense_epochs", "1", "--seeds", "0"]
    few += ["--recover_epochs", "1"]
    return ["--data_dir", str(data_dir), "--results_file", str(results), "--device", "cpu", *few, *more]


def lines(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def rows(table: str) -> dict[str, list[str]]:
    """Cells of a table, by prior; a title may stand above it."""
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def job(**changes: Any) -> vgg.Job:
    return vgg.Job(**{
        "prior": "group",
        "seed": 0,
        "width": WIDTH,
        "epochs": 1,
        "dense_epochs": 1,
        "recover_epochs": 1,
        **changes,
    })


def finished(done: vgg.Job, accuracy: float = 80.0, units_left: tuple[int, ...] = (1, 2)) -> vgg.Run:
    scores = {"start_accuracy": 50.0, "accuracy_after_cut": 70.0, "accuracy": accuracy, "weights_left": 10.0}
    sizes = {"units": (4, 6), "units_left": units_left}
    return vgg.Run(**asdict(done), **scores, **sizes, seconds=3.0, device="cpu", torch_version="0")


def brightness(images: cifar10.Images, which: str) -> list[int]:
    """Read the classes off the images."""
    means = torch.cat([images.train, images.held_out]).mean((1, 2, 3))
    ranks = means.sub(means.min()).div(means.max() - means.min()).mul(9).round().long()
    return (ranks[: len(images.train)] if which == "train" else ranks[len(images.train) :]).tolist()


@pytest.mark.parametrize("validate", [False, True])
def test_images_are_standardised_and_keep_their_labels(validate: bool, data_dir: Path) -> None:
    images = cifar10.load_images(data_dir, 30, validate=validate, device=CPU)
    assert images.train.shape == (30, 3, 32, 32)
    assert len(images.held_out) == len(images.held_out_labels) == (NUM_VALIDATION if validate else NUM_TEST)
    torch.testing.assert_close(images.train.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(images.train.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-5)
    assert brightness(images, "train") == images.train_labels.tolist()
    assert brightness(images, "held_out") == images.held_out_labels.tolist()


def test_validation_images_are_not_trained_on(data_dir: Path) -> None:
    images = cifar10.load_images(data_dir, NUM_TRAIN - NUM_VALIDATION, validate=True, device=CPU)
    seen = torch.cat([images.train, images.held_out]).flatten(1)
    assert len(seen.unique(dim=0)) == NUM_TRAIN


@pytest.mark.parametrize(("num_examples", "validate"), [(0, False), (NUM_TRAIN + 1, False), (NUM_TRAIN, True)])
def test_images_that_are_not_there_are_refused(num_examples: int, validate: bool, data_dir: Path) -> None:
    with pytest.raises(ValueError, match=f"`num_examples` is {num_examples}: expected 1 to"):
        cifar10.load_images(data_dir, num_examples, validate=validate, device=CPU)


def test_a_file_without_images_is_refused_by_name(tmp_path: Path, data_dir: Path) -> None:
    file = write_folder(tmp_path, 2, 2) / "train.parquet"
    table = parquet.read_table(file)
    parquet.write_table(table.rename_columns(["image", "label"]), file)
    with pytest.raises(ValueError, match=r"train\.parquet has the columns \['image', 'label'\]: expected img among"):
        cifar10.load_images(tmp_path, 1, validate=False, device=CPU)
    file.write_bytes((data_dir / "train.parquet").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"train\.parquet is no parquet file, or half of one: download it again"):
        cifar10.load_images(tmp_path, 1, validate=False, device=CPU)


def test_augmented_images_are_shifted_and_mirrored() -> None:
    images = torch.randn(40, 2, 5, 6)
    padded = nn.functional.pad(images, (4,) * 4)
    moves = []
    for image, seen in zip(padded, cifar10.augment(images), strict=True):
        crops = {(y, x): image[:, y : y + 5, x : x + 6] for y in range(9) for x in range(9)}
        found = [(*at, False) for at, crop in crops.items() if torch.equal(crop, seen)]
        found += [(*at, True) for at, crop in crops.items() if torch.equal(crop.flip(-1), seen)]
        assert len(found) == 1
        moves += found
    rows_moved, columns_moved, mirrored = (set(move) for move in zip(*moves, strict=True))
    assert min(len(rows_moved), len(columns_moved)) > 5  # of nine
    assert mirrored == {False, True}


def test_the_network_is_vgg_16() -> None:
    layers = [layer for layer in vgg.vgg(1.0).modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 16
    # Those of the published network, less a bias for each of the 4,224 channels.
    assert sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Conv2d)) == 14_714_688 - 4_224


@pytest.mark.parametrize("width", [WIDTH, 0.25, 0.001])
def test_every_hidden_layer_can_lose_units(width: float) -> None:
    model = vgg.vgg(width)
    sizes = [max(1, round(size * width)) for size in (64, 64, 128, 128, *3 * [256], *8 * [512])]
    assert [sublayer.num_units for sublayer in find_chain_sublayers(model)] == sizes
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_every_prior_is_run_once(data_dir: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vgg.main(flags(data_dir, results))
    runs = lines(results)
    assert {run["prior"] for run in runs} == {"group", "mixture", "dense"}
    assert all(sum(run["units"]) == 164 and run["device"] == "cpu" for run in runs)
    first = capsys.readouterr().out
    assert first.startswith("VGG-16, 0.03125 times as wide, on 30 images of CIFAR-10\n")
    assert {prior: cells[0] for prior, cells in rows(first).items()} == {"dense": "1", "group": "1", "mixture": "1"}
    vgg.main(flags(data_dir, results))
    assert lines(results) == runs  # nothing is run twice
    assert capsys.readouterr().out == first


def images_of(num: int) -> cifar10.Images:
    images, labels = torch.randn(num, 3, 32, 32), torch.arange(num) % 10
    return cifar10.Images(images, labels, images, labels)


def test_all_priors_of_a_seed_start_from_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vgg, "accuracy", lambda model, *_: next(model.parameters()).sum().item())
    images = images_of(10)
    jobs = [job(prior="group"), job(prior="dense"), job(prior="dense", seed=1)]
    group, control, other = (vgg.run(each, images, CPU).start_accuracy for each in jobs)
    assert group == control != other


def test_the_network_that_is_scored_is_the_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rule finds so early is nothing, so say it: three channels of the widest layer stay."""
    keep = torch.zeros(2, 16, dtype=torch.bool)
    keep[:, [3, 8, 9]] = True
    keep[0] = True  # a convolution that pads reads it, so it ends on the out-side
    monkeypatch.setattr(vgg, "relevance_mask", lambda _: RelevanceMask({"4.0": keep}))
    scored: list[nn.Module] = []

    def accuracy(model: nn.Module, *_: Tensor) -> float:
        scored.append(model)
        return float(len(scored))

    monkeypatch.setattr(vgg, "accuracy", accuracy)
    run = vgg.run(job(), images_of(20), CPU)
    assert scored[-1][4][0].out_channels == scored[-1][4][3].in_channels == 3
    assert run.units_left == (3,)
    assert (run.start_accuracy, run.accuracy_after_cut, run.accuracy) == (1, 2, 3)
    full = sum(parameter.numel() for parameter in vgg.vgg(WIDTH).parameters())
    # Thirteen channels with their two numbers in the norm, each read by and reading 16 others.
    assert run.weights_left == pytest.approx(100 - 100 * 13 * (2 * 16 * 9 + 2) / full)


@pytest.mark.parametrize(("prior", "expected"), [("group", [1, 5]), ("dense", [1, 3 + 5])], ids=["group", "control"])
def test_what_is_left_recovers_and_the_control_trains_as_long(
    prior: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense: list[int] = []
    monkeypatch.setattr(vgg, "train_dense_", lambda _, course: dense.append(course.epochs))
    monkeypatch.setattr(vgg, "accuracy", lambda *_: 1.0)
    vgg.run(job(prior=prior, epochs=3, recover_epochs=5), images_of(20), CPU)
    assert dense == expected


def test_norms_gather_their_statistics_anew() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model(torch.full((5, 3), 100.0) + torch.randn(5, 3))  # of a network as it was
    inputs = torch.randn(50, 3)
    vgg.settle_norms_(model, inputs)
    outputs = model[0](inputs)
    torch.testing.assert_close(model[1].running_mean, outputs.mean(0))
    torch.testing.assert_close(model[1].running_var, outputs.var(0))
    assert model[1].momentum == nn.BatchNorm1d(4).momentum


@pytest.mark.parametrize("falling", [False, True])
def test_rates_hold_or_fall_over_a_course(falling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    step = torch.optim.Adam.step

    def noted(optimizer: torch.optim.Adam) -> None:
        rates.append([group["lr"] for group in optimizer.param_groups])
        step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    model = patch_model_(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), VDConfig())
    course = Course(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), 4, 2, learning_rate=1.0, falling=falling)
    vgg.train_variational_(model, course, {"log_var": 0.5}, kl_weight=1.0)
    factors = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25] if falling else 8 * [1]
    assert rates == [[factor, 0.5 * factor] for factor in factors]


@pytest.mark.parametrize("distance", [0.0, 3.0])
def test_distances_bound_how_far_the_posterior_moves(distance: float) -> None:
    images = images_of(10)
    course = Course(images.train, images.train_labels, epochs=2, batch_size=5, learning_rate=0.0)
    moving = job(log_var_distance=distance, group_scale_distance=distance, kl_weight=1.0)
    model = vgg.vgg(WIDTH)
    kept: dict[str, Tensor] = {}

    def watch(patched: nn.Module) -> RelevanceMask:
        kept.update(patched.state_dict())
        return RelevanceMask({path: torch.ones_like(values > 0) for path, values in unit_relevance(patched).items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg, "relevance_mask", watch)
        vgg.sparsify_(model, course, moving)
    moved = max((values + 10).abs().max() for name, values in kept.items() if name.endswith("log_var"))
    assert moved <= 1.01 * distance
    assert moved >= 0.5 * distance


@pytest.mark.parametrize(
    "change",
    [
        ["--width", "0.0625"],
        ["--num_examples", "20"],
        ["--dense_epochs", "2"],
        ["--epochs", "2"],
        ["--recover_epochs", "2"],
        ["--kl_weight", "0.3"],
        ["--initial_log_var", "-8"],
        ["--log_var_distance", "30"],
        ["--group_scale_distance", "3"],
        ["--bf16"],
        ["--validate"],
        ["--seeds", "1"],
    ],
    ids=lambda change: change[0],
)
def test_other_settings_are_other_runs(
    change: list[str], data_dir: Path, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    done: list[vgg.Job] = []

    def run(wanted: vgg.Job, *_: object) -> vgg.Run:
        done.append(wanted)
        return finished(wanted, accuracy=float(len(done)))

    monkeypatch.setattr(vgg, "run", run)
    one_prior = flags(data_dir, results, "--priors", "group")
    vgg.main(one_prior)
    vgg.main([*one_prior, *change])
    assert len(set(done)) == len(done) == 2
    first, second = (rows(table)["group"] for table in capsys.readouterr().out.split("VGG-16")[1:])
    assert (first[0], second[0]) == ("1", "1")  # no table counts the other's run
    assert ("1.00" in first[6], "2.00" in second[6]) == (True, True)


def test_the_table_sets_each_run_against_the_control_of_its_seed() -> None:
    runs = [finished(job(prior="dense", seed=seed), 80 + seed, (4, 6)) for seed in (0, 1)]
    runs += [finished(job(seed=0), 79.0, (1, 1)), finished(job(seed=1), 78.0, (1, 2)), finished(job(seed=2), 10.0)]
    cells = rows(vgg.summarise(runs))
    assert cells["dense"][-1] == "0.00 ± 0.00"
    assert cells["group"][:2] == ["3", "2.7 of 10"]
    assert cells["group"][2].startswith("73.33 ± 3.33")
    assert cells["group"][-1] == "2.00 ± 1.00"  # 1 and 3 points; seed 2 has no control
    assert rows(vgg.summarise([finished(job())]))["group"][-1] == "not measured"


def test_the_plan_lists_what_is_left(data_dir: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = flags(data_dir, results, "--seeds", "0", "1", "--priors", "group", "dense", "--plan")
    settings = {"num_examples": 30, "dense_epochs": 1}
    append_run(results, finished(job(**settings)))
    append_run(results, finished(job(**settings, prior="dense", seed=1, kl_weight=7.0)))
    vgg.main(argv)
    planned = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert planned == [["dense", "0", "unknown"], ["group", "1", "3", "s"], ["dense", "1", "unknown"]]
    assert len(read_runs(results, vgg.Run)) == 2  # nothing was run


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(["--priors", "laplace"], "`priors` holds"), (["--num_examples", "99"], "`num_examples` is 99")],
)
def test_wrong_choices_are_refused(
    wrong: list[str], message: str, data_dir: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        vgg.main(flags(data_dir, results, *wrong))
    assert message in capsys.readouterr().err
    assert not results.exists()


@pytest.mark.skipif(not REAL_IMAGES.exists(), reason="CIFAR-10 is not there")
def test_real_images_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "NUM_VALIDATION_IMAGES", 50)
    images = cifar10.load_images(REAL_IMAGES, 50, validate=True, device=CPU)
    assert images.train.shape == images.held_out.shape == (50, 3, 32, 32)
    assert set(images.train_labels.tolist()) <= set(range(10))
    # Neighbouring pixels of a photograph resemble each other.
    left, right = (images.train[..., columns].flatten() for columns in (slice(0, 31), slice(1, 32)))
    assert torch.corrcoef(torch.stack([left, right]))[0, 1] > 0.8
