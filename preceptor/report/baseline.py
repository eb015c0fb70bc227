"""What every model is held against: the commonest disease, a bag of words, and the exact answerer.

A student that doesn't beat character n-grams with a logistic regression on the same labels was not worth its
training; one near the exact answerer has no more to learn from its cases.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from preceptor.core.records import Case, Diagnosis, Prediction, Row
from preceptor.tasks.diagnosis import parse
from preceptor.tasks.prompts import record_in

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

BAG_OF_WORDS = "bag_of_words"
COMMONEST = "commonest"
EXACT = "exact"
YARDSTICKS = (COMMONEST, BAG_OF_WORDS, EXACT)
LIKELY = 0.5
"""A disease is named from this probability on; the likeliest is named in any case."""
ABSTAIN = ""
"""The class of answers that name no disease."""
MOST_CLASSES = 300
"""The commonest names that are learned; a name beyond is too rare to be learned from a bag of words."""


def commonest(pairs: Iterable[tuple[str, Sequence[str]]], cases: Iterable[Case]) -> Iterator[Prediction]:
    """The disease that most labels name, for every case alike, as sure as it is common; nothing without labels."""
    labels = [set(diseases) or {ABSTAIN} for _, diseases in pairs]
    counts = Counter(sorted(name for names in labels for name in names))
    if counts:
        name, number = counts.most_common(1)[0]
        for case in cases:
            yield _answer(case, COMMONEST, {name: number / len(labels)}, abstains=name == ABSTAIN)


class BagOfWords:
    """Character n-grams weighed by TF-IDF and one logistic regression a disease."""

    def __init__(self, pairs: Iterable[tuple[str, Sequence[str]]]) -> None:
        """Learns from pairs of a record's text and the diseases that its label names; none is abstention."""
        texts, labels = [], []
        for text, diseases in pairs:
            texts.append(text)
            labels.append(set(diseases) or {ABSTAIN})
        counts = Counter(name for names in labels for name in names)
        self.classes = tuple(name for name, _ in counts.most_common(MOST_CLASSES))
        if not texts:
            return
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsRestClassifier
        from sklearn.pipeline import make_pipeline

        number = {name: i for i, name in enumerate(self.classes)}
        truth = np.zeros((len(texts), len(self.classes)), dtype=np.int8)
        for row, names in enumerate(labels):
            truth[row, [number[name] for name in names if name in number]] = 1
        words = TfidfVectorizer(analyzer="char", ngram_range=(2, 4), sublinear_tf=True, max_features=20_000)
        # The dual problem, solved loosely: a tenth of the time, and the same answers.
        one = LogisticRegression(C=10, solver="liblinear", dual=True, tol=0.1, random_state=0)
        each = OneVsRestClassifier(one)
        self.pipeline: Pipeline = make_pipeline(words, each)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Label .* is present in all training examples")
            self.pipeline.fit(texts, truth)

    def predict(self, cases: Sequence[Case]) -> Iterator[Prediction]:
        """An answer for each case, without evidence; nothing if there was nothing to learn from."""
        if not self.classes or not cases:
            return
        for case, row in zip(cases, self.pipeline.predict_proba([case.text for case in cases]), strict=True):
            # For a single class scikit-learn adds its complement in front.
            chances = dict(zip(self.classes, row[-len(self.classes) :].tolist(), strict=True))
            yield _answer(case, BAG_OF_WORDS, chances, abstains=max(chances, key=chances.__getitem__) == ABSTAIN)


def labelled(rows: Iterable[Row]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Record and diseases of each training row that holds both."""
    for row in rows:
        record, output = record_in(row.messages), parse(row.answer).output
        if record is not None and output is not None:
            yield record, output.diseases


def exact(cases: Iterable[Case]) -> Iterator[Prediction]:
    """The best answers that the texts allow, for the cases whose probabilities are known."""
    for case in cases:
        if case.differential:
            yield _answer(case, EXACT, case.differential, abstains=case.expects_abstention)


def _answer(case: Case, model: str, chances: dict[str, float], *, abstains: bool) -> Prediction:
    ranked = sorted((name for name in chances if name != ABSTAIN), key=lambda name: -chances[name])
    named = [] if abstains else [name for i, name in enumerate(ranked) if i == 0 or chances[name] >= LIKELY]
    return Prediction(
        case_id=case.id,
        model=model,
        prompt_sha="",
        output=Diagnosis(diseases=tuple(named)),
        confidence={name: min(1.0, chances[name]) for name in named},
    )
