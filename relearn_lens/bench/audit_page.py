"""An audit as a person reads it: 25 lines, and a page."""

from __future__ import annotations

import textwrap
from pathlib import Path

from relearn_lens.bench.audit import FORMS, Audit, Interval
from relearn_lens.files import as_json, write_whole

BLOCKS = 12
"""That a line has room for."""


def lines(name: str, done: Audit) -> list[str]:
    """What is printed: the verdict first; at most 25 lines of 80 columns."""
    e, n = done.evidence, done.numbers
    out = [f"{name}: {done.verdict.kind}"[:80], *_wrapped(f"  {done.verdict.why}")]
    out.append(f"most of it that anything reaches: {e.reached:.2f}")
    answers = {"answers": "as taught", "without the prompt": "without the prompt", "reworded": "reworded"}
    shares = [f"{_short(n[key])} {says}" for key, says in answers.items() if key in n]
    out += _wrapped(f"answers {'; '.join(shares)}; chance {e.chance:.2f}; what stays {e.retained:.2f}")
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
    return [*out, *(line for missing in done.verdict.missing for line in _wrapped(f"not given: {missing}"))][:25]


def _short(value: Interval) -> str:
    return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 80, subsequent_indent="  ")


def write(name: str, done: Audit, folder: Path) -> Path:
    """Write audit.json and the page; gives the page's path."""
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
