"""An audit of somebody else's model: what it still answers, what can be read inside, and what comes back.

1. Ask: as taught, in other wordings and forms, with and without a system prompt.
2. Read: probes by layer on what is to be forgotten, fitted to other keys.
3. Bring back: 1 to 128 steps on half of the facts, scored on the other half; fewer bits, fewer weights, lines in
   context. Parts of the model say where it came back.
4. The same of an original and of a twin that never knew, where they are given; what is missing is named.

The model is left as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relearn_lens import names, progress
from relearn_lens.analysis.audit import Evidence, Verdict, decide
from relearn_lens.analysis.matrix import Course, share
from relearn_lens.measure.answers import AnswerAccuracy, answer, choose
from relearn_lens.measure.asking import Asked, ask
from relearn_lens.measure.evaluation import OVERALL, Scores
from relearn_lens.measure.extraction import ExtractionStrength
from relearn_lens.measure.grafting import grafts
from relearn_lens.measure.inside import STATES, KnownInside
from relearn_lens.measure.states import states_of
from relearn_lens.models.model import LanguageModel
from relearn_lens.neurons.weights import parts
from relearn_lens.relearn.attacks import ATTACKS
from relearn_lens.runs.removals import weights_sha256
from relearn_lens.text.facts import FORGET, RETAIN, TRAINED, Facts, Passage
from relearn_lens.text.facts.encoded import encode_passages

ATTACKED, HELD_OUT = FORGET
STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
RATES = (1e-4, 3e-4)
BOUND = 0.10
"""Share of what stays that relearning may cost."""
FORMS = ("options", "yes-no")
"""In which the same is asked, by the likelihood of the choices; a model that was never taught them may answer by
chance."""
KEYS = 48
"""Of each role that are asked, at most."""

Interval = tuple[float, float, float]
"""Value, low, high."""
Framed = Callable[[Sequence[Passage]], tuple[Passage, ...]]
"""Puts passages behind a system prompt."""


@dataclass(frozen=True)
class Audit:
    """What was found out about one model."""

    evidence: Evidence
    verdict: Verdict
    numbers: Mapping[str, Interval]
    """Shares with intervals over keys, by name."""
    curve: Mapping[str, Sequence[float | int]]
    """`steps`, and the held-out half answered at each: of the model, and of the twin where there is one."""
    rate: float
    """Learning rate at which most came back."""
    best: int
    """The step at which most was back, among those that cost at most `BOUND` of what stays; 0: none was."""
    grafts: Sequence[Mapping[str, Any]]
    states: Mapping[str, float]
    """Share of passages in each state."""
    items: Sequence[Mapping[str, str]]
    """Each passage with its state."""
    facts: str = ""
    notes: Sequence[str] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {**asdict(self), "reached": self.evidence.reached}


@names.explained
def audit(
    model: LanguageModel,
    facts: Facts,
    *,
    original: LanguageModel | None = None,
    never: LanguageModel | None = None,
    system: str | None = None,
    rates: Sequence[float] = RATES,
    steps: Sequence[int] = STEPS,
    seed: int = 0,
    kept: dict[Any, Any] | None = None,
) -> Audit:
    """Ask, read and bring back, and what may be said of it.

    What is measured of the original and of the twin alone goes into `kept`, by their weights: audits of several models
    that are given one dictionary measure it once.

    Raises:
        ValueError: a system prompt for a tokenizer without a chat template; an original that does not know the facts,
            or models that are no copies of one architecture; before any training.
    """
    work = _Work(model, facts, original, never, seed, kept)
    framed = framing(model, system)
    with progress.task("asking"):
        work.ask(framed)
    inside, items = work.read_inside()
    work.values["alike"] = alike(model, work.statements, work.retained)
    work.values |= of_weights(model, original)
    with progress.task("bringing back"):
        curve, rate, weights = work.relearn(rates, steps)
        skipped = work.attack()
        where = _where(model, weights, lambda: work.accuracy(model, work.held_out)) if weights else []
    evidence = Evidence(**work.values)
    shown = {name: curve[name] for name in ("all_steps", "all", "twin") if name in curve}
    return Audit(
        evidence, decide(evidence), work.numbers, {"steps": shown.pop("all_steps"), "model": shown.pop("all"), **shown},
        rate, curve["at"], where, inside, items, facts.name, (*facts.notes, *skipped),
    )  # fmt: skip


class _Work:
    """One audit under way: what is measured of the model, and of those beside it."""

    def __init__(
        self, model: LanguageModel, facts: Facts, original: LanguageModel | None, never: LanguageModel | None,
        seed: int, kept: dict[Any, Any] | None,
    ):  # fmt: skip
        self.model, self.facts, self.original, self.never = model, facts, original, never
        self.seed, self.kept, self.closed = seed, kept, facts.answers()
        self.statements = drawn(facts, FORGET, "statement", seed)
        self.held_out, self.retained = (drawn(facts, each, "statement", seed) for each in ((HELD_OUT,), RETAIN))
        self.values: dict[str, Any] = {}
        """By field of `Evidence`."""
        self.numbers: dict[str, Interval] = {}

    def beside(self, model: LanguageModel, what: Any, measure: Callable[[], Any]) -> Any:
        """What is measured of a model beside the audited one, once where it is kept."""
        if self.kept is None:
            return measure()
        key = what, weights_sha256(model), self.facts.sha256(), self.seed
        if key not in self.kept:
            self.kept[key] = measure()
        return self.kept[key]

    def accuracy(self, of: LanguageModel, passages: Sequence[Passage]) -> AnswerAccuracy:
        return answer(of, passages, closed=self.closed).accuracy

    def note(self, name: str, scores: Scores) -> float:
        self.numbers[name] = (scores.shown(OVERALL), *scores.interval(OVERALL))
        return self.numbers[name][0]

    def ask(self, framed: Framed | None) -> None:
        """As taught, in other words and forms, with and without a system prompt; of the others, as taught."""
        model, facts, statements, values = self.model, self.facts, self.statements, self.values
        knew = None
        if (original := self.original) is not None:
            knew = self.note("original", self.beside(original, "answers", lambda: self.accuracy(original, statements)))
        plain = self.accuracy(model, statements)
        chance = plain.chance(OVERALL)
        if knew is not None and knew <= chance + 0.1:
            raise ValueError(
                f"the original does not answer these facts either ({knew:.2f}, chance {chance:.2f}): there is nothing "
                "that could have been removed; give facts that it knows"
            )
        values |= {"chance": chance, "original_answers": knew}
        values["answers"] = self.note("answers", plain if framed is None else self.accuracy(model, framed(statements)))
        values["without_prompt"] = None if framed is None else self.note("without the prompt", plain)
        values["retained"] = self.note("retained", self.accuracy(model, self.retained))
        if (never := self.never) is not None:
            values["twin_answers"] = self.note(
                "twin", self.beside(never, "answers", lambda: self.accuracy(never, statements))
            )
        if any(" " in p.answer.strip() for p in statements):  # of one word it is whether that is answered
            strength = ExtractionStrength()
            questions = Asked(facts, statements, ("forgotten",) * len(statements))
            for who, of in (("", model), (" of the original", original), (" of the twin", never)):
                if of is not None:
                    extract = partial(strength, of, questions)
                    self.note(f"extraction{who}", self.beside(of, "extraction", extract) if who else extract())
        if reworded := drawn(facts, FORGET, "paraphrase", self.seed):
            values["reworded"] = self.note("reworded", self.accuracy(model, reworded))
        if choices := [p for p in statements if p.choices]:
            picked = choose(model, choices)
            values["options"], values["options_chance"] = self.note("of the choices", picked), picked.chance(OVERALL)
        for form in FORMS:
            if passages := [p for p in drawn(facts, FORGET, form, self.seed) if p.choices]:
                self.note(form, choose(model, passages))

    def read_inside(self) -> tuple[dict[str, float], list[dict[str, str]]]:
        """What probes read of the model, of the original and of the twin; the share of each state, and each item's."""
        questions = ask(self.facts, roles=FORGET, keys=KEYS, wordings=1, seed=self.seed)
        probe = KnownInside(seed=self.seed)
        try:
            with progress.task("reading inside"):
                known = probe(self.model, questions)
                for name, other in (("original", self.original), ("twin", self.never)):
                    if other is not None:
                        read = self.beside(other, "inside", partial(probe, other, questions))
                        self.values[f"{name}_inside"] = read.value(OVERALL)
        except ValueError:  # no closed sets
            return {}, []
        self.values["inside"], self.values["inside_chance"] = known.value(OVERALL), known.chance(OVERALL)
        self.values["by_layer"] = {name: known.layer(name).value(OVERALL) for name in known.layers}
        self.note("inside", known)
        items = [
            {"prompt": p.prompt, "answer": p.answer, "key": p.key, "state": state}
            for p, state in zip(known.items, known.states, strict=True)
        ]
        return {state: known.states.count(state) / len(known.states) for state in STATES}, items

    def relearn(self, rates: Sequence[float], steps: Sequence[int]) -> tuple[dict[str, Any], float, dict[str, Tensor]]:
        """`_relearned` of the model, and at its rate of the twin."""
        data = self.facts, self.held_out, self.retained
        curve, rate, weights = _relearned(self.model, *data, rates, steps, self.seed)
        self.values["back"] = curve["interval"][0] - curve["all"][0]
        self.numbers["relearned"] = curve["interval"]
        if (never := self.never) is not None:
            twin = self.beside(
                never, ("relearned", rate, tuple(steps)),
                lambda: _relearned(never, *data, (rate,), steps, self.seed)[0],
            )  # fmt: skip
            n = max(i for i, step in enumerate(twin["all_steps"]) if step <= curve["at"])
            self.values["twin_back"] = twin["all"][n] - twin["all"][0]
            curve["twin"] = twin["all"]
        return curve, rate, weights

    def attack(self) -> list[str]:
        """Fewer bits, fewer weights, lines in context; what could not be done, and why."""
        skipped = []
        for name, attack in (
            ("quantised", ATTACKS["quantised"](bits=4)), ("pruned", ATTACKS["pruned"]()),  # pyright: ignore[reportCallIssue]
            ("in_context", ATTACKS["in_context"]()), ("unrelated", ATTACKS["in_context"](kind="unrelated")),  # pyright: ignore[reportCallIssue]
        ):  # fmt: skip
            try:
                for _ in attack(self.model, self.facts, seed=self.seed):
                    prompted = attack.asked(self.statements, self.facts, seed=self.seed)
                    self.values[name] = self.note(name, self.accuracy(self.model, prompted))
            except ValueError as error:  # prompts longer than the context, no matrices to round
                self.values[name] = None
                skipped.append(f"{name}: {error}")
        return skipped


def framing(model: LanguageModel, system: str | None) -> Framed | None:
    """How passages are put behind a system prompt, in the words of the model's own chat template.

    Raises:
        ValueError: the tokenizer has none.
    """
    if system is None:
        return None
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"--system: the tokenizer of {tokenizer.name_or_path!r} has no chat template, so nobody knows how its "
            "makers put a system prompt; save a tokenizer that has one, or leave --system out"
        )

    def put(passages: Sequence[Passage]) -> tuple[Passage, ...]:
        turns = [[{"role": "system", "content": system}, {"role": "user", "content": p.prompt}] for p in passages]
        texts = (tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in turns)
        return tuple(replace(p, prompt=text) for p, text in zip(passages, texts, strict=True))

    put([Passage("", "x", "x")])  # a template that takes no system turn says so before any work
    return put


def drawn(facts: Facts, roles: Sequence[str], form: str, seed: int) -> tuple[Passage, ...]:
    """Passages of one form, one wording of each relation in turn, about at most `KEYS` keys of each role; where there
    are no statements, what else is taught."""
    forms = (form,) if facts.passages(*roles, forms=(form,)) or form != "statement" else TRAINED
    out: list[Passage] = []
    for role in roles:
        among = facts.keys(role)
        chosen = {among[i] for i in np.random.default_rng(seed).permutation(len(among))[:KEYS]}
        by_fact: dict[tuple[str, str], list[Passage]] = {}
        for p in facts.passages(role, forms=forms):
            if p.key in chosen:
                by_fact.setdefault((p.key, p.relation), []).append(p)
        out += [each[i % len(each)] for i, each in enumerate(by_fact.values())]
    return tuple(out)


def alike(model: LanguageModel, forgotten: Sequence[Passage], retained: Sequence[Passage]) -> float:
    """By how much more the hidden states that predict forgotten answers point one way than those of retained ones: mean
    cosine with their mean direction, at the block where the difference is largest."""

    def spread(passages: Sequence[Passage]) -> dict[str, float]:
        encoded = encode_passages(passages, model.tokenizer, context=model.context)
        kept: dict[str, list[Tensor]] = {}
        for pieces in encoded.cuts():
            batch = encoded.batch(pieces).to(model.device)
            by_layer, _ = states_of(model, batch)
            for name, states in by_layer.items():
                kept.setdefault(name, []).append(states[batch.first].float().cpu())
        units = {name: torch.nn.functional.normalize(torch.cat(each), dim=1) for name, each in kept.items()}
        return {name: float(unit.mean(0).norm()) for name, unit in units.items()}

    here, there = spread(forgotten), spread(retained)
    return max(here[name] - there[name] for name in here)


def of_weights(model: LanguageModel, original: LanguageModel | None) -> dict[str, float]:
    """What the weights say by themselves, and beside the original's."""
    mine = {name: value.float() for name, value in model.weights().items() if value.is_floating_point()}
    blocks = {name: value for name, value in mine.items() if value.ndim == 2 and any(c.isdigit() for c in name)}
    total = sum(value.numel() for value in blocks.values())
    if original is None:
        nothing = (value == 0 for value in blocks.values())
        zeroed = sum(int((zero.all(1)[:, None] | zero.all(0)[None]).sum()) for zero in nothing)
        return {"zeroed": zeroed / max(total, 1)}
    theirs = {name: value.float() for name, value in original.weights().items() if value.is_floating_point()}
    if mine.keys() != theirs.keys() or any(mine[name].shape != theirs[name].shape for name in mine):
        raise ValueError(
            "--original: its weights are of another architecture than the model's; give what it was made from"
        )
    zeroed = sum(int(((value == 0) & (theirs[name].to(value.device) != 0)).sum()) for name, value in blocks.items())
    change = sum(float((value - theirs[name].to(value.device)).square().sum()) for name, value in mine.items())
    size = sum(float(value.square().sum()) for value in theirs.values())
    return {"zeroed": zeroed / max(total, 1), "moved": math.sqrt(change / size)}


def _relearned(
    model: LanguageModel, facts: Facts, held_out: Sequence[Passage], retained: Sequence[Passage],
    rates: Sequence[float], steps: Sequence[int], seed: int,
) -> tuple[dict[str, Any], float, dict[str, Tensor]]:  # fmt: skip
    """The held-out half while T is trained on, at the rate that brings most back among usable checkpoints, and the
    weights there; the model is put back."""
    closed = facts.answers()
    start = model.copied()
    best: tuple[float, dict[str, Any], float, dict[str, Tensor]] | None = None

    def sums(passages: Sequence[Passage]) -> AnswerAccuracy:
        return answer(model, passages, closed=closed).accuracy

    before = sums(held_out), sums(retained)
    for rate in rates:
        attack = ATTACKS["relearn"](lr=rate, steps=tuple(steps))  # pyright: ignore[reportCallIssue]
        at, scores = [0], [before]
        top, weights, when = before[0].value(OVERALL), {}, 0
        try:
            for pause in attack(model, facts, seed=seed):
                at.append(pause.step)
                scores.append((sums(held_out), sums(retained)))
                course = Course(
                    tuple(at), np.stack([one.sums(OVERALL) for one, _ in scores]),
                    np.stack([other.sums(OVERALL) for _, other in scores]),
                )  # fmt: skip
                if len(at) - 1 in course.usable(BOUND) and float(share(course.held_out[-1].sum(0))) > top:
                    top, when = float(share(course.held_out[-1].sum(0))), len(at) - 1
                    weights = model.copied()
        except (FloatingPointError, ValueError):
            if len(at) == 1:
                raise
        finally:
            model.load_weights(start)
        curve: dict[str, Any] = {
            "at": at[when],
            "all_steps": at, "all": [one.value(OVERALL) for one, _ in scores],
            "interval": (scores[when][0].shown(OVERALL), *scores[when][0].interval(OVERALL)),
        }  # fmt: skip
        if best is None or top > best[0]:
            best = top, curve, rate, weights
    assert best is not None
    return best[1:]


def _where(
    model: LanguageModel, relearned: Mapping[str, Tensor], known: Callable[[], AnswerAccuracy]
) -> list[dict[str, Any]]:
    """By part: what it alone, taken from the relearned model, brings back; the model is put back."""
    moved = parts(model, bands=min(len(model.bridge.blocks), 6))
    grafted = grafts(model, model.copied(), relearned, lambda _: {"accuracy": known()}, parts=moved)
    return [
        {"part": part, "enough": grafted.enough(part).value, "needed": grafted.needed(part).value}
        for part in grafted.parts
    ]
