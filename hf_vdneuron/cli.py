# SPDX-License-Identifier: Apache-2.0
"""What every script does around its job: flags, one-line errors, checks before long work, whole files, tables."""

import argparse
import json
import os
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import datasets
import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import HfArgumentParser


__all__ = [
    "check_counts",
    "choose_device",
    "one_line_errors",
    "output_folder",
    "parse_args",
    "print_table",
    "shareable_command",
    "write_json",
]

P = ParamSpec("P")
T = TypeVar("T")

#: Set to anything to see the traceback of an error.
DEBUG_VARIABLE = "HF_VDNEURON_DEBUG"

#: Exit code of a command that was used wrongly, as of argparse.
USAGE_EXIT_CODE = 2

#: Longest error line, in characters. Some libraries explain for pages.
MAX_ERROR_WIDTH = 1000

#: What the flags of a secret end with.
SECRET_SUFFIX = "hub_token"


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of a description as they are."""


class _Parser(HfArgumentParser):
    """Reports a wrong flag in one line; the usage of a Trainer's 150 flags would fill pages."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_EXIT_CODE, f"error: {message}; --help lists the flags\n")


def parse_args(argument_types: Sequence[Any], argv: Sequence[str], *, description: str) -> tuple[Any, ...]:
    """Parse flags into dataclasses, one flag per field.

    Args:
        argument_types: Dataclasses whose fields have `help` in their metadata.
        argv: Arguments of the process, without its name.
        description: What the script does, for `--help`.

    Returns:
        One instance per dataclass. An unknown or missing flag, or a value of the wrong type, ends the process with
        one line and exit code 2.
    """
    epilog = f"Set {DEBUG_VARIABLE}=1 to see the traceback of an error."
    parser = _Parser(
        argument_types,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    *parsed, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unknown arguments {unknown}")
    return tuple(parsed)


def one_line_errors(main: Callable[P, T]) -> Callable[P, T]:
    """Let a script answer an error that its user can mend with one line on stderr and exit code 2.

    Such errors are ValueError and OSError; any other is a bug and keeps its traceback, as do all if the environment
    variable `HF_VDNEURON_DEBUG` is set. So that the line stands alone, datasets and the Hub client report errors
    only, not their retries.

    Args:
        main: What the script does.

    Returns:
        The same, with that manner.
    """

    @wraps(main)
    def polite_main(*args: P.args, **kwargs: P.kwargs) -> T:
        # Not of transformers: there the level decides whether a Trainer shows its progress bar.
        datasets.logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
        try:
            return main(*args, **kwargs)
        except (ValueError, OSError) as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            sys.stderr.write(f"error: {textwrap.shorten(str(error), MAX_ERROR_WIDTH)}\n")
            raise SystemExit(USAGE_EXIT_CODE) from None

    return polite_main


def check_counts(arguments: object, *names: str) -> None:
    """Check flags that count something.

    Args:
        arguments: Their dataclass.
        *names: Names of the flags. A flag that is None was not given.

    Raises:
        ValueError: One is below 1.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}, expected at least 1")


@contextmanager
def output_folder(output_dir: str | Path) -> Generator[Path]:
    """Check, before long work, that results can be written; work that fails leaves no empty folder behind.

    Args:
        output_dir: Folder for the results; it need not exist, and is not created here.

    Yields:
        Its absolute path.

    Raises:
        OSError: It cannot be created, or not be written to.
    """
    path = Path(output_dir).absolute()
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    _check_writable(output_dir, path if not new else new[-1].parent)
    try:
        yield path
    except BaseException:  # an interrupt by the user too
        for folder in new:
            with suppress(OSError):  # it was not made, or there is something in it
                folder.rmdir()
        raise


def _check_writable(output_dir: str | Path, existing: Path) -> None:
    try:
        if not str(output_dir):
            raise FileNotFoundError("it is empty")
        if existing.is_file():
            raise NotADirectoryError(f"`{existing.name}` is a file")
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise OSError(f"`output_dir` {str(output_dir)!r} is not writable: choose another folder ({error})") from error


def shareable_command(script: str, argv: Sequence[str]) -> str:
    """Write a command for others to repeat: local folders go by their names, and secrets are left out.

    Args:
        script: Path of the script in the repository.
        argv: Arguments without the program's name.

    Returns:
        The command, quoted for a shell.
    """
    return shlex.join(["python", script, *(_shareable(before, word) for before, word in pairwise(["", *argv]))])


def _shareable(before: str, word: str) -> str:
    """Write one word of a command, a flag or its value or both."""
    flag, equals, value = word.partition("=") if word.startswith("--") else (before, "", word)
    if flag.replace("-", "_").endswith(SECRET_SUFFIX) and value:
        value = "..."
    elif Path(value).is_absolute():
        value = Path(value).name
    return f"{flag}={value}" if equals else value or word


def choose_device(name: str | None) -> torch.device:
    """Choose where to compute.

    Args:
        name: Name of a device, such as `cpu` or `cuda:1`; if None, the accelerator of the machine, or else the CPU.

    Returns:
        The device, which is there.

    Raises:
        ValueError: There is no such device.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"`device` {name!r} cannot be used: choose another, such as cpu ({error})") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all; a kill leaves the old file, if any.

    Args:
        path: The file; its folder is created if needed.
        content: What to write, free of NaN and infinity, which JSON does not know.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a plain-text table to stdout: the first column left, the others right.

    Args:
        header: Titles of the columns.
        rows: Cells.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
