"""Break the code on purpose, one place at a time, and report which breaks the tests catch.

    python -m scripts.mutants --list
    python -m scripts.mutants --out before.json                   # all of them, an hour or more of one core
    python -m scripts.mutants --only 'ops/*' --jobs 2
    python -m scripts.mutants --compare before.json after.json

A mutant is located by the name of a function and a piece of its code as ``ast.unparse`` writes it, so formatting,
comments, docstrings and the file can change. A mutant that no longer applies is reported as ``gone``; correct its entry
in scripts/mutant_list.py. The tests of its package run in a copy of the tree, never in the tree itself.
"""

import argparse
import ast
import compileall
import fnmatch
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple, NoReturn

import pytest

from scripts.mutant_list import MUTANTS, TESTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path("src/tokenward")
COPIED = ("src", "tests", "docs", "recipes", "scripts", "benchmarks", "studies")
TIMEOUT_S = 1800
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
"""pytest warns that it cannot rewrite assertions in modules imported before it, which does not matter here."""
CAUGHT, SURVIVED, GONE, BROKEN = "caught", "survived", "gone", "broken"


class Place(NamedTuple):
    """The file and function that a mutant changes."""

    path: Path
    node: ast.AST
    text: str


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """All classes and functions with their dotted names."""
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        prefix, node = stack.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + child.name, child
                stack.append((f"{prefix}{child.name}.", child))


def bare(node: ast.AST) -> str:
    """Code of a function without docstrings, as ``ast.unparse`` writes it."""
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.FunctionDef | ast.ClassDef)
            and ast.get_docstring(inner, clean=False) is not None
        ):
            inner.body = inner.body[1:] or [ast.Pass()]
    return ast.unparse(node)


def place_of(mutant: Mutant, root: Path) -> Place | None:
    """The unique place of a mutant, searched in its own package first; None if there is none."""
    for folder in (root / SOURCE / mutant.package, root / SOURCE):
        files = (
            [folder.with_suffix(".py")]
            if folder.with_suffix(".py").is_file()
            else sorted(folder.rglob("*.py"))
        )
        found = [
            Place(path, node, text)
            for path in files
            for name, node in functions(ast.parse(path.read_text(encoding="utf-8")))
            if name == mutant.where and mutant.old in (text := bare(node))
        ]
        if len(found) == 1:
            return found[0]
    return None


def mutated(mutant: Mutant, place: Place) -> str:
    """The text of the file with the mutant applied."""
    lines = place.path.read_text(encoding="utf-8").splitlines()
    node = place.node
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    first = min([node.lineno, *(item.lineno for item in node.decorator_list)]) - 1
    code = place.text.replace(mutant.old, mutant.new, 1)
    indented = [" " * node.col_offset + line for line in code.splitlines()]
    return "\n".join([*lines[:first], *indented, *lines[node.end_lineno :]]) + "\n"


def tests_of(mutant: Mutant, root: Path) -> list[str]:
    """Test files and folders of a mutant; those of its package if its own do not exist."""
    named = [name for name in mutant.tests if (root / name).exists()]
    return named or [name for name in TESTS[mutant.package] if (root / name).exists()]


def copy_tree(folder: Path) -> Path:
    """Copy the tree, with bytecode."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "results", "node_modules")
            shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, folder / path.name)
    compileall.compile_dir(str(folder / "src"), quiet=2)
    return folder


def preload() -> None:
    """Import libraries once, before test processes are forked."""
    for name in ("datasets", "peft", "accelerate", "pydantic", "typer", "torch._dynamo"):
        importlib.import_module(name)
    for name in ("Trainer", "AutoModelForCausalLM", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(importlib.import_module("transformers"), name)


def run_tests(root: Path, tests: Sequence[str], log: Path) -> int:
    """Run tests in a copy until the first failure. Returns pytest's exit status, or -1 after the time limit."""
    child = os.fork()
    if not child:
        _test_and_exit(root, tests, log)
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def _test_and_exit(root: Path, tests: Sequence[str], log: Path) -> NoReturn:
    os.setsid()
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    sys.path[:0] = [str(root), str(root / "src")]
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    status = 3
    try:
        status = int(pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *QUIET, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def verdict(mutant: Mutant, root: Path) -> dict[str, object]:
    """Apply a mutant, run its tests, and restore the file."""
    place, tests = place_of(mutant, root), tests_of(mutant, root)
    if place is None or not tests:
        return {"result": GONE, "by": "" if tests else "no tests"}
    log = root.with_suffix(".log")
    before, times = place.path.read_text(encoding="utf-8"), place.path.stat()
    begun = time.monotonic()
    try:
        place.path.write_text(mutated(mutant, place), encoding="utf-8")
        status = run_tests(root, tests, log)
    finally:
        # The old time stamp makes the bytecode valid again.
        place.path.write_text(before, encoding="utf-8")
        os.utime(place.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    output = log.read_text(encoding="utf-8", errors="replace").splitlines()
    failed = [
        line.split(" - ")[0].partition(" ")[2] for line in output if line.startswith(("FAILED", "ERROR"))
    ]
    result = {0: SURVIVED, 1: CAUGHT, 2: CAUGHT, -1: CAUGHT}.get(status, BROKEN)
    by = failed[0] if failed else "" if result == SURVIVED else " ".join(output[-3:])
    return {"result": result, "by": by, "seconds": round(time.monotonic() - begun, 1)}


def run(mutants: Sequence[Mutant], out: Path | None, jobs: int) -> dict[str, dict[str, object]]:
    """Run all mutants that are not in ``out`` yet. ``out`` is written after each one."""
    preload()
    found: dict[str, dict[str, object]] = (
        json.loads(out.read_text(encoding="utf-8")) if out is not None and out.is_file() else {}
    )
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch, ThreadPoolExecutor(jobs) as pool:
        copies: Queue[Path] = Queue()
        for number in range(jobs):
            copies.put(copy_tree(Path(scratch) / str(number)))

        def one(mutant: Mutant) -> None:
            copy = copies.get()
            try:
                found[mutant.name] = verdict(mutant, copy)
            finally:
                copies.put(copy)
            print(f"{found[mutant.name]['result']:>9}  {mutant.name}  {found[mutant.name]['by']}", flush=True)
            if out is not None:
                out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")

        list(pool.map(one, [mutant for mutant in mutants if mutant.name not in found]))
    return found


def show(found: dict[str, dict[str, object]]) -> None:
    """Print a row per package, and the mutants that were not caught."""
    packages = dict.fromkeys(name.split("/")[0] for name in found)
    print(f"\n{'package':<12}{'mutants':>8}{CAUGHT:>8}{SURVIVED:>10}{GONE:>6}")
    for package in packages:
        count = Counter(item["result"] for name, item in found.items() if name.split("/")[0] == package)
        print(f"{package:<12}{count.total():>8}{count[CAUGHT]:>8}{count[SURVIVED]:>10}{count[GONE]:>6}")
    total = Counter(item["result"] for item in found.values())
    print(f"{'all':<12}{total.total():>8}{total[CAUGHT]:>8}{total[SURVIVED]:>10}{total[GONE]:>6}")
    for name, item in found.items():
        if item["result"] != CAUGHT:
            print(f"  {item['result']}: {name}")


def compare(before: Path, after: Path) -> int:
    """Print mutants whose result changed. Returns 1 if one is no longer caught."""
    one, other = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    lost = 0
    for name in sorted({*one, *other}):
        results = [found.get(name, {}).get("result", "not run") for found in (one, other)]
        if results[0] != results[1]:
            lost += results[0] == CAUGHT
            print(f"{name}: {results[0]} -> {results[1]}")
    return int(lost > 0)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="names to run, a pattern such as 'ops/*'")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel jobs")
    parser.add_argument("--out", type=Path, help="JSON file of results; mutants in it are not run again")
    parser.add_argument("--list", action="store_true", help="only print the place of each mutant")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    options = parser.parse_args()
    if options.compare:
        return compare(*options.compare)
    mutants = [mutant for mutant in MUTANTS if fnmatch.fnmatch(mutant.name, options.only)]
    if options.list:
        for mutant in mutants:
            place = place_of(mutant, ROOT)
            print(f"{mutant.name}: {GONE if place is None else place.path.relative_to(ROOT)}")
        return 0
    found = run(mutants, options.out, options.jobs)
    show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
