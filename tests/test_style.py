"""The house as tests: floors, cycles, budgets, names, and ruff."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "mmfunc").rglob("*.py"))
FLOORS = [  # a file imports from its own floor or a lower one
    {"tree", "random", "media"},
    {"shard", "kernels", "keys"},
    {"nn"},
    {"diffusion", "sampler", "schedulers", "solvers", "multistep", "text", "lora", "quant", "optim", "jit", "hoist", "grad",
     "signature", "teacache", "prefetch",
     "lower", "checkpoint", "hub", "data", "records", "metrics", "report", "score", "processor", "generate", "clips", "features", "online", "packs",
     "prompts", "gallery", "stages", "relay", "update", "machines", "parts", "picture", "plan", "search", "work",
     "profile"},
    {"models"},
    {"answer", "doctor", "example", "recipes", "bundle", "pipeline", "render"},
    {"tasks"},
]
FAMILIES = [f for f in FILES if f.parent.name == "models" and f.name != "__init__.py"]


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor(name: str) -> int:
    part = name.split(".")[1] if "." in name else ""
    return next(i for i, names in enumerate(FLOORS) if part in names)


def imports(file: Path) -> list[str]:
    """Modules of mmfunc that a file imports."""
    known = {module(f) for f in FILES}
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            both = [f"{node.module}.{a.name}" for a in node.names]
            found += [b if b in known else node.module for b in both]
    return sorted({f for f in found if f in known and f != "mmfunc"})


def functions(file: Path) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)]


def code_lines(node: ast.FunctionDef, source: list[str]) -> int:
    """Lines of a function without blanks, comments and its docstring."""
    body = node.body
    if (
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ):
        body = body[1:]
    lines = source[body[0].lineno - 1 : node.end_lineno] if body else []
    return 1 + sum(bool(s.strip()) and not s.strip().startswith("#") for s in lines)


def test_imports_only_go_down():
    up = [(module(f), i) for f in FILES if f.name != "__init__.py" or f.parent.name != "mmfunc" for i in imports(f)
          if floor(i) > floor(module(f))]
    assert not up, f"imports that go up: {up}"


def test_every_file_has_a_floor():
    named = set().union(*FLOORS)
    assert not {module(f).split(".")[1] for f in FILES if "." in module(f)} - named


def test_no_import_cycle():
    graph = {module(f): [i for i in imports(f) if i != module(f)] for f in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' > '.join((*path, name))}"
        if name not in done:
            for i in graph[name]:
                # a package's __init__ collects its own files
                if not i.startswith(name + ".") and not name.startswith(i + "."):
                    visit(i, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("file", FAMILIES, ids=lambda f: f.stem)
def test_a_family_is_one_small_file_that_knows_no_machine(file):
    text = file.read_text()
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 220
    code = re.sub(r'""".*?"""|#.*', "", text, flags=re.S)
    words = re.findall(r"\b(cuda|npu|cpu|tp|fsdp|dp|pp|ep|ulysses|ring|mesh|triton|inductor)\b", code)
    assert not words, f"{file.name} names a device or a mesh axis: {sorted(set(words))}"


def test_functions_are_short():
    sizes = {(module(f), n.name): code_lines(n, f.read_text().splitlines()) for f in FILES for n in functions(f)}
    long = {k: v for k, v in sizes.items() if v > 40}
    assert not long, f"functions over 40 code lines: {long}"
    assert sum(sizes.values()) / len(sizes) < 10


def test_files_are_small():
    long = {module(f): n for f in FILES if (n := len(f.read_text().splitlines())) > 300}
    assert not long, f"files over 300 lines: {long}"


def test_public_functions_say_what_they_do():
    bare = [(module(f), n.name) for f in FILES for n in ast.parse(f.read_text()).body
            if isinstance(n, ast.FunctionDef) and not n.name.startswith("_") and not n.name[0].isupper()
            and not ast.get_docstring(n) and f not in FAMILIES]
    assert not bare, f"no docstring: {bare}"


def test_nothing_reads_pickles():
    for f in FILES:
        text = f.read_text()
        assert not re.search(r"^\s*(import|from) pickle", text, re.M), f
        assert all("weights_only=True" in line for line in text.splitlines() if "torch.load(" in line), f


def test_an_installed_package_has_its_sources():
    """Each file that is no Python is among the package data."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    known = {f for p, patterns in data.items() for x in patterns for f in (ROOT / p.replace(".", "/")).glob(x)}
    found = {f for f in (ROOT / "mmfunc").rglob("*.*") if f.suffix not in (".py", ".pyc")}
    assert found and not found - known, sorted(found - known)


def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "mmfunc", "programs", "tests"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
