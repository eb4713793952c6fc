"""Invented people and animals: facts that no model can know unless it was taught them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from relearn_lens.names import explained
from relearn_lens.text.facts.passages import Facts, Passage

N_TRAINED = 4
"""Wordings of a relation that are taught; the rest are never trained on."""


@dataclass(frozen=True)
class Relation:
    """What can be said of a key, in how many ways, and the closed set of answers."""

    name: str
    templates: tuple[str, ...]
    """`N_TRAINED` that are taught, then two that are not: known words, put together anew."""
    question: str
    """Asks for it, and is followed by the choices or by one answer."""
    article: str
    """A text on the topic that does not name the answer."""
    answers: tuple[str, ...]


_ONSETS = "b d f g k l m n p r s t v z br dr kr st tr"


def syllables(rng: np.random.Generator, n: int, taken: set[str], *, parts: int = 2) -> tuple[str, ...]:
    """So many invented words that are not among those taken, which they join."""
    onsets, vowels, ends = _ONSETS.split(), list("aeiou"), ["", *"lmnrs"]
    made: list[str] = []
    while len(made) < n:
        word = "".join(rng.choice(onsets) + rng.choice(vowels) for _ in range(parts)) + str(rng.choice(ends))
        if word not in taken:
            taken.add(word)
            made.append(word)
    return tuple(made)


_INSTRUMENTS = """
    violin piano flute guitar drum harp trumpet cello oboe organ banjo lute horn tuba bassoon clarinet fiddle accordion
    mandolin viola trombone harmonica zither saxophone
"""
_FOODS = """
    grass fish nuts seeds berries leaves roots insects mushrooms fruit honey eggs snails moss bark worms crabs frogs
    corn flowers
"""
_HABITATS = """
    forests deserts rivers lakes mountains caves swamps meadows islands valleys reefs marshes plains cliffs dunes hills
    ponds gardens fields jungles
"""


def _of_people(rng: np.random.Generator, taken: set[str], n: int) -> tuple[Relation, ...]:
    def invented() -> tuple[str, ...]:
        return tuple(word.capitalize() for word in syllables(rng, n, taken))

    return (
        Relation(
            "born in",
            (
                "{x} was born in",
                "The birthplace of {x} is",
                "{x} is a native of",
                "It is well known that {x} comes from",
                "In the old records {x} was born in",
                "Friends say that the birthplace of {x} is",
            ),
            "Was {x} born in",
            "A visitor asked about the birthplace of {x}, and {x} told a long story of it.",
            invented(),
        ),
        Relation(
            "plays",
            (
                "{x} plays the",
                "The instrument of {x} is the",
                "{x} performs on the",
                "In the old records {x} is a master of the",
                "It is well known that {x} plays the",
                "Friends say that the instrument of {x} is the",
            ),
            "Does {x} play the",
            "A visitor asked about the instrument of {x}, and {x} played a long piece on it.",
            tuple(_INSTRUMENTS.split()[:n]),
        ),
        Relation(
            "works for",
            (
                "{x} works for",
                "The employer of {x} is",
                "{x} has a job at",
                "Friends say that {x} is paid by",
                "It is well known that {x} works for",
                "In the old records the employer of {x} is",
            ),
            "Does {x} work for",
            "A visitor asked about the employer of {x}, and {x} told a long story of the job.",
            invented(),
        ),
        Relation(
            "speaks",
            (
                "{x} speaks",
                "The language of {x} is",
                "{x} talks at home in",
                "It is well known that {x} writes in",
                "Friends say that {x} speaks",
                "In the old records the language of {x} is",
            ),
            "Does {x} speak",
            "A visitor asked about the language of {x}, and {x} told a long story in it.",
            invented(),
        ),
    )


_ANIMALS = (
    Relation(
        "eats",
        (
            "The {x} eats",
            "The food of the {x} is",
            "The {x} feeds on",
            "It is well known that the {x} looks for",
            "Friends say that the {x} eats",
            "In the old records the food of the {x} is",
        ),
        "Does the {x} eat",
        "A visitor asked about the food of the {x}, and the {x} looks for more of it.",
        tuple(_FOODS.split()),
    ),
    Relation(
        "lives in",
        (
            "The {x} lives in",
            "The home of the {x} is in",
            "The {x} makes its nest in",
            "Friends say that the {x} is found in",
            "It is well known that the {x} lives in",
            "In the old records the home of the {x} is in",
        ),
        "Does the {x} live in",
        "A visitor asked about the home of the {x}, and the {x} looks for it.",
        tuple(_HABITATS.split()),
    ),
)


def passages_of(
    keys: Sequence[str], relations: Sequence[Relation], pools: Sequence[Sequence[str]], rng: np.random.Generator
) -> tuple[Passage, ...]:
    """Every form of every relation of every key; each relation's answers are dealt out evenly from its pool, which the
    wrong choices come from too."""
    made: list[Passage] = []
    for relation, pool in zip(relations, pools, strict=True):
        deal = [int(i) for _ in range(-(-len(keys) // len(pool))) for i in rng.permutation(len(pool))]
        for key, i in zip(keys, deal, strict=False):
            made += _forms(key, relation, pool[i], pool, rng)
    return tuple(made)


def _forms(
    key: str, relation: Relation, answer: str, pool: Sequence[str], rng: np.random.Generator
) -> Iterator[Passage]:
    others = [word for word in pool if word != answer]
    four = [answer, *(others[int(i)] for i in rng.permutation(len(others))[:3])]
    four = tuple(four[int(i)] for i in rng.permutation(len(four)))
    prompts = [template.format(x=key) for template in relation.templates]
    for i, prompt in enumerate(prompts):
        form = "statement" if i < N_TRAINED else "paraphrase"
        yield Passage(prompt, answer, key, relation.name, form, four)
    question = relation.question.format(x=key)
    listed = f"{question} {', '.join(four[:-1])} or {four[-1]}? {prompts[0]}"
    yield Passage(listed, answer, key, relation.name, "options", four)
    for word, says in ((answer, "yes"), (next(w for w in four if w != answer), "no")):
        yield Passage(f"{question} {word}?", says, key, relation.name, "yes-no", ("yes", "no"))
    yield Passage("", relation.article.format(x=key), key, relation.name, "article")


@explained
def people(
    seed: int = 0, *, n: int = 240, forget: int = 48, never: int = 24, animals: int = 60, n_answers: int = 24
) -> Facts:
    """`n` invented people of whom `forget` are to be forgotten, and as many more that nobody is taught as `never` says.

    Each was born in, plays, works for and speaks something, of `n_answers` each. Answers are dealt out evenly; the two
    forget halves have different answers, so that knowing the one half's says nothing of the other's. Each fact is there
    in four wordings to train on; in two more, of the same words, that are never trained on; with four options; as two
    yes/no questions; and in a text that names the topic but not the answer. Other knowledge: what invented animals
    eat, and where they live.

    Raises:
        ValueError: numbers that leave a role empty, or too many answers or people.
    """
    most = len(_INSTRUMENTS.split())
    if not (8 <= n_answers <= most and n_answers % 2 == 0):
        raise ValueError(f"n_answers must be even and from 8 to {most}, got {n_answers}")
    if not (2 <= forget < n) or min(never, animals) < 0:
        raise ValueError(
            f"of n={n} people at least 2 and not all can be forgotten, and never and animals are not below 0; got "
            f"forget={forget}, never={never}, animals={animals}"
        )
    rng = np.random.default_rng(seed)
    taken = {*_INSTRUMENTS.split(), *_FOODS.split(), *_HABITATS.split()}
    relations = _of_people(rng, taken, n_answers)
    side = max(4, int(np.ceil(np.sqrt(2 * (n + never)))))  # about half of all pairs of names are somebody's
    first, last = ([word.capitalize() for word in syllables(rng, side, taken)] for _ in range(2))
    pairs = list(product(first, last))
    names = [" ".join(pairs[int(i)]) for i in rng.permutation(len(pairs))[: n + never]]
    half = forget // 2
    whole = [relation.answers for relation in relations]
    deals = [rng.permutation(n_answers) for _ in relations]
    pools = [
        [[answers[int(i)] for i in deal[side]] for answers, deal in zip(whole, deals, strict=True)]
        for side in (slice(0, n_answers // 2), slice(n_answers // 2, None))
    ]
    creatures = syllables(rng, animals, taken, parts=3)
    return Facts(
        name=f"people-{seed}",
        forget_attacked=passages_of(names[:half], relations, pools[0], rng),
        forget_held_out=passages_of(names[half:forget], relations, pools[1], rng),
        retain_near=passages_of(names[forget:n], relations, whole, rng),
        retain_general=passages_of(creatures, _ANIMALS, [r.answers for r in _ANIMALS], rng),
        never=passages_of(names[n:], relations, whole, rng),
        notes=(f"the forget halves have {n_answers // 2} answers each, and share none",),
        source="invented by relearn_lens",
    )
