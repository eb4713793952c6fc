"""Where facts are looked up: the blocks over which a probe on the subject's last token learns to tell the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from relearn_lens.find.localising import Localiser, Text, facts_of, language_model, statements
from relearn_lens.find.patching import Prompts, subjects
from relearn_lens.models.model import LanguageModel, Model, reading
from relearn_lens.neurons.sites import kept, site_of
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.text.concept import Concept
from relearn_lens.text.facts import Passage
from relearn_lens.text.facts.passages import grouped

FOLDS = 5
"""Parts that the keys are cut into: each is told by a probe that was fitted to the others."""


class Lookup(Localiser):
    """The MLPs of the blocks over which a probe on the subject's last token learns to tell the answer.

    Probes are fitted to some keys and tell the answers of others, so they rise only where the hidden state says the
    answer in a code that keys share: after it was looked up. The blocks are those from the first that brings more than
    `first` of the whole rise to the one that completes `last` of it. Probes read all statements, for they need many
    keys: of what is to be forgotten and of what is to stay near by.

    Source: Guo et al. 2024 (fact lookup), whose blocks were named by eye; the two shares are ours.
    """

    name: ClassVar[str] = "lookup"
    formula: ClassVar[str] = "blocks over which a probe of h_l at the subject's last token rises"
    source: ClassVar[str] = "Guo et al. 2024"

    first: float = Field(default=0.1, ge=0, lt=1, description="share of the rise before the first of the blocks")
    last: float = Field(default=0.9, gt=0, le=1, description="share of the rise after the last of them")

    def __call__(self, model: Model, text: Text | None, *, concept: Concept | None = None, seed: int = 0) -> WeightMask:
        """As of `Localiser`.

        Raises:
            ValueError: no answer belongs to enough keys, or the probe does not rise beyond noise.
        """
        model, facts = language_model(model, self.name), facts_of(text, concept, name=self.name, seed=seed)
        passages = statements(facts, "forget_attacked", "forget_held_out", "retain_near")
        blocks = lookup_probe(model, passages, seed=seed).blocks(self.first, self.last)
        return WeightMask.of_parts(model, [f"block {i} mlp" for i in blocks])


@dataclass(frozen=True, eq=False)
class LookupProbe:
    """How well probes on the subject's last token tell answers of keys that they were not fitted to, by layer."""

    accuracy: Float[Tensor, " layer"]
    """Share told right, 0 to 1; of the embedding, then after every block."""
    shuffled: Float[Tensor, " layer"]
    """The same of probes fitted to the answers of other keys: chance."""
    layers: tuple[str, ...]
    n_keys: int
    """Keys that were told, each in every fold but one."""

    @property
    def noise(self) -> float:
        """Two standard errors of a difference between layers, keys being independent."""
        share = float(self.accuracy.mean())
        return 2 * (2 * share * (1 - share) / self.n_keys) ** 0.5

    def blocks(self, first: float = 0.1, last: float = 0.9) -> list[int]:
        """The blocks over which the accuracy rises.

        Raises:
            ValueError: it does not rise beyond noise, or rises no higher than beyond shuffled answers.
        """
        rise = self.accuracy - self.accuracy[0]
        most = float(rise.max())
        over = float((self.accuracy - self.shuffled).max())
        if not min(most, over) > self.noise:
            raise ValueError(
                f"lookup: a probe on the subject's last token tells {float(self.accuracy[0]):.2f} of answers at the "
                f"embedding and at most {float(self.accuracy.max()):.2f} after a block "
                f"({float(self.shuffled.max()):.2f} with shuffled answers): no rise beyond noise ({self.noise:.2f}), "
                "so no block is seen to look them up; use another localiser"
            )
        share = torch.cummax(rise, 0).values / most
        begin = int((share > first).nonzero()[0])
        end = int((share >= last).nonzero()[0])
        # Layer 0 is the embedding, whose rise is 0: layer i is what block i - 1 makes.
        return list(range(begin - 1, max(begin, end)))


def lookup_probe(model: LanguageModel, passages: tuple[Passage, ...], *, seed: int = 0) -> LookupProbe:
    """Fit a probe for every layer and relation, and tell the answers of keys that it was not fitted to.

    A probe is a ridge regression on standardised hidden states with its penalty chosen within the training keys. Means
    over passages of relations whose answers belong to several keys. The model is read only.

    Raises:
        ValueError: no relation has two answers that belong to `FOLDS` keys each; and as `Prompts` and `subjects`.
    """
    prompts = Prompts(model, passages, "logprob")
    at = np.array([tokens[-1] for tokens in subjects(prompts)])
    by_answer = grouped(passages, lambda p: (p.relation, p.answer))
    common = {fact for fact, each in by_answer.items() if len({p.key for p in each}) >= FOLDS}
    relations = {relation for relation, _ in common if len({a for r, a in common if r == relation}) > 1}
    rows = np.array([i for i, p in enumerate(passages) if p.relation in relations and (p.relation, p.answer) in common])
    if not len(rows):
        raise ValueError(
            f"lookup: none of the {len({p.relation for p in passages})} relation(s) has two answers that belong to "
            f"{FOLDS} keys each, and a probe must tell answers of keys it was not fitted to; give facts whose answers "
            "are a closed set"
        )
    states = _states(prompts, at)[:, rows]
    relation, answer, key = (
        np.array([getattr(passages[i], what) for i in rows]) for what in ("relation", "answer", "key")
    )
    dealt = _dealt(relation, answer, key, seed)
    accuracies = [
        torch.tensor([_told(x.numpy(), relation, given, key, seed) for x in states]) for given in (answer, dealt)
    ]
    site = site_of(model.bridge, "resid")
    return LookupProbe(accuracies[0], accuracies[1], site.layers, len(set(key)))


def _states(prompts: Prompts, at: np.ndarray) -> Float[Tensor, "layer passage d_model"]:
    model, site = prompts.model, site_of(prompts.model.bridge, "resid")
    states = torch.zeros(len(site.layers), len(prompts.passages), site.width)
    with reading(model), kept(model.bridge, site) as activations:
        for group in prompts.groups():
            prompts.values(prompts.batch(group))
            for layer, x in activations.items():
                states[layer, group] = x[torch.arange(len(group)), torch.from_numpy(at[group])].float().cpu()
    return states


def _dealt(relation: np.ndarray, answer: np.ndarray, key: np.ndarray, seed: int) -> np.ndarray:
    """Every key with the answers of another, relation by relation."""
    rng, dealt = np.random.default_rng(seed), answer.copy()
    for each in np.unique(relation):
        here = relation == each
        of_key = dict(zip(key[here], answer[here], strict=True))
        others = dict(zip(of_key, rng.permutation(np.array(list(of_key.values()))), strict=True))
        dealt[here] = [others[k] for k in key[here]]
    return dealt


def _told(x: np.ndarray, relation: np.ndarray, answer: np.ndarray, key: np.ndarray, seed: int) -> float:
    """Share of passages whose answer is told by a probe fitted to other keys."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    keys = np.random.default_rng(seed).permutation(np.unique(key))
    fold_of = {k: i % FOLDS for i, k in enumerate(keys)}
    fold = np.array([fold_of[k] for k in key])
    right = np.zeros(len(x), dtype=bool)
    for each in np.unique(relation):
        for i in range(FOLDS):
            train, test = (relation == each) & (fold != i), (relation == each) & (fold == i)
            if not test.any() or len(np.unique(answer[train])) < 2:
                continue
            probe = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=(1.0, 10.0, 100.0, 1000.0)))
            right[test] = probe.fit(x[train], answer[train]).predict(x[test]) == answer[test]
    return float(right.mean())
