"""The stages that compute values per token: reference log-probabilities, and the values that scorers read."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from tokenward.api.constant import warn_of_stored
from tokenward.api.transfer import OTHER_TOKENS, OtherTokens
from tokenward.api.values import CACHE, Maker, frozen_values
from tokenward.artifacts import StageFolder, StagePart, file_fingerprint, part_of_process
from tokenward.distributed import first_alone, share_label, together
from tokenward.models.base import TokenModel
from tokenward.models.loading import DTYPES, device_of, slow_float32
from tokenward.scoring.coverage import Coverage, coverage
from tokenward.scoring.reads import Value
from tokenward.scoring.scorers import Scorer
from tokenward.scoring.store import Shards, TokenStore, write_store
from tokenward.scoring.transfer import Carrier
from tokenward.stages.auxiliary import auxiliary_of, folder_of, scorer_of
from tokenward.stages.base import Checks, Stage
from tokenward.stages.other_tokens import other_template, other_tokens, policy_template
from tokenward.stages.part_checks import check_scorer
from tokenward.stages.run import AUXILIARY, Run
from tokenward.stages.tables import pairs_fingerprint, say_notes, tables
from tokenward.tokens.encode import check_some_left
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template

Facts = Callable[[TokenStore], Mapping[str, Any]]
"""What the manifest says of a complete store."""


class ValuesStage(Stage):
    """A stage that stores values per token. Several jobs, or the processes of one launch, can each write a part of the store."""

    parallel = True

    @abstractmethod
    def write(self, run: Run, folder: StageFolder) -> Facts:
        """Write the missing shards of the folder's part, or of the whole stage."""

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        facts = self.write(run, folder)
        return first_alone(lambda: dict(facts(TokenStore(folder.path))))

    def shards(self, run: Run, folder: StageFolder) -> Shards:
        """The files that parts of the stage are made of."""
        rows = tables(run, run.tokenizer_template(run.reference_model)).everything
        return Shards(folder.path, len(rows), run.recipe.scores.shard_rows)

    def carry_out_part(self, run: Run, part: StagePart) -> Literal["was done", "done", "waits"]:
        """Write the missing shards of a part. If no shard of any part is missing then, finish the stage.

        Returns:
            Whether the stage was done before, is done now, or waits for other parts.

        Raises:
            UserError: the stage cannot work, or another job works on the part or with another recipe.
        """
        settings, inputs = self.settings(run), self.inputs(run)
        with run.stage(self.name, settings, inputs, layout=self.layout, part=part) as folder:
            if folder.done:
                return "was done"
            shards = self.shards(run, folder)
            # Without missing shards of its own, a job loads a model only to finish the stage.
            others = [] if shards.missing(part) else shards.missing()
            facts = None if others else self.write(run, folder)
            missing = others or shards.without_damaged(run.display.line).missing()
            if facts is None or missing:
                run.display.line(f"  {shards.said_missing(part, missing)}")
                return "waits"
            folder.complete(**facts(TokenStore(folder.path)))
        self.show(run)
        return "done"


class ReferenceStage(ValuesStage):
    """Compute the reference's log-probability of every response token, for oracle, scores and evaluation."""

    name = "reference"

    def settings(self, run: Run) -> Mapping[str, Any]:
        scores = run.recipe.scores
        return {
            "seed": run.recipe.seed,
            "scores": {"precision": scores.precision, "shard_rows": scores.shard_rows},
            "model": {"dtype": run.recipe.model.dtype},
        }

    def inputs(self, run: Run) -> Mapping[str, str]:
        template = run.tokenizer_template(run.reference_model)
        return {
            "data": run.done("data").identity,
            "pairs": pairs_fingerprint(run, template),
            "model": run.fingerprint_of(run.reference_model),
            "template": template.fingerprint,
        }

    def write(self, run: Run, folder: StageFolder) -> Facts:
        template = run.tokenizer_template(run.reference_model)
        pairs = tables(run, template)
        counts = pairs.summed
        check_some_left(counts)
        run.display.table("pairs", ("", "rows"), [(name, str(count)) for name, count in counts.items()])
        say_notes(run, template, counts, pairs.train.store)
        if pairs.without_eval:
            run.display.line(f"  {pairs.without_eval}")
        model = run.load(run.reference_model)
        maker = maker_of(run, "reference", [Value("reference", "logp")], template, loaded=model)
        _write(run, folder.path, [maker], template, pairs.everything, part=folder.part)
        return lambda store: {"responses": len(store), "layout": model.layout, "pairs": counts}


class ScoresStage(ValuesStage):
    """Store the raw values of every response token that the scorer reads of frozen models and of the data.

    Scores and selections are computed from these values when they are read.
    """

    name = "scores"

    def settings(self, run: Run) -> Mapping[str, Any]:
        return value_settings(run, scorer_of(run))

    def inputs(self, run: Run) -> Mapping[str, str]:
        scorer = scorer_of(run)
        found = {"reference": run.done("reference").identity, **value_inputs(run, scorer)}
        if other_template(run, scorer) is not None:
            own = policy_template(run)
            found |= {"template": own.fingerprint, "pairs": pairs_fingerprint(run, own)}
        return found

    def shards(self, run: Run, folder: StageFolder) -> Shards:
        others = other_tokens(run)
        if others is None:
            return super().shards(run, folder)
        return Shards(folder.path / OTHER_TOKENS, len(others.rows), run.recipe.scores.shard_rows)

    def check_data(self, run: Run) -> None:
        """Check that an oracle's other tokenizer reads the same texts as the policy's, before it is trained."""
        if (others := other_tokens(run)) is not None:
            others.check()

    def write(self, run: Run, folder: StageFolder) -> Facts:
        scorer, template = scorer_of(run), run.tokenizer_template(run.reference_model)
        others = other_tokens(run)
        if others is not None:
            template = others.own_template
            complete = write_other_values(run, folder, scorer, others)
        else:
            write_values(run, folder, folder.path, scorer, template, tables(run, template).everything)
            complete = None

        def facts(store: TokenStore) -> Mapping[str, Any]:
            covered: dict[str, Any] = {}
            if complete is not None:
                store, found = complete()
                covered = {"token_coverage": found._asdict()}
            warn_of_stored(scorer, store, run.display.line)
            limits = run.recipe.tokens
            tokens = {
                "template": template.fingerprint,
                "max_prompt_tokens": limits.max_prompt_tokens,
                "too_long": limits.too_long,
            }
            return {"responses": len(store), "reference": run.reference_model, "tokens": tokens, **covered}

        return facts

    def checks(self, run: Run) -> Checks:
        return {"scores.scorer": lambda: check_scorer(run, scorer_of(run))}


def value_settings(run: Run, scorer: Scorer) -> dict[str, Any]:
    """Every part of the recipe that the values of a scorer depend on, except what made their models."""
    table, read = run.recipe.scores, _values_read(scorer)
    settings: dict[str, Any] = {"scores": {"precision": table.precision, "shard_rows": table.shard_rows}}
    further = {str(value): dict(value.details) for value in read if value not in ("oracle_logp", "reward")}
    if further:
        settings["scores"]["values"] = further
    auxiliary = run.recipe.auxiliary_models
    prompts = {name: auxiliary[name].prompt for name in _by_model(read) if name in auxiliary}
    if any(prompts.values()):
        settings["auxiliary_models"] = prompts
    return settings


def write_values(
    run: Run, stage: StageFolder, folder: Path, scorer: Scorer, template: Template, rows: TokenTable
) -> TokenStore:
    """Store the values that a scorer reads of every response in a folder of a stage, which resumes at the next shard.

    The reference stage must have stored all rows. If the stage's folder is open for a part, only that is written.
    """
    # For values too expensive to compute again after a stop. Jobs that work at once must not append to one file.
    cache, part = folder / CACHE, part_of_process(stage.part)
    mine = cache if part is None else cache / part.name
    by_model = _by_model(_values_read(scorer))
    makers = [maker_of(run, model, values, template, mine) for model, values in by_model.items()]
    stage.temporary.append(cache)
    return _write(run, folder, makers, template, rows, TokenStore(run.path("reference")), part=part)


def write_other_values(
    run: Run, stage: StageFolder, scorer: Scorer, others: OtherTokens
) -> Callable[[], tuple[TokenStore, Coverage]]:
    """Store the values that a scorer reads of models with other tokens than the policy, in their tokens.

    Returns:
        Divides them among the policy's tokens, once all parts are stored.
    """
    cache, part = stage.path / CACHE, part_of_process(stage.part)
    stage.temporary.append(cache)
    by_model = _by_model(_values_read(scorer))
    theirs = {model: by_model.pop(model) for model in list(by_model) if model in others.models}
    reference = TokenStore(run.path("reference"))
    their_reference = "reference" in others.models
    makers = [
        maker_of(run, model, values, others.template, cache if part is None else cache / part.name)
        for model, values in theirs.items()
    ]
    source = stage.path / OTHER_TOKENS
    _write(
        run, source, makers, others.template, others.rows, reference if their_reference else None, part=part
    )

    def complete() -> tuple[TokenStore, Coverage]:
        values = TokenStore(source)
        names = [str(value) for found in theirs.values() for value in found]
        names += ["reference_logp"] if their_reference else []
        makers = [
            maker_of(run, model, values, others.own_template, cache) for model, values in by_model.items()
        ]
        carrier = Carrier(values, names, others.rows, *others.spellers)
        after = _write(
            run,
            stage.path,
            [carrier, *makers],
            others.own_template,
            others.own,
            None if their_reference else reference,
        )
        found = coverage(values, after, names)
        run.display.line(found.line(*(speller.name for speller in others.spellers)))
        return after, found

    return complete


def _values_read(scorer: Scorer) -> list[Value]:
    """The values that a scorer reads, except the reference's log-probability, which has its own stage."""
    return [value for value in frozen_values(scorer) if value != "reference_logp"]


def _by_model(values: Sequence[Value]) -> dict[str, list[Value]]:
    models = dict.fromkeys(value.model for value in values)
    return {model: [value for value in values if value.model == model] for model in models}


def scoring_models(scorer: Scorer) -> list[str]:
    """Models that compute values for a scorer."""
    return [model for model in _by_model(_values_read(scorer)) if model != "data"]


def value_inputs(run: Run, scorer: Scorer) -> dict[str, str]:
    """Fingerprints of the models and files that a scorer's values come from, without the reference."""
    found: dict[str, str] = {}
    for model, mine in _by_model(_values_read(scorer)).items():
        if model in ("oracle", "reward"):
            found[model] = run.done(model).identity
        elif model in run.recipe.auxiliary_models:
            if run.recipe.auxiliary_models[model].training is not None:
                found[f"{AUXILIARY}{model}"] = run.done(f"{AUXILIARY}{model}").identity
            else:
                found[f"model of {model}"] = run.fingerprint_of(folder_of(run, model))
        for value in mine if model == "data" else ():
            if value.kind == "file":
                found[f"file {value.details['file']}"] = file_fingerprint(Path(value.details["file"]))
    return found


def _write(
    run: Run,
    folder: Path,
    makers: Sequence[Maker | Carrier],
    template: Template,
    rows: TokenTable,
    reference: TokenStore | None = None,
    *,
    part: StagePart | None = None,
) -> TokenStore:
    shard_rows, table = run.recipe.scores.shard_rows, run.recipe.model
    half = run.recipe.scores.precision == "bfloat16"
    if slow_float32(device_of(table.device), DTYPES.get(table.dtype, torch.bfloat16), half=half):
        run.display.line(
            "  products are in float32, and this GPU is many times faster in bfloat16: write scores.precision=bfloat16, if scores "
            "that nearly tie may change places"
        )
    mine, label = part_of_process(part), share_label(folder.name)

    def write() -> None:
        shards = Shards(folder, len(rows), shard_rows).without_damaged(run.display.line, mine)
        responses = shards.waiting(rows, mine)
        with run.display.progress(label, responses * (sum(maker.passes for maker in makers) or 1)) as bar:
            write_store(
                folder,
                makers,
                template,
                rows,
                shard_rows=shard_rows,
                progress=bar.advance,
                reference=reference,
                part=mine,
            )

    together(write)
    return TokenStore(folder)


def maker_of(
    run: Run,
    model: str,
    values: Sequence[Value],
    template: Template,
    cache: Path | None = None,
    *,
    loaded: TokenModel | None = None,
) -> Maker:
    """Computes values of one of the run's models, or of its data."""

    def load(attention: str | None) -> TokenModel:
        if loaded is not None and attention is None:
            return loaded
        folder = folder_of(run, model)
        return run.load_reward(folder) if model == "reward" else run.load(folder, attention=attention)

    return Maker(
        model,
        values,
        template,
        load,
        style=run.style,
        **run.passes,
        batch=run.recipe.evaluation.batch,
        cache=cache,
        prompt=auxiliary_of(run, model).prompt,
    )
