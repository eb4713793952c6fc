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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relearn_lens import progress
from relearn_lens.analysis.audit import Evidence, Verdict, decide
from relearn_lens.analysis.matrix import Course, share
from relearn_lens.measure.answers import AnswerAccuracy, answer, choose
from relearn_lens.measure.asking import Asked, ask
from relearn_lens.measure.evaluation import OVERALL
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
    framed = framing(model, system)
    closed = facts.answers()
    statements = drawn(facts, FORGET, "statement", seed)
    held_out, retained = drawn(facts, (HELD_OUT,), "statement", seed), drawn(facts, RETAIN, "statement", seed)

    def accuracy(of: LanguageModel, passages: Sequence[Passage]) -> AnswerAccuracy:
        return answer(of, passages, closed=closed).accuracy

    beside = _Beside(facts.sha256(), seed, kept)
    numbers: dict[str, Interval] = {}

    def note(name: str, scores: AnswerAccuracy) -> float:
        numbers[name] = (scores.shown(OVERALL), *scores.interval(OVERALL))
        return numbers[name][0]

    with progress.task("asking"):
        knew = (
            None
            if original is None
            else note("original", beside(original, "answers", lambda: accuracy(original, statements)))
        )
        plain = accuracy(model, statements)
        chance = plain.chance(OVERALL)
        if knew is not None and knew <= chance + 0.1:
            raise ValueError(
                f"the original does not answer these facts either ({knew:.2f}, chance {chance:.2f}): there is nothing "
                "that could have been removed; give facts that it knows"
            )
        found: dict[str, Any] = {"chance": chance, "original_answers": knew}
        found["answers"] = note("answers", plain if framed is None else accuracy(model, framed(statements)))
        found["without_prompt"] = None if framed is None else note("without the prompt", plain)
        found["retained"] = note("retained", accuracy(model, retained))
        if never is not None:
            found["twin_answers"] = note("twin", beside(never, "answers", lambda: accuracy(never, statements)))
        if any(" " in p.answer.strip() for p in statements):  # of one word it is whether that is answered
            strength = ExtractionStrength()
            asked = Asked(facts, statements, ("forgotten",) * len(statements))
            for who, of in (("", model), (" of the original", original), (" of the twin", never)):
                if of is not None:
                    score = beside(of, "extraction", partial(strength, of, asked)) if who else strength(of, asked)
                    low, high = score.interval(OVERALL)
                    numbers[f"extraction{who}"] = (score.shown(OVERALL), low, high)
        if reworded := drawn(facts, FORGET, "paraphrase", seed):
            found["reworded"] = note("reworded", accuracy(model, reworded))
        if choices := [p for p in statements if p.choices]:
            picked = choose(model, choices)
            found["options"], found["options_chance"] = note("of the choices", picked), picked.chance(OVERALL)
        for form in FORMS:
            if passages := [p for p in drawn(facts, FORGET, form, seed) if p.choices]:
                note(form, choose(model, passages))
    inside, items = _inside(model, facts, found, numbers, {"original": original, "twin": never}, beside, seed)
    found["alike"] = alike(model, statements, retained)
    found |= of_weights(model, original)
    with progress.task("bringing back"):
        curve, rate, weights = _relearned(model, facts, held_out, retained, rates, steps, seed)
        found["back"] = curve["interval"][0] - curve["all"][0]
        numbers["relearned"] = curve["interval"]
        if never is not None:
            twin = beside(
                never, ("relearned", rate, tuple(steps)),
                lambda: _relearned(never, facts, held_out, retained, (rate,), steps, seed)[0],
            )  # fmt: skip
            n = max(i for i, step in enumerate(twin["all_steps"]) if step <= curve["at"])
            found["twin_back"] = twin["all"][n] - twin["all"][0]
            curve["twin"] = twin["all"]
        for name, attack in (
            ("quantised", ATTACKS["quantised"](bits=4)), ("pruned", ATTACKS["pruned"]()),  # pyright: ignore[reportCallIssue]
            ("in_context", ATTACKS["in_context"]()), ("unrelated", ATTACKS["in_context"](kind="unrelated")),  # pyright: ignore[reportCallIssue]
        ):  # fmt: skip
            try:
                for _ in attack(model, facts, seed=seed):
                    found[name] = note(name, accuracy(model, attack.asked(statements, facts, seed=seed)))
            except ValueError as error:  # prompts longer than the context, no matrices to round
                found[name] = None
                found.setdefault("skipped", []).append(f"{name}: {error}")
        where = _where(model, weights, lambda: accuracy(model, held_out)) if weights else []
    skipped = found.pop("skipped", [])
    evidence = Evidence(**found)
    shown = {name: curve[name] for name in ("all_steps", "all", "twin") if name in curve}
    return Audit(
        evidence, decide(evidence), numbers, {"steps": shown.pop("all_steps"), "model": shown.pop("all"), **shown},
        rate, curve["at"], where, inside, items, facts.name, (*facts.notes, *skipped),
    )  # fmt: skip


class _Beside:
    """What is measured of models beside the audited one, once where it is kept."""

    def __init__(self, facts: str, seed: int, kept: dict[Any, Any] | None):
        self.facts, self.seed, self.kept = facts, seed, kept

    def __call__(self, model: LanguageModel, what: Any, measure: Callable[[], Any]) -> Any:
        if self.kept is None:
            return measure()
        key = what, weights_sha256(model), self.facts, self.seed
        if key not in self.kept:
            self.kept[key] = measure()
        return self.kept[key]


def framing(model: LanguageModel, system: str | None) -> Callable[[Sequence[Passage]], tuple[Passage, ...]] | None:
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
        out = []
        for p in passages:
            turns = [{"role": "system", "content": system}, {"role": "user", "content": p.prompt}]
            out.append(
                replace(p, prompt=tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
            )
        return tuple(out)

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


def _inside(
    model: LanguageModel, facts: Facts, found: dict[str, Any], numbers: dict[str, Interval],
    others: Mapping[str, LanguageModel | None], beside: _Beside, seed: int,
) -> tuple[dict[str, float], list[dict[str, str]]]:  # fmt: skip
    """What probes read of the model, of the original and of the twin; the share of each state, and each item's."""
    asked = ask(facts, roles=FORGET, keys=KEYS, wordings=1, seed=seed)
    try:
        with progress.task("reading inside"):
            known = KnownInside(seed=seed)(model, asked)
            for name, other in others.items():
                if other is not None:
                    read = partial(KnownInside(seed=seed), other, asked)
                    found[f"{name}_inside"] = beside(other, "inside", read).value(OVERALL)
    except ValueError:  # no closed sets
        return {}, []
    found["inside"], found["inside_chance"] = known.value(OVERALL), known.chance(OVERALL)
    numbers["inside"] = (known.shown(OVERALL), *known.interval(OVERALL))
    found["by_layer"] = {name: known.layer(name).value(OVERALL) for name in known.layers}
    n = len(known.states)
    items = [
        {"prompt": p.prompt, "answer": p.answer, "key": p.key, "state": state}
        for p, state in zip(known.items, known.states, strict=True)
    ]
    return {state: known.states.count(state) / n for state in STATES}, items


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
        out = {}
        for name, parts_ in kept.items():
            unit = torch.nn.functional.normalize(torch.cat(parts_), dim=1)
            out[name] = float(unit.mean(0).norm())
        return out

    here, there = spread(forgotten), spread(retained)
    return max(here[name] - there[name] for name in here)


def of_weights(model: LanguageModel, original: LanguageModel | None) -> dict[str, float]:
    """What the weights say by themselves, and beside the original's."""
    mine = {name: value.float() for name, value in model.weights().items() if value.is_floating_point()}
    blocks = {name: value for name, value in mine.items() if value.ndim == 2 and any(c.isdigit() for c in name)}
    total = sum(value.numel() for value in blocks.values())
    if original is None:
        zeroed = 0
        for value in blocks.values():
            nothing = value == 0
            rows, columns = nothing.all(1), nothing.all(0)
            zeroed += int((rows[:, None] | columns[None]).sum())
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
    start = {name: value.detach().clone() for name, value in model.weights().items()}
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
                    weights = {name: value.detach().clone() for name, value in model.weights().items()}
        except (FloatingPointError, ValueError):
            if len(at) == 1:
                raise
        finally:
            model.load_weights(start)
        every = [one.value(OVERALL) for one, _ in scores]
        told = scores[when][0]
        curve: dict[str, Any] = {
            "at": at[when],
            "all_steps": at, "all": every,
            "interval": (told.shown(OVERALL), *told.interval(OVERALL)),
        }  # fmt: skip
        if best is None or top > best[0]:
            best = top, curve, rate, weights
    assert best is not None
    return best[1], best[2], best[3]


def _where(
    model: LanguageModel, relearned: Mapping[str, Tensor], known: Callable[[], AnswerAccuracy]
) -> list[dict[str, Any]]:
    """By part: what it alone, taken from the relearned model, brings back; the model is put back."""
    start = {name: value.detach().clone() for name, value in model.weights().items()}
    blocks = len(model.bridge.blocks)
    found = grafts(model, start, relearned, lambda _: {"accuracy": known()}, parts=parts(model, bands=min(blocks, 6)))
    return [
        {"part": part, "enough": found.enough(part).value, "needed": found.needed(part).value} for part in found.parts
    ]


# --- what is printed

BLOCKS = 12
"""That a line has room for."""


def lines(name: str, done: Audit) -> list[str]:
    """What is printed: the verdict first; at most 25 lines of 80 columns."""
    e, n = done.evidence, done.numbers
    out = [f"{name}: {done.verdict.kind}"[:80], *_wrapped(f"  {done.verdict.why}")]
    out.append(f"most of it that anything reaches: {e.reached:.2f}")
    asked = [f"{_short(n['answers'])} as taught"]
    asked += [f"{_short(n[key])} {key}" for key in ("without the prompt", "reworded") if key in n]
    out += _wrapped(f"answers {'; '.join(asked)}; chance {e.chance:.2f}; what stays {e.retained:.2f}")
    if "extraction" in n:
        others = [f"{key.split()[-1]} {value[0]:.2f}" for key, value in n.items() if key.startswith("extraction of")]
        also = f" ({', '.join(others)})" if others else ""
        out.append(f"of answers it completes a share of {_short(n['extraction'])}{also}")
    if e.options is not None:
        forms = "".join(f"; {form} {_short(n[form])}" for form in FORMS if form in n)
        out += _wrapped(f"of the choices {_short(n['of the choices'])}, chance {e.options_chance:.2f}{forms}")
    beside = [
        f"{who} {value:.2f}"
        for who, value in (("original", e.original_answers), ("twin", e.twin_answers))
        if value is not None
    ]
    if beside:
        out.append(f"answered by others: {', '.join(beside)}")
    if e.inside is not None:
        others = [
            f"{who} {value:.2f}"
            for who, value in (("chance", e.inside_chance), ("original", e.original_inside), ("twin", e.twin_inside))
            if value is not None
        ]
        out += _wrapped(f"inside: probes read {_short(n['inside'])} ({', '.join(others)})")
        every = -(-len(e.by_layer) // BLOCKS)
        shown = list(e.by_layer.items())[::-1][::every][::-1]  # the last one always
        out += _wrapped(f"by block: {', '.join(f'{k} {v:.2f}' for k, v in shown)}")
    gains = "" if e.twin_back is None else f"; the twin gains {e.twin_back:+.2f}"
    out += _wrapped(
        f"half relearned (best at step {done.best} of {done.curve['steps'][-1]}, lr {done.rate:g}): of the other half "
        f"{_short(n['relearned'])}, {e.back:+.2f}{gains}"
    )
    course = list(zip(done.curve["steps"], done.curve["model"], strict=True))
    out += _wrapped("after steps: " + ", ".join(f"{step} {share:.2f}" for step, share in course[::2]))
    weak = [
        f"{what} {value:.2f}"
        for what, value in (
            ("int4", e.quantised), ("a third of weights pruned", e.pruned), ("facts in context", e.in_context),
            ("unrelated lines", e.unrelated),
        )
        if value is not None
    ]  # fmt: skip
    out += _wrapped(f"answers with {', '.join(weak)}")
    top = sorted((g for g in done.grafts if g["enough"] == g["enough"]), key=lambda g: -g["enough"])[:3]
    if top:
        out += _wrapped("came back in " + ", ".join(f"{g['part']} ({g['enough']:.2f} alone)" for g in top))
    if done.states:
        out += _wrapped("items: " + ", ".join(f"{k} {100 * v:.0f} %" for k, v in done.states.items()))
    for missing in done.verdict.missing:
        out += _wrapped(f"not given: {missing}")
    return out[:25]


def _short(value: Interval) -> str:
    return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 80, subsequent_indent="  ")


def write(name: str, done: Audit, folder: Path) -> Path:
    """Write audit.json and the page; gives the page's path."""
    from relearn_lens.files import as_json, write_whole
    from relearn_lens.show import plots, report

    draw = report.Drawing()
    pictures = [
        draw(plots.audit_layers, done.evidence), draw(plots.audit_curve, done.curve, done.rate),
        draw(plots.audit_parts, done.grafts), draw(plots.audit_states, done.states),
    ]  # fmt: skip
    page = report.page(
        "audit.html.j2", title=f"Audit of {name}", heading=f"Audit of {name}: {done.verdict.kind}",
        why=done.verdict.why, missing=done.verdict.missing, lines=lines(name, done)[2:],
        pictures=[p for p in pictures if p],
        items=(["prompt", "answer", "state"], [[i["prompt"], i["answer"], i["state"]] for i in done.items]),
        notes=done.notes, facts=done.facts,
    )  # fmt: skip
    write_whole(folder / "audit.json", as_json({"model": name, **done.to_dict()}))
    write_whole(folder / "report.html", page.encode())
    return folder / "report.html"
