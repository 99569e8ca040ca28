"""Replies from an OpenAI-compatible server: vLLM, SGLang or llama.cpp. Prompts go and replies come as token ids."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel
from tokenward.plugins import check_positive, validated
from tokenward.sampling.dialects import Completions, Dialect, LlamaCpp, Odd
from tokenward.sampling.endpoint import Access, Endpoint, Failed, Refused, key_of
from tokenward.sampling.engines import TOLERANCE, Continuation, Order
from tokenward.scoring.reads import Progress

_HINTS = {
    401: "Set key_variable to the name of a variable with a valid key.",
    403: "Set key_variable to the name of a variable with a valid key.",
    404: "Check address, which ends with /v1 for most servers, and served_model_name.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class ServerSampler:
    """A server that samples replies: vLLM, SGLang or llama.cpp, which are told apart by what they answer.

    Attributes:
        address: Base address, such as ``http://127.0.0.1:8000/v1``.
        start_address: Address of a server with the model before training, for an evaluation. Without it, transformers samples the
            replies before training.
        served_model_name: Name of the model at the server; None if it serves only one.
        key_variable: Environment variable with the API key; None sends none.
        parallel: Number of concurrent requests, each for one reply.
        timeout: Seconds to wait for a reply.
        attempts: Attempts before a request counts as failed.
        tolerance: Largest mean difference between its log-probabilities and the model's, nats per token. A larger one means that
            the server holds other weights.
    """

    address: str
    start_address: str | None = None
    served_model_name: str | None = None
    key_variable: str | None = None
    parallel: int = 16
    timeout: float = 600.0
    attempts: int = 6
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        for name in ("address", "start_address"):
            if (address := getattr(self, name)) is not None:
                _check_address(name, address)
        check_positive(
            parallel=self.parallel, timeout=self.timeout, attempts=self.attempts, tolerance=self.tolerance
        )

    def open(self, address: str | None = None) -> "OpenServer":
        """Connect to ``address``, or to :attr:`address`, and find out what serves there.

        Raises:
            UserError: it cannot be reached, refuses the key, or serves several models or none of this name.
        """
        return OpenServer(self, address or self.address)


def _check_address(name: str, address: str) -> None:
    try:
        parts = urlsplit(address)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"{name} is {address!r}. Write a base address such as http://127.0.0.1:8000/v1.",
            code="bad-url",
            key=name,
        )
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        # The value is not shown: it may hold a password.
        raise UserError(
            f"{name} holds a user name, a password or a query, which manifests would record. Write the address alone, and the name of a "
            "variable with the key as key_variable.",
            code="bad-url",
            key=name,
        )


_NAMED, _NAME = 5, 100
"""Models that an error names, and characters of a name."""


class ServedModel(NamedTuple):
    """A model at a server.

    Attributes:
        name: Its name there.
        owner: Which software says that it serves it.
    """

    name: str
    owner: str


class OpenServer:
    """A server that answers; see :class:`tokenward.sampling.engines.Engine`.

    Args:
        settings: How it is reached.
        address: Its base address.

    Raises:
        UserError: it cannot be reached, refuses the key, or serves several models or none of this name.
    """

    def __init__(self, settings: ServerSampler, address: str) -> None:
        self._settings, self._address = settings, address.rstrip("/")
        key = key_of(settings.key_variable, os.environ)
        self._access = Access(self._address, key, settings.timeout, settings.attempts, "a server", "server")
        self._served = self._find(self._models())
        self._dialect = self._dialect_of(self._served.owner)

    @property
    def title(self) -> str:
        """What errors call it."""
        return f"the server at {self._address}"

    @property
    def facts(self) -> dict[str, str]:
        """Address, model and software, for a manifest."""
        return {
            "name": "server",
            "address": self._address,
            "model": self._served.name,
            "software": self._served.owner,
        }

    def hold(self, model: LanguageModel, *, first: bool) -> None:
        """See :class:`tokenward.sampling.engines.Engine`: a server keeps the weights that it was started with."""
        if not first:
            raise UserError(
                f"training changed the weights, and {self.title} keeps those that it was started with. Sample with vllm, which takes the "
                "new ones, or with transformers.",
                code="weights-changed",
            )
        if self._find(self._models()) != self._served:
            raise UserError(
                f"{self.title} serves another model than before. Start it again with the former one.",
                code="other-weights",
            )

    def draw(self, orders: Sequence[Order], progress: Progress) -> list[Continuation]:
        """See :class:`tokenward.sampling.engines.Engine`."""
        pool = ThreadPoolExecutor(self._settings.parallel)
        with Endpoint(self._access, _is_table) as endpoint:
            try:
                found = []
                for drawn in pool.map(lambda order: self._one(endpoint, order), orders):
                    found.append(drawn)
                    progress(1)
                return found
            finally:
                # After Ctrl-C or an error, waiting requests are not sent and none is repeated.
                endpoint.stop()
                pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Nothing to end: connections are closed after each call."""

    def _one(self, endpoint: Endpoint, order: Order) -> Continuation:
        dialect = self._dialect
        body = dialect.body(order, self._served.name)
        answer = self._asked(lambda: endpoint.post(dialect.path, body))
        try:
            return dialect.read(order, answer)
        except (Odd, LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            problem = str(error) if isinstance(error, Odd) else f"answers in an unknown form ({error!r:.200})"
            raise UserError(f"{self.title} {problem}.", code="wrong-replies") from error

    def _asked(self, send: Callable[[], Any]) -> Any:
        try:
            return send()
        except Failed as failure:
            raise UserError(
                f"{self.title} did not answer in {self._settings.attempts} attempts. The last: {failure}. Check that it runs and that address "
                "and timeout are right; finished stages are kept.",
                code="server-fails",
            ) from failure
        except Refused as refused:
            hint = _HINTS.get(refused.status, "Check the sampling settings and the server's context.")
            raise UserError(
                f"{self.title} refuses the request with {refused.problem} {hint}", code="server-refuses"
            ) from None

    def _models(self) -> Any:
        with Endpoint(self._access, _is_table) as endpoint:
            return self._asked(lambda: endpoint.get("/models"))

    def _find(self, listed: Mapping[str, Any]) -> ServedModel:
        """The model of the settings among those that the server lists."""
        data, wanted = listed.get("data"), self._settings.served_model_name
        known = [item for item in data if isinstance(item, dict)] if isinstance(data, list) else []
        models = [ServedModel(str(item.get("id")), str(item.get("owned_by"))) for item in known]
        fitting = models if wanted is None else [model for model in models if model.name == wanted]
        if len(fitting) != 1:
            names = ", ".join(model.name[:_NAME] for model in models[:_NAMED]) or "no model"
            more = f" and {len(models) - _NAMED} more" if len(models) > _NAMED else ""
            given = "not set" if wanted is None else repr(wanted)
            advice = "Write one of them" if models else "Start it with a model, or write one"
            raise UserError(
                f"{self.title} serves {names}{more}, and served_model_name is {given}. {advice} as "
                "served_model_name.",
                code="unknown-model",
                key="served_model_name",
            )
        return fitting[0]

    def _dialect_of(self, owner: str) -> Dialect:
        if owner == "llamacpp":
            return LlamaCpp(f"{self._address.removesuffix('/v1')}/completion")
        # Anything else must return token ids as vLLM does, or is refused at the first answer.
        return Completions(joint=owner == "sglang")


def _is_table(body: Any) -> bool:
    return isinstance(body, dict)
