"""Prints the house in figures: files and lines by package, circles of imports, and arrows that point up.

python infra/layout.py
"""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

FLOORS = {"lidit": 0, "pipelines": 1, "trainer": 1, "demo": 2}
"""A package may import itself and lower floors."""
ROOT = Path(__file__).resolve().parent.parent


def arrows() -> set[tuple[str, str]]:
    """(importer, imported) of all modules of the packages."""
    graph = grimp.build_graph(*FLOORS, cache_dir=None)
    return {(module, other) for module in graph.modules for other in graph.find_modules_directly_imported_by(module)}


def up_arrows(imports: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Imports of a package beside or above one's own."""
    packages = [(pair, [name.partition(".")[0] for name in pair]) for pair in sorted(imports)]
    return [pair for pair, (own, other) in packages if own != other and FLOORS[own] <= FLOORS[other]]


def circle(imports: set[tuple[str, str]], depth: int) -> list[str]:
    """One circle among modules cut to `depth` names, or nothing: at 2, files and folders of a package are alike."""
    cut = {tuple(".".join(name.split(".")[:depth]) for name in pair) for pair in imports}
    below: dict[str, set[str]] = {}
    for importer, imported in cut:
        if importer != imported and not importer.startswith(f"{imported}."):
            below.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def tree() -> str:
    """A line for every file: its name, and the first sentence of its docstring. Families begin with what they say."""
    lines = []
    for package in (*FLOORS, "infra"):
        for folder in sorted({path.parent for path in (ROOT / package).rglob("*.py")}):
            files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
            face = folder / "__init__.py"
            says = f": {_first_sentence(face)}" if face.exists() and _first_sentence(face) else ""
            lines += [f"**{folder.relative_to(ROOT)}/**{says}", ""]
            lines += [*(f"- `{path.name}`: {_first_sentence(path)}" for path in files), ""]
    return "\n".join(lines)


def _first_sentence(path: Path) -> str:
    paragraph = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    return paragraph.partition(". ")[0].removesuffix(".")


def main() -> int:
    """Prints the figures; 1 where there is a circle or an arrow that points up."""
    if sys.argv[1:] == ["--tree"]:
        print(tree())
        return 0
    for package in FLOORS:
        lengths = sorted(len(path.read_text().splitlines()) for path in (ROOT / package).rglob("*.py"))
        print(f"{package:10} {len(lengths):4} files {sum(lengths):6,} lines, the longest {lengths[-1]}")
    imports = arrows()
    found = [way for way in (circle(imports, depth) for depth in (2, 3, 4)) if way]
    up = up_arrows(imports)
    print(f"circles    {len(found):4} {' | '.join(' -> '.join(way) for way in found)}")
    print(f"up-arrows  {len(up):4} {' | '.join(' -> '.join(pair) for pair in up)}")
    return 1 if found or up else 0


if __name__ == "__main__":
    sys.exit(main())
