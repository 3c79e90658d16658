"""Which packages may know of which, and what is loaded by whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lidit

pytestmark = pytest.mark.unit

ROOT = Path(lidit.__file__).resolve().parent.parent
HEAVY = ("ray", "lance", "deepspeed", "pipelines", "trainer", "demo")


READER = "lidit.store.features"  # which reads tables by Lance


def test_lidit_loads_no_engine():
    """Every module of it but the command line and the reader of tables, in a process of its own."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "lidit").rglob("*.py")]
    names = [".".join(path.parts) for path in paths if path.stem not in ("cli", "__init__")]
    modules = [name for name in names if name != READER]
    assert len(modules) >= 40
    code = (
        f"import sys, importlib\nfor name in ['lidit', *{modules!r}]: importlib.import_module(name)\n"
        f"print(sorted(name for name in sys.modules if name.split('.')[0] in {HEAVY!r}))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("module", ["pipelines.ingest", "lidit.cli", "infra.submit"])
def test_torch_is_loaded_only_where_it_is_used(module):
    """An actor of an ingest would take 200 MB and seconds more."""
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & sys.modules.keys()))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.strip() == "[]", process.stderr


def imports_of(path):
    """Top-level packages that a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            found.add(path.parent.name)
    return found


@pytest.mark.parametrize("package, other", [("pipelines", "trainer"), ("trainer", "pipelines")])
def test_pipelines_and_trainer_never_import_each_other(package, other):
    if not (ROOT / package).is_dir():
        pytest.skip(f"there is no {package} yet")
    offenders = [path.name for path in (ROOT / package).rglob("*.py") if other in imports_of(path)]
    assert offenders == []


def test_lidit_imports_no_other_package_of_the_project():
    """The command line names its jobs as strings, and loads them when they are called."""
    offenders = {
        path.name: sorted(imports_of(path) & set(HEAVY))
        for path in (ROOT / "lidit").rglob("*.py")
        if imports_of(path) & set(HEAVY)
    }
    assert offenders == {"features.py": ["lance"]}
