"""Manifests that a test changes on purpose, with the checksum and the files' digests that go with the change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenward.artifacts import MANIFEST, Manifest, fingerprint, recorded


def rewritten(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> None:
    """Change the manifest in a stage's folder, and record the files that are there now."""
    found = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    values = change(found.model_dump())
    made_from = [values["stage"], values["format"], values["settings"], values["inputs"]]
    values |= {"fingerprint": fingerprint(made_from), "checksum": ""}
    values["files"] = recorded(folder) if values["complete"] else {}
    Manifest.model_validate(values).write(folder)
