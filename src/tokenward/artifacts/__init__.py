"""The folder of a stage: manifest, atomic writes, fingerprints, lock and resume."""

from tokenward.artifacts.files import (
    MANIFEST,
    MODEL_FILES,
    atomic_file,
    atomic_write,
    file_fingerprint,
    fingerprint,
    folder_fingerprint,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from tokenward.artifacts.manifest import Manifest, read_manifest, require
from tokenward.artifacts.parts import StagePart, part_of_process
from tokenward.artifacts.stage import StageFolder, open_part, open_stage

__all__ = [
    "MANIFEST",
    "MODEL_FILES",
    "Manifest",
    "StageFolder",
    "StagePart",
    "atomic_file",
    "atomic_write",
    "file_fingerprint",
    "fingerprint",
    "folder_fingerprint",
    "open_part",
    "open_stage",
    "part_of_process",
    "read_json",
    "read_jsonl",
    "read_manifest",
    "require",
    "write_json",
    "write_jsonl",
]
