"""Secrets in settings: found by their names and shapes, and masked in everything that is written, shown or raised."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "(hidden)"
"""What stands in place of a secret. It is fixed, so that another secret makes no stage run again."""

_NAME = re.compile(
    r"(?:.*[_.-])?(?:api_?keys?|access_?keys?|secret_?keys?|private_?keys?|secrets?|passwords?|passwd|passphrases?|authorization|"
    r"credentials?|cookies?|bearer|(?:hub|hf|huggingface|access|auth|api|refresh|session|secret|private|personal|wandb|bot)_?tokens?)"
)
_HEADERS = re.compile(r"(?:.*[_.-])?headers?")
_PERHAPS = re.compile(r"(?:.*[_.-])?(?:token|key)")
_RANDOM = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9_~+=-]{20,}")
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|"
    r"AKIA[0-9A-Z]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,})"
)
_IN_ADDRESS = re.compile(r"(?P<kept>\b[A-Za-z][A-Za-z0-9+.-]{0,20}://)[^/\s@'\"]{1,500}@")
_IN_QUERY = re.compile(
    r"(?P<kept>[?&](?:key|[\w-]{0,40}(?:token|api-?_?key|secret|password|signature|credential)|sig|auth)=)[^&#\s'\"]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<kept>\b(?:bearer|basic)\s+)(?=[\w.~+/=-]*[0-9])[\w.~+/=-]{12,}", re.IGNORECASE)
_SHORTEST = 6
_known: set[str] = set()


def hidden(value: Any) -> Any:
    """A copy of some settings, in which the mask stands in place of each secret.

    A secret is the value of a key such as ``api_key``, ``hub_token`` or ``password``, any value below ``headers``, the user name
    and the keys of an address, and text with the shape of a known kind of key. From then on, :func:`without_secrets` knows it too.
    """
    return _hidden(value, "", secret=False)


def remember(secret: str) -> None:
    """Let :func:`without_secrets` know a secret, such as the value of an environment variable."""
    # A short one, or one like a word, would be found in ordinary text.
    is_word = secret.isalpha() and secret in (secret.lower(), secret.capitalize(), secret.upper())
    if len(secret) >= _SHORTEST and not is_word and secret != MASK:
        _known.add(secret)


def without_secrets(text: str) -> str:
    """The text with the mask in place of each secret that is known, and of each part that has the shape of one."""
    return _shaped(without_known(text))


def without_known(text: str) -> str:
    """The text with the mask in place of each secret that is known. Nothing else of it changes: it may be a user's data."""
    for secret in sorted(_known, key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, MASK)
    return text


def without_known_inside(value: Any) -> Any:
    """A copy of a JSON value, with :func:`without_known` of each text in it."""
    if isinstance(value, Mapping):
        return {key: without_known_inside(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_known_inside(inner) for inner in value]
    return without_known(value) if isinstance(value, str) else value


def masked_keys(value: Any, place: str = "") -> Iterator[str]:
    """Dotted keys of settings whose secret was masked when they were written."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from masked_keys(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from masked_keys(inner, place)
    elif isinstance(value, str) and MASK in value:
        yield place


def is_secret(key: str, value: Any = "") -> bool:
    """Whether a key, or the shape of its value, says that the value is a secret."""
    name = key.lower().replace("-", "_").rpartition(".")[2]
    looks = _PERHAPS.fullmatch(name) and isinstance(value, str) and _RANDOM.fullmatch(value)
    return bool(_NAME.fullmatch(name) or looks)


def _hidden(value: Any, key: str, *, secret: bool) -> Any:
    secret = secret or is_secret(key, value)
    if isinstance(value, Mapping):
        secret = secret or bool(_HEADERS.fullmatch(key.lower()))
        return {name: _hidden(inner, str(name), secret=secret) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(inner, key, secret=secret) for inner in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if secret:
        remember(str(value))
        return MASK
    return _shaped(value) if isinstance(value, str) else value


def _shaped(text: str) -> str:
    for found in (_IN_ADDRESS, _IN_QUERY, _BEARER):
        text = found.sub(_masked, text)
    return _SHAPES.sub(MASK, text)


def _masked(found: re.Match[str]) -> str:
    kept = found["kept"]
    value = found[0][len(kept) :].removesuffix("@")
    remember(value.rpartition(":")[2])
    return f"{kept}{MASK}{'@' if found[0].endswith('@') else ''}"
