"""What all localisers share: a frozen object that, called on a model and facts, says where they are.

A localiser gives a `Saliency` (one number per neuron: take its `top`) or a `WeightMask`. Facts are read from the
statements about what is to be forgotten; a text with a concept is made facts first.
"""

from __future__ import annotations

from typing import ClassVar

from relearn_lens.find.patching import Pairs, Readout, contrasted
from relearn_lens.find.saliency import Saliency
from relearn_lens.methods import Method
from relearn_lens.models.model import LanguageModel, Model
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.facts import FORGET, Facts, Passage, from_concept

Text = Facts | Corpus
"""Facts, or a labelled text whose concept is given beside it."""


class Localiser(Method):
    """Says where in a model something is."""

    name: ClassVar[str]
    formula: ClassVar[str]
    """What is measured. h_l: the hidden state after block l; a: an activation; p: the probability of the answer."""
    source: ClassVar[str]
    gives: ClassVar[str] = "weights"
    """`"weights"` (a `WeightMask`), or `"neurons"` (a `Saliency`)."""

    def __call__(
        self, model: Model, text: Text | None, *, concept: Concept | None = None, seed: int = 0
    ) -> Saliency | WeightMask:
        """Find it. `concept` is for a text that is no `Facts`; the model is read only.

        Raises:
            ValueError: a text or a model that the method cannot read; before any work.
        """
        raise NotImplementedError


def facts_of(text: Text | None, concept: Concept | None, *, name: str, seed: int = 0) -> Facts:
    """Facts as they are, or made of a text and a concept.

    Raises:
        ValueError: facts with a concept, a text without one, or neither.
    """
    if isinstance(text, Facts):
        if concept is not None:
            raise ValueError(
                f"{name}: facts {text.name!r} say themselves what is to be found, so concept {concept.name!r} goes "
                "with a labelled text alone"
            )
        return text
    if not isinstance(text, Corpus) or concept is None:
        given = "a text without a concept" if isinstance(text, Corpus) else type(text).__name__
        raise ValueError(f"{name} reads facts, or a labelled text with concept=, and got {given}")
    return from_concept(text, concept, seed=seed)


def language_model(model: Model, name: str) -> LanguageModel:
    """The model, which predicts answers.

    Raises:
        ValueError: it is a tagger.
    """
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"{name} asks a language model for answers, and this is a {type(model).__name__}; for a tagger use score"
        )
    return model


def some_blocks(model: Model, wanted: int | None) -> int:
    """A number of blocks; by default a third of them.

    Raises:
        ValueError: more than the model has.
    """
    n = int(model.bridge.cfg.n_layers)
    k = -(-n // 3) if wanted is None else wanted
    if k > n:
        raise ValueError(f"blocks = {k}: this model has {n}")
    return k


def statements(facts: Facts, *roles: str) -> tuple[Passage, ...]:
    """The statements of some roles, by default of what is to be forgotten, that have a prompt.

    Raises:
        ValueError: there are none.
    """
    passages = tuple(p for p in facts.passages(*(roles or FORGET), forms="statement") if p.prompt)
    if not passages:
        raise ValueError(
            f"facts {facts.name!r} have no statement with a prompt and an answer in {', '.join(roles or FORGET)}, so "
            "nothing is asked there; give rows of prompt and answer"
        )
    return passages


def pairs_of(model: LanguageModel, facts: Facts, contrast: str, metric: Readout, seed: int) -> Pairs:
    """The statements about what is to be forgotten beside contrasting ones (`contrasted`).

    `contrast` is a form that the facts have (`abc` of `ioi`), `swap` (another key), or `auto`: `abc` where there is
    that form, else `swap`.

    Raises:
        ValueError: no such form; and as `contrasted` and `Pairs`.
    """
    forms = {p.form for p in facts.passages(*FORGET)}
    form = "abc" if contrast == "auto" and "abc" in forms else contrast
    if form in ("auto", "swap"):
        return Pairs(model, *contrasted(statements(facts), (), seed=seed), metric)
    if form not in forms:
        raise ValueError(
            f"contrast = {contrast!r}: facts {facts.name!r} have no such form; they have {', '.join(sorted(forms))}, "
            "and swap is always there"
        )
    return Pairs(model, *contrasted(statements(facts), facts.passages(*FORGET, forms=form), seed=seed), metric)
