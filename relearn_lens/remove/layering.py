"""Removers that forget piece by piece, so that what brings one piece back does not bring back the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from relearn_lens import methods
from relearn_lens.methods import Training
from relearn_lens.models.model import Model, reading
from relearn_lens.models.training import Checkpoint, Checkpoints, Step, plain, train_
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.remove.losses import NPO, GradDiff, SimNPO
from relearn_lens.remove.removal import FORGET, RETAIN, Entries, Remover, Removing, Texts
from relearn_lens.remove.representations import RMU
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Encoded
from relearn_lens.text.facts.encoded import EncodedPassages, encode_passages

LATER = "later"
"""The role of what is to be forgotten in a later stage, and is kept until then."""


class Layered(Remover):
    """Layered unlearning: what is to be forgotten is cut into folds F_1, ..., F_k; stage i forgets F_1 to F_i and keeps
    all else, the folds after it too.

    Facts are cut by key, other texts by sentence, as the seed says. Every stage is a training of its own, by the same
    settings; the folds that are kept have the loss and the weight of the retained text. What `over` compares with is
    the model before the first stage.

    Source: Qian et al. 2025 (layered unlearning), over RMU and SimNPO.
    """

    name: ClassVar[str] = "layered"
    formula: ClassVar[str] = (
        "for i = 1 to folds: f(F_1, ..., F_i) + r(retained) + r(F_i+1, ...), f and r those of `over`"
    )
    source: ClassVar[str] = "Qian et al. 2025"

    over: GradDiff | NPO | SimNPO | RMU = Field(default=RMU(), description="what forgets, and keeps, in every stage")
    folds: int = Field(default=3, ge=1, le=100, description="folds, and stages")

    def entries(self, model: Model) -> Entries:
        """Those of `over`."""
        return self.over.entries(model)

    def stages(self, model: Model, forget: Corpus | Encoded, seed: int) -> list[dict[str, Corpus | Encoded]]:
        """What is forgotten in each stage, and what is kept until a later one.

        Raises:
            ValueError: fewer keys or sentences than folds.
        """
        if isinstance(forget, EncodedPassages):
            names = np.array([p.key for p in forget.passages])
        else:
            forget = forget.corpus if isinstance(forget, Encoded) else forget
            names = np.arange(len(forget))
        keys = np.random.default_rng(seed).permutation(np.unique(names))
        if len(keys) < self.folds:
            raise ValueError(f"folds = {self.folds}: there are {len(keys)} keys to forget; take fewer folds")

        def take(chosen: list[np.ndarray]) -> Corpus | Encoded:
            which = np.flatnonzero(np.isin(names, np.concatenate(chosen)))
            if isinstance(forget, EncodedPassages):
                passages = [forget.passages[i] for i in which]
                return encode_passages(passages, model.tokenizer, context=model.context, name=forget.corpus.name)
            return forget.take(which)

        cut = np.array_split(keys, self.folds)
        return [
            {FORGET: take(cut[:i])} | ({LATER: take(cut[i:])} if i < self.folds else {})
            for i in range(1, self.folds + 1)
        ]

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: Model, texts: Texts, where: Mapping[str, Bool[Tensor, ...]] | None = None, *, seed: int = 0,
        how: Training | None = None, step: Step = plain, resume: Any = None, **fields: Any,
    ) -> Iterator[Checkpoint]:  # fmt: skip
        """As of `Remover`, of each stage in turn.

        Raises:
            ValueError: as of `Remover`, fewer keys than folds, a remover without a retained text, or a `resume`.
        """
        if resume is not None:
            raise ValueError("layered trains several times, and does not resume")
        if isinstance(where, WeightMask):
            where.check(model)
        where = self.entries(model) if where is None else where
        how = methods.of(Removing, how or self.over.usual, fields)
        terms = self.over.terms(model, seed)
        if RETAIN not in terms:
            raise ValueError(f"layered keeps folds as {self.over.name} keeps the retained text; give alpha above 0")
        given = self.texts(model, texts, (FORGET, RETAIN), seed)
        stages, trainings = self.stages(model, given[FORGET], seed), []
        for i, stage in enumerate(stages):
            by_role = {role: model.encode(t) if isinstance(t, Corpus) else t for role, t in (given | stage).items()}
            of = terms | ({LATER: terms[RETAIN]} if LATER in stage else {})
            objective = self.over.objective(model, of, where, seed)

            def begun(i: int = i, by_role: Any = by_role, objective: Any = objective, kept: Any = None) -> Checkpoints:
                return train_(
                    model, by_role, how, objective=objective, step=step, only=where, reference=kept, seed=seed + i,
                    what=f"removing by layered, {i + 1} of {len(stages)}",
                )  # fmt: skip

            trainings.append((by_role, objective, begun))
        trainings[0][2]().close()  # checks all of it
        return self._staged(model, trainings)

    def _staged(self, model: Model, trainings: Any) -> Iterator[Checkpoint]:
        with reading(model):
            kept = [o.reference(model, texts) if hasattr(o, "reference") else None for texts, o, _ in trainings]
        steps, tokens, epochs = 0, 0, 0.0
        for reference, (_, _, begun) in zip(kept, trainings, strict=True):
            pause = None
            for pause in begun(kept=reference):
                yield replace(
                    pause, step=steps + pause.step, epoch=epochs + pause.epoch, tokens_seen=tokens + pause.tokens_seen
                )
            assert pause is not None
            steps, tokens, epochs = steps + pause.step, tokens + pause.tokens_seen, epochs + pause.epoch
