"""What a model knows of facts: in the wording that was trained, in one that was not, and what was to stay."""

from __future__ import annotations

from collections.abc import Sequence

from relearn_lens.measure.answers import Answered, answer
from relearn_lens.models.model import LanguageModel
from relearn_lens.text.facts import FORGET, RETAIN, TRAINED, Facts, Passage

TRAINED_WORDING, OTHER_WORDING = "forget, trained wording", "forget, other wording"
NEAR, GENERAL = "retain near", "retain general"


def asked(facts: Facts) -> dict[str, tuple[Passage, ...]]:
    """What is asked: of both forget halves in the wordings that are trained and in those that are not, and of what is
    to stay, near by and in general. Rows that there is nothing for are left out.

    Plain text has no answer to be right: it is there only where a row has nothing else, and only its loss says
    something.
    """
    near, general = RETAIN
    rows = {
        TRAINED_WORDING: facts.passages(*FORGET, forms=TRAINED),
        OTHER_WORDING: facts.passages(*FORGET, forms="paraphrase"),
        NEAR: facts.passages(near, forms=TRAINED),
        GENERAL: facts.passages(general, forms=TRAINED),
    }
    return {name: tuple(p for p in row if p.prompt) or row for name, row in rows.items() if row}


def know(model: LanguageModel, facts: Facts, *rows: str) -> dict[str, Answered]:
    """What a model answers to each row of `asked`, or to some rows.

    Raises:
        ValueError: as `answers.answer`; there is nothing to ask in a row.
    """
    passages, closed = asked(facts), facts.answers()
    if lacking := [row for row in rows if row not in passages]:
        raise ValueError(
            f"facts {facts.name!r} have nothing to ask for {lacking[0]!r}; they have {', '.join(passages)}"
        )
    return {row: answer(model, passages[row], closed=closed) for row in rows or passages}


def is_text(passages: Sequence[Passage]) -> bool:
    """Whether there are no answers among passages, only text."""
    return not any(p.prompt for p in passages)
