"""What is written about the runs is what their rows say."""

import re
from pathlib import Path

import benchmark
import pytest


README = Path(__file__).parents[1] / "scripts" / "results" / "README.md"

#: A line of the table of scores, which names its task, and one that sums up over tasks.
SCORES = re.compile(r"\| (?:sst2|mrpc|cola|qnli_devsplit) \| (?:[\d.]+x)? ?\| \w+ \| \d \|.*")
LEAD = re.compile(r"\| [\d.]+x \| \w+ \| \d \|.*")


#: Heading -> steps of sparsification and recovery of the runs below it.
BUDGETS = {"### A target": (400, 160), "### A long recovery on CoLA": (1500, 600), "### A short recovery": (40, 20)}


@pytest.mark.parametrize("heading", BUDGETS)
def test_its_tables_are_those_of_the_script(heading: str, capsys: pytest.CaptureFixture[str]) -> None:
    sparsify, recover = BUDGETS[heading]
    steps = [f"--sparsify_steps={sparsify}", f"--recover_steps={recover}"]
    benchmark.main(["--model_name_or_path", "model", "--bf16", "--table", *steps])
    printed = set(capsys.readouterr().out.splitlines())
    section = README.read_text(encoding="utf-8").split(f"\n{heading}\n")[1].split("\n#")[0]
    written = [line for line in section.splitlines() if SCORES.match(line) or LEAD.match(line)]
    assert len(written) > 5
    assert [line for line in written if line not in printed] == []
