"""Which model is the reference: of a policy with an adapter, and of models that share weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

import tokenward
from tests.api.conftest import TOKENS, Script, arguments
from tests.tiny import move_trained, save_tiny
from tokenward.errors import UserError
from tokenward.scoring.basic import Entropy

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def adapted(script: Script, base: Any = None, *, by: float = 0.3) -> Any:
    """The model with an adapter that was trained before."""
    torch.manual_seed(0)
    model = get_peft_model(base or script.load(), LoraConfig(**LORA))  # type: ignore[arg-type]
    move_trained(model, by=by)
    return model


@pytest.fixture(scope="module")
def merged(script: Script, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("merged"), adapted(script).merge_and_unload()))


def first_step(script: Script, folder: Path, **given: Any) -> dict[str, float]:
    """What the first step logs."""
    trainer = tokenward.SelectiveTrainer(
        args=arguments(folder, 1, logging_steps=1), train_dataset=script.train, tokens=TOKENS, **given
    )
    trainer.train()
    return trainer.state.log_history[0]


STARTS = [(tokenward.TDPO(), 0.693147), (tokenward.KTO(), 0.5)]


@pytest.mark.parametrize(("objective", "loss"), STARTS)
@pytest.mark.parametrize("given", ["merged", "nothing"])
def test_a_policy_with_a_trained_adapter_starts_at_its_reference(
    script: Script, merged: str, tmp_path: Path, objective: Any, loss: float, given: str
) -> None:
    reference = {"reference": merged} if given == "merged" else {}
    found = first_step(script, tmp_path, model=adapted(script), objective=objective, **reference)
    assert found["loss"] == pytest.approx(loss, abs=1e-4)
    assert found.get("kl", found.get("kl/chosen")) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("objective", "loss"), STARTS)
def test_an_oracle_with_a_trained_adapter_starts_at_its_reference(
    script: Script, tmp_path: Path, objective: Any, loss: float
) -> None:
    args = arguments(tmp_path, 1, logging_steps=1)
    tokenward.train_oracle(adapted(script), script.train, args=args, objective=objective, tokens=TOKENS)
    first = json.loads((tmp_path / "history.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(loss, abs=1e-4)
    assert first.get("kl", first.get("kl/chosen")) == pytest.approx(0, abs=1e-4)


def test_an_oracle_takes_no_second_adapter(script: Script, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        tokenward.train_oracle(
            adapted(script), script.train, args=arguments(tmp_path, 1), peft_config=LORA, tokens=TOKENS
        )
    assert caught.value.code == "second-adapter"


def test_the_base_is_not_the_reference_of_a_trained_adapter(script: Script, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        first_step(
            script, tmp_path, model=adapted(script), objective=tokenward.TDPO(), reference=script.model
        )
    assert caught.value.code == "reference-mismatch"


@pytest.mark.parametrize("objective", [tokenward.DPO(), tokenward.TDPO(), tokenward.KTO()])
@pytest.mark.parametrize("adapter", [None, LORA])
def test_the_policy_itself_as_reference_is_the_policy_before_training(
    script: Script, tmp_path: Path, objective: Any, adapter: Any
) -> None:
    model, given = script.load(), {"objective": objective, "peft_config": adapter}
    own = first_step(script, tmp_path / "own", model=model, reference=model, **given)
    assert own == pytest.approx(first_step(script, tmp_path / "none", model=script.load(), **given))


def test_a_base_with_an_adapter_inside_is_no_reference(script: Script, tmp_path: Path) -> None:
    """PEFT changes the base object: it gives the adapter's numbers."""
    base = script.load()
    policy = adapted(script, base)
    for call in (
        lambda: tokenward.evaluate(policy, script.eval, reference=base, tokens=TOKENS, quiet=True),
        lambda: tokenward.score(script.eval, oracle=policy, reference=base, tokens=TOKENS, quiet=True),
        lambda: first_step(script, tmp_path, model=policy, objective=tokenward.DPO(), reference=base),
    ):
        with pytest.raises(UserError, match="PEFT adapter inside") as caught:
            call()
        assert caught.value.code == "adapter-inside"
    with pytest.raises(UserError) as caught:
        first_step(script, tmp_path, model=base, oracle=policy)
    assert caught.value.code == "same-model"
    separate = tokenward.score(script.eval, oracle=policy, reference=script.model, tokens=TOKENS, quiet=True)
    assert any(value != 0 for value in separate[0]["token_scores"][0])


def test_after_training_with_an_adapter_the_base_is_read_from_its_folder(
    script: Script, tmp_path: Path
) -> None:
    model = script.load()
    trainer = tokenward.SelectiveTrainer(
        model,
        arguments(tmp_path, 2),
        script.train,
        objective=tokenward.DPO(),
        peft_config=LORA,
        tokens=TOKENS,
    )
    trainer.train()
    with pytest.raises(UserError) as caught:
        tokenward.evaluate(trainer.model, script.eval, reference=model, tokens=TOKENS, quiet=True)
    assert caught.value.code == "adapter-inside"
    found = tokenward.evaluate(trainer.model, script.eval, reference=script.model, tokens=TOKENS, quiet=True)
    assert found["logps/chosen_change"].value != 0


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft warns of a second adapter
def test_one_model_is_not_compared_with_itself(script: Script, tmp_path: Path) -> None:
    base, loaded = script.load(), script.load()
    one, other = adapted(script, base), get_peft_model(base, LoraConfig(**LORA))  # type: ignore[arg-type]
    tokenizer: Any = {"processing_class": AutoTokenizer.from_pretrained(script.model)}
    evaluated: list[tuple[Any, Any, dict[str, Any]]] = [
        (loaded, loaded, {}),
        (one, other, {}),
        (script.model, Path(script.model), {}),
        (script.model, script.model, tokenizer),
    ]
    for model, reference, more in evaluated:
        with pytest.raises(UserError) as caught:
            tokenward.evaluate(model, script.eval, reference=reference, tokens=TOKENS, quiet=True, **more)
        assert caught.value.code == "same-model"
    for oracle, reference in ((loaded, loaded), (one, other), (script.model, script.model)):
        with pytest.raises(UserError) as caught:
            tokenward.score(script.eval, oracle=oracle, reference=reference, tokens=TOKENS, quiet=True)
        assert caught.value.code == "same-model"
    surprisal = Entropy(of="oracle")
    tokenward.score(script.eval, oracle=loaded, reference=loaded, scorer=surprisal, tokens=TOKENS, quiet=True)


def test_an_interval_needs_resamples(script: Script) -> None:
    with pytest.raises(UserError, match="bootstrap") as caught:
        tokenward.evaluate(script.folder / "oracle/model", script.eval, reference=script.model, bootstrap=0)
    assert caught.value.code == "out-of-range"


class Network(torch.nn.Module):
    """A scorer with weights: its result has a gradient."""

    reads = ("reference_logp",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(-1.0))

    def forward(self, record: Any) -> torch.Tensor:
        return self.scale * record.value("reference_logp")


def test_a_module_is_a_scorer(script: Script) -> None:
    given: dict[str, Any] = {"reference": script.model, "tokens": TOKENS, "quiet": True}
    found, known = (
        tokenward.score(script.eval, oracle=scorer, **given) for scorer in (Network(), tokenward.Surprisal())
    )
    assert found["token_scores"] == known["token_scores"]


def test_a_divergence_alone_is_to_the_given_reference(script: Script, merged: str, tmp_path: Path) -> None:
    """No stored values show that a new adapter's base is another model than the reference."""
    objective = tokenward.Sum(terms=[{"name": "simpo"}, {"name": "token_kl"}])
    given: dict[str, Any] = {"objective": objective, "peft_config": LORA}
    apart = first_step(script, tmp_path / "apart", model=script.model, reference=merged, **given)
    start = first_step(script, tmp_path / "start", model=script.model, **given)
    named = first_step(script, tmp_path / "named", model=script.model, reference=script.model, **given)
    assert apart["kl"] > 1
    assert start["kl"] == named["kl"] == pytest.approx(0, abs=1e-4)
