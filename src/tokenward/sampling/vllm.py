"""Replies from vLLM in this process. It gets its weights from a saved folder."""

import gc
import importlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel

from tokenward.errors import UserError
from tokenward.models.adapters import merge_adapter
from tokenward.models.loading import LanguageModel
from tokenward.plugins import check_positive, validated
from tokenward.sampling.engines import TOLERANCE, Continuation, Order, check_not_raised
from tokenward.scoring.reads import Progress

INSTALL = (
    "vLLM asks for older versions of transformers than tokenward, so install it with pip install --no-deps, and its other packages "
    "beside it; or serve the model from an environment of its own, with {name: server, address: ...}."
)
"""How to get the package: no extra can hold it, because pip finds no versions that suit both."""

_OURS = ("model", "tokenizer", "generation_config", "skip_tokenizer_init")
"""Arguments of vLLM's LLM that are set here."""


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class VllmSampler:
    """vLLM in this process, for replies. Needs the package ``vllm``.

    Attributes:
        llm: Arguments of ``vllm.LLM``, such as ``gpu_memory_utilization``, ``tensor_parallel_size`` and ``max_model_len``. Without
            ``dtype``, it is the model's.
        chunk: Number of replies per call of ``generate``; the progress moves after each.
        tolerance: Largest mean difference between its log-probabilities and the model's, nats per token. A larger one means that
            it holds other weights.
    """

    llm: dict[str, Any] | None = None
    chunk: int = 1024
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        check_positive(chunk=self.chunk, tolerance=self.tolerance)
        for name in _OURS:
            if name in (self.llm or {}):
                raise UserError(
                    f"tokenward sets {name} of vllm.LLM itself. Remove it.",
                    code="reserved-key",
                    key=f"llm.{name}",
                )

    def open(self) -> "OpenVllm":
        """The engine, which loads a model when it first samples.

        Raises:
            UserError: the package is not installed, or this is one of several processes.
        """
        return OpenVllm(self)


class OpenVllm:
    """vLLM's ``LLM``; see :class:`tokenward.sampling.engines.Engine`.

    Args:
        settings: Its settings.

    Raises:
        UserError: the package is not installed, or this is one of several processes.
    """

    def __init__(self, settings: VllmSampler) -> None:
        if (processes := PartialState().num_processes) > 1:
            raise UserError(
                f"vllm runs in one process, and this run has {processes}, each of which would start it on the same GPUs. Start a server, "
                "and sample with {name: server, address: ...}.",
                code="several-processes",
            )
        self._settings = settings
        try:
            self._vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            raise UserError(
                f"the sampler vllm needs vllm, which cannot be imported ({error}). {INSTALL}",
                code="missing-package",
            ) from error
        self._llm: Any = None

    @property
    def title(self) -> str:
        """What errors call it."""
        return "vLLM"

    @property
    def facts(self) -> dict[str, str]:
        """Name and version, for a manifest."""
        return {"name": "vllm", "software": f"vllm {self._vllm.__version__}"}

    def hold(self, model: LanguageModel, *, first: bool) -> None:
        """Save the weights to a temporary folder, from which vLLM loads them."""
        with TemporaryDirectory(prefix="tokenward-") as folder:
            tied = save_whole(model, Path(folder)).config.get_text_config().tie_word_embeddings
            if tied:
                self.close()  # reloading leaves a head that shares the embedding's weight as it was (vLLM 0.32)
            if self._llm is None:
                dtype = {"dtype": str(model.dtype).removeprefix("torch.")}
                # "vllm" in place of the folder's own generation settings, which could add penalties.
                self._llm = self._vllm.LLM(
                    model=folder,
                    tokenizer=folder,
                    generation_config="vllm",
                    **dtype | (self._settings.llm or {}),
                )
                return
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            # What it remembers of prompts was computed with the former weights.
            if not self._llm.reset_prefix_cache():
                raise UserError(
                    "vLLM kept its cache of prompts, which holds values of former weights.",
                    code="other-weights",
                )

    def draw(self, orders: Sequence[Order], progress: Progress) -> list[Continuation]:
        """See :class:`tokenward.sampling.engines.Engine`."""
        found: list[Continuation] = []
        for start in range(0, len(orders), self._settings.chunk):
            group = orders[start : start + self._settings.chunk]
            prompts = [{"prompt_token_ids": order.prompt} for order in group]
            answers = self._llm.generate(prompts, [self._params(order) for order in group], use_tqdm=False)
            found += [_read(order, answer) for order, answer in zip(group, answers, strict=True)]
            progress(len(group))
        return found

    def close(self) -> None:
        """End vLLM and free its memory."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _params(self, order: Order) -> Any:
        settings = order.settings
        check_not_raised(settings.temperature, "vLLM")
        return self._vllm.SamplingParams(
            n=1,
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=order.seed,
            stop=list(settings.stop),
            stop_token_ids=order.ends,
            logprobs=0 if order.logprobs else None,  # 0: of the sampled token alone
        )


def _read(order: Order, answer: Any) -> Continuation:
    (output,) = answer.outputs
    ids = list(output.token_ids)
    if output.finish_reason not in ("stop", "length"):
        raise UserError(
            f"vLLM ended a reply with finish_reason {output.finish_reason!r}.", code="wrong-replies"
        )
    logprobs = None
    if order.logprobs and output.logprobs is not None:
        logprobs = [float(found[token].logprob) for token, found in zip(ids, output.logprobs, strict=True)]
    return Continuation(ids, output.finish_reason == "stop", logprobs)


def save_whole(model: LanguageModel, folder: Path) -> PreTrainedModel:
    """Write a model as an ordinary folder with whole weights; an adapter is merged in a copy. Returns what was written.

    Raises:
        UserError: it is an MLP before the head of a frozen model, or its adapter cannot be merged.
    """
    if model.head_mlp is not None:
        raise UserError(
            "vLLM cannot load an MLP before the head of a frozen model. Sample with transformers.",
            code="unsupported-model",
        )
    whole: Any = model.model
    if isinstance(whole, PeftModel):
        whole = merge_adapter(cast(PeftModel, deepcopy(whole)), model.name)
    whole.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return whole
