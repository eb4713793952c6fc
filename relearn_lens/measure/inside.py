"""What is known inside and outside: answers that a probe reads from hidden states, and those that the model gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from beartype import beartype as typechecker
from jaxtyping import Bool, Float, Int, jaxtyped
from pydantic import Field

from relearn_lens.measure.answers import AnswerAccuracy
from relearn_lens.measure.asking import Asked, Metric, Reference, ask, asked_of
from relearn_lens.measure.keymeans import KeyMeans, tabulated
from relearn_lens.measure.states import blocks_of, states_of
from relearn_lens.models.model import LanguageModel, reading
from relearn_lens.names import existing
from relearn_lens.text.corpus import Strings
from relearn_lens.text.facts import FORGET, Facts, Passage
from relearn_lens.text.facts.encoded import encode_passages

RETAINED, SUPPRESSED, GONE, LUCKY = STATES = ("retained", "suppressed", "gone from what we can read", "lucky guess")
"""Known inside and outside, inside alone, neither, outside alone."""
FOLDS = 5
"""Parts that forget keys are cut into: each is read by probes fitted to the keys of all others."""


class InsideAccuracy(KeyMeans):
    """Share of answers that a probe reads."""

    metric: ClassVar[str] = "inside"
    unit: ClassVar[str] = "share of answers that a probe reads from hidden states, 0 to 1"
    quantity: ClassVar[str] = "known inside"


class StateShare(KeyMeans):
    """Share of passages in one state."""

    metric: ClassVar[str] = "state"
    unit: ClassVar[str] = "share of passages, 0 to 1"
    quantity: ClassVar[str] = "share"


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class Inside(InsideAccuracy):
    """What a probe at one layer reads, what the model says of the same passages, and the state of each."""

    layers: Strings
    chosen: str
    """The layer whose probes read most of what is retained, of keys that they were not fitted to."""
    layer_total: Float[np.ndarray, "layer key label"]
    """Passages whose answer is read, at every layer."""
    outside_total: Float[np.ndarray, "key label"]
    """Passages that the model answers, among the closed set, by the likeliest first token of an answer."""
    items: tuple[Passage, ...]
    places: Strings
    """Of each item."""
    states: Strings
    """Of each item."""

    def layer(self, name: str) -> InsideAccuracy:
        """The accuracy of the probes of one layer.

        Raises:
            ValueError: there is no such layer.
        """
        total = self.layer_total[self.layers.index(existing("layer", name, self.layers))]
        return InsideAccuracy(total, self.guessed, self.passages, self.keys, self.labels)

    @property
    def outside(self) -> AnswerAccuracy:
        """What the model says of the same passages."""
        guess = np.full(self.total.shape, np.nan)
        return AnswerAccuracy(self.outside_total, guess, self.passages, self.keys, self.labels)

    def state(self, name: str) -> StateShare:
        """The share of passages in a state; a guess is the share that a probe of shuffled labels would put there.

        Raises:
            ValueError: there is no such state.
        """
        existing("state", name, STATES)
        each = np.array([state == name for state in self.states], dtype=float)
        _, _, (total,) = tabulated(self.items, self.places, each)
        read = np.divide(self.guessed, self.passages, out=np.zeros(self.total.shape), where=self.passages > 0)
        outside = self.outside_total if name in (RETAINED, LUCKY) else self.passages - self.outside_total
        by_chance = outside * (read if name in (RETAINED, SUPPRESSED) else 1 - read)
        return StateShare(total, by_chance, self.passages, self.keys, self.labels)

    def shares(self, label: str) -> dict[str, float]:
        """The share of each state at a place."""
        return {name: self.state(name).shown(label) for name in STATES}


class KnownInside(Metric):
    """Whether a linear probe on hidden states reads an answer of a closed set, beside whether the model gives it.

    At the position that predicts the answer, a probe for each relation and block is fitted by ridge regression to the
    answers of other keys: those of `retain_near`, and in turn those of four fifths of the forget keys, so that every
    key that is read is held out. The block is chosen by what is read of held-out `retain_near` keys. Chance is that of
    the same probes for answers that are dealt anew among the keys that they are fitted to. Relations without a closed
    set are left out.

    Source: ours; probes for what was removed: Patil et al. 2024, Lynch et al. 2024; linear probes: Alain & Bengio 2017.
    """

    name: ClassVar[str] = "inside"
    unit: ClassVar[str] = InsideAccuracy.unit
    formula: ClassVar[str] = "mean over passages of [argmax over answers of probe(h) = y], keys held out"
    source: ClassVar[str] = "ours; Patil et al. 2024, Lynch et al. 2024"
    keys: int = Field(default=192, ge=10, le=10**6, description="most retain_near keys that probes are fitted to")
    ridge: float = Field(default=1e-2, gt=0, le=10**6, description="penalty, in shares of the states' mean variance")
    shuffles: int = Field(default=5, ge=1, le=1000, description="deals of answers for the chance level")
    seed: int = Field(default=0, ge=0, description="of folds and deals")

    def __call__(self, model: LanguageModel, facts: Facts | Asked, *, reference: Reference | None = None) -> Inside:
        questions = asked_of(facts)
        is_closed = [p.relation in questions.closed for p in questions.passages]
        here = questions.where(
            [c and place.startswith(FORGET) for c, place in zip(is_closed, questions.places, strict=True)]
        )
        if not here.passages:
            raise ValueError(
                f"{self.name} reads answers of closed sets, and what is to be forgotten of {questions.facts.name!r} "
                f"has none that is asked; relations with a closed set: {', '.join(questions.closed) or 'none'}"
            )
        relations = {p.relation for p in here.passages}
        near = ask(questions.facts, roles=["retain_near"], keys=self.keys, wordings=1, seed=self.seed)
        near = near.where([p.relation in relations for p in near.passages])
        both = (*here.passages, *near.passages)
        states, outside = _read(model, both, questions.closed)
        n = len(here.passages)
        folds = _folds([p.key for p in both], n, self.seed)
        right = np.zeros((states.shape[1], len(both)), dtype=bool)
        by_chance = np.zeros((states.shape[1], len(both)))
        rng = np.random.default_rng(self.seed)
        for relation in relations:
            rows = np.array([i for i, p in enumerate(both) if p.relation == relation])
            answers = questions.closed[relation]
            y = np.array([answers.index(both[i].answer) if both[i].answer in answers else -1 for i in rows])
            _, key = np.unique([both[i].key for i in rows], return_inverse=True)
            dealt = [_dealt(y, key, rng) for _ in range(self.shuffles)]
            for layer in range(states.shape[1]):
                predicted = _held_out(states[rows, layer], np.stack([y, *dealt]), folds[rows], len(answers), self.ridge)
                right[layer, rows] = predicted[0] == y
                by_chance[layer, rows] = (predicted[1:] == y).mean(0)
        layers = blocks_of(model).layers
        # What is retained says which layer to read, never what was forgotten.
        best = int(right[:, n:].mean(1).argmax())
        inside, predicted = right[best, :n], outside[:n]
        state = np.where(inside, np.where(predicted, RETAINED, SUPPRESSED), np.where(predicted, LUCKY, GONE))
        keys, labels, (total, guessed, out, count, *by_layer) = tabulated(
            here.passages, here.places, inside.astype(float), by_chance[best, :n], predicted.astype(float), 1.0,
            *right[:, :n].astype(float),
        )  # fmt: skip
        return Inside(
            total, guessed, count.astype(np.int64), keys, labels, layers, layers[best], np.stack(by_layer), out,
            here.passages, here.places, tuple(state.tolist()),
        )  # fmt: skip


def _read(
    model: LanguageModel, passages: tuple[Passage, ...], closed: dict[str, tuple[str, ...]]
) -> tuple[Float[np.ndarray, "passage layer d_model"], Bool[np.ndarray, " passage"]]:
    """Every block's state where the answer's first token is predicted, and whether the model prefers that token to the
    first tokens of all other answers of the set."""
    encoded = encode_passages(passages, model.tokenizer, context=model.context)
    first: dict[str, np.ndarray] = {}
    for relation, answers in closed.items():
        if prompts := [p for p in passages if p.relation == relation][:1]:
            answers_encoded = encode_passages(
                [Passage(prompts[0].prompt, answer, prompts[0].key, relation) for answer in answers],
                model.tokenizer, context=model.context,
            )  # fmt: skip
            starts = np.searchsorted(answers_encoded.word_of[answers_encoded.scored], np.arange(len(answers)))
            first[relation] = np.unique(answers_encoded.ids[answers_encoded.scored][starts])
    layers = blocks_of(model).layers
    width = int(model.bridge.cfg.d_model)
    states = np.zeros((len(passages), len(layers), width), dtype=np.float32)
    outside = np.zeros(len(passages), dtype=bool)
    with reading(model):
        for pieces in encoded.cuts():
            batch = encoded.batch(pieces).to(model.device)
            by_layer, last = states_of(model, batch)
            at, rows = batch.first, batch.words.cpu().numpy()
            for i, name in enumerate(layers):
                states[rows, i] = by_layer[name][at].float().cpu().numpy()
            logits = model.logits(last[at]).float().cpu().numpy()
            target = batch.ids.flatten()[batch.subword[at]].cpu().numpy()
            for row, scores, token in zip(rows.tolist(), logits, target.tolist(), strict=True):
                among = first[passages[row].relation]
                outside[row] = token == among[scores[among].argmax()]
    return states, outside


def _folds(keys: list[str], n_forget: int, seed: int) -> Int[np.ndarray, " passage"]:
    """The fold of each passage, by key; forget keys and the others are cut apart, so that each fold has of both."""
    fold: dict[str, int] = {}
    for part in (keys[:n_forget], keys[n_forget:]):
        distinct = list(dict.fromkeys(part))
        for place, i in enumerate(np.random.default_rng(seed).permutation(len(distinct))):
            fold[distinct[i]] = place % FOLDS
    return np.array([fold[key] for key in keys])


def _dealt(y: np.ndarray, key: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Answers dealt anew among keys; all passages of a key have the one answer."""
    first = np.array([y[key == k][0] for k in range(key.max() + 1)])
    return rng.permutation(first)[key]


def _held_out(
    states: Float[np.ndarray, "passage d_model"],
    labels: Int[np.ndarray, "deal passage"],
    folds: Int[np.ndarray, " passage"],
    n_answers: int,
    ridge: float,
) -> Int[np.ndarray, "deal passage"]:
    """For every passage the answer that a probe fitted to all other folds reads, under each labelling."""
    predicted = np.full(labels.shape, -1)
    for fold in np.unique(folds):
        test, train = folds == fold, folds != fold
        mean = states[train].mean(0)
        x, target = (states[train] - mean).astype(np.float64), (states[test] - mean).astype(np.float64)
        gram = x.T @ x
        gram[np.diag_indices_from(gram)] += ridge * max(np.trace(gram), 1e-12) / len(gram)
        read = np.linalg.solve(gram, target.T).T @ x.T  # [test, train]: how each held-out passage weighs the others
        for deal, y in enumerate(labels):
            one_hot = np.eye(n_answers)[y[train]] * (y[train] >= 0)[:, None]
            predicted[deal, test] = (read @ (one_hot - one_hot.mean(0)) + one_hot.mean(0)).argmax(1)
    return predicted
