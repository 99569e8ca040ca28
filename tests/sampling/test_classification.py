"""Examples, the gap as a preference source, calibration, the final choice, and random prompts."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_llama, tiny_tokenizer
from tokenward.errors import UserError
from tokenward.models.head import SelectiveHead
from tokenward.models.loading import LanguageModel
from tokenward.ops.classification import predictions
from tokenward.sampling.classification import (
    ClassificationGap,
    LabelledText,
    PromptTemplate,
    TaskModel,
    choose,
    random_prompts,
    read_labelled,
)
from tokenward.sampling.classification.prompts import calibration_offsets

REAL = Path(__file__).parents[3] / "shared" / "data" / "fewshot_16"
TABLE = {
    (1,): {"a": [0.9, 0.1], "b": [0.6, 0.4], "c": [0.5, 0.5]},
    (2,): {"a": [0.2, 0.8], "b": [0.3, 0.7], "c": [0.4, 0.6]},
    (3,): {"a": [0.7, 0.3], "b": [0.2, 0.8], "c": [0.55, 0.45]},
}


class ByHand(TaskModel):
    """Class probabilities by prompt and text; equal ones for others."""

    calls: list

    def class_logprobs(self, prompts, texts):
        self.calls.append(([tuple(ids) for ids in prompts], list(texts)))
        rows = [[TABLE.get(tuple(ids), {}).get(text, [0.5, 0.5]) for text in texts] for ids in prompts]
        return torch.tensor(rows).log()


def by_hand():
    model = tiny_llama()
    language = LanguageModel(
        model=model, tokenizer=tiny_tokenizer(), head=SelectiveHead(model.get_output_embeddings()),
        layout="shared", fingerprint="", name="tiny",
    )  # fmt: skip
    task = ByHand(model=language, template=PromptTemplate("{sentence} {prompt}"), verbalizers=[" a", "good"])
    object.__setattr__(task, "calls", [])
    return task


def labelled(*pairs):
    return [LabelledText(text, label, f"file:{row}") for row, (text, label) in enumerate(pairs, 2)]


EXAMPLES = labelled(("a", 0), ("b", 1), ("c", 1))
# Prompt 1: gaps 0.8, -0.2 and an exact tie. Prompt 2: -0.6, 0.4, 0.2. Prompt 3: 0.4, 0.6, -0.1.
SCORES = {1: (160 - 36 + 0) / 3, 2: (-108 + 80 + 40) / 3, 3: (80 + 120 - 18) / 3}


def score(gap, *prompts):
    return gap([""] * len(prompts), [""] * len(prompts), [list(ids) for ids in prompts])


def test_scores_by_hand_with_an_exact_tie():
    gap = ClassificationGap(task=by_hand(), examples=EXAMPLES, share=1.0)
    assert score(gap, (1,), (2,), (3,), (9,)) == pytest.approx([*SCORES.values(), 0.0], abs=1e-4)
    assert score(replace(gap, correct=10, wrong=1), (1,), (9,)) == pytest.approx([(8 - 0.2) / 3, 0], abs=1e-5)


def test_a_subset_is_the_same_for_all_prompts_and_for_the_same_number():
    examples = labelled(*((str(number), number % 2) for number in range(32)))
    gap = ClassificationGap(task=by_hand(), examples=examples)

    def texts(draw, **settings):
        return [example.text for example in replace(gap, draw=draw, **settings).drawn()]

    drawn = [texts(draw) for draw in range(300)]
    assert drawn == [texts(draw) for draw in range(300)]
    assert {len(found) for found in drawn} == {26}  # 80 % of 32, as in the published code
    assert len(set(map(tuple, drawn[:6]))) == 6
    assert texts(3, seed=1) != drawn[3]
    counts = Counter(text for found in drawn for text in found)
    assert len(counts) == 32
    assert 210 < min(counts.values()) <= max(counts.values()) < 280
    score(replace(gap, draw=5), (1,), (2,))
    assert gap.task.calls == [([(1,), (2,)], drawn[5])]


def test_calibration_by_hand():
    """Two prompts; the first leans to class 1 by log-odds of 1 and 3, so its threshold is 2."""
    logp = torch.tensor([[[0.0, 1.0], [0.0, 3.0]], [[0.0, -1.0], [0.0, 1.0]]]).log_softmax(-1)
    offsets = calibration_offsets(logp)
    expected = torch.tensor([[-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(offsets, expected, atol=1e-6, rtol=0)
    assert predictions(logp, offsets[:, None]).tolist() == [[0, 1], [0, 1]]


def test_the_best_are_chosen_by_the_development_split_and_tested_by_hand():
    task = by_hand()
    test = labelled(("b", 1), ("a", 1), ("c", 1), ("a", 0))
    chosen = choose(task, [[2], [9], [1], [3], [2], [1]], EXAMPLES, test, best=3)
    assert [candidate.ids for candidate in chosen.candidates] == [[3], [1], [2], [9]]
    scores = [SCORES[3], SCORES[1], SCORES[2], 0.0]
    assert [candidate.score for candidate in chosen.candidates] == pytest.approx(scores, abs=1e-4)
    # A tie predicts the first label: prompt 1 says 0 for the text c, whose label is 1.
    accuracies = [2 / 3, 1 / 3, 2 / 3, 1 / 3]
    assert [candidate.accuracy for candidate in chosen.candidates] == pytest.approx(accuracies)
    assert chosen.candidates[0].text == tiny_tokenizer().decode([3])
    assert chosen.correct.int().tolist() == [[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 0]]
    assert chosen.accuracy == [0.5, 0.25, 0.75]
    # Log-odds of a, b, c and the threshold near their mean, by prompt: -0.85 1.39 -0.20 at about 0.1; -2.20 -0.41 0
    # at about -0.8; 1.39 0.85 0.41 at about 0.88.
    assert chosen.calibrated.int().tolist() == [[1, 0, 0, 1], [1, 0, 1, 1], [0, 1, 0, 0]]
    assert chosen.calibrated_accuracy == [0.5, 0.75, 0.25]
    # The test texts are read once, for the best three alone.
    assert task.calls[-1] == ([(3,), (1,), (2,)], ["b", "a", "c", "a"])
    assert len(task.calls) == 2


def test_labels_of_the_development_split_do_not_calibrate():
    flipped = [example._replace(label=1 - example.label) for example in EXAMPLES]
    one, other = (choose(by_hand(), [[3]], examples, EXAMPLES) for examples in (EXAMPLES, flipped))
    assert torch.equal(one.offsets, other.offsets)
    assert one.calibrated.shape == (1, 3)


def test_the_earliest_of_equal_candidates_comes_first():
    chosen = choose(by_hand(), [[30], [9], [20]], EXAMPLES, EXAMPLES, best=1)
    assert [candidate.ids for candidate in chosen.candidates] == [[30], [9], [20]]


def test_random_prompts_are_seeded_and_exclude_ids():
    prompts = random_prompts(6, 5, 40, 3, excluded=[0, 4, 99])
    assert prompts == random_prompts(6, 5, 40, 3, excluded={4, 0})
    assert prompts != random_prompts(6, 5, 40, 4, excluded={4, 0})
    assert [len(ids) for ids in prompts] == [5] * 40
    assert {token for ids in prompts for token in ids} == {1, 2, 3, 5}


def test_labelled_texts_of_every_file_type(tmp_path):
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"so\t1\n " \t0\n')
    (tmp_path / "a.csv").write_text('label,sentence\n1,"""so"\n0," "" "\n')
    (tmp_path / "a.jsonl").write_text(
        '{"sentence": "\\"so", "label": 1}\n{"sentence": " \\" ", "label": 0}\n'
    )
    for name, rows in (("a.tsv", (2, 3)), ("a.csv", (2, 3)), ("a.jsonl", (1, 2))):
        path = tmp_path / name
        expected = [LabelledText('"so', 1, f"{path}:{rows[0]}"), LabelledText(' " ', 0, f"{path}:{rows[1]}")]
        for names in ("sentence", ("text", "sentence")):
            assert read_labelled(path, names, "label", classes=2) == expected


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("sentence\tlabel\n", "empty-file", "a.tsv"),
        ("sentense\tlabel\na\t1\n", "missing-column", "a.tsv:2: has no column text or sentence"),
        ("text\tlabel\tsentence\na\t1\tb\n", "ambiguous-column", "text and sentence"),
        ("text\tlabels\na\t1\n", "missing-column", "Did you mean labels?"),
        ("text\tlabel\na\tpositive\n", "invalid-field", ":2: label"),
        ("text\tlabel\na\t0.5\n", "invalid-field", "0.5"),
        ("text\tlabel\na\t1\nb\t-1\n", "invalid-label", ":3: label is -1"),
        ("text\tlabel\na\t2\n", "invalid-label", ":2: label is 2"),
        ("text\tlabel\n  \t1\n", "empty-text", ":2: text"),
    ],
)
def test_a_row_without_text_or_label_is_an_error_that_names_it(tmp_path, content, code, words):
    path = tmp_path / "a.tsv"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_labelled(path, ("text", "sentence"), "label", classes=2)
    assert caught.value.code == code
    assert words in str(caught.value)


@pytest.mark.skipif(not REAL.is_dir(), reason="the few-shot files are not beside this checkout")
@pytest.mark.parametrize(("name", "counts"), [("sst-2", (32, 32, 1821)), ("agnews", (64, 64, 7600))])
def test_the_published_few_shot_files(name, counts):
    classes = {"sst-2": 2, "agnews": 4}[name]
    splits = [
        read_labelled(REAL / name / "16-13" / f"{split}.tsv", ("text", "sentence"), "label", classes=classes)
        for split in ("train", "dev", "test")
    ]
    assert tuple(map(len, splits)) == counts
    for split in splits[:2]:
        assert [sum(item.label == label for item in split) for label in range(classes)] == [16] * classes
    # The files hold quote characters that are no quoting: each line is one text.
    assert random.Random(0).choice(splits[2]).text.count("\n") == 0
    lines = (REAL / name / "16-13" / "test.tsv").read_text().splitlines()[1:]
    assert [item.text for item in splits[2]] == [line.rsplit("\t", 1)[0] for line in lines]
