"""The house rules that no single module can check: who may import whom, and what must stay out of where.

The rules are the two tables below; a new package or top-level module needs a row in them.
"""

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpo_megatron import config_io
from tests.tiny import run_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rpo_megatron"

PARTS = {
    "": "base",  # rpo_megatron/__init__.py
    "errors": "base",
    "config": "base",
    "config_verbs": "base",
    "config_io": "base",
    "knobs": "base",
    "fileio": "base",
    "flags": "base",
    "processes": "base",
    "cpu": "distributed",
    "distributed": "distributed",
    "objectives": "objectives",
    "data": "data",
    "model": "model",
    "training": "training",
    "planning": "planning",
    "doctor": "doctor",
    "cli": "cli",
    "__main__": "main",
}
"""First component of a module's name -> the part of the house that it belongs to."""

MAY_IMPORT: dict[str, set[str]] = {
    "base": set(),
    "distributed": {"base"},
    "objectives": {"base"},
    "data": {"base"},
    "model": {"base", "distributed", "data"},
    "training": {"base", "distributed", "objectives", "data", "model"},
    "planning": {"base", "data", "model", "training"},
    "doctor": {"base", "distributed"},
    "cli": {"base", "distributed", "objectives", "data", "model", "training", "planning", "doctor"},
    "main": {"cli"},
}
"""Part -> the other parts that it may import, anywhere, also inside a function."""

OUTSIDE: dict[str, set[str]] = {
    "base": {"msgspec", "yaml"},
    "objectives": {"torch"},
    "data": {
        *("numpy", "msgspec", "tqdm"),
        *("datasets", "jinja2", "pyarrow", "sentencepiece", "tokenizers", "transformers", "zstandard"),
    },
    "planning": set(),
    "cli": set(),
    "main": set(),
}
"""Part -> the libraries beyond Python's own that it may import. Parts that are not named may import any."""

ONLY_IN = {
    "parallel_state": "rpo_megatron/distributed.py",
    "get_forward_backward_func": "rpo_megatron/training/forward.py",
}
"""Words that may stand in one file only: megatron's global groups and its schedule."""


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of the whole package."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def part(module: str) -> str:
    """Which part of the house a module of ours is in."""
    component = module.removeprefix("rpo_megatron").removeprefix(".").split(".")[0]
    assert component in PARTS, f"{module} is in no part of the house: add '{component}' to PARTS and MAY_IMPORT"
    return PARTS[component]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Dotted names that a file imports; `from a import b` gives a.b, or a where b is no module of ours."""
    found = set()
    for node in walk(tree(path), into_functions=not at_import_time):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                ours = node.module.startswith("rpo_megatron")
                found.add(node.module if ours and full not in modules() else full)
    return found


def walk(node: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if into_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from walk(child, into_functions=into_functions)


def test_imports_point_downward() -> None:
    """An import that points upward or sideways ties two parts together that must be understood and changed alone."""
    wrong = [
        f"{name} imports {target}"
        for name, path in modules().items()
        for target in imports(path)
        if target.split(".")[0] == "rpo_megatron"
        and part(target) != part(name)
        and part(target) not in MAY_IMPORT[part(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_libraries_stay_where_they_belong() -> None:
    """torch in the config would make `--help` slow; megatron or process groups in the data or the mathematics would
    make them impossible to test alone."""
    wrong = []
    for name, path in modules().items():
        allowed = OUTSIDE.get(part(name))
        for target in imports(path):
            library = target.split(".")[0]
            if library == "rpo_megatron" or library in sys.stdlib_module_names or allowed is None:
                continue
            if library not in allowed or target.startswith("torch.distributed"):
                wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    """A cycle works or breaks with the order in which modules happen to be imported first."""
    graph = {name: imports(path, at_import_time=True) & modules().keys() for name, path in modules().items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the cycle in it


@pytest.mark.parametrize("word", ONLY_IN)
def test_megatrons_global_state_has_one_door(word: str) -> None:
    """A second reader of megatron's globals would break layouts that are given as process groups."""
    users = [str(path.relative_to(ROOT)) for path in modules().values() if word in path.read_text(encoding="utf-8")]
    assert users == [ONLY_IN[word]]


def test_no_module_state() -> None:
    """`global` means a function whose result depends on what ran before."""
    wrong = [
        f"{name}:{node.lineno}"
        for name, path in modules().items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Global)
    ]
    assert not wrong, wrong


def test_files_are_short() -> None:
    """A file of more than 400 lines holds more than one thing."""
    files = [
        path for folder in ("rpo_megatron", "tests", "tools", "examples") for path in (ROOT / folder).rglob("*.py")
    ]
    long = {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text("utf-8").splitlines())) > 400}
    assert not long, long


def test_every_module_imports_on_a_cpu() -> None:
    """A module that nothing else imports can be broken, or need CUDA to load, without any other test noticing."""
    code = (
        "import importlib, sys; from rpo_megatron import cpu; cpu.enable();"
        "list(map(importlib.import_module, sys.argv[1:]))"
    )
    names = [name for name in modules() if name != "rpo_megatron.__main__"]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


PLAN = ["plan", "model=llama-3.1-8b", "gpu=H100", "gpus=8"]


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["prepare", "--help"], ["methods"], ["config"], PLAN]
)
def test_light_verbs_do_not_load_torch(words: list[str], tmp_path: Path) -> None:
    """Help that takes seconds is not read; a config is looked at on login nodes, where torch may not even start."""
    if words == ["config"]:
        config_io.write(run_config(tmp_path), tmp_path / "run.yaml")
        words = ["config", str(tmp_path / "run.yaml")]
    code = (
        "import sys; from rpo_megatron.cli import main; code = main(sys.argv[1:]);"
        "loaded = sys.modules.keys() & {'torch', 'megatron', 'transformers', 'datasets', 'pandas'};"
        "sys.exit(code or (f'loaded {loaded}' if loaded else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5
