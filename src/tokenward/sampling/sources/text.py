"""Metrics of a completion against reference texts: ROUGE, METEOR and chrF."""

import io
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from tokenward.errors import UserError
from tokenward.sampling.sources.base import FIXED, RowError, source_package

DEBIAN_FOLDER = Path("/usr/share/wordnet")
LEXICOGRAPHER_FILES = 45


def load_wordnet(debian_folder: Path = DEBIAN_FOLDER) -> Any:
    """Nltk's WordNet reader, on nltk's data or on the files of Debian's wordnet-base.

    Raises:
        UserError: neither has the dictionary.
    """
    wordnet = source_package("nltk.corpus", "meteor").wordnet
    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        if (debian_folder / "data.noun").is_file():
            return _from_debian(debian_folder)
        raise UserError(
            "METEOR needs the WordNet dictionary, which was found neither in nltk's data folders nor in "
            f"{debian_folder}. Call nltk.download('wordnet') in Python with internet access, or install Debian's package "
            "wordnet-base, or use the source rouge, which needs no data.",
            code="missing-data",
        ) from error
    return wordnet


def _from_debian(folder: Path) -> Any:
    """Debian ships WordNet's original files, without two that nltk expects but METEOR does not need."""
    nltk_data = source_package("nltk.data", "meteor")
    readers = source_package("nltk.corpus.reader", "meteor")
    lazy = source_package("nltk.corpus.util", "meteor").LazyCorpusLoader

    class DebianWordNet(readers.WordNetCorpusReader):
        def open(self, file: str) -> Any:
            if file == "lexnames":
                return io.StringIO("".join(f"{i:02d}\t{i:02d}\t0\n" for i in range(LEXICOGRAPHER_FILES)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Maps other languages' words, which would need more of nltk's data."""

    # nltk refuses to open files outside its data folders.
    if str(folder) not in nltk_data.path:
        nltk_data.path.append(str(folder))
    return DebianWordNet(str(folder), lazy("omw-2.0", readers.CorpusReader, r".*\.tab"))


Several = Literal["max", "mean"]


class _NothingToCount(Exception):
    """A metric finds nothing to count in a reference, so that every reply would get 0."""


class _ReferenceMetric:
    """A metric against the column ``references``; an empty completion, which overlaps with nothing, gets 0."""

    name: ClassVar[str]

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] = (),
        **columns: Sequence[Any],
    ) -> list[float]:
        if "references" not in columns:
            found = ", ".join(column for column in columns if column not in FIXED) or "none"
            raise UserError(
                f"{self.name} compares with reference texts, but the examples have no column references "
                f"(their columns: {found}). Name the column that holds them, such as target.",
                code="missing-column",
                key="examples.references",
            )
        pairs = zip(completions, columns["references"], strict=True)
        return [self._checked(row, *pair) for row, pair in enumerate(pairs)]

    def _checked(self, row: int, completion: str, references: Any) -> float:
        if isinstance(references, str) or not isinstance(references, Sequence) or not references:
            raise RowError(
                row, f"references is {references!r}; expected a list of texts.", code="invalid-references"
            )
        for text in references:
            if not isinstance(text, str) or not text.strip():
                raise RowError(
                    row,
                    f"a reference is {text!r}, which matches no reply. Leave the example out, or give it a text.",
                    code="invalid-references",
                )
        try:
            return self._score(completion, references) if completion.strip() else 0.0
        except _NothingToCount as error:
            raise RowError(row, str(error), code="invalid-references") from error

    def _score(self, completion: str, references: Sequence[str]) -> float:
        raise NotImplementedError


def _combined(values: Sequence[float], several: Several) -> float:
    return max(values) if several == "max" else sum(values) / len(values)


@dataclass(frozen=True)
class Rouge(_ReferenceMetric):
    """ROUGE (Lin, 2004) of the package rouge-score, from 0 to 1.

    Words are runs of ``a-z`` and ``0-9`` in lower case, so it works for text in Latin letters only.

    Attributes:
        type: ``rouge1`` and ``rouge2`` count shared words and word pairs, ``rougeL`` the longest common subsequence of
            words, ``rougeLsum`` that of each line of the reference with all lines of the reply.
        stemmer: Compare Porter stems of words longer than three letters.
        measure: ``fmeasure`` is the harmonic mean of ``precision`` and ``recall``.
        several: Score with several references: the ``max`` or the ``mean``.
    """

    name: ClassVar = "rouge"
    _: KW_ONLY
    type: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = "rougeL"
    stemmer: bool = True
    measure: Literal["fmeasure", "precision", "recall"] = "fmeasure"
    several: Several = "max"

    @cached_property
    def _scorer(self) -> Any:
        package = source_package("rouge_score.rouge_scorer", "rouge")
        return package.RougeScorer([self.type], use_stemmer=self.stemmer)

    def _score(self, completion: str, references: Sequence[str]) -> float:
        needed = 2 if self.type == "rouge2" else 1
        for text in references:
            words = source_package("rouge_score.tokenize", "rouge").tokenize(text, None)
            if len(words) < needed:
                raise _NothingToCount(
                    f"{self.type} needs {needed} words of a-z and 0-9 in a reference, found {len(words)}, so every reply would "
                    "get 0. Use chrf for other alphabets, or leave the example out."
                )
        results = [self._scorer.score(text, completion)[self.type] for text in references]
        return _combined([float(getattr(result, self.measure)) for result in results], self.several)


@dataclass(frozen=True)
class Meteor(_ReferenceMetric):
    """METEOR (Lavie and Agarwal, 2007; alpha 0.9, beta 3, gamma 0.5) of nltk, from 0 to 1.

    Words match exactly, by their Porter stem, or as synonyms in WordNet, whose dictionary must be installed. nltk looks
    synonyms up by the stem, so it finds none for "large", whose stem is "larg". Words are split by nltk's ``word_tokenize``,
    sentences at ``.``, ``!`` and ``?`` before white space, which needs no sentence model.

    Attributes:
        several: Score with several references: the ``max`` or the ``mean``.
    """

    name: ClassVar = "meteor"
    _: KW_ONLY
    several: Several = "max"

    @cached_property
    def _wordnet(self) -> Any:
        return load_wordnet()

    def _score(self, completion: str, references: Sequence[str]) -> float:
        score = source_package("nltk.translate.meteor_score", "meteor").single_meteor_score
        words = _words(completion)
        values = [float(score(_words(text), words, wordnet=self._wordnet)) for text in references]
        return _combined(values, self.several)


def _words(text: str) -> list[str]:
    split = source_package("nltk.tokenize", "meteor").NLTKWordTokenizer().tokenize
    return [word for sentence in re.split(r"(?<=[.!?])\s+", text) for word in split(sentence)]


@dataclass(frozen=True)
class ChrF(_ReferenceMetric):
    """Sentence chrF (Popovic, 2015) of the package sacrebleu, from 0 to 100; the best of several references.

    It counts shared character n-grams, so it works for every alphabet.

    Attributes:
        characters: Maximum n-gram length in characters.
        words: Maximum n-gram length in words; 0 is chrF, 2 is chrF++.
        beta: Weight of recall over precision.
    """

    name: ClassVar = "chrf"
    _: KW_ONLY
    characters: int = 6
    words: int = 0
    beta: int = 2

    def __post_init__(self) -> None:
        if self.characters < 1 or self.words < 0 or self.beta < 1:
            raise UserError(
                f"chrf needs characters and beta of at least 1 and words of at least 0, got characters {self.characters}, "
                f"words {self.words}, beta {self.beta}. Common values are 6, 0 and 2; chrF++ has words 2.",
                code="invalid-setting",
            )

    @cached_property
    def _scorer(self) -> Any:
        metric = source_package("sacrebleu.metrics", "chrf").CHRF
        return metric(char_order=self.characters, word_order=self.words, beta=self.beta)

    def _score(self, completion: str, references: Sequence[str]) -> float:
        return float(self._scorer.sentence_score(completion, list(references)).score)
