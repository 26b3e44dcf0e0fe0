# SPDX-License-Identifier: Apache-2.0
"""Make a task of real text that every Python carries: which package of the standard library does a docstring document?

    python scripts/docstrings.py DIR

Writes `DIR/docstrings/{train,validation}.parquet`, ready for `--dataset_dir DIR --task_name docstrings`.
"""

import argparse
import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value

from hf_vdneuron.cli import one_line_errors, output_folder


#: Packages with some hundred docstrings each, on subjects of their own.
PACKAGES = ("asyncio", "email", "idlelib", "importlib", "multiprocessing", "tkinter", "unittest", "xml")

#: A package counts if this Python ships it with at least so many docstrings.
MIN_DOCSTRINGS = 100
MIN_PACKAGES = 2

#: Share of rows held out.
VALIDATION_SHARE = 0.2
SEED = 0


def docstrings(folder: Path) -> Iterator[str]:
    """Read all docstrings of a package, without importing it.

    Args:
        folder: Folder of the package.

    Yields:
        Docstrings on one line each, every text once.
    """
    seen = set()
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if text and text not in seen:
                    seen.add(text)
                    yield text


def read_library(library: Path) -> Dataset:
    """Read the docstrings of all packages that have enough of them.

    Args:
        library: Folder of the standard library.

    Returns:
        Rows of `sentence` and `label`.

    Raises:
        ValueError: If fewer than two packages have.
    """
    texts = {name: list(docstrings(library / name)) for name in PACKAGES}
    labels = [name for name, found in texts.items() if len(found) >= MIN_DOCSTRINGS]
    if len(labels) < MIN_PACKAGES:
        raise ValueError(
            f"{library} has {MIN_DOCSTRINGS} docstrings in {labels or 'none'} of {', '.join(PACKAGES)}, expected at "
            f"least {MIN_PACKAGES}: use a Python that comes with the sources of its library"
        )
    rows = [{"sentence": text, "label": label} for label in labels for text in texts[label]]
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=labels)})
    return Dataset.from_list(rows, features=features)


@one_line_errors
def main(argv: list[str]) -> None:
    """Write the task.

    Args:
        argv: The folder to write to.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", metavar="DIR", help="folder for the task's folder")
    with output_folder(Path(parser.parse_args(argv).output_dir) / "docstrings") as folder:
        rows = read_library(Path(sysconfig.get_path("stdlib")))
        parts = rows.train_test_split(test_size=VALIDATION_SHARE, seed=SEED)
        folder.mkdir(parents=True, exist_ok=True)
        parts["train"].to_parquet(folder / "train.parquet")
        parts["test"].to_parquet(folder / "validation.parquet")
    labels = ", ".join(rows.features["label"].names)
    print(f"{len(parts['train'])} docstrings to train on, {len(parts['test'])} held out, from {labels}")


if __name__ == "__main__":
    main(sys.argv[1:])
