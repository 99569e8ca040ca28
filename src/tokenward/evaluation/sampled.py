"""Replies for an evaluation: sampled with transformers, or with an engine that holds the same weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenward.distributed import first_alone
from tokenward.models.loading import LanguageModel
from tokenward.sampling import Reply, SamplingSettings, sample_replies
from tokenward.sampling.engines import Engine, EngineSampler
from tokenward.sampling.registry import EngineSettings
from tokenward.sampling.server import ServerSampler
from tokenward.sampling.vllm import OpenVllm
from tokenward.scoring.reads import Progress
from tokenward.tokens.template import Template


@dataclass(kw_only=True)
class EvaluationReplies:
    """Samples one reply to each prompt, before and after training.

    Attributes:
        settings: Sampling settings.
        seed: Seed of the replies.
        engine: Samples in place of transformers.
        facts: What a manifest says about the engine and the check of its weights, for each side that it sampled.
    """

    settings: SamplingSettings
    seed: int
    engine: EngineSettings | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    _vllm: OpenVllm | None = None

    def __call__(
        self,
        model: LanguageModel,
        template: Template,
        prompts: Sequence[Sequence[int]],
        *,
        before: LanguageModel | None = None,
        progress: Progress | None = None,
    ) -> list[Reply]:
        """Replies of a model.

        Args:
            model: The model.
            template: Defines the end of a reply.
            prompts: Token ids.
            before: The model before training; None if ``model`` is that one.
            progress: Called with the number of new replies.

        Raises:
            UserError: the engine holds other weights, cannot be reached, or cannot take a setting.
        """
        if self.engine is None or not self._samples(after=before is not None):
            settings: dict[str, Any] = {"seed": self.seed, "progress": progress, "shared": True}
            return sample_replies(model, template, prompts, self.settings, **settings)
        tolerance = self.engine.tolerance

        def ask() -> tuple[list[Reply], dict[str, Any]]:
            engine = self._opened(after=before is not None)
            sampler = EngineSampler(
                engine=engine,
                model=model,
                template=template,
                settings=self.settings,
                tolerance=tolerance,
                before=before,
            )
            groups = sampler(prompts, count=1, seed=self.seed, progress=progress)
            return [reply for (reply,) in groups], {**engine.facts, "weights": sampler.checks[-1]._asdict()}

        replies, facts = first_alone(ask)  # one process asks for all
        self.facts["before" if before is None else "after"] = facts
        return replies

    def _samples(self, *, after: bool) -> bool:
        """Whether the engine samples a side, or transformers."""
        return after or not isinstance(self.engine, ServerSampler) or self.engine.start_address is not None

    def _opened(self, *, after: bool) -> Engine:
        settings = self.engine
        assert settings is not None
        if isinstance(settings, ServerSampler):
            return settings.open() if after else settings.open(settings.start_address)
        if self._vllm is None:
            self._vllm = settings.open()
        return self._vllm

    def close(self) -> None:
        """End an engine in this process and free its memory."""
        if self._vllm is not None:
            self._vllm.close()
            self._vllm = None
