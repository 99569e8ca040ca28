"""The folder of a stage: manifest, atomic writes, fingerprints, lock and resume."""

from tokenward.artifacts.files import (
    MANIFEST,
    MODEL_FILES,
    atomic_file,
    atomic_write,
    content_of,
    file_fingerprint,
    fingerprint,
    folder_fingerprint,
    read_json,
    read_jsonl,
    user_path,
    write_json,
    write_jsonl,
)
from tokenward.artifacts.manifest import DamagedFiles, Manifest, read_manifest, require
from tokenward.artifacts.outputs import EVENTS, OBSERVED, recorded, said
from tokenward.artifacts.parts import StagePart, part_of_process
from tokenward.artifacts.stage import StageFolder, open_part, open_stage
from tokenward.artifacts.system import naming_the_disk, of_system

__all__ = [
    "EVENTS",
    "MANIFEST",
    "MODEL_FILES",
    "OBSERVED",
    "DamagedFiles",
    "Manifest",
    "StageFolder",
    "StagePart",
    "atomic_file",
    "atomic_write",
    "content_of",
    "file_fingerprint",
    "fingerprint",
    "folder_fingerprint",
    "naming_the_disk",
    "of_system",
    "open_part",
    "open_stage",
    "part_of_process",
    "read_json",
    "read_jsonl",
    "read_manifest",
    "recorded",
    "require",
    "said",
    "user_path",
    "write_json",
    "write_jsonl",
]
