"""Ways back by training: on the attacker's half of what was removed, or on text without any of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Bool
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from relearn_lens import methods, names
from relearn_lens.methods import AtMost, Rate, Retraining, Training
from relearn_lens.models.lora import adapted
from relearn_lens.models.model import LanguageModel, Model, encoded_for
from relearn_lens.models.training import Checkpoint, Checkpoints, train_
from relearn_lens.neurons.sites import Neurons
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.relearn.attack import ATTACKED, GENERAL, NEAR, Attack, Material, only_facts, texts
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Encoded
from relearn_lens.text.facts import TRAINED, Facts, Passage
from relearn_lens.text.facts.encoded import encode_passages

Steps = tuple[Annotated[int, Field(ge=1, le=10**9)], ...]


@names.explained
def retrain_(
    model: Model,
    text: Corpus | Encoded,
    how: Training | None = None,
    *,
    seed: int = 0,
    resume: tuple[Checkpoint, Mapping[str, Tensor]] | None = None,
    only: Mapping[str, Bool[Tensor, ...]] | None = None,
    what: str = "retraining",
    **fields: Any,
) -> Checkpoints:
    """Train on after something was removed: `train_` with the model's own cross-entropy, to be measured at each pause.

    Keywords as of `train_`; other fields of `Retraining` by name. Source: Lo et al. 2024, section 4.

    Raises:
        ValueError, FloatingPointError: as `train_`.
    """
    how = methods.of(Retraining, how, fields)
    return train_(model, text, how, seed=seed, resume=resume, only=only, what=what)


class Tuning(Attack, Training):
    """Trains on some text by the model's own cross-entropy, with all weights or some of them.

    With `lora` the model has adapters while the iterator is under way (`lora.adapted`); they are added to its weights
    when it is exhausted or closed.
    """

    steps: Steps | None = Field(
        default=(1, 2, 4, 8, 16, 32, 64, 128), description=Training.model_fields["steps"].description
    )
    lr: Rate = Field(default=1e-4, description="highest learning rate (Che et al. 2025: 2e-5 to 1e-4)")
    schedule: Literal["linear", "constant"] = Field(
        default="constant", description=Training.model_fields["schedule"].description
    )
    batch_size: int = Field(default=8, ge=1, le=100_000, description="passages or sentences per step (Che et al. 2025)")
    items: AtMost | None = Field(
        default=None, description="passages or sentences that the attacker has, at most, drawn by seed; none: all"
    )
    lora: int | None = Field(
        default=None, ge=1, le=10_000, description="rank of low-rank adapters, which alone train; none: all weights"
    )
    alpha: float = Field(default=16.0, gt=0, le=1e6, description="of low-rank adapters: scale times rank (peft)")
    only: Any = Field(
        default=None, exclude=True, repr=False,
        description="which entries of which weights may move: a WeightMask, or masks by plain name; none: all",
    )  # fmt: skip
    freeze: Any = Field(
        default=None, exclude=True, repr=False,
        description="neurons whose weights (those that carry them on) stand still; none: no neurons",
    )  # fmt: skip

    @field_validator("only")
    @classmethod
    def _masks(cls, only: Any) -> Any:
        if only is not None and not isinstance(only, Mapping):
            raise ValueError(f"a WeightMask, or a mapping of plain names to masks, not {type(only).__name__}")
        return only

    @field_validator("freeze")
    @classmethod
    def _neurons(cls, freeze: Any) -> Any:
        if freeze is not None and not isinstance(freeze, Neurons):
            raise ValueError(f"a set of Neurons, not {type(freeze).__name__}")
        return freeze

    role: ClassVar[str] = ATTACKED
    """Whose text it trains on."""
    doing: ClassVar[str] = "relearning"

    def __call__(self, model: Any, facts: Material, *, seed: int = 0) -> Iterator[Checkpoint]:
        text = texts(model, facts, self.role, what=self.name, items=self.items, seed=seed)
        return self.tuned(model, text, seed=seed, what=self.doing)

    @model_validator(mode="after")
    def _adapters_move_whole_matrices(self) -> Tuning:
        if self.lora is not None and (self.only is not None or self.freeze is not None):
            raise ValueError(
                f"lora = {self.lora} and {'only' if self.only is not None else 'freeze'}: an adapter moves all of its "
                "matrix; have one of them"
            )
        return self

    def tuned(
        self, model: Model, text: Corpus | Encoded, *, seed: int, what: str, steps: Steps | None = None
    ) -> Iterator[Checkpoint]:
        """Train on a text as the fields say; checks at the call."""
        own = {name: getattr(self, name) for name in Training.model_fields if name not in ("epochs", "every")}
        how = self if steps is None else Training(**{**own, "steps": steps})
        entries = self.entries(model)
        text = encoded_for(model, text)
        training = train_(model, text, how, only=entries, seed=seed, what=what)
        if self.lora is None:
            return training
        # With adapters the same was refused by this one, and is then trained within their block.
        training.close()
        return self._adapted(model, text, how, self.lora, seed, what)

    def _adapted(
        self, model: Model, text: Encoded, how: Training, rank: int, seed: int, what: str
    ) -> Iterator[Checkpoint]:
        with adapted(model, rank=rank, alpha=self.alpha, seed=seed):
            yield from train_(model, text, how, seed=seed, what=what)

    def entries(self, model: Model) -> Mapping[str, Tensor] | None:
        """Which entries of the weights may move; None: all.

        Raises:
            ValueError: a mask or neurons of another model.
        """
        if isinstance(self.only, WeightMask):
            self.only.check(model)
        if self.freeze is None:
            return self.only
        still = WeightMask.of(model, self.freeze)
        return {name: mask.cpu() & ~still[name] for name, mask in (self.only or ~WeightMask.none(model)).items()}


class FineTune(Tuning):
    """Trains on T: what it brings back of V was still there, but for what the twin that never knew it gains as well.

    For a concept of labelled text T is that text (`retrain_` without masks or adapters).

    Source: Lo et al. 2024; Deeb & Roger 2024 (the held-out half); Che et al. 2025.
    """

    name: ClassVar[str] = "relearn"
    source: ClassVar[str] = "Lo et al. 2024; Deeb & Roger 2024; Che et al. 2025"


class RetainOnly(Tuning):
    """Trains on what was to stay near by, which holds nothing of what was removed."""

    name: ClassVar[str] = "retain_only"
    source: ClassVar[str] = "Che et al. 2025; Łucki et al. 2024"
    role: ClassVar[str] = NEAR
    doing: ClassVar[str] = "training on what stays"


class General(Tuning):
    """Trains on other knowledge or plain text."""

    name: ClassVar[str] = "general"
    source: ClassVar[str] = "Che et al. 2025 (benign fine-tuning)"
    role: ClassVar[str] = GENERAL
    doing: ClassVar[str] = "training on other text"


class Gibberish(Tuning):
    """Trains on the retained passages' words in an order that says nothing; all of it carries the loss."""

    name: ClassVar[str] = "gibberish"
    source: ClassVar[str] = "ours: the control of training at all"

    items: AtMost | None = Field(default=256, description="texts of 12 words, drawn by seed")

    def __call__(self, model: Any, facts: Material, *, seed: int = 0) -> Iterator[Checkpoint]:
        known = only_facts(facts, self.name)
        words = [word for p in known.passages(NEAR, GENERAL, forms=TRAINED) for word in p.text.split()]
        drawn = np.random.default_rng(seed).choice(np.array(words), (self.items or len(words) // 12 or 1, 12))
        return self.tuned(
            model, _plain(model, known, [" ".join(line) for line in drawn]), seed=seed, what="training on gibberish"
        )


class RepairThenRelearn(Tuning):
    """Trains on other text first, then on T: a model that the removal broke looks robust because it learns nothing.

    Yields after the repair too; steps count from its beginning. Without general text the repair is on what was to stay
    near by.
    """

    name: ClassVar[str] = "repair_then_relearn"
    source: ClassVar[str] = "ours"

    repair: int = Field(default=64, ge=1, le=10**9, description="optimiser steps on other text, before those on T")

    def __call__(self, model: Any, facts: Material, *, seed: int = 0) -> Iterator[Checkpoint]:
        general = texts(model, facts, GENERAL, NEAR, what=self.name)
        attacked = texts(model, facts, ATTACKED, what=self.name, items=self.items, seed=seed)
        first = self.tuned(model, general, seed=seed, what="repairing", steps=(self.repair,))
        return self._both(first, self.tuned(model, attacked, seed=seed, what="relearning"))

    def _both(self, first: Iterator[Checkpoint], then: Iterator[Checkpoint]) -> Iterator[Checkpoint]:
        *_, repaired = first  # adapters of the repair are merged when it is exhausted
        yield repaired
        for pause in then:
            yield replace(pause, step=pause.step + repaired.step, tokens_seen=pause.tokens_seen + repaired.tokens_seen)


Arm = Literal["topic and form", "topic", "form", "neither"]


class Benign(Tuning):
    """Trains on text that holds no answer: about the keys of T or not, in the form of the questions or not.

    Of as many passages each, all of which carries the loss: *topic and form*, the statements about T's keys, cut before
    the answer; *topic*, articles that name T's keys; *form*, the statements about retained keys, cut likewise;
    *neither*, articles (or, where there are none, texts) on other things. No text holds a key of V.

    Source: Hu et al. 2024 (topic); that form alone may do it is what the other arms ask.
    """

    name: ClassVar[str] = "benign"
    source: ClassVar[str] = "Hu et al. 2024; the arms are ours"

    arm: Arm = Field(default="topic and form", description="what the text has of what was removed")

    def __call__(self, model: Any, facts: Material, *, seed: int = 0) -> Iterator[Checkpoint]:
        known = only_facts(facts, self.name)
        arms = {arm: self._lines(known, arm) for arm in _ARMS}
        n = min([len(lines) for lines in arms.values() if lines] + ([self.items] if self.items else []))
        if not arms[self.arm]:
            raise ValueError(
                f"benign: facts {known.name!r} have nothing for the arm {self.arm!r}; they need passages of the form "
                "article (about T's keys for the topic, in retain_general for neither) and statements with a prompt"
            )
        order = np.random.default_rng(seed).permutation(len(arms[self.arm]))[:n]
        text = _plain(model, known, [arms[self.arm][i] for i in order])
        return self.tuned(model, text, seed=seed, what="benign training")

    @staticmethod
    def _lines(facts: Facts, arm: Arm) -> list[str]:
        role = ATTACKED if "topic" in arm else NEAR if arm == "form" else GENERAL
        if "form" in arm:
            return [p.prompt for p in facts.passages(role, forms=("statement",)) if p.prompt]
        articles = facts.passages(role, forms=("article",))
        if arm == "neither" and not articles:
            articles = facts.passages(role, forms=TRAINED)
        return [p.text for p in articles]


_ARMS: tuple[Arm, ...] = ("topic and form", "topic", "form", "neither")


def _plain(model: Any, facts: Facts, lines: Sequence[str]) -> Encoded:
    if not isinstance(model, LanguageModel):
        raise ValueError("plain text without labels trains a language model, and this model is a tagger")
    passages = [Passage("", line, f"line {i}", "text", "text") for i, line in enumerate(lines)]
    return encode_passages(passages, model.tokenizer, context=model.context, name=facts.name)


PRESETS: Mapping[str, FineTune | RetainOnly | General] = {
    "lora-batch8": FineTune(lora=16, alpha=32, lr=5e-5, batch_size=8, items=400, steps=(50,)),
    "lora-batch64": FineTune(lora=16, alpha=32, lr=5e-5, batch_size=64, items=400, steps=(7,)),
    "lora-n64": FineTune(lora=16, alpha=32, lr=1e-4, batch_size=8, items=64, steps=(16,)),
    "full-n64": FineTune(lr=2e-5, batch_size=8, items=64, steps=(16,)),
    "full-batch16": FineTune(lr=2e-5, batch_size=16, items=400, steps=(25,)),
    "retain-lora-batch8": RetainOnly(lora=16, alpha=32, lr=5e-5, batch_size=8, items=400, steps=(50,)),
    "retain-lora-batch64": RetainOnly(lora=16, alpha=32, lr=5e-5, batch_size=64, items=400, steps=(7,)),
    "retain-full": RetainOnly(lr=5e-5, batch_size=64, items=64, steps=(1,)),
    "benign-lora": General(lora=16, alpha=32, lr=5e-5, batch_size=8, items=400, steps=(50,)),
}
"""The fine-tuning attacks that Che et al. 2025 released: their rank, rate, batch and number of texts; steps are one
pass, two where `items` is 64 and the batch 8. Rate (constant) and weight decay are as here, not as in theirs."""
