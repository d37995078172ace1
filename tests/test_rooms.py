"""The rooms of docs/architecture.md: which may import which. And no function is too long to read at once."""

import ast
import graphlib

import pytest
from helpers import PROJECT

from federated.version import files_of

GROUND = ["options", "seeds", "files", "metrics", "version", "slurm", "domains", "search", "extension"]
# The lowest first: each may import from itself and those before it
ROOMS = [
    {f"federated.{name}" for name in GROUND},
    {"federated.algorithms", "federated.models", "federated.data"},
    {f"federated.{name}" for name in ("settings", "privacy", "lock", "trial", "study", "halving")},
    {"federated.learning"},
    {"federated.running"},
]
REPORTING = 3  # federated.reporting stands on the first three rooms, beside learning and running
MAX_LINES = 80

SOURCES = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in files_of(PROJECT)
}


def imports_of(name):
    """The project's modules that a module imports, as it is loaded or later, but for those that only a type checker needs."""
    found, nodes = set(), [SOURCES[name]]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    known = set()
    for each in found:
        while each and each not in SOURCES:
            each = each.rpartition(".")[0]
        known.add(each)
    return known - {"", "federated", name}


def height_of(module):
    """The place of a module's room in ROOMS; reporting stands above all rooms, the scripts above reporting."""
    for height, room in enumerate(ROOMS):
        if any(module == each or module.startswith(f"{each}.") for each in room):
            return height
    return len(ROOMS) if module.startswith("federated.reporting") else len(ROOMS) + 1


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("federated.")])
def test_imports_point_down(name):
    height, imported = height_of(name), {each: height_of(each) for each in imports_of(name)}
    assert height <= len(ROOMS), "it stands in no room"
    assert not {each for each, its_height in imported.items() if its_height > height}
    if name.startswith("federated.reporting"):
        assert not {each for each, its_height in imported.items() if REPORTING <= its_height < len(ROOMS)}


def test_no_modules_import_each_other():
    graph = {name: imports_of(name) for name in SOURCES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_map_names_every_file():
    """For algorithms, which have a file each, it names their directory."""
    text = (PROJECT / "docs" / "architecture.md").read_text()
    files = [path for path in (PROJECT / "federated").rglob("*.*") if path.suffix in (".py", ".js", ".css")]
    named = [path.name for path in files if path.parent.name != "algorithms" and path.name != "__init__.py"]
    scripts = [path.name for path in PROJECT.glob("*.py")]
    assert named and [name for name in [*named, *scripts] if f"`{name}`" not in text and f"/{name}`" not in text] == []


def test_no_function_is_too_long():
    lengths = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, source in SOURCES.items()
        for node in ast.walk(source)
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
