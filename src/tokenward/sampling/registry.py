"""The samplers that a recipe can name, and what they need."""

from importlib.util import find_spec
from typing import Any

from tokenward.config.base import Named
from tokenward.errors import UserError
from tokenward.plugins import build, find
from tokenward.sampling.sampler import TransformersSampler
from tokenward.sampling.server import ServerSampler
from tokenward.sampling.vllm import INSTALL, VllmSampler

EngineSettings = ServerSampler | VllmSampler
"""Settings of an engine outside of the trainer."""

ENGINES: dict[str, Any] = {"server": ServerSampler, "vllm": VllmSampler}
SAMPLERS: dict[str, Any] = {"transformers": TransformersSampler, **ENGINES}

_PACKAGES = {"server": ("openai", "httpx2"), "vllm": ("vllm",)}
_INSTALL = {"server": "It is part of the extra tokenward[server].", "vllm": INSTALL}


def engine_of(sampler: Named) -> EngineSettings | None:
    """The engine that a recipe names; None if it names transformers or a custom sampler.

    Raises:
        UserError: a setting is wrong, or a package is not installed.
    """
    if sampler.name not in ENGINES:
        return None
    settings = build("sampler", sampler.name, sampler.arguments, ENGINES)
    for package in _PACKAGES[sampler.name]:
        # Not imported here: vLLM takes many seconds and may claim the GPU.
        if find_spec(package) is None:
            raise UserError(
                f"the sampler {sampler.name} needs {package}, which is not installed. {_INSTALL[sampler.name]}",
                code="missing-package",
            )
    return settings


def evaluation_engine(sampler: Named) -> EngineSettings | None:
    """As :func:`engine_of`, for an evaluation, which has no custom samplers.

    Raises:
        UserError: another name, a wrong setting, or a package that is not installed.
    """
    if ":" in sampler.name:
        raise UserError(
            f"an evaluation samples with {', '.join(SAMPLERS)}; got {sampler.name!r}. A custom sampler works in online.sampler.",
            code="unknown-name",
            key="evaluation.sampler",
        )
    find("sampler", sampler.name, SAMPLERS)
    if sampler.name == "transformers" and sampler.arguments:
        raise UserError(
            f"in an evaluation, transformers has no settings of its own, got {', '.join(sampler.arguments)}. Write them beside sampler: "
            "evaluation.temperature, evaluation.precision and so on.",
            code="unknown-setting",
            key="evaluation.sampler",
        )
    return engine_of(sampler)
