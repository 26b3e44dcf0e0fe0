"""The README's table of supported models is the one that the script prints."""

from pathlib import Path

import pytest
import support_table
from zoo import GENERATING, ROWS

from hf_vdneuron.architectures import ARCHITECTURES


def test_readme_shows_the_table() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert support_table.support_table() in text


def test_every_type_stands_in_one_row() -> None:
    types = [name for row in support_table.support_rows() for name in row[0].split(", ")]
    assert sorted(types) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("row", ROWS)
def test_it_says_what_the_zoo_tries(row: str) -> None:
    """A model loses what its sub-layers say, and generates where the zoo lets it generate."""
    found = next(one for one in support_table.support_rows() if ROWS[row].model_type in one[0].split(", "))
    assert (found[1] == "yes") == (ROWS[row].heads > 0)
    assert (found[3] == "yes") == (row in GENERATING)
