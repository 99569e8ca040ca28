"""A stage's folder: manifest, atomic write, fingerprint, lock, resume."""

from tokenward.artifacts.files import (
    MANIFEST,
    MODEL_FILES,
    atomic_file,
    atomic_write,
    file_fingerprint,
    fingerprint,
    folder_fingerprint,
)
from tokenward.artifacts.manifest import Manifest, read_manifest, require
from tokenward.artifacts.stage import StageFolder, open_stage

__all__ = [
    "MANIFEST",
    "MODEL_FILES",
    "Manifest",
    "StageFolder",
    "atomic_file",
    "atomic_write",
    "file_fingerprint",
    "fingerprint",
    "folder_fingerprint",
    "open_stage",
    "read_manifest",
    "require",
]
