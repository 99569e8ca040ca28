"""Print sizes of the code, to compare before and after a change of its structure.

    python -m scripts.sizes                 # of this tree
    python -m scripts.sizes --root OTHER    # of a checkout of another commit

With ``--run``, also counts the files that a policy stage uses, in a real run of the tests' tiny recipe.
"""

import argparse
import ast
import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

CONTAINERS = {
    "Choice", "ComparisonFile", "Split", "PairSets", "EncodedSet", "EncodedRows", "EncodedFile", "Encoded", "Joined",
    "LazyRows", "Mapped", "Responses", "TokenRow", "Rows", "StepBatch", "TokenBatch", "EncodedStore", "TokenTable",
    "Comparison", "Tables",
}  # fmt: skip
"""Classes that hold comparisons between file and batch, in this and earlier commits."""

WEIGHT_CHECK = "must give one finite weight"
"""Part of the error message for wrong weights. It occurs once for each place that makes weights."""


def sources(root: Path) -> list[Path]:
    """Modules of the package."""
    return sorted((root / "src" / "tokenward").rglob("*.py"))


def lines(paths: list[Path]) -> int:
    """Total number of lines."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def classes(paths: list[Path]) -> Iterator[tuple[str, Path]]:
    """All top-level classes with their modules."""
    for path in paths:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                yield node.name, path


def longest_function(paths: list[Path]) -> tuple[int, str]:
    """Number of lines and location of the longest function."""
    found = [
        (node.end_lineno - node.lineno + 1, f"{path.name}:{node.name}")
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]
    return max(found)


def folder(paths: list[Path], *names: str) -> list[Path]:
    """Modules in any of these packages."""
    return [path for path in paths if set(names) & set(path.parts)]


def files_of_policy(root: Path) -> int:
    """Number of modules in which a policy stage calls a function, in a run of the tests' tiny recipe."""
    sys.path[:0] = [str(root / "src"), str(root)]
    import tokenward
    from tests.tiny import make_workplace, save_tiny

    seen: set[str] = set()
    package = str(root / "src" / "tokenward")

    def note(frame, event, argument) -> None:  # type: ignore[no-untyped-def]
        if frame.f_code.co_filename.startswith(package):
            seen.add(frame.f_code.co_filename)

    with tempfile.TemporaryDirectory() as temporary:
        recipe = make_workplace(Path(temporary) / "work", save_tiny(Path(temporary) / "model"))
        with contextlib.chdir(recipe.parent.parent):
            tokenward.run(recipe, last="scores", quiet=True)
            sys.setprofile(note)
            tokenward.run(recipe, last="policy", quiet=True)
            sys.setprofile(None)
    return len(seen)


def main() -> None:
    """Print the sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--run", action="store_true", help="also count the files that a policy stage uses")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    paths, tests = sources(root), sorted((root / "tests").rglob("*.py"))
    found = list(classes(paths))
    twice = sorted(name for name, count in Counter(name for name, _ in found).items() if count > 1)
    length, where = longest_function(paths)
    rows = {
        "modules": len(paths),
        "lines of source": lines(paths),
        "lines of stages and tools (pipeline before)": lines(folder(paths, "pipeline", "stages", "tools")),
        "modules of stages and tools": len(folder(paths, "pipeline", "stages", "tools")),
        "containers between file and batch": len({name for name, _ in found if name in CONTAINERS}),
        "places that make weights": sum(WEIGHT_CHECK in path.read_text(encoding="utf-8") for path in paths),
        "names shared by several classes": f"{len(twice)} {' '.join(twice)}".strip(),
        "longest function": f"{length} ({where})",
        "lines of tests": lines(tests),
    }
    if arguments.run:
        rows["files that a policy stage uses"] = files_of_policy(root)
    for name, value in rows.items():
        print(f"{name:45} {value}")


if __name__ == "__main__":
    main()
