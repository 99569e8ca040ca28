"""Checks of how a policy that trains on its own replies samples them."""

from tokenward.config import OnlineTable, PolicyTable
from tokenward.errors import UserError
from tokenward.plugins import find
from tokenward.sampling.checks import check_temperature
from tokenward.sampling.registry import SAMPLERS, engine_of
from tokenward.sampling.server import ServerSampler
from tokenward.stages.base import Checks
from tokenward.stages.run import Run


def sampling_checks(run: Run, table: OnlineTable | PolicyTable, where: str) -> Checks:
    """Checks of how the policy's replies are sampled, by the table ``where``."""
    cold, stop = f"{where}.sampling.temperature", f"{where}.sampling.stop"
    return {
        cold: lambda: check_temperature(table.sampling.temperature, cold),
        stop: lambda: _check_stop(table.sampling.stop),
        f"{where}.sampler": lambda: _check_sampler(run, table, where),
    }


def _check_stop(texts: list[str]) -> None:
    if "" in texts:
        raise UserError(
            "stop contains an empty text, which would end every reply at its first token. Write stop: [], or texts of one or more "
            "characters.",
            code="empty-text",
        )


def _check_sampler(run: Run, table: OnlineTable | PolicyTable, where: str) -> None:
    find("sampler", table.sampler.name, SAMPLERS)
    engine = engine_of(table.sampler)
    if engine is None:
        return
    if run.recipe.model.head_mlp is not None or run.recipe.prompt_task is not None:
        raise UserError(
            f"{table.sampler.name} samples replies of whole models or adapters to written prompts, not of a prompt_task or a head_mlp. "
            f"Remove {where}.sampler to sample with transformers.",
            code="unsupported-sampling",
        )
    if table.sampling.precision != "float32":
        raise UserError(
            f"precision has no effect on the sampler {table.sampler.name}, which has its own type. Remove it.",
            code="unused-key",
            key=f"{where}.sampling.precision",
        )
    if isinstance(engine, ServerSampler):
        _check_server(table, engine, where)


def _check_server(table: OnlineTable | PolicyTable, server: ServerSampler, where: str) -> None:
    """A server keeps its weights, so it may only be asked before the policy changes."""
    if server.start_address is not None:
        message = "start_address is for evaluation.sampler. Remove it: address is the server of the policy before training."
        raise UserError(message, code="unused-key", key=f"{where}.sampler.start_address")
    changing = ["objective: {name: reinforce}"] if table.objective.name == "reinforce" else []
    changing += [name for name in ("every", "evaluate_every") if getattr(table, name, None) is not None]
    if changing:
        raise UserError(
            f"a server keeps the weights that it was started with, and {' and '.join(changing)} need samples of the policy in training. "
            "Use {name: vllm}, which takes the new weights, or {name: transformers}.",
            code="weights-changed",
        )
