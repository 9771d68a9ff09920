"""The graph of imports: no file imports itself by way of others, not even for typing, and layers point one way."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import moekit

ROOT = Path(moekit.__file__).parent
PATHS = {".".join(("moekit", *p.relative_to(ROOT).with_suffix("").parts)): p for p in ROOT.rglob("*.py")}
FILES = {name.removesuffix(".__init__"): path for name, path in PATHS.items()}
#: A layer imports those before it alone, of these.
LAYERS = ("moekit.lang", "moekit.compile.tile", "moekit.compile.schedule", "moekit.compile.passes", "moekit.backends")


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports where it is read: not those that a function imports when it runs."""
    found, left = set(), list(ast.parse(path.read_text()).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{a.name}" for a in node.names}
            found |= {name for name in whole if name in FILES} or {node.module}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            left += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return {name for name in found if name in FILES}


GRAPH = {name: imported(path) - {name} for name, path in FILES.items()}


def test_the_graph_sees_imports():
    assert "moekit.compile.tile.walk" in GRAPH["moekit.compile.tile"]
    assert "moekit.lang.graph" in GRAPH["moekit.compile.passes.nest"]


def test_no_file_imports_itself():
    try:
        tuple(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith(LAYERS)])
def test_layers_point_one_way(name):
    mine = next(i for i, layer in enumerate(LAYERS) if name.startswith(layer))
    assert not [other for other in GRAPH[name] if other.startswith(LAYERS[mine + 1 :])]
