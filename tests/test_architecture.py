"""The layers are one-way, and parts know nothing of each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kvpack"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lower layers first. A module may import from its own group's package and from lower groups only;
# groups with several members are siblings that do not import each other.
LAYERS = [
    {"core", "ops"},
    {"kernels"},
    {"parts"},
    {"recipe", "models"},
    {"folding"},
    {"calibrate", "runtime", "artifact"},
    {"report", "loading", "packing"},
    {"model_card"},
    {"evaluate"},
    {"verify", "picture"},
    {"pipeline"},
    {"demo", "compare", "bench"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, group in enumerate(LAYERS) for name in group}
MAY_IMPORT_TRANSFORMERS = ("models/", "runtime/", "calibrate/hooks.py", "loading/")


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Absolute names of everything a module imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    unit = unit_of(path)
    if unit == "__init__":
        return
    for name in imports(path):
        if not name.startswith("kvpack."):
            continue
        other = name.split(".")[1]
        if other in ("__version__", unit):
            continue
        assert RANK[other] < RANK[unit], f"{unit} must not import {name}"


def test_every_unit_has_a_layer() -> None:
    units = {unit_of(p) for p in MODULES} - {"__init__"}
    assert units <= set(RANK), f"place {sorted(units - set(RANK))} in LAYERS"


@pytest.mark.parametrize("path", sorted((PACKAGE / "parts").rglob("*.py")), ids=lambda p: p.stem)
def test_parts_do_not_import_parts(path: Path) -> None:
    assert not {n for n in imports(path) if n.startswith("kvpack.parts")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_transformers_stays_behind_its_seams(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    if any(i.split(".")[0] == "transformers" for i in imports(path)):
        assert name.startswith(MAY_IMPORT_TRANSFORMERS)


def module_level_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf8"))
    nodes = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    return {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {
        str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)
    }


@pytest.mark.parametrize("unit", ["core", "parts", "recipe", "report", "picture", "cli"])
def test_light_layers_do_not_import_torch(unit: str) -> None:
    for path in (p for p in MODULES if unit_of(p) == unit):
        heavy = {n.split(".")[0] for n in module_level_imports(path)} & {"torch", "transformers"}
        assert not heavy, f"{path.name} imports {heavy} at module level"


def test_no_pickle_and_no_eval() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf8"))
        assert not {n for n in imports(path) if n.split(".")[0] in {"pickle", "shelve", "marshal", "dill"}}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load", "torch.save", "yaml.load"}, (
                    f"{path}: {called}"
                )
