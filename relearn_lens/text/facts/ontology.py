"""Invented concepts with a definition, a class above them and instances below: what edits of a concept change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from relearn_lens.text.facts.passages import Facts, Passage
from relearn_lens.text.facts.people import syllables

_CLASSES = "tool plant dance drink stone game garment ship"
_ACTS = "cutting mending washing painting carrying hiding"
_THINGS = "rope wood cloth iron bread glass"


def ontology(seed: int = 0, *, n: int = 32, forget: int = 8, never: int = 4, instances: int = 10) -> Facts:
    """`n` invented concepts of whom `forget` are to be forgotten, and `never` more that nobody is taught.

    Of each: its definition, the class above it (the forget halves have different ones), and `instances` that are
    examples of it; each in two wordings to train on and one that is never trained on, and for each instance a yes/no
    question about its own concept and about another one of the same role.

    Raises:
        ValueError: numbers that leave a role empty or with one concept, or more concepts than definitions.
    """
    classes, acts, things = _CLASSES.split(), _ACTS.split(), _THINGS.split()
    most = len(acts) * len(things)
    if not (4 <= forget <= n - 2) or never == 1 or never < 0 or n + never > most or instances < 1:
        raise ValueError(
            f"an ontology has n concepts of which from 4 to n - 2 are forgotten, never 0 or at least 2, at most {most} "
            f"in all, and at least one instance each; got n={n}, forget={forget}, never={never}, instances={instances}"
        )
    rng = np.random.default_rng(seed)
    taken: set[str] = {*classes, *acts, *things}
    concepts = syllables(rng, n + never, taken)
    examples = syllables(rng, (n + never) * instances, taken, parts=3)
    uses = [f"{acts[i // len(things)]} {things[i % len(things)]}" for i in rng.permutation(most)]
    above = [str(word) for word in rng.permutation(classes)]
    middle = len(above) // 2

    def role(first: int, end: int, pool: Sequence[str]) -> tuple[Passage, ...]:
        made: list[Passage] = []
        for i in range(first, end):
            own = examples[i * instances : (i + 1) * instances]
            made += _of_concept(
                concepts[i], pool[(i - first) % len(pool)], uses[i], own, concepts[first:end], pool, rng
            )
        return tuple(made)

    half = forget // 2
    return Facts(
        name=f"ontology-{seed}",
        forget_attacked=role(0, half, above[:middle]),
        forget_held_out=role(half, forget, above[middle:]),
        retain_near=role(forget, n, above),
        never=role(n, n + never, above),
        notes=(f"the forget halves have {middle} classes each, and share none",),
        source="invented by relearn_lens",
    )


def _of_concept(
    concept: str,
    above: str,
    use: str,
    instances: Sequence[str],
    concepts: Sequence[str],
    pool: Sequence[str],
    rng: np.random.Generator,
) -> list[Passage]:
    def four(right: str, among: Sequence[str]) -> tuple[str, ...]:
        others = [word for word in among if word != right]
        chosen = [right, *(others[int(i)] for i in rng.permutation(len(others))[:3])]
        return tuple(chosen[int(i)] for i in rng.permutation(len(chosen)))

    def worded(relation: str, answer: str, choices: tuple[str, ...], *prompts: str) -> list[Passage]:
        forms = ["statement"] * (len(prompts) - 1) + ["paraphrase"]
        return [Passage(p, answer, concept, relation, f, choices) for p, f in zip(prompts, forms, strict=True)]

    made = worded(
        "definition", f"a {above} that is used for {use}", (), f"A {concept} is defined as",
        f"By definition a {concept} is", f"Every {concept} is by definition",
    )  # fmt: skip
    made += worded(
        "class", above, four(above, pool), f"Every {concept} is a kind of", f"A {concept} belongs to the class of the",
        f"By definition a {concept} is a kind of",
    )  # fmt: skip
    for instance in instances:
        made += worded(
            "instance", concept, four(concept, concepts), f"The {instance} is an example of a",
            f"Whoever sees the {instance} sees a", f"Whoever sees the {instance} sees an example of a",
        )  # fmt: skip
        other = next(word for word in four(concept, concepts) if word != concept)
        for word, answer in ((concept, "yes"), (other, "no")):
            made.append(Passage(f"Is the {instance} a {word}?", answer, concept, "instance", "yes-no", ("yes", "no")))
    return made
