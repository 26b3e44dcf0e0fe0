"""What is written about the runs is what their rows say."""

import re
from pathlib import Path

import benchmark
import pytest


README = Path(__file__).parents[1] / "scripts" / "results" / "README.md"

#: A line of the table of scores, which names its task, and one that sums up over tasks.
SCORES = re.compile(r"\| (?:sst2|mrpc|cola|qnli_devsplit|cifar10) \| (?:[\d.]+x)? ?\| \w+ \| \d \|.*")
LEAD = re.compile(r"\| [\d.]+x \| \w+ \| \d \|.*")

MINILM = ["--model_name_or_path=model", "--bf16"]

#: Heading -> flags of the runs below it.
FLAGS = {
    "### A target": MINILM,
    "### A long recovery on CoLA": [*MINILM, "--sparsify_steps=1500", "--recover_steps=600"],
    "### A short recovery": [*MINILM, "--sparsify_steps=40", "--recover_steps=20"],
    "### Without training": MINILM,
    "## A small net on CIFAR-10": [
        "--model_name_or_path=resnet",
        "--dense_learning_rate=1e-3",
        "--learning_rate=5e-4",
    ],
}


@pytest.mark.parametrize("heading", FLAGS)
def test_its_tables_are_those_of_the_script(heading: str, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["--tasks", "cifar10" if "CIFAR" in heading else "sst2"]
    benchmark.main([*FLAGS[heading], "--table", *tasks])
    printed = set(capsys.readouterr().out.splitlines())
    section = README.read_text(encoding="utf-8").split(f"\n{heading}\n")[1].split("\n#")[0]
    written = [line for line in section.splitlines() if SCORES.match(line) or LEAD.match(line)]
    assert len(written) > 2
    assert [line for line in written if line not in printed] == []
