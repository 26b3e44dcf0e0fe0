"""Scripts answer mistakes with one line, check before they work, and write whole files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hf_vdneuron.cli import (
    check_writable_output_dir,
    choose_device,
    one_line_errors,
    parse_args,
    print_table,
    write_json,
)


@dataclass
class Job:
    name: str = field(metadata={"help": "What it is called."})
    steps: int = field(default=3, metadata={"help": "How long it takes."})
    fast: bool = field(default=False, metadata={"help": "Whether it hurries."})

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"`steps` is {self.steps}, expected at least 1")


@dataclass
class Place:
    room: str | None = field(default=None, metadata={"help": "Where it is done."})


def parse(*argv: str) -> tuple[Any, ...]:
    return parse_args((Job, Place), argv, description="Does a job.")


@one_line_errors
def fail_with(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        pytest.param(["--name", "a"], (Job("a"), Place()), id="defaults"),
        pytest.param(["--name=a", "--steps", "5", "--fast"], (Job("a", 5, True), Place()), id="values"),
        pytest.param(["--room", "cellar", "--name", "a"], (Job("a"), Place("cellar")), id="second dataclass"),
    ],
)
def test_flags_become_dataclasses(argv: list[str], expected: tuple[Any, ...]) -> None:
    assert parse(*argv) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param([], "the following arguments are required: --name", id="missing"),
        pytest.param(["--name", "a", "--steps", "x"], "invalid int value: 'x'", id="wrong type"),
        pytest.param(["--name", "a", "--speed", "9"], "unknown arguments ['--speed', '9']", id="unknown"),
        pytest.param(["--name", "a", "--step", "9"], "unknown arguments ['--step', '9']", id="abbreviated"),
    ],
)
def test_a_wrong_flag_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert message in line


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    for part in ("Does a job.", "--name", "What it is called.", "(default: 3)", "--room", "HF_VDNEURON_DEBUG"):
        assert part in text


@pytest.mark.parametrize("error", [ValueError("bad\n  value"), OSError("bad\n\nvalue")], ids=["value", "os"])
def test_a_mistake_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fail_with(error)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: bad value\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        fail_with(KeyError("x"))


def test_debugging_keeps_every_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_VDNEURON_DEBUG", "1")
    with pytest.raises(ValueError, match="bad"):
        fail_with(ValueError("bad"))


def test_checking_an_output_folder_leaves_no_trace(tmp_path: Path) -> None:
    check_writable_output_dir(tmp_path)
    check_writable_output_dir(tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["file", "file/below", "file/far/below"])
def test_an_unwritable_output_folder_is_refused(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"`output_dir` '.*{where}' is not writable: choose another folder"):
        check_writable_output_dir(tmp_path / where)


def test_devices_are_chosen_by_name() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device(None).type in {"cpu", "cuda", "mps", "xpu"}
    for name in ("cuda:99", "toaster"):
        with pytest.raises(ValueError, match=f"`device` '{name}' cannot be used: choose another"):
            choose_device(name)


def test_json_is_written_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_json(path, {"score": 0.1, "names": ["x", None]})
    assert json.loads(path.read_text()) == {"score": 0.1, "names": ["x", None]}
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"new": float("nan")})

    def killed(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["", "dense", "pruned"], [["score", "0.91", "0.905"], ["parameters", "1,000", "400"]])
    assert capsys.readouterr().out.splitlines() == [
        "            dense  pruned",
        "----------  -----  ------",
        "score        0.91   0.905",
        "parameters  1,000     400",
    ]
