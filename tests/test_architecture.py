"""Imports point one way, every module imports, every public name is documented."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import tokenward

ROOT = Path(tokenward.__file__).parent
ORDER = [
    "hidden", "errors", "trl_names", "types", "plugins", "display", "methods", "distributed", "ops", "losses", "artifacts", "config", "data", "tokens", "models", "scoring",
    "selection", "objectives", "sampling", "training", "evaluation", "api", "stages", "report", "tools", "cli", "__main__", "__init__",
]  # fmt: skip
# Imported inside a function, so that checking a recipe stays free of torch until a verb needs it.
LATE = {("config", "training"), ("__init__", "stages"), ("__init__", "tools"), ("__init__", "scoring")}
MODULES = sorted(ROOT.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_layers(source: str) -> set[str]:
    tree = ast.parse(source)
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[1] for name in names if name.startswith("tokenward.")}


def later_layers(layer: str, source: str) -> set[str]:
    return {
        other
        for other in imported_layers(source)
        if ORDER.index(other) > ORDER.index(layer) and (layer, other) not in LATE
    }


def test_imports_point_backwards() -> None:
    found = {path: later_layers(layer_of(path), path.read_text()) for path in MODULES}
    assert not {str(path.relative_to(ROOT)): sorted(later) for path, later in found.items() if later}


def test_a_bad_import_is_found() -> None:
    assert later_layers("ops", "from tokenward.models.loading import load_model") == {"models"}


def test_no_module_imports_the_package_by_dots() -> None:
    """``import tokenward.x`` and relative imports would escape the walk above."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path
            assert not (
                isinstance(node, ast.Import) and any(n.name.startswith("tokenward") for n in node.names)
            ), path


def test_ops_knows_no_file_device_or_config() -> None:
    allowed = {"torch", "collections", "decimal", "fractions", "typing", "math", "tokenward"}
    for path in (ROOT / "ops").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert {(module or "").split(".")[0] for module in modules} <= allowed, path


def test_every_module_imports_and_its_public_names_are_documented() -> None:
    missing = []
    for info in pkgutil.walk_packages(tokenward.__path__, "tokenward."):
        module = importlib.import_module(info.name)
        assert module.__doc__, info.name
        for name, value in vars(module).items():
            mine = getattr(value, "__module__", None) == info.name and not name.startswith("_")
            if (
                mine
                and (inspect.isclass(value) or inspect.isfunction(value))
                and not (value.__doc__ or "").strip()
            ):
                missing.append(f"{info.name}.{name}")
    assert not missing


def test_no_two_classes_share_a_name() -> None:
    found = [
        node.name
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    assert not {name for name in found if found.count(name) > 1}


def test_modules_stay_readable() -> None:
    long = {
        str(path.relative_to(ROOT)): n for path in MODULES if (n := len(path.read_text().splitlines())) > 500
    }
    assert not long


def test_the_list_of_slow_tests_names_tests() -> None:
    home = Path(__file__).parent.parent
    for line in (home / "tests" / "slow.txt").read_text().splitlines():
        file, _, name = line.partition("::")
        assert f"def {name.partition('[')[0]}(" in (home / file).read_text(), line
