"""The house rules that no linter knows: imports run downhill, modules are small, say their job and stay silent."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_vdneuron


PACKAGE = hf_vdneuron.__name__
FOLDER = Path(hf_vdneuron.__file__).parent
TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.py"))}
MODULES = sorted(TREES.keys() - {"__init__"})

# What travels with saved models as remote code: it needs no other module, and finds its own by relative names.
TRAVELLERS = [
    "modeling_vdneuron_experts",
    "modeling_vdneuron_structure",
    "modeling_vdneuron",
]

# A module imports only from modules above it.
DOWNHILL = [
    *TRAVELLERS,
    "functional",
    "schedules",
    "loss_scaling",
    "precision",
    "sublayers",
    "priors",
    "experts",
    "layers",
    "variational_experts",
    "chains",
    "layouts",
    "discovered",
    "architectures",
    "config",
    "skeletons",
    "stock",
    "structure",
    "elbo",
    "masks",
    "patching",
    "sharding",
    "curvature",
    "laplace",
    "relevance",
    "evidence",
    "budget",
    "selection",
    "exactness",
    "pruning",
    "pruned_twin",
    "dependence",
    "probing",
    "discovery",
    "reconstruction",
    "persistence",
    "plain_loading",
    "how_to_load",
    "hub",
    "hub_trainer",
    "latency",
    "latency_table",
    "monitoring",
    "judgement",
    "goal_args",
    "training_args",
    "targets",
    "one_shot",
    "steering",
    "keepsake",
    "tolerance",
    "checks",
    "optimization",
    "checkpoints",
    "distillation",
    "phases",
    "resumable_trainer",
    "recovering_trainer",
    "fitting_trainer",
    "judging_trainer",
    "trainer",
    "glue",
    "labels",
    "loading",
    "evaluation",
    "cli",
    "wording",
    "report",
    "history",
    "drawing",
    "figures",
    "model_card",
    "report_page",
    "publishing",
    "subwords",
    "embeddings",
    "vocabulary",
]

MAX_MODULE_LINES = 400
MAX_BODY_LINES = 50


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names that the tree imports; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """Modules of the package that the module imports; what names no module is left as it is written."""
    found = (f"{PACKAGE}{name}" if name.startswith(".") else name for name in imported_names(TREES[module]))
    names = (name.split(".") for name in found if name.startswith(PACKAGE))
    return {parts[1] if parts[0] == PACKAGE and len(parts) > 1 else ".".join(parts) for parts in names}


def foreign_imports(module: str) -> set[str]:
    """Top-level packages that come into memory with the module, through other modules of ours too."""
    foreign = {name.split(".")[0] for name in imported_names(TREES[module])} - {PACKAGE, ""}
    return foreign.union(*(foreign_imports(below) for below in own_imports(module)))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of the function without signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_every_module_has_its_place() -> None:
    assert set(MODULES) <= set(DOWNHILL), "add the new module to DOWNHILL, below everything it imports"
    assert len(set(DOWNHILL)) == len(DOWNHILL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downhill(module: str) -> None:
    above = set(DOWNHILL[: DOWNHILL.index(module)])
    assert own_imports(module) <= above


@pytest.mark.parametrize("module", TREES)
def test_imports_stand_at_the_top(module: str) -> None:
    assert not [name for function in functions(TREES[module]) for name in imported_names(function)]


@pytest.mark.parametrize("module", sorted({"functional", "precision", "schedules"} & TREES.keys()))
def test_the_mathematics_knows_only_torch(module: str) -> None:
    assert foreign_imports(module) - sys.stdlib_module_names <= {"torch"}


@pytest.mark.parametrize("module", TRAVELLERS)
def test_remote_code_needs_only_torch_and_transformers(module: str) -> None:
    assert foreign_imports(module) - sys.stdlib_module_names == {"torch", "transformers"}
    assert own_imports(module) < set(TRAVELLERS)


@pytest.mark.parametrize("module", sorted(set(MODULES) - set(TRAVELLERS)))
def test_only_remote_code_imports_by_relative_names(module: str) -> None:
    assert not [name for name in imported_names(TREES[module]) if name.startswith(".")]


@pytest.mark.parametrize("module", TREES)
def test_module_says_its_job_and_its_names(module: str) -> None:
    first_line, _, rest = (FOLDER / f"{module}.py").read_text(encoding="utf-8").partition("\n")
    assert first_line == "# SPDX-License-Identifier: Apache-2.0"
    assert rest.startswith(('"""', 'r"""'))
    assigned = {
        ast.unparse(target) for node in TREES[module].body if isinstance(node, ast.Assign) for target in node.targets
    }
    assert "__all__" in assigned


@pytest.mark.parametrize("module", TREES)
def test_module_is_silent_and_raises_real_errors(module: str) -> None:
    calls = {ast.unparse(node.func) for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)}
    assert "print" not in calls
    assert not [node.lineno for node in ast.walk(TREES[module]) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("module", TREES)
def test_module_is_small(module: str) -> None:
    num_lines = len((FOLDER / f"{module}.py").read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_MODULE_LINES
    assert {f.name: body_lines(f) for f in functions(TREES[module]) if body_lines(f) > MAX_BODY_LINES} == {}
