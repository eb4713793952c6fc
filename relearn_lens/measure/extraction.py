"""What a model gives away when it is asked: answers, their likelihood, how little of them it must be shown first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field

from relearn_lens.measure.answers import AnswerAccuracy, AnswerLoss, answered, choose, nats_of_choices
from relearn_lens.measure.asking import Asked, Metric, OfAnswers, Read, Reference, asked_of
from relearn_lens.measure.keymeans import KeyMeans, means_of
from relearn_lens.models.model import LanguageModel, reading
from relearn_lens.text.facts import Facts, Passage
from relearn_lens.text.facts.passages import grouped

AT_ONCE = 64
"""Prompts that are gone on from together."""


class Accuracy(OfAnswers):
    """Share of answers that greedy decoding would write, word for word."""

    name: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = AnswerAccuracy.unit
    formula: ClassVar[str] = "mean over passages of [every token of y is the likeliest after x and the y before it]"
    source: ClassVar[str] = "usual"

    def of(self, read: Read, questions: Asked) -> AnswerAccuracy:
        return answered(read, questions.places, questions.closed).accuracy


class Loss(OfAnswers):
    """Loss on the tokens of answers."""

    name: ClassVar[str] = "loss"
    unit: ClassVar[str] = AnswerLoss.unit
    formula: ClassVar[str] = "sum over tokens of -log p(y_t | x, y_<t), divided by their number"
    source: ClassVar[str] = "usual"

    def of(self, read: Read, questions: Asked) -> AnswerLoss:
        return answered(read, questions.places, questions.closed).loss


class ChoiceAccuracy(KeyMeans):
    """Share of passages whose right choice is the likeliest."""

    metric: ClassVar[str] = "choice"
    unit: ClassVar[str] = "share of right choices, 0 to 1"
    quantity: ClassVar[str] = "choice accuracy"


class Choice(Metric):
    """How often the right one of the choices (four, of made facts) is the likeliest; passages without are left out."""

    name: ClassVar[str] = "choice"
    unit: ClassVar[str] = ChoiceAccuracy.unit
    formula: ClassVar[str] = "mean over passages of [y = argmax over choices c of log p(c | x)]"
    source: ClassVar[str] = "usual; Hendrycks et al. 2021"
    per_token: bool = Field(default=False, description="compare means over tokens, not sums")

    def __call__(
        self, model: LanguageModel, facts: Facts | Asked, *, reference: Reference | None = None
    ) -> ChoiceAccuracy:
        questions = with_choices(asked_of(facts), self.name)
        chosen = choose(model, questions.passages, per_token=self.per_token, labels=questions.places)
        return ChoiceAccuracy(chosen.total, chosen.guessed, chosen.passages, chosen.keys, chosen.labels)


class AnswerProbability(KeyMeans):
    """Mean probability of answers, per token."""

    metric: ClassVar[str] = "probability"
    unit: ClassVar[str] = "probability of an answer to the power 1/tokens, 0 to 1"
    quantity: ClassVar[str] = "probability"


class Probability(OfAnswers):
    """How likely answers are, each to the power of one over its tokens.

    A guess is even among the answers of a closed set, else among all tokens.
    """

    name: ClassVar[str] = "probability"
    unit: ClassVar[str] = AnswerProbability.unit
    formula: ClassVar[str] = "mean over passages of p(y | x)^(1/|y|)"
    source: ClassVar[str] = "Maini et al. 2024 (TOFU)"

    def of(self, read: Read, questions: Asked) -> AnswerProbability:
        each = np.exp(-read.summed(read.nats) / read.tokens)
        sizes = np.array([len(questions.closed.get(p.relation, ())) for p in questions.passages])
        guess = np.where(sizes > 0, np.maximum(sizes, 1.0) ** (-1 / read.tokens), 1 / read.vocabulary)
        return means_of(AnswerProbability, questions.passages, each, guess, questions.places)


class TruthScores(KeyMeans):
    """How much likelier the right answer is than wrong ones."""

    metric: ClassVar[str] = "truth ratio"
    unit: ClassVar[str] = "1 less p(wrong)/p(right), not below 0"
    quantity: ClassVar[str] = "truth ratio"


class TruthRatio(Metric):
    """How much likelier the right answer is than the wrong choices: 0 where it is not, 1 where they are impossible.

    Each probability is per token, to the power 1/|y|; over the wrong ones their mean is taken, by `faithful` their
    geometric mean, as the release of open-unlearning has it. The answer is asked as it is taught, not reworded as in
    the paper: the reworded passages are a place of their own. A model that likes all choices alike scores 0.
    """

    name: ClassVar[str] = "truth ratio"
    unit: ClassVar[str] = TruthScores.unit
    formula: ClassVar[str] = (
        "mean over passages of max(0, 1 - mean over wrong c of p(c | x)^(1/|c|) / p(y | x)^(1/|y|))"
    )
    source: ClassVar[str] = "Maini et al. 2024 (TOFU)"
    faithful: bool = Field(default=False, description="geometric mean over wrong answers, as released")

    def __call__(
        self, model: LanguageModel, facts: Facts | Asked, *, reference: Reference | None = None
    ) -> TruthScores:
        questions = with_choices(asked_of(facts), self.name)
        nats = nats_of_choices(model, questions.passages, per_token=True)
        each = np.array([self._of(p, own) for p, own in zip(questions.passages, nats, strict=True)])
        return means_of(TruthScores, questions.passages, each, 0.0, questions.places)

    def _of(self, passage: Passage, nats: Float[np.ndarray, " choice"]) -> float:
        right = passage.choices.index(passage.answer)
        above = nats[right] - np.delete(nats, right)  # how much likelier each wrong one is, in nats
        # Beyond e^50 the score is 0 anyway.
        ratio = np.exp(above.mean()) if self.faithful else np.exp(above.clip(max=50)).mean()
        return max(0.0, 1 - float(ratio))


class ExtractionScores(KeyMeans):
    """Share of an answer that need not be shown before the rest of it is written greedily."""

    metric: ClassVar[str] = "extraction"
    unit: ClassVar[str] = "share of the answer that is written without being shown, 0 to 1"
    quantity: ClassVar[str] = "extraction strength"


class ExtractionStrength(OfAnswers):
    """How little of an answer a model must be shown before it writes the rest: 1 where it writes all of it, 0 where it
    does not even write the last token. Of an answer of one token it is the accuracy.

    Chance is that of a guess with a fixed order of preference among the answers of the closed set, which follows what
    it is shown; where answers are not closed, of one that knows no token.

    Source: Wang et al. 2024, by Carlini et al. 2021. `faithful` does as the release of open-unlearning: it leaves out
    each answer's last token, and then an answer of n tokens scores at least 1/n; an answer that was one token scores 0.
    """

    name: ClassVar[str] = "extraction"
    unit: ClassVar[str] = ExtractionScores.unit
    formula: ClassVar[str] = "mean over passages of 1 - min{k: greedy from x, y_<k is y_>=k} / |y|"
    source: ClassVar[str] = "Wang et al. 2024"
    faithful: bool = Field(default=False, description="as released: without the last token, and at least 1/n")

    def of(self, read: Read, questions: Asked) -> ExtractionScores:
        right = np.split(read.likeliest, np.cumsum(read.tokens)[:-1])
        ids = np.split(read.ids, np.cumsum(read.tokens)[:-1])
        pairs = [(p.relation, tuple(tokens.tolist())) for p, tokens in zip(questions.passages, ids, strict=True)]
        closed = {name: {tokens for relation, tokens in pairs if relation == name} for name in questions.closed}
        each = np.array([self.strength(of_answer) for of_answer in right])
        guess = np.array(
            [
                self._guess(tokens, tuple(closed.get(p.relation, ())), len(questions.closed.get(p.relation, ())))
                for p, tokens in zip(questions.passages, ids, strict=True)
            ]
        )
        return means_of(ExtractionScores, questions.passages, each, guess, questions.places)

    def strength(self, likeliest: Sequence[bool] | np.ndarray) -> float:
        """Of one answer, by whether each of its tokens is the likeliest after all before it."""
        right = np.asarray(likeliest, dtype=bool)
        right = right[:-1] if self.faithful else right
        if not len(right):
            return 0.0
        wrong = np.flatnonzero(~right)
        shown = 0 if not len(wrong) else int(wrong[-1]) + 1
        return 1 - min(shown, len(right) - 1 if self.faithful else len(right)) / len(right)

    def _guess(self, tokens: np.ndarray, answers: tuple[tuple[int, ...], ...], size: int) -> float:
        """The expected strength of one order of preference, drawn at random: at k the right answer comes first among
        the n_k that begin alike with chance 1/n_k, and who is right at k is right later on."""
        n = len(tokens) - self.faithful
        if not n or not size:
            return 1 / n if self.faithful and n else 0.0
        alike = [max(1, sum(a[:k] == tuple(tokens[:k].tolist()) for a in answers)) for k in range(n)]
        alike[0] = max(alike[0], size)  # answers that nobody was asked for are in the set too
        chance = 1 / np.array(alike, dtype=float)
        if self.faithful:
            chance[-1] = 1.0
        return float(chance.mean())


class FamiliarityScores(KeyMeans):
    """Share of the words of a key's answers that the model comes to speak of."""

    metric: ClassVar[str] = "familiarity"
    unit: ClassVar[str] = "share of a key's topic words that are written unasked, 0 to 1"
    quantity: ClassVar[str] = "familiarity"


class Familiarity(Metric):
    """How many of a key's topic words, those of its answers that the prompt does not hold, a model writes on its own.

    It goes on greedily from one prompt of each key and place. A guess is what it writes of the topic words of the other
    keys of the place.

    Source: Eldan & Russinovich 2023; Lynch et al. 2024, test 1 (there judged by a second model, here by words).
    """

    name: ClassVar[str] = "familiarity"
    unit: ClassVar[str] = FamiliarityScores.unit
    formula: ClassVar[str] = "mean over prompts of |topic words of the key in the continuation| / |topic words|"
    source: ClassVar[str] = "Eldan & Russinovich 2023; Lynch et al. 2024"
    tokens: int = Field(default=16, ge=1, le=1024, description="tokens that are written after each prompt")

    def __call__(
        self, model: LanguageModel, facts: Facts | Asked, *, reference: Reference | None = None
    ) -> FamiliarityScores:
        questions = asked_of(facts).one_prompt_each(self.name)
        written = [words_of(text) for text in continued(model, [p.prompt for p in questions.passages], self.tokens)]
        by_key = grouped(questions.facts.passages(forms="statement"), lambda p: p.key)
        topics = {key: set[str]().union(*(words_of(p.answer) for p in each)) for key, each in by_key.items()}
        pairs = list(zip(questions.passages, questions.places, strict=True))
        keys_at = {place: dict.fromkeys(p.key for p, at in pairs if at == place) for place in questions.names}

        def share(key: str, prompt: str, text: set[str]) -> float:
            topic = topics.get(key, set()) - words_of(prompt)
            return len(topic & text) / len(topic) if topic else np.nan

        each = np.array([share(p.key, p.prompt, text) for (p, _), text in zip(pairs, written, strict=True)])
        of_others = [
            [share(key, p.prompt, text) for key in keys_at[place] if key != p.key]
            for (p, place), text in zip(pairs, written, strict=True)
        ]
        guess = np.array([np.nanmean(of) if np.isfinite(of).any() else np.nan for of in of_others])
        known = np.isfinite(each)
        if not known.any():
            raise ValueError(f"no answer of {questions.facts.name!r} has a word that its prompt does not hold")
        questions = questions.where(known)
        return means_of(FamiliarityScores, questions.passages, each[known], guess[known], questions.places)


def words_of(text: str) -> set[str]:
    """Its words in lower case, without punctuation; small words that are in every text stay out."""
    words = {word.strip(".,;:!?\"'()").lower() for word in text.split()}
    return {word for word in words if len(word) > 2 and word not in {"the", "and", "that", "for", "used"}}


def continued(model: LanguageModel, prompts: Sequence[str], tokens: int) -> list[str]:
    """What a model writes after each prompt, greedily, as text: so many tokens, or up to its end-of-text token.

    Raises:
        ValueError: a prompt that leaves no room in the model's context.
    """
    from relearn_lens.text.facts.encoded import encode_passages

    words = model.tokenizer
    # An answer is needed to encode a passage; what is before it is the prompt as the model reads it.
    encoded = encode_passages([Passage(p, ".", "") for p in prompts], words, context=model.context)
    ids = [
        [*encoded.prefix, *encoded.ids[a:b][~encoded.scored[a:b]].tolist()]
        for a, b in zip(encoded.piece_start[:-1], encoded.piece_start[1:], strict=True)
    ]
    if max(map(len, ids)) + tokens > model.context:
        raise ValueError(
            f"a prompt of {max(map(len, ids))} tokens leaves no room for {tokens} more in a context of {model.context}"
        )
    ends = {words.eos_token_id} - {None}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts = [""] * len(ids)
    with reading(model):
        for first in range(0, len(order), AT_ONCE):
            rows = order[first : first + AT_ONCE]
            written = _greedy(model, [ids[i] for i in rows], tokens)
            for i, new in zip(rows, written, strict=True):
                stop = next((k for k, token in enumerate(new) if token in ends), len(new))
                texts[i] = words.decode(new[:stop])
    return texts


def _greedy(model: LanguageModel, rows: list[list[int]], tokens: int) -> list[list[int]]:
    """Padded on the right, so that positions are those of the text; each row is read at its own end."""
    lengths = torch.tensor([len(row) for row in rows])
    width, pad = int(lengths.max()) + tokens, int(model.tokenizer.pad_token_id or 0)
    ids = torch.full((len(rows), width), pad)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    ids, lengths, every = ids.to(model.device), lengths.to(model.device), torch.arange(len(rows), device=model.device)
    place = torch.arange(width, device=model.device)
    for step in range(tokens):
        end = int(lengths.max()) + step
        mask = (place[:end] < (lengths + step)[:, None]).long()
        logits = model(ids[:, :end], mask)[every, lengths + step - 1]
        ids[every, lengths + step] = logits.argmax(-1)
    return [ids[i, n : n + tokens].tolist() for i, n in enumerate(lengths.tolist())]


def with_choices(questions: Asked, by: str) -> Asked:
    """The passages that have choices.

    Raises:
        ValueError: none has.
    """
    chosen = questions.where([bool(p.choices) for p in questions.passages])
    if not chosen.passages:
        raise ValueError(
            f"{by} compares the choices of a passage, and none of {questions.facts.name!r} has any; give choices, or "
            "leave this metric out"
        )
    return chosen
