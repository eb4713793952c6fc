"""What every metric of facts shares: which passages are asked, in which places, and one reading of the answers.

A *place* is a role of the facts in the wordings that were taught (`"forget_held_out"`) or in others
(`"forget_held_out, reworded"`): what a metric's value is looked up by.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from relearn_lens.measure.evaluation import Scores
from relearn_lens.methods import MAX_TOKENS, Method
from relearn_lens.models import processes
from relearn_lens.models.model import LanguageModel
from relearn_lens.names import explained
from relearn_lens.neurons.streaming import stream
from relearn_lens.text.corpus import Strings
from relearn_lens.text.encoding import Batch
from relearn_lens.text.facts import FORGET, RETAIN, ROLES, TRAINED, Facts, Passage
from relearn_lens.text.facts.encoded import EncodedPassages, encode_passages
from relearn_lens.text.facts.passages import grouped

REWORDED = ", reworded"
"""What follows a role in the name of the place of wordings that were never taught."""


@dataclass(frozen=True, eq=False, repr=False)
class Asked:
    """The passages of facts that are asked, and the place of each."""

    facts: Facts
    passages: tuple[Passage, ...]
    places: Strings
    """One per passage."""

    @property
    def names(self) -> tuple[str, ...]:
        """The places, each once."""
        return tuple(dict.fromkeys(self.places))

    @cached_property
    def closed(self) -> dict[str, tuple[str, ...]]:
        """The closed sets of answers, by relation."""
        return self.facts.answers()

    def where(self, keep: Sequence[bool] | np.ndarray) -> Asked:
        """Some of the passages."""
        return Asked(self.facts, tuple(compress(self.passages, keep)), tuple(compress(self.places, keep)))

    def one_prompt_each(self, by: str) -> Asked:
        """One passage with a prompt of each key and place.

        Raises:
            ValueError: no passage has a prompt.
        """
        prompts = [i for i, p in enumerate(self.passages) if p.prompt]
        by_key = grouped(prompts, lambda i: (self.passages[i].key, self.places[i]))
        if not by_key:
            raise ValueError(
                f"{by} goes on from a prompt, and no passage of {self.facts.name!r} that is asked has one; ask in "
                "forms that have"
            )
        chosen = {each[0] for each in by_key.values()}
        return self.where([i in chosen for i in range(len(self.passages))])

    def __repr__(self) -> str:
        return f"Asked({len(self.passages)} passages of {self.facts.name} in {', '.join(self.names)})"


@explained
def ask(
    facts: Facts,
    *,
    roles: Sequence[str] = (*FORGET, *RETAIN),
    keys: int | None = 48,
    wordings: int | None = 2,
    seed: int = 0,
) -> Asked:
    """Passages to measure by: of each role at most so many keys, drawn by `seed`, and of each of their relations at
    most so many wordings that were taught and so many that were not, each wording about as often as any other.

    None is all. Roles without passages, and wordings that the facts do not have, are no place.

    Raises:
        ValueError: an unknown role, numbers below 1, or no passage.
    """
    if min(1 if n is None else n for n in (keys, wordings)) < 1:
        raise ValueError(f"keys and wordings must be at least 1, or None for all; got {keys} and {wordings}")
    forms = {"": TRAINED, REWORDED: ("paraphrase",)}
    passages: list[Passage] = []
    places: list[str] = []
    for role in roles:
        among = facts.keys(role)
        chosen = among
        if keys is not None and keys < len(among):
            # Which keys are asked must not depend on the other roles.
            drawn = np.random.default_rng([seed, ROLES.index(role)]).permutation(len(among))[:keys]
            chosen = tuple(among[i] for i in sorted(drawn))
        number = {key: i for i, key in enumerate(chosen)}
        for ending, names in forms.items():
            here = (p for p in facts.passages(role, forms=names) if p.key in number)
            for (key, _), each in grouped(here, lambda p: (p.key, p.relation)).items():
                n = len(each) if wordings is None else min(wordings, len(each))
                taken = [each[(number[key] * n + i) % len(each)] for i in range(n)]
                passages += taken
                places += [role + ending] * n
    if not passages:
        raise ValueError(
            f"facts {facts.name!r} have no passage to ask in the roles {', '.join(roles)} and the forms "
            f"{', '.join((*TRAINED, 'paraphrase'))}; name other roles, or give these forms"
        )
    return Asked(facts, tuple(passages), tuple(places))


@dataclass(frozen=True, eq=False)
class Read:
    """What a model makes of the tokens of answers, each given all before it."""

    passages: tuple[Passage, ...]
    nats: Float[np.ndarray, " token"]
    likeliest: Bool[np.ndarray, " token"]
    """Whether the token is what decoding greedily would write."""
    passage: Int[np.ndarray, " token"]
    """The passage that each token is of."""
    ids: Int[np.ndarray, " token"]
    vocabulary: int
    """Number of tokens that a uniform guess chooses from."""

    @cached_property
    def tokens(self) -> Int[np.ndarray, " passage"]:
        """Tokens of each answer."""
        return np.bincount(self.passage, minlength=len(self.passages))

    @cached_property
    def right(self) -> Bool[np.ndarray, " passage"]:
        """Whether every token of the answer is the likeliest."""
        return self.summed(~self.likeliest) == 0

    def summed(self, values: np.ndarray) -> Float[np.ndarray, " passage"]:
        """Sums of one number per token over the tokens of each answer."""
        return np.bincount(self.passage, weights=values.astype(float), minlength=len(self.passages))


def read_answers(
    model: LanguageModel, passages: Sequence[Passage] | EncodedPassages, *, max_tokens: int = MAX_TOKENS
) -> Read:
    """One pass over passages that reads all of their answers' tokens.

    Raises:
        ValueError: no passage, as `encode_passages`; or a loss that is not finite.
    """
    is_encoded = isinstance(passages, EncodedPassages)
    encoded = passages if is_encoded else encode_passages(passages, model.tokenizer, context=model.context)
    tokens = _Tokens(model, encoded)
    stream(model, encoded, (), readers=[tokens], max_tokens=max_tokens)
    passage = encoded.word_of[encoded.scored].astype(np.int64)
    if not np.isfinite(tokens.nats).all():
        bad = len(np.unique(passage[~np.isfinite(tokens.nats)]))
        raise ValueError(
            f"the loss on {bad} of {len(encoded.passages)} answers is not finite (NaN or infinite); look at the "
            "model's weights and at the learning rate"
        )
    ids = encoded.ids[encoded.scored].astype(np.int64)
    return Read(encoded.passages, tokens.nats, tokens.likeliest > 0, passage, ids, model.vocabulary)


class _Tokens:
    """Reads the nats of every token of the answers, and whether it is the likeliest."""

    def __init__(self, model: LanguageModel, encoded: EncodedPassages):
        self.model = model
        ends = np.concatenate([[0], np.cumsum(encoded.scored)])[encoded.piece_start]
        self.answer_of: list[np.ndarray] = np.split(np.arange(ends[-1]), ends[1:-1])
        self.nats, self.likeliest = np.zeros((2, int(ends[-1])))

    def read(self, batch: Batch, states: Float[Tensor, "sentence token d_model"]) -> None:
        """The answers of a batch."""
        logits = self.model.logits(states.flatten(0, 1)[batch.subword - 1]).float()
        target = batch.ids.flatten()[batch.subword]
        at = np.concatenate([self.answer_of[piece] for piece in batch.pieces.tolist()])
        self.nats[at] = F.cross_entropy(logits, target, reduction="none").cpu().numpy()
        self.likeliest[at] = (logits.argmax(-1) == target).cpu().numpy()

    def together(self) -> None:
        """Take what other processes read; here it is still 0."""
        processes.sum_(torch.from_numpy(self.nats), torch.from_numpy(self.likeliest))


@dataclass(frozen=True, eq=False)
class Reference:
    """Other models that a metric compares with, each one of its own: a model that is trained on is not its own past."""

    base: LanguageModel | None = None
    """As it was before anything was removed."""
    never: LanguageModel | None = None
    """The twin that never saw what is to be forgotten."""
    removed: Mapping[str, Tensor] | None = None
    """The weights right after removing, copied."""
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What metrics computed of these models alone, so that the next checkpoint need not."""

    def once(self, what: Hashable, of: Callable[[], Any]) -> Any:
        """What `of` gives, which is called the first time alone."""
        if what not in self.kept:
            self.kept[what] = of()
        return self.kept[what]

    def need(self, *names: str, by: str) -> tuple[LanguageModel, ...]:
        """The named models.

        Raises:
            ValueError: one is missing.
        """
        models = {name: getattr(self, name) for name in names}
        if missing := [name for name, other in models.items() if other is None]:
            raise ValueError(
                f"{by} compares with the model {missing[0]!r}, which was not given; pass "
                f"reference=Reference({', '.join(f'{name}=...' for name in names)})"
            )
        return tuple(models.values())


class Metric(Method):
    """One number of a model on facts, by place, with its interval over keys, its unit and its chance level."""

    name: ClassVar[str]
    unit: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """The models of a `Reference` without which there is no such number."""

    def __call__(self, model: LanguageModel, facts: Facts | Asked, *, reference: Reference | None = None) -> Scores:
        """The number, of a model that is read only.

        Raises:
            ValueError: no passage that it can be taken of, or no reference that it needs.
        """
        raise NotImplementedError


class OfAnswers(Metric):
    """A metric of the tokens of answers: several of them come from one reading."""

    def of(self, read: Read, questions: Asked) -> Scores:
        """The number, of answers that were read already."""
        raise NotImplementedError

    def __call__(self, model: LanguageModel, facts: Facts | Asked, *, reference: Reference | None = None) -> Scores:
        questions = asked_of(facts)
        return self.of(read_answers(model, questions.passages), questions)


def asked_of(facts: Facts | Asked) -> Asked:
    """What is asked; of facts as they are, what `ask` asks by default."""
    return ask(facts) if isinstance(facts, Facts) else facts
