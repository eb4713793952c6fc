"""What the terminal says of a run: its numbers are those of the run, and it fits 25 lines of 80 columns."""

import re
from dataclasses import replace

import pytest

from relearn_lens.runs.results import Run
from relearn_lens.runs.settings import Experiment
from relearn_lens.show import brief
from tests.analysis.test_story import scores_of
from tests.show.test_plots import holding, losing, margined, rich, run_of, with_all


@pytest.fixture(scope="module")
def run() -> Run:
    return with_all(rich(run_of("concept", "random", "unpruned", seeds=3, width=12)))


def plain(run: Run, report: str | None = "runs/names/report.html") -> list[str]:
    return [line.plain for line in brief.brief(run, report)]


def entry(lines: list[str], key: str) -> str:
    """An entry with the lines that go on with it."""
    first = next(k for k, line in enumerate(lines) if line.startswith(key))
    rest = (k for k in range(first + 1, len(lines)) if not lines[k].startswith("   "))
    return " ".join(line.strip() for line in lines[first : next(rest, len(lines))])


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(
    "arms", [("concept", "random", "unpruned"), ("concept",), ("unpruned",), ("concept", "random")]
)
def test_brief_fits_25_lines_of_80_columns(arms, seeds):
    made = run_of(*arms, seeds=seeds, width=12)
    lines = plain(with_all(rich(made)) if "concept" in arms else made)
    assert len(lines) <= brief.MOST == 25
    assert max(map(len, lines)) <= 80
    assert not re.search(r"\bnan\b|None", " ".join(lines))


def test_brief_leaves_brackets_out_before_it_is_too_long(run, monkeypatch):
    first = brief.answered(run)[0]
    monkeypatch.setattr(brief, "answered", lambda _: [replace(first, says="in words", number="30 % [25, 34]")])
    whole = plain(run)
    assert any(line.endswith("in words (30 % [25, 34])") for line in whole)
    monkeypatch.setattr(brief, "MOST", len(whole) - 1)
    assert any(line.endswith("in words") for line in plain(run))
    monkeypatch.setattr(brief, "MOST", 1)
    assert not any(line.startswith("now") for line in plain(run))


def test_headline_says_what_was_cut(run):
    assert plain(run)[0] == "place in minilm · bsb-names · resid · 12 of 36 neurons cut · 3 seeds"
    long = replace(run, experiment=run.experiment.model_copy(update={"model": "m" * 100}))
    assert len(brief.headline(long).plain) == 80


def test_table_holds_the_means_of_every_arm(run):
    _, header, *rows = plain(run)
    assert header.split() == ["F1", "of", "place", "base", "cut", "1", "2", "epochs"]
    for name, line in zip(run.arms, rows, strict=False):
        means = [sum(path[s].scores.shown("place") for path in run.arms[name]) / 3 for s in run.arms[name][0].stages]
        assert line.split()[:-1] == [name, *(brief.number(value) for value in means)]
        assert len(line.split()[-1]) == len(means)


def test_arms_and_verdicts_have_their_colours(run):
    lines = brief.brief(run)
    assert "#D55E00" in str(lines[2].spans[0].style)
    verdicts = {answer.name: answer.question.verdict for answer in brief.answered(run)}
    for name, verdict in verdicts.items():
        line = next(line for line in lines if line.plain.startswith(name))
        assert line.plain[9:23].strip() == verdict
        assert brief.VERDICT_COLOURS[verdict] in str(line.spans[0].style)


def test_answers_hold_the_numbers_of_the_questions(run):
    lines = plain(run)
    found = {answer.question.key: answer for answer in brief.answered(run)}
    assert list(found) == [
        "specific", "returns", "sooner", "where when it is first back", "where at the end", "same", "primed", "mixed",
    ]  # fmt: skip
    returns = found["returns"].question.number
    assert returns is not None
    assert f"{100 * returns.value:.0f} % [{100 * returns.low:.0f}, {100 * returns.high:.0f}]" in found["returns"].says
    early, late = (found[key].says for key in ("where when it is first back", "where at the end"))
    early_says = "first back, epoch 1: block 1 alone brings back 30 % (controls 2 %), without it 80 % is lost"
    assert early == f"{early_says}: needed, not enough"
    assert late == "epoch 2: block 1 alone brings back 90 % (controls 2 %), without it 20 % is lost: enough, not needed"
    assert "25 % of those found now are old, 5 % by chance" in found["same"].says
    assert "9 random cuts leave .60" in entry(lines, "gone?")
    assert found["sooner"].says == "there is no never twin"


def test_steps_are_not_counted_to_where_a_margin_never_left():
    run = run_of("concept", "unpruned", seeds=3)
    run.arms["never"] = list(run.arms["unpruned"])
    for name in ("concept", "never"):
        for k, path in enumerate(run.arms[name]):
            cut = replace(path["pruned"], scores=margined(scores_of(0.8)))
            run.arms[name][k] = replace(path, snapshots={**path.snapshots, "pruned": cut})
    says = {each.name: each.says for each in brief.answered(run)}
    assert says["back?"].endswith("it never fell to half")
    assert says["sooner?"] == "it never fell to half; nor did a model that never had the label"


@pytest.mark.parametrize(("p", "told"), [(0.2, True), (0.01, False)])
def test_a_verdict_that_falls_to_holm_says_so_in_its_line(run, p, told):
    there = replace(run)  # with numbers of its own
    there.numbers.__dict__["questions"] = [
        replace(each, verdict="supported", p_holm=p) if each.key == "returns" else each
        for each in run.numbers.questions
    ]
    back = next(answer for answer in brief.answered(there) if answer.name == "back?")
    assert back.says.endswith("; not beyond Holm") is told


def test_nothing_is_called_enough_while_the_question_is_inconclusive(run, monkeypatch):
    known = run.numbers.questions
    open_ = [replace(each, verdict="inconclusive") if each.key.startswith("where") else each for each in known]
    monkeypatch.setitem(vars(run.numbers), "questions", open_)
    says = " ".join(each.says for each in brief.answered(run) if each.question.key.startswith("where"))
    assert "without it 80 % is lost" in says
    assert "enough" not in says + brief.sentence(run)


def test_one_seed_gives_numbers_and_no_verdict():
    lines = plain(with_all(rich(run_of("concept", "random", "unpruned", width=12))))
    assert "undecided     first back" in entry(lines, "where?")
    assert "block 1 alone brings back" in entry(lines, "where?")
    assert "[" not in entry(lines, "back?")
    assert entry(lines, "seeds").startswith("seeds    1, so these are numbers and no verdicts")


def test_a_label_that_never_returns_is_said():
    run = run_of("concept", "random", seeds=3)
    assert brief.never_back(run) == ""
    for k, path in enumerate(run.arms["concept"]):
        low = replace(path["2"], scores=margined(scores_of(0.8, person=0.2)))
        run.arms["concept"][k] = replace(path, snapshots={**path.snapshots, "2": low})
    assert brief.never_back(run).startswith("person is at .20 of ")
    assert entry(plain(run), "lost").endswith("in the concept arm at epoch 2")


def test_took_over_shows_words_before_and_after(run):
    line = brief.took_over(run)
    assert line is not None
    assert re.match(r"now      L\w+N\d+  .+ → .+", line.plain)
    assert len(line.plain) <= 80
    assert brief.took_over(run_of("concept", "random")) is None


def test_sentence_is_one_and_holds_the_numbers(run):
    said = brief.sentence(run)
    assert said.startswith("Without 12 of 36 neurons, place falls from F1 ")
    assert said.endswith("at the end, block 1 alone brings back 90 % of it.")
    assert "no concept arm" in brief.sentence(run_of("unpruned", seeds=2))


def test_brief_of_a_language_model_shows_nats():
    run = losing(run_of("concept", "random", seeds=3))
    lines = plain(run)
    assert lines[1].startswith("loss of place")
    assert "F1" not in " ".join(lines)
    assert brief.sentence(run).startswith("Without 4 of 12 neurons, the loss on place goes from ")


@pytest.mark.parametrize(
    ("value", "shown"), [(0.92, ".92"), (0.0, ".00"), (1.0, "1.00"), (0.996, "1.00"), (-0.05, "-.05"), (12.34, "12.3")]
)
def test_number_is_short(value, shown):
    assert brief.number(value) == shown
    assert brief.number(float("nan")) == "-"


def test_spark_has_a_bar_for_every_value():
    assert brief.spark([0.0, 0.5, 1.0]) == "▁▅█"
    assert brief.spark([2.0, 3.0, 9.0], 2.0, 3.0) == "▁██"
    assert brief.spark([float("nan"), 1.0, 1.0], 1.0, 1.0) == "▁▁▁"


def test_stages_are_known_before_the_run():
    assert brief.stages_of(Experiment()) == ["base", "pruned", "1", "2", "4", "8", "16", "32", "64"]
    epochs = Experiment.model_validate({"retrain": {"steps": None, "epochs": 5, "every": 2}})
    assert brief.stages_of(epochs) == ["base", "pruned", "2", "4", "5"]


def test_rows_of_arms_under_way_fill_up():
    stages = ["base", "pruned", "1", "2"]
    lines = brief.rows_of({"other": {"base": scores_of(0.9), "pruned": scores_of(0.4)}}, "person", "place", stages)
    assert lines["other"].plain.split() == ["other", "(person)", ".90", ".40", "▇▄"]


def test_many_stages_are_thinned_out_to_80_columns():
    stages = ["base", "pruned", *map(str, range(1, 40))]
    line = brief.rows_of({"concept": dict.fromkeys(stages, scores_of(0.5))}, None, "place", stages)["concept"]
    shown = brief.head("F1 of place", stages, "steps").plain
    assert max(len(line.plain), len(shown)) <= 80
    assert shown.split()[3:6] == ["base", "cut", "1"]
    assert shown.split()[-2:] == ["39", "steps"]
    assert line.plain.count(".50") == len(shown.split()) - 4


def test_a_seed_whose_cut_takes_less_than_was_asked_for_is_named(run):
    assert not any(line.startswith("size") for line in plain(run))
    made = with_all(rich(run_of("concept", "random", "unpruned", seeds=3, width=12)))
    sized = made.sized[1]
    doses = tuple(
        replace(dose, scores=margined(scores_of(0.18))) if (dose.cut, dose.fraction) == ("concept", 0.05) else dose
        for dose in sized.doses
    )
    made.sized[1] = replace(sized, doses=doses)
    says = "seed 1: no cut takes place below 0.1 of its 0.90 and leaves the others; 5 % takes most, to 0.18"
    assert entry(plain(made), "size") == f"size     {says}"
    assert says in made.numbers.notes


def test_what_was_held_is_beside_the_free_arm():
    made = run_of("concept", "random", "unpruned", seeds=3, width=12)
    assert not any(line.startswith("held") for line in plain(made))
    made.blocked += holding(made)
    says = "90 % is back at step > 30; with the part held > 64, the heirs 8 or 16, others 4"
    assert entry(plain(made), "held") == f"held     {says}"


def test_a_part_that_is_not_known_holds_nothing():
    made = run_of("concept", "random", "unpruned", seeds=3, width=12)
    made.blocked += [replace(each, course={}) for each in holding(made)]
    assert "the part held (none known), the heirs" in entry(plain(made), "held")
