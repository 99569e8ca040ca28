"""Model folders of strangers: each ends in one line with the folder and the cause, whatever reads it, and nothing is unpickled."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification
from typer.testing import CliRunner

from tests.models.hostile import ADAPTERS, FOLDERS, OF_ADAPTER, Change, settings
from tests.tiny import tiny_llama
from tokenward.cli import app
from tokenward.errors import UserError
from tokenward.models.adapters import lora_config
from tokenward.models.identity import model_fingerprint, model_sizes
from tokenward.models.loading import load_backbone, load_model
from tokenward.models.plausible import pattern_problem
from tokenward.sampling.sources.models import SequenceClassifier

FINE = {"config: quantized by nobody", "tokenizer: unknown class", "generation: no JSON"}
"""What transformers leaves aside: the model is whole without it."""


@pytest.fixture(scope="module")
def adapter_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    made = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    made.save_pretrained(str(folder))
    settings(OF_ADAPTER, base_model_name_or_path=str(tiny_folder))(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of transformers with the tokenizer and the chat template of the tiny model."""
    folder = tmp_path_factory.mktemp("classifier") / "model"
    shutil.copytree(tiny_folder, folder)
    config = tiny_llama().config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(str(folder))
    return folder


def changed(sound: Path, folder: Path, change: Change) -> str:
    shutil.copytree(sound, folder)
    change(folder)
    return str(folder)


def refusal(act: Callable[[], object], folder: str) -> str:
    """What is said of a folder, empty if it is read; nothing else than a UserError with one line may come."""
    try:
        act()
    except UserError as error:
        said = str(error)
        assert folder in said
        assert "\n" not in said
        assert len(said) < 1500
        return said
    return ""


def load(folder: str) -> None:
    load_model(folder, device="cpu").template("chat").prompt_ids([{"role": "user", "content": "x"}])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_hostile_model_is_one_line(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = changed(tiny_folder, tmp_path / "m", FOLDERS[kind])
    assert bool(refusal(lambda: load(folder), folder)) == (kind not in FINE)
    for act in (model_sizes, model_fingerprint):
        refusal(lambda act=act: act(folder), folder)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_hostile_adapter_is_one_line(kind: str, adapter_folder: Path, tmp_path: Path) -> None:
    folder = changed(adapter_folder, tmp_path / "a", ADAPTERS[kind])
    assert refusal(lambda: load(folder), folder)
    for act in (model_sizes, model_fingerprint):
        refusal(lambda act=act: act(folder), folder)


@pytest.mark.parametrize(
    "kind", ["config: a million layers", "config: negative layers", "weights: header too long"]
)
def test_also_for_another_head(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = changed(tiny_folder, tmp_path / "m", FOLDERS[kind])
    assert refusal(lambda: load_backbone(folder, device="cpu"), folder)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_hostile_classifier_is_one_line(kind: str, tmp_path: Path, classifier: Path) -> None:
    folder = changed(classifier, tmp_path / "c", FOLDERS[kind])
    source = SequenceClassifier(model=folder, pair="prompt_completion", template_chat=True, device="cpu")
    fine = kind in FINE or kind.startswith("generation")  # a classifier generates nothing
    assert bool(refusal(lambda: source(["a"], ["b"]), folder)) == (not fine)


QUICK = {"config: a million layers", "config: unknown activation", "tokenizer: deep", "pickle: a trap"}
COMMANDS = ["plan", "data", "score", "evaluate", "chat", "compare-models"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in FOLDERS]
)
def test_every_command_says_it_in_one_line(
    command: str, kind: str, tiny_workplace: Path, tiny_folder: Path
) -> None:
    folder = changed(tiny_folder, Path.cwd() / "hostile", FOLDERS[kind])
    Path("prompts.jsonl").write_text('{"prompt": "Say a word."}\n')
    words = {
        "chat": [folder],
        "compare-models": [
            str(tiny_folder),
            folder,
            "--prompts",
            "prompts.jsonl",
            "--set",
            "evaluation.max_new_tokens=8",
        ],
    }.get(command, [str(tiny_workplace), "--set", f"model.name={folder}"])
    result = CliRunner().invoke(app, [command, *words], input="hi\n")
    if (
        result.exit_code == 0
    ):  # a plan and the data need no weights, and a chat says what is wrong and waits for the next line
        assert (
            kind in FINE
            or command in ("plan", "data")
            or "hostile is refused" in result.output
            or "has a syntax error" in result.output
        )
        return
    assert isinstance(result.exception, UserError), result.exception
    assert folder in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(ab|a)*c",
        "(?:x*y?)*z",
        "((a))*" * 2 + "(b*)*",
        ".*" * 9 + "x",
        "(",
        "a" * 3000,
        "(?P<n>a*){2,}",
    ],
)
def test_patterns_that_may_take_all_time_are_refused(pattern: str) -> None:
    assert pattern_problem(pattern)
    with pytest.raises(UserError, match="names layers"):
        lora_config({"target_modules": pattern}, encoder_decoder=False)


@pytest.mark.parametrize(
    "pattern",
    ["all-linear", r".*\.(q|v)_proj", r"^(?!.*lm_head).*\.layers\.\d+\.(self_attn|mlp)\..*proj$", r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:(?:q_proj)))"],
)  # fmt: skip
def test_patterns_that_people_write(pattern: str) -> None:
    assert not pattern_problem(pattern)
    lora_config({"target_modules": [pattern], "r": 4}, encoder_decoder=False)


def test_a_rank_that_no_machine_holds() -> None:
    with pytest.raises(UserError, match="rank"):
        lora_config({"r": 10**9}, encoder_decoder=False)
