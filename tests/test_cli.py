"""Scripts answer mistakes with one line, check before they work, and write whole files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hf_vdneuron.cli import (
    check_counts,
    choose_device,
    one_line_errors,
    output_folder,
    parse_args,
    print_table,
    shareable_command,
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


@pytest.mark.parametrize("value", [0, -1])
def test_counts_are_at_least_one(value: int) -> None:
    check_counts(Job("a", steps=1), "steps")
    check_counts(Place(), "room")
    job = Job("a")
    job.steps = value
    with pytest.raises(ValueError, match=f"`steps` is {value}, expected at least 1"):
        check_counts(job, "steps")


def test_checking_an_output_folder_leaves_no_trace(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "new" / "deep"):
        with output_folder(path) as folder:
            assert folder == path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["file", "file/below", "file/far/below"])
def test_an_unwritable_output_folder_is_refused(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=rf"`output_dir` '.*{where}' is not writable: choose another folder"),
        output_folder(tmp_path / where),
    ):
        pytest.fail("entered")


def test_an_output_folder_has_a_name() -> None:
    with pytest.raises(OSError, match=r"`output_dir` '' is not writable.*it is empty"), output_folder(""):
        pytest.fail("entered")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("holds_a_file", [False, True], ids=["empty", "with a file"])
def test_work_that_fails_leaves_no_empty_folder(
    holds_a_file: bool, error: type[BaseException], tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(error), output_folder(tmp_path / "old" / "new" / "deep") as folder:  # noqa: PT012
        folder.mkdir(parents=True)
        if holds_a_file:
            (folder / "log").touch()
        raise error
    assert folder.exists() == holds_a_file
    assert (tmp_path / "old" / "new").exists() == holds_a_file
    assert (tmp_path / "old").exists()


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        pytest.param([], "", id="nothing"),
        pytest.param(["--out", "/home/me/out", "--in=/data/x/"], " --out out --in=x", id="folders"),
        pytest.param(["--model", "org/name", "--dir=rel/path"], " --model org/name --dir=rel/path", id="names"),
        pytest.param(["--hub_token", "s3", "--hub-token=s3"], " --hub_token ... --hub-token=...", id="secrets"),
        pytest.param(["--flag", "--x", "-1", "--root", "/"], " --flag --x -1 --root /", id="values"),
        pytest.param(["--include", "*.0.*", "--empty", ""], " --include '*.0.*' --empty ''", id="quotes"),
    ],
)
def test_a_command_says_nothing_about_the_machine(argv: list[str], shown: str) -> None:
    assert shareable_command("scripts/x.py", argv) == f"python scripts/x.py{shown}"


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
