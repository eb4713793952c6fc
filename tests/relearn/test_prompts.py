"""Ways back in how passages are asked."""

from dataclasses import replace

import pytest

from relearn_lens.models import toy
from relearn_lens.relearn.prompts import InContext, OtherForm, Paraphrase


@pytest.fixture
def statements(facts):
    return facts.passages("forget_held_out", forms="statement")


@pytest.mark.parametrize("kind", ["facts", "summary", "unrelated"])
def test_facts_of_t_stand_before_questions_and_never_of_the_passage_itself(facts, statements, kind):
    attack = InContext(kind=kind, examples=3)
    role = "retain_general" if kind == "unrelated" else "forget_attacked"
    whole = {f"{p.text}.\n" for p in facts.passages(role, forms="statement")}
    n = 2 if kind == "summary" else 3  # two keys
    for plain, given in zip(statements, attack.asked(statements, facts, seed=1), strict=True):
        assert given == replace(plain, prompt=given.prompt)
        assert given.prompt.endswith("\n" + plain.prompt)
        lines = given.prompt.removesuffix(plain.prompt).splitlines(keepends=True)
        assert len(lines) == len(set(lines)) == n
        assert plain.key not in "".join(lines)
        if kind != "summary":
            assert set(lines) <= whole
        else:
            for line in lines:
                key = next(key for key in facts.keys("forget_attacked") if line.startswith(f"{key}: "))
                answers = {p.answer for p in facts.passages("forget_attacked", forms="statement") if p.key == key}
                assert len(answers) == 4
                assert all(answer in line for answer in answers)
    attacked = facts.passages("forget_attacked", forms="statement")
    for given in attack.asked(attacked, facts):
        assert given.prompt.count(given.key) == 1
    assert attack.asked(statements, facts, seed=1) == attack.asked(statements, facts, seed=1)
    if kind != "summary":
        assert attack.asked(statements, facts, seed=1) != attack.asked(statements, facts, seed=2)


@pytest.mark.parametrize(
    ("attack", "form", "n"), [(Paraphrase(), "paraphrase", 2), (OtherForm(), "options", 1),
                              (OtherForm(form="yes-no"), "yes-no", 2)],
)  # fmt: skip
def test_the_same_is_asked_in_another_form(facts, statements, attack, form, n):
    given = attack.asked(statements, facts)
    assert {(p.key, p.relation) for p in given} == {(p.key, p.relation) for p in statements}
    assert {p.form for p in given} == {form}
    assert len(given) == n * len(statements) // 4 == len(set(given))
    born = [p for p in statements if p.relation == "born in"]
    assert {p.relation for p in attack.asked(born, facts)} == {"born in"}


@pytest.mark.parametrize("attack", [InContext(), Paraphrase(), OtherForm()])
def test_the_model_is_left_alone(model, facts, attack, untouched):
    with untouched(model):
        (pause,) = attack(model, facts)
        assert pause.step == 0
        with attack.applied(model, facts, seed=3):
            pass


def test_what_is_missing_is_said(model, facts):
    alone = {role: facts.passages(role, forms="statement") for role in ("forget_attacked", "forget_held_out")}
    bare = replace(
        facts, **alone, retain_near=facts.passages("retain_near", forms="statement"), retain_general=(), never=()
    )
    with pytest.raises(ValueError, match="paraphrase: facts 'people-0' have no passage of the form 'paraphrase'"):
        Paraphrase()(model, bare)
    with pytest.raises(ValueError, match=r"other_form: .* of the form 'yes-no'; their forms are statement"):
        OtherForm(form="yes-no").asked(bare.forget_held_out, bare)
    articles = replace(bare, forget_attacked=facts.passages("forget_attacked", forms="article"))
    with pytest.raises(ValueError, match="in_context: facts 'people-0' have no statement to put before a question"):
        InContext()(model, articles)
    near = InContext(kind="unrelated", examples=2).asked(bare.forget_held_out[:1], bare)[0].prompt
    assert sum(key in near for key in bare.keys("retain_near")) >= 1
    with pytest.raises(ValueError, match="in_context is made of passages and takes Facts, got Corpus"):
        InContext()(model, toy.corpus(sentences=3))
