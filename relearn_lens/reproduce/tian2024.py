"""InstructEdit: instruction-based knowledge editing for large language models (Tian et al. 2024, arXiv:2402.16123)

Claims: one editor for several tasks does better if words before each edit name its task, and these words turn the
direction of the edit.
Here: an editor (MEND) of the toy's last two blocks learns four tasks, to give another answer to one of four relations,
on facts that stay: with words before the edit that name its task, with words that name none, and without any. It then
edits T's facts, two of each task at a time, and an edit holds where a wording that nothing was trained on is answered
so. Questions have no words before them. The direction of a task is that of the change that all of its edits make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from relearn_lens.measure.answers import answer
from relearn_lens.models.model import LanguageModel, reading
from relearn_lens.remove.editing import AGAIN, EDITS, Editor, Mend
from relearn_lens.reproduce.protocol import Lab, Paper, Reading, cosine
from relearn_lens.text.facts import Passage, alternatives
from relearn_lens.text.facts.encoded import EncodedPassages, encode_passages

TASKS = {"born in": "the birthplace", "plays": "the instrument", "works for": "the employer", "speaks": "the language"}
"""By relation, what names it; in words that the toy has."""
ARMS = {"named": tuple(TASKS.values()), "neutral": ("it is well known",) * len(TASKS), "none": ("",) * len(TASKS)}
EDITOR = Mend(rank=64, scale=1e-2)
LEARNING = {"lr": 1e-3, "steps": (150,), "batch_size": 8}
TOGETHER = 2
Edits = list[tuple[Passage, Passage]]
"""Facts with new answers, each in a wording to edit with and in another one."""


def measure(lab: Lab) -> Iterator[Reading]:
    """What holds and where edits point, by what stands before them."""
    learnt, made = (
        [_edits(lab, role, relation, form) for relation in TASKS]
        for role, form in (("retain_near", "statement"), ("forget_attacked", "paraphrase"))
    )
    held, apart = {}, {}
    for arm, words in ARMS.items():
        with lab.loaded(lab.base) as model:
            editor = _editor(lab, model, learnt, words)
            with reading(editor):
                ways = [_changes(editor, [edits], [said]) for edits, said in zip(made, words, strict=True)]
                each = [1 - cosine(one, other) for one, other in combinations(ways, 2)]
                apart[arm] = sum(each) / len(each)
                held[arm] = _held(lab, model, editor, made, words)
    share = {arm: sum(each) / len(each) for arm, each in held.items()}
    says = ", ".join(f"{arm} {' '.join(f'{value:.2f}' for value in each)}" for arm, each in held.items())
    angles = ", ".join(f"{arm} {value:.2f}" for arm, value in apart.items())
    for key, each, note in (("instructed", share, f"by relation {says}"), ("direction", apart, f"1 - cosine {angles}")):
        effect, control = (each[arm] - each["none"] for arm in ("named", "neutral"))
        yield Reading(key, effect, control, f"seed {lab.seed}: {note}")


def _edits(lab: Lab, role: str, relation: str, form: str) -> Edits:
    """Other answers to a relation: each in the fact's first wording to train on, and in its last one of a form."""
    wordings: dict[str, list[Passage]] = {}
    for p in (*lab.facts.passages(role, forms=("statement",)), *lab.facts.passages(role, forms=(form,))):
        if p.relation == relation:
            wordings.setdefault(p.key, []).append(p)
    others = alternatives(lab.facts, [each[0] for each in wordings.values()], seed=lab.seed)
    return [
        (new, replace(each[-1], answer=new.answer, choices=()))
        for new, each in zip(others, wordings.values(), strict=True)
    ]


def _encoded(model: LanguageModel, tasks: Sequence[Edits], words: Sequence[str]) -> EncodedPassages:
    passages = [
        replace(edit, prompt=f"{said} {edit.prompt}".strip())
        for edits, said in zip(tasks, words, strict=True)
        for edit, _ in edits
    ]
    return encode_passages(passages, model.tokenizer, context=model.context)


def _editor(lab: Lab, model: LanguageModel, learnt: Sequence[Edits], words: Sequence[str]) -> Editor:
    """What has learnt all tasks."""
    texts = EDITOR.texts(model, lab.facts, seed=lab.seed)
    asked = [again for edits in learnt for _, again in edits]
    texts |= {
        EDITS: _encoded(model, learnt, words),
        AGAIN: encode_passages(asked, model.tokenizer, context=model.context),
    }
    editor, training = EDITOR.learning(model, texts, seed=lab.seed, **LEARNING)
    for _ in training:
        pass
    return editor


def _changes(editor: Editor, tasks: Sequence[Edits], words: Sequence[str]):
    encoded = _encoded(editor, tasks, words)
    return editor.changes(encoded.batch(np.arange(encoded.n_pieces)))


def _held(lab: Lab, model: LanguageModel, editor: Editor, made: Sequence[Edits], words: Sequence[str]) -> list[float]:
    """Share of edits that hold, by task."""
    right: list[list[float]] = [[] for _ in made]
    for first in range(0, min(map(len, made)), TOGETHER):
        group = [edits[first : first + TOGETHER] for edits in made]
        editor.change_(_changes(editor, group, words))
        for task, edits in enumerate(group):
            right[task].append(answer(model, [asked for _, asked in edits]).accuracy.value("overall"))
        model.load_weights(lab.base.weights)
    return [sum(each) / len(each) for each in right]


PAPER = Paper(
    "tian2024", "InstructEdit: instruction-based knowledge editing", "Tian et al. 2024, arXiv:2402.16123",
    "one MEND editor for four relations, learnt with words that name the relation, with words that do not, and "
    "without; T's facts edited eight at a time, asked in a wording that nothing was trained on",
    "relations are told apart by the edit itself, where the paper has four sets of facts and a pretrained model",
    measure,
    toy_only="an editor learns on facts that stay, in a second wording to train on, which `countries` do not have",
)  # fmt: skip
