"""Which files are read when a model is loaded, so that none of them can be replaced unnoticed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers.utils.hub import CHAT_TEMPLATE_DIR, cached_file

from tokenward.artifacts import folder_fingerprint

UNREACHABLE = (HfHubHTTPError, OSError, httpx2.HTTPError)
"""What is raised if the hub gives no answer."""

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"

_TOKENIZER_FILES = ("*.spm", "*.codes", "*.tokenizer")
"""Vocabularies of transformers' tokenizers whose names the patterns of model files do not match."""

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files of weights in the order in which transformers looks for them."""

_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""The same of peft."""


def files_fingerprint(folder: Path) -> str:
    """Fingerprint of everything that loading a model, an adapter or a tokenizer from a folder reads in it.

    Of a folder with safetensors and no code of its own, it is that of the files that every model has.
    """
    return folder_fingerprint(folder, also=_further(folder))


def _further(folder: Path) -> Iterator[Path]:
    for pattern in (*_TOKENIZER_FILES, f"{CHAT_TEMPLATE_DIR}/*.jinja", "custom_generate/*"):
        yield from folder.glob(pattern)
    named = _json(folder / CONFIG).get("transformers_weights")
    for weights in (_first(folder, _WEIGHTS), _first(folder, _ADAPTER_WEIGHTS), named):
        if weights is not None:
            yield from _of_weights(folder, str(weights))
    if code_of(str(folder)):
        # The code may read any file beside it.
        yield from folder.iterdir()
        yield from folder.rglob("*.py")


def _first(folder: Path, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if (folder / name).is_file()), None)


def _of_weights(folder: Path, name: str) -> Iterator[Path]:
    """A file of weights, and the files that it names if it is an index; an index may name files in other folders."""
    path = folder / name
    yield path
    if name.endswith(".index.json"):
        shards = _json(path).get("weight_map")
        for shard in sorted(set(shards.values())) if isinstance(shards, dict) else ():
            yield path.parent / str(shard)


def _json(path: Path | str | None) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none, which loading the model will say."""
    try:
        found = json.loads(Path(path or "").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def code_of(source: str) -> set[str]:
    """The classes that a model or its tokenizer brings, such as ``modeling_own.OwnModel`` or ``owner/repo--modeling_own.OwnModel``."""
    quiet: dict[str, Any] = {
        f"_raise_exceptions_for_{kind}": False
        for kind in ("missing_entries", "connection_errors", "gated_repo")
    }
    found: set[str] = set()
    for name in (CONFIG, TOKENIZER_CONFIG):
        named = _json(cached_file(source, name, **quiet)).get("auto_map")
        for item in named.values() if isinstance(named, dict) else [named]:
            found.update(str(part) for part in (item if isinstance(item, list) else [item]) if part)
    return found


def foreign_code(source: str) -> dict[str, str]:
    """Fingerprint of each folder or repository with code that a model needs and does not hold itself."""
    found: dict[str, str] = {}
    for name in sorted(code_of(source)):
        place, foreign, reference = name.rpartition("--")
        if not foreign or place in found:
            continue
        folder = Path(place)
        files = (f"{reference.split('.')[0]}.py", CONFIG)
        code = ("**/*.py", "*.json")
        found[place] = folder_fingerprint(folder, code) if folder.is_dir() else commit_of(place, *files)
    return found


def commit_of(repository: str, *files: str) -> str:
    """Commit of a repository of the hub; without a connection that of its files in the cache, and empty if there are none."""
    try:
        return str(model_info(repository).sha)
    except (HFValidationError, *UNREACHABLE):
        cached = [try_to_load_from_cache(repository, file) for file in files]
    return next((Path(file).parent.name for file in cached if isinstance(file, str)), "")
