"""The exact posterior of the textbook's diseases given what a record says.

A hypothesis is one disease or a pair. Given a hypothesis and the states of the latent groups, findings are
independent: P(f) = 1 - (1 - leak) * prod_d (1 - p_df) * prod_k (1 - w_kf) over its diseases and the active
groups (noisy-OR, Pearl 1988). A present finding is mentioned with probability m1, clearly, in lay words or
blurred; an absent one is denied with probability m0; what isn't mentioned counts by its silence. A blurred
phrase says that at least one of its findings was mentioned so. The posterior sums over hypotheses and groups.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from preceptor.clinical.textbook.book import Sex, Style, Textbook
from preceptor.clinical.textbook.reader import Reading

Floats = NDArray[np.float64]
SEXES: tuple[Sex, ...] = ("male", "female")


@dataclass(frozen=True)
class Posterior:
    """Probabilities given a record."""

    hypotheses: tuple[tuple[str, ...], ...]
    probabilities: Floats
    """Of each hypothesis, shape (hypotheses,)."""
    marginals: dict[str, float]
    """Of each disease, likeliest first; they sum to more than 1, for pairs count twice."""


@dataclass(frozen=True)
class _Terms:
    """Log-probability of what a record may say of each finding, shape (findings, hypotheses * groups)."""

    said: Floats
    denied: Floats
    silent: Floats
    silent_or_blurred: Floats
    nothing: Floats
    """Of a record that says nothing, shape (hypotheses * groups,)."""


class World:
    """The textbook as arrays. States run over hypotheses, then over the states of the groups.

    With `latent` False the groups are averaged out of each finding by itself: findings that a group brings together
    then count as if each were news (naive Bayes).
    """

    def __init__(self, book: Textbook, *, latent: bool = True) -> None:
        self.book = book
        self.findings = tuple(book.findings)
        self.index = {finding: i for i, finding in enumerate(self.findings)}
        pairs = [pair for pair in combinations(book.diseases, 2) if not book.excluded(*pair)]
        self.hypotheses: tuple[tuple[str, ...], ...] = (*((d,) for d in book.diseases), *pairs)
        self._known = frozenset(map(frozenset, self.hypotheses))
        self.groups: tuple[tuple[int, ...], ...] = tuple(product((0, 1), repeat=len(book.world.groups)))
        self.present = self._present()
        """P(finding | hypothesis, groups), shape (findings, hypotheses, groups)."""
        self.group_given = self._group_given()
        """P(groups | hypothesis), shape (hypotheses, groups)."""
        if not latent:
            self.present = (self.present * self.group_given).sum(-1, keepdims=True)
            self.group_given, self.groups = np.ones((len(self.hypotheses), 1)), ((),)
        self._log_group_given = np.log(self.group_given)
        self.membership = np.array([[d in h for d in book.diseases] for h in self.hypotheses], dtype=float)
        self._terms: dict[Style, _Terms] = {style: self._said(style) for style in book.world.styles}

    def _present(self) -> Floats:
        book = self.book
        causes = np.array([[1 - book.diseases[d].findings.get(f, 0.0) for d in book.diseases] for f in self.findings])
        weights = np.array([[1 - f.groups.get(k, 0.0) for k in book.world.groups] for f in book.findings.values()])
        leak = np.array([f.leak for f in book.findings.values()])
        place = {disease: i for i, disease in enumerate(book.diseases)}
        by_hypothesis = np.stack([causes[:, [place[d] for d in h]].prod(1) for h in self.hypotheses], axis=1)
        by_groups = np.stack([(weights ** np.array(state)).prod(1) for state in self.groups], axis=1)
        present: Floats = 1 - (1 - leak)[:, None, None] * by_hypothesis[:, :, None] * by_groups[:, None, :]
        return present

    def _group_given(self) -> Floats:
        world, diseases = self.book.world, self.book.diseases
        active = np.array(
            [
                [
                    1 - (1 - g.base) * np.prod([1 - diseases[d].groups.get(k, 0.0) for d in h])
                    for k, g in world.groups.items()
                ]
                for h in self.hypotheses
            ]
        )
        return np.stack([np.where(state, active, 1 - active).prod(1) for state in self.groups], axis=1)

    def _said(self, style: Style) -> _Terms:
        """The four things a record of a style may say of each finding.

        Whether it was said in clear or lay words, and in which of them, doesn't depend on the disease.
        """
        writing, blurred = self.book.world.styles[style], self.book.world.forms.blurred
        present = self.present.reshape(len(self.findings), -1)
        denial = np.array([f.absent_mention * writing.absent for f in self.book.findings.values()])[:, None]
        silent = present * (1 - writing.present) + (1 - present) * (1 - denial)
        return _Terms(
            said=np.log(present * writing.present * (1 - blurred)),
            denied=np.log((1 - present) * denial),
            silent=np.log(silent),
            nothing=np.log(silent).sum(0),
            silent_or_blurred=np.log(silent + present * writing.present * blurred),
        )

    def prior(self, sex: Sex | None, age: int | None) -> Floats:
        """P(hypothesis | sex, age); what is not known is averaged over the population."""
        sexes: tuple[Sex, ...] = SEXES if sex is None else (sex,)
        bands = self.book.world.age_weights if age is None else {self.book.band(age): 1.0}
        given = [weight / len(sexes) * self._prior(s, band) for s in sexes for band, weight in bands.items()]
        prior: Floats = np.sum(given, axis=0)
        return prior

    @cache  # noqa: B019  one world lives as long as the process
    def _prior(self, sex: Sex, band: str) -> Floats:
        weight = {d.id: d.prevalence * d.age[band] * d.sex[sex] for d in self.book.diseases.values()}
        raw = np.array([np.prod([weight[d] for d in h]) for h in self.hypotheses])
        single = np.array([len(h) == 1 for h in self.hypotheses])
        share = self.book.world.pairs
        prior: Floats = np.where(single, (1 - share) * raw / raw[single].sum(), share * raw / raw[~single].sum())
        return prior

    def posterior(self, reading: Reading) -> Posterior:
        """P(hypothesis | what the record says)."""
        weights = self._told(reading).sum(1) * self.prior(reading.sex, reading.age)
        return self.believed(weights / weights.sum())

    def _told(self, reading: Reading) -> Floats:
        """P(what the record says, groups | hypothesis) up to a factor, shape (hypotheses, groups)."""
        terms = self._terms[reading.style]
        affirmed, negated, blurs = self._subjects(reading)
        log = terms.nothing
        for rows, term in ((affirmed, terms.said), (negated, terms.denied)):
            log = log + (term[rows] - terms.silent[rows]).sum(0)
        for rows in blurs:
            either, silence = terms.silent_or_blurred[rows].sum(0), terms.silent[rows].sum(0)
            log = log + np.log1p(-np.exp(silence - either)) + either - silence
        log = log.reshape(self.group_given.shape) + self._log_group_given
        told: Floats = np.exp(log - log.max())
        return told

    def _subjects(self, reading: Reading) -> tuple[list[int], list[int], list[list[int]]]:
        """The findings that a record affirms, those that it denies, and for each blur those that it may stand for.

        They are in order, for a sum's last digits follow it.
        """
        affirmed = {m.subject for m in reading.mentions if m.form in ("clear", "lay")}
        negated = {m.subject for m in reading.mentions if m.form == "negated"} - affirmed
        blurs = sorted({m.subject for m in reading.mentions if m.form == "blurred"})
        members = (set(self.book.world.blurs[blur].findings) - affirmed - negated for blur in blurs)
        rows = [sorted(self.index[subject] for subject in subjects) for subjects in (affirmed, negated, *members)]
        return rows[0], rows[1], list(filter(None, rows[2:]))

    def worth_asking(self, reading: Reading) -> dict[str, float]:
        """How much one would learn of the diseases by asking whether a finding is there, in nats, the most first.

        It is the mutual information of hypothesis and finding given the record, for each finding that the record
        neither affirms nor denies. That it is silent about one, or blurs it with others, counts already.
        """
        terms, writing = self._terms[reading.style], self.book.world.styles[reading.style]
        affirmed, negated, blurs = self._subjects(reading)
        present = self.present.reshape(len(self.findings), -1)
        unsaid = present * (1 - writing.present)
        there = unsaid / np.exp(terms.silent)  # P(present | silent, hypothesis, groups)
        for rows in blurs:
            either, silence = (np.exp(term[rows]) for term in (terms.silent_or_blurred, terms.silent))
            said = either - silence  # by the blur; to it, or to silence, the others add up
            alone = unsaid[rows] + said
            others = [(np.delete(either, i, 0).prod(0), np.delete(silence, i, 0).prod(0)) for i in range(len(rows))]
            both = [alone[i] * e - unsaid[rows[i]] * s for i, (e, s) in enumerate(others)]
            there[rows] = np.stack(both) / (either.prod(0) - silence.prod(0))
        joint = self._told(reading) * self.prior(reading.sex, reading.age)[:, None]
        joint = joint / joint.sum()
        asked = [i for i in range(len(self.findings)) if i not in {*affirmed, *negated}]
        yes = (there[asked].reshape(len(asked), *joint.shape) * joint).sum(-1)
        no = np.maximum(joint.sum(-1) - yes, 0)
        answers = np.stack([yes.sum(-1), no.sum(-1)], axis=-1)
        learned = _entropy(joint.sum(-1)) + _entropy(answers) - _entropy(yes) - _entropy(no)
        order = np.argsort(-learned, kind="stable").tolist()
        return {self.findings[asked[place]]: float(learned[place]) for place in order}

    def believed(self, probabilities: Floats) -> Posterior:
        """Probabilities of the hypotheses, with what they say of each disease."""
        marginals = dict(zip(self.book.diseases, (probabilities @ self.membership).tolist(), strict=True))
        ordered = dict(sorted(marginals.items(), key=lambda item: -item[1]))
        return Posterior(self.hypotheses, probabilities, ordered)

    def exact(self, posterior: Posterior) -> tuple[str, ...]:
        """The best answer: each disease that is at least as likely as not, at least the likeliest, in order.

        Empty where the likeliest does not reach the textbook's `abstain_below`. It is always a hypothesis: of three
        that are likely two are named, and of two that never occur together one.
        """
        likely = tuple(d for d, p in posterior.marginals.items() if p >= 0.5)  # noqa: PLR2004  as likely as not
        first = next(iter(posterior.marginals))
        if posterior.marginals[first] < self.book.world.abstain_below:
            return ()
        return likely[:2] if frozenset(likely[:2]) in self._known else (first,)

    @cache  # noqa: B019  one world lives as long as the process
    def support(self, disease: str) -> Floats:
        """How strongly each finding speaks for a disease: log P(f | disease) - log P(f), shape (findings,)."""
        row = self.hypotheses.index((disease,))
        given = (self.present[:, row] * self.group_given[row]).sum(-1)
        overall = (self.present * self.group_given).sum(-1) @ self.prior(None, None)
        ratio: Floats = np.log(given) - np.log(overall)
        return ratio


def _entropy(p: Floats) -> Floats:
    """-Σ p log p over the last axis; p need not sum to 1."""
    found: Floats = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    return found
