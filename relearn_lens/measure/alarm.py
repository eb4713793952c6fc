"""An alarm for whoever lets somebody fine-tune a model: what was removed begins to return, and is not yet said.

1. A reading is what probes read of the removed facts in hidden states, the loss on their answers, and, where the
   weights of before the removal are known, how far the weights moved back towards them.
2. A signal counts by how far it is above the reading before the fine-tuning, in standard deviations of the same over
   fine-tunings that bring nothing back; the alarm is raised when the largest of them is above a threshold.
3. The threshold is the conformal quantile of the largest value of such a run, so that of n of them at most one in
   n + 1 is expected to raise a false alarm, as long as what comes is like them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback

from relearn_lens.models.model import LanguageModel, Model, Tagger, hidden, reading
from relearn_lens.neurons.sites import site_of, streaming
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Batch, Encoded
from relearn_lens.text.facts import FORGET, Facts, Passage
from relearn_lens.text.facts.encoded import encode_passages
from relearn_lens.text.facts.passages import grouped

FOLDS = 5
"""Parts that keys are dealt into: a probe is read on keys that it was not fitted to."""
STRENGTH = 0.1
"""Ridge penalty of the probes, per item, of states of standard deviation 1."""


class ReturnWarning(UserWarning):
    """What was removed begins to return."""


@dataclass(frozen=True)
class Reading:
    """What the alarm saw at one step; each is larger where more is back."""

    step: int
    probe: float
    """Chance that a probe prefers the right answer to another one of its relation, mean over layers: .5 is chance."""
    likelihood: float
    """Minus nats per token of the answers."""
    update: float | None
    """Cosine of the change of the weights since the fine-tuning began with minus that of the removal, -1 to 1; None
    without the weights of before."""
    right: float
    """What behaviour shows: share of the answers that are given greedily. Not a signal."""

    @property
    def signals(self) -> dict[str, float]:
        """The signals by name."""
        values = {"probe": self.probe, "likelihood": self.likelihood, "update": self.update}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Thresholds:
    """What fine-tunings look like that bring nothing back."""

    scale: Mapping[str, float]
    """Of each signal, the standard deviation (around 0) of its rises in them."""
    limit: float
    """In such standard deviations."""
    runs: int
    left_out: int
    """Runs that were not used, since behaviour returned in them."""
    false_alarms: float
    """Runs like them that are expected to raise it: share, at most."""


class ReturnAlarm(TrainerCallback):
    """Watches removed facts, or a concept, while a model is fine-tuned on anything; warns when they begin to return.

    A callback of transformers' `Trainer`; in any other loop call `alarm.step(model, 0)` before the first step and
    `alarm.step(model, n)` after the others. The model is a `LanguageModel` or `Tagger`, or a causal model of
    transformers (then with `tokenizer`), and is only read. Calibrate it first on the model before the fine-tuning:
    `alarm.calibrate(model, runs)`; each run trains it in place on data that bring nothing back, best some that are
    near the topic.

    Measured by `python -m tests.benchmarks.alarm` on four small models that were taught invented facts, from which
    NPO took some, with `base` given and read at 12 of 64 steps; 95 % intervals, which take fine-tunings as independent
    but for the lead's. Behaviour returned where 10 points more were answered.

    | what | measured |
    |---|---|
    | false alarms, kinds it was calibrated on, other seeds | 3 of 24, .12 [.03, .32]; .08 was aimed at |
    | false alarms, kinds it had not seen, 16 of them naming forgotten keys | 0 of 24, .00 [.00, .14] |
    | raised before behaviour returned | 41 of 48 returns, .85 [.72, .94]; at the same reading 4, after it 3, never 0 |
    | lead | median 7 steps [5, 13], from -20 to 47; below 0 in three of four returns by adapters of one model |

    Those 48 returns are 32 fine-tunings on half of the watched facts and 16 on retained facts of the same kind, all of
    which brought facts back. Where all weights trained it was raised within three steps on those facts; where adapters
    did, late or at the same reading in one model, 4 to 36 steps ahead in ten of the others' twelve. All false alarms
    are on other knowledge, in two models. Four models of this size say nothing of how it does on others: calibrate it,
    and look at fine-tunings that it was not calibrated on.

    Source: ours; conformal thresholds: Vovk et al. 2005.
    """

    def __init__(
        self,
        about: Facts | tuple[Corpus, Concept],
        *,
        roles: Sequence[str] = FORGET,
        thresholds: Thresholds | None = None,
        base: Mapping[str, Tensor] | None = None,
        tokenizer: Any = None,
        every: int = 1,
        stop: bool = False,
        returned: float | int = 0.1,
        items: int = 512,
        seed: int = 0,
    ):
        """`about` are the facts, of which those in `roles` are watched, or labelled text and a concept in it.

        `base` are weights of before the removal, by the names of `Model.weights()` or `named_parameters()`; a copy of
        the weights that the fine-tuning begins with is then kept. It reads at every `every`-th step, at most so many
        `items` (drawn by seed), and with `stop` a `Trainer` stops when the alarm is raised. Behaviour has returned
        where the share that is answered is `returned` above what it was at first.

        Raises:
            ValueError: nothing to watch, or probes would have nothing to be fitted to.
        """
        if not isinstance(about, Facts | tuple):
            raise ValueError(
                f"an alarm watches facts, or a text and a concept in it (corpus, concept); got a {type(about).__name__}"
            )
        if every < 1 or items < 2 or not 0 < returned < 1:
            raise ValueError(
                "every must be at least 1, items at least 2 and returned between 0 and 1, got "
                f"every={every}, items={items}, returned={returned}"
            )
        self.about, self.roles, self.thresholds, self.base = about, tuple(roles), thresholds, base
        self.tokenizer, self.every, self.stop, self.items, self.seed = tokenizer, every, stop, items, seed
        self.returned = returned
        self.readings: list[Reading] = []
        self.raised: int | None = None
        """The step at which it was raised."""
        self._began: dict[str, Tensor] = {}
        self._text: _Watched | None = None
        self._passages = _one_each(about, self.roles, items, seed) if isinstance(about, Facts) else []

    # --- as a callback

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Read the model before its first step."""
        self.tokenizer = self.tokenizer or kwargs.get("processing_class")
        self.step(model, int(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> Any:
        """Read it after a step, and stop the training if that is wanted."""
        self.step(model, int(state.global_step))
        if self.stop and self.raised is not None:
            control.should_training_stop = True
        return control

    # --- in any loop

    def step(self, model: Any, step: int) -> Reading | None:
        """Read a model after a step (0: before the first), and warn if what was removed begins to return.

        None where this step is not read (`every`).

        Raises:
            ValueError: no thresholds yet, or a model whose tokenizer is not known.
        """
        if self.thresholds is None:
            raise ValueError(
                "this alarm has no thresholds; give it fine-tunings that bring nothing back (alarm.calibrate(model, "
                "runs)), or the thresholds= of an earlier calibration"
            )
        if step % self.every and self.readings:
            return None
        if step == 0:
            self.restart()
        now = self._read(model, step)
        self.readings.append(now)
        if self.raised is None and self.level(now) > self.thresholds.limit:
            self.raised = step
            rises = ", ".join(f"{name} {rise:+.3g}" for name, rise in self.rises(now).items())
            warnings.warn(
                f"step {step}: what was removed begins to return ({rises}; {self.level(now):.1f} standard deviations "
                f"of harmless fine-tunings, the limit is {self.thresholds.limit:.1f}); {now.right:.0%} of it is "
                "answered",
                ReturnWarning,
                stacklevel=2,
            )
        return now

    @property
    def behaved(self) -> int | None:
        """The first step that was read at which behaviour had returned."""
        first = self.readings[0].right if self.readings else 0.0
        return next((r.step for r in self.readings if r.right - first >= self.returned - 1e-9), None)

    @property
    def lead(self) -> int | None:
        """Steps by which it was raised before behaviour returned, below 0 after it; None unless both happened."""
        return None if self.raised is None or self.behaved is None else self.behaved - self.raised

    def restart(self) -> None:
        """Forget what was read, for another fine-tuning."""
        self.readings, self.raised, self._began = [], None, {}

    def rises(self, now: Reading) -> dict[str, float]:
        """How far each signal is above the first reading."""
        return {name: value - self.readings[0].signals[name] for name, value in now.signals.items()}

    def level(self, now: Reading) -> float:
        """The largest rise, in standard deviations of harmless fine-tunings."""
        assert self.thresholds is not None
        return max(rise / self.thresholds.scale[name] for name, rise in self.rises(now).items())

    def calibrate(
        self, model: Any, runs: Iterable[Callable[[Any], Iterable[Any]]], *, false_alarms: float | int = 0.1
    ) -> Thresholds:
        """Set the thresholds by fine-tunings that bring nothing back, of the model as it is; its weights are put back.

        A run is given the model, trains it in place and yields wherever it is to be read (of what it yields, `step` is
        used where there is one): `lambda model: rl.relearn.General(steps=(4, 16))(model, facts, seed=1)`. With n runs
        at most the share max(false_alarms, 1 / (n + 1)) of runs like them is expected to raise the alarm.

        Raises:
            ValueError: no run that yields, or a share that is not between 0 and 1.
        """
        if not 0 < false_alarms < 1:
            raise ValueError(f"the share of false alarms must be between 0 and 1, got {false_alarms}")
        before = {name: value.clone() for name, value in _weights(model).items()}
        each: list[list[dict[str, float]]] = []
        left_out = 0
        for run in runs:
            self.restart()
            self.readings.append(self._read(model, 0))
            pauses = iter(run(model))
            try:
                for i, pause in enumerate(pauses, start=1):
                    self.readings.append(self._read(model, int(getattr(pause, "step", i))))
            finally:
                if isinstance(pauses, Generator):
                    pauses.close()  # what it still has in the model goes before the weights are put back
                with torch.no_grad():
                    for name, value in _weights(model).items():
                        value.copy_(before[name])
            if self.behaved is not None:
                left_out += 1
            elif len(self.readings) > 1:
                each.append([self.rises(now) for now in self.readings[1:]])
        self.restart()
        if not each:
            raise ValueError(
                f"no run to calibrate on: {left_out} brought back what was removed, the others yielded nothing; give "
                "fine-tunings that do not, and stop now and then to be read, some on text near the topic"
            )
        every = [rise for rises in each for rise in rises]
        scale = {name: max(math.sqrt(np.mean([rise[name] ** 2 for rise in every])), 1e-12) for name in every[0]}
        largest = sorted(max(rise / scale[name] for now in rises for name, rise in now.items()) for rises in each)
        n = len(largest)
        place = min(n, math.ceil((n + 1) * (1 - false_alarms)))
        self.thresholds = Thresholds(scale, largest[place - 1], n, left_out, 1 - place / (n + 1))
        return self.thresholds

    # --- reading

    def _read(self, model: Any, step: int) -> Reading:
        text = self._watched(model)
        states, nats, right = text.read(model)
        seen = text.watched
        return Reading(
            step,
            _preferred(states, text.label, text.kind, text.group, seen, self.seed),
            -float(nats[seen].sum() / text.tokens[seen].sum()),
            self._update(model),
            float(right[seen].mean()),
        )

    def _watched(self, model: Any) -> _Watched:
        if self._text is None:
            if isinstance(self.about, Facts):
                if isinstance(model, Tagger):
                    raise ValueError(
                        "facts are answered by a language model, and this model is a tagger; give (corpus, concept) "
                        "in their place"
                    )
                tokenizer = self.tokenizer or getattr(model, "tokenizer", None)
                if tokenizer is None:
                    raise ValueError("the tokenizer of this model is not known; give it as tokenizer=")
                context = getattr(model, "context", None) or getattr(model.config, "max_position_embeddings", None)
                self._text = _of_facts(self._passages, self.about, self.roles, tokenizer, context)
            else:
                if not isinstance(model, Model):
                    raise ValueError(
                        f"a concept is watched in a Tagger or LanguageModel, got a {type(model).__name__}; load it as "
                        "one of them, or give facts (rl.facts.from_concept)"
                    )
                self._text = _of_concept(*self.about, model, self.items, self.seed)
        return self._text

    def _update(self, model: Any) -> float | None:
        if self.base is None:
            return None
        now = {name: value for name, value in _weights(model).items() if name in self.base}
        if not now or any(value.shape != self.base[name].shape for name, value in now.items()):
            raise ValueError(
                f"base: {len(now)} of its {len(self.base)} weights are this model's, or their shapes differ; give "
                "weights of the same model by the same names"
            )
        if not self._began:
            self._began = {name: value.clone() for name, value in now.items()}
        dot = moved = removed = 0.0
        for name, value in now.items():
            change = (value - self._began[name]).flatten().double()
            back = (self.base[name].to(value.device) - self._began[name]).flatten().double()
            dot += float(change @ back)
            moved, removed = moved + float(change @ change), removed + float(back @ back)
        return dot / math.sqrt(moved * removed) if moved and removed else 0.0


@dataclass(frozen=True)
class _Watched:
    """Items in a model's tokens: a passage, or a word of a concept's corpus; some of them are watched."""

    encoded: Encoded
    item_of: Mapping[int, int]
    """Word of the encoded corpus to item."""
    label: np.ndarray
    """What a probe is to read of each item."""
    kind: np.ndarray
    """Labels of one kind are told from each other."""
    group: np.ndarray
    watched: np.ndarray
    tokens: np.ndarray

    def read(self, model: Any) -> tuple[Float[Tensor, "layer item d_model"], np.ndarray, np.ndarray]:
        """Hidden states where each item's first sub-word is predicted (of a tagger: on it), nats summed over its
        sub-words, and whether all of them are the likeliest."""
        n = len(self.label)
        nats, right = np.zeros(n), np.ones(n)
        states: Tensor | None = None
        with reading(model):
            for batch in self.encoded.batches(device=next(model.parameters()).device):
                layers, logits, target = _outputs(model, batch)
                items = np.array([self.item_of.get(word, -1) for word in batch.word_of.tolist()])
                known = items >= 0
                loss = F.cross_entropy(logits.float(), target, reduction="none").cpu().numpy()
                np.add.at(nats, items[known], loss[known])
                wrong = (logits.argmax(-1) != target).cpu().numpy()
                right[items[wrong & known]] = 0
                which, first = np.unique(items, return_index=True)
                if states is None:
                    states = torch.zeros(len(layers), n, layers.shape[-1])
                states[:, which[which >= 0]] = layers[:, first[which >= 0]].float().cpu()
        assert states is not None
        return states, nats, right


def _outputs(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Of every sub-word: hidden states by layer, the logits of what it may be, and what it is."""
    before = batch.subword if isinstance(model, Tagger) else batch.subword - 1
    if isinstance(model, Model):
        site, seen = site_of(model.bridge, "resid"), {}
        with streaming(model.bridge, site, lambda i, x: seen.update({i: x.flatten(0, 1)[before]})):
            last = hidden(model.bridge, batch.ids, batch.mask).flatten(0, 1)[before]
        layers = torch.stack([seen[i] for i in sorted(seen)])
        if isinstance(model, Tagger):
            return layers, model.head(last), batch.tag
        assert isinstance(model, LanguageModel)
        return layers, model.logits(last), batch.ids.flatten()[batch.subword]
    out = model(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True, use_cache=False)
    layers = torch.stack([x.flatten(0, 1)[before] for x in out.hidden_states])
    return layers, out.logits.flatten(0, 1)[before], batch.ids.flatten()[batch.subword]


def _one_each(facts: Facts, roles: Sequence[str], items: int, seed: int) -> list[Passage]:
    """A statement of each watched fact, then one of each retained one near by, as many as there is room for."""

    def statements(*of: str) -> list[Passage]:
        by_fact = grouped(facts.passages(*of, forms="statement"), lambda p: (p.key, p.relation))
        return [each[0] for each in by_fact.values()]

    if not (watched := statements(*roles)):
        raise ValueError(
            f"facts {facts.name!r} have no statement in {' or '.join(roles)}, so there is nothing to watch"
        )
    rng, others = np.random.default_rng(seed), statements("retain_near")
    watched = [watched[i] for i in np.sort(rng.permutation(len(watched))[: max(1, items // 2)])]
    others = [others[i] for i in np.sort(rng.permutation(len(others))[: items - len(watched)])]
    shared = {(p.relation, p.answer) for p in others}
    if not any((p.relation, p.answer) in shared for p in watched):
        raise ValueError(
            f"no watched answer of facts {facts.name!r} is the answer of a retained fact of the same relation, so a "
            "probe for it can be fitted to nothing; give facts with closed sets of answers in retain_near too"
        )
    return watched + others


def _of_facts(
    passages: list[Passage], facts: Facts, roles: Sequence[str], tokenizer: Any, context: int | None
) -> _Watched:
    encoded = encode_passages(passages, tokenizer, context=context, name=facts.name)
    keys = {p.key for p in facts.passages(*roles)}
    tokens = np.bincount(encoded.word_of[encoded.scored], minlength=len(passages))
    return _Watched(
        encoded, {i: i for i in range(len(passages))}, _numbered((p.relation, p.answer) for p in passages),
        _numbered(p.relation for p in passages), _numbered(p.key for p in passages),
        np.array([p.key in keys for p in passages]), tokens,
    )  # fmt: skip


def _of_concept(corpus: Corpus, concept: Concept, model: Model, items: int, seed: int) -> _Watched:
    """Half of the items carry the concept, and are watched; a probe tells them from the other half."""
    classes = concept.classes(corpus)
    encoded = model.encode(corpus, reading="word")
    carries = np.asarray(classes.carries)[np.asarray(classes.of_word)]
    readable, rng = np.unique(encoded.word_of), np.random.default_rng(seed)
    sides = [readable[carries[readable] == side] for side in (True, False)]
    if min(map(len, sides)) < FOLDS:
        raise ValueError(
            f"{len(sides[0])} words of {corpus.name!r} carry concept {concept.name!r} and {len(sides[1])} do not; a "
            f"probe needs {FOLDS} of each"
        )
    words = np.sort(np.concatenate([rng.permutation(side)[: items // 2] for side in sides]))
    item_of = {int(word): i for i, word in enumerate(words)}
    sentence = np.searchsorted(corpus.start, words, side="right") - 1
    tokens = np.bincount(encoded.word_of, minlength=corpus.n_words)[words]
    label = carries[words].astype(np.int64)
    return _Watched(encoded, item_of, label, np.zeros(len(words), dtype=np.int64), sentence, carries[words], tokens)


def _numbered(values: Iterable[Any]) -> np.ndarray:
    each = list(values)
    number = {value: i for i, value in enumerate(dict.fromkeys(each))}
    return np.array([number[value] for value in each])


def _preferred(
    states: Float[Tensor, "layer item d_model"],
    label: np.ndarray, kind: np.ndarray, group: np.ndarray, watched: np.ndarray, seed: int,
) -> float:  # fmt: skip
    """How often a ridge probe prefers an item's label to another one of its kind (ties: half), mean over watched items
    and layers. Items of one group are never on both sides; labels that the probe was not fitted to are left out."""
    total = n = 0.0
    fold_of_group = np.random.default_rng(seed).permutation(int(group.max()) + 1) % FOLDS
    for each in np.unique(kind[watched]):
        mine = np.flatnonzero(kind == each)
        fold = fold_of_group[group[mine]]
        for held_out in range(FOLDS):
            fit, test = mine[fold != held_out], mine[(fold == held_out) & watched[mine]]
            labels = np.unique(label[fit])
            test = test[np.isin(label[test], labels)]
            if not len(test) or len(labels) < 2:
                continue
            for scores in _probe(states[:, fit], states[:, test], torch.from_numpy(label[fit][:, None] == labels)):
                own = scores[torch.arange(len(test)), torch.from_numpy(np.searchsorted(labels, label[test]))][:, None]
                above = (own > scores).sum(1) + ((own == scores).sum(1) - 1) / 2
                total, n = total + float((above / (len(labels) - 1)).sum()), n + len(test)
    return total / n if n else math.nan


def _probe(fit: Tensor, test: Tensor, one_hot: Tensor) -> Iterator[Float[Tensor, "item label"]]:
    """Scores of a ridge regression to each label, by layer; solved between items, of which there are few."""
    mean, sd = fit.mean(1, keepdim=True), fit.std(1, keepdim=True, correction=0)
    sd = torch.where(sd > 1e-6 * mean.abs() + 1e-12, sd, torch.inf)
    x, y = (fit - mean) / sd, (test - mean) / sd
    target = one_hot.float() - one_hot.float().mean(0)
    for train, other in zip(x.double(), y.double(), strict=True):
        width = train.shape[1]
        kernel = train @ train.T / width + STRENGTH * torch.eye(len(train), dtype=torch.float64)
        yield (other @ train.T / width @ torch.linalg.solve(kernel, target.double())).float()


def _weights(model: Any) -> dict[str, Tensor]:
    if isinstance(model, Model):
        return model.weights()
    return {name: value.detach() for name, value in model.named_parameters()}
