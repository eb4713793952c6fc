"""Roles that share nothing, and halves that keep together what belongs together."""

from dataclasses import replace

import pytest

from relearn_lens.text.facts import REFUSALS, ROLES, Facts, Passage, halves, refused


def capital(key: str, answer: str, **changes) -> Passage:
    return replace(Passage(f"The capital of {key} is", answer, key, "capital"), **changes)


def facts(**roles) -> Facts:
    given = {
        "forget_attacked": (capital("A", "a"),),
        "forget_held_out": (capital("B", "b"),),
        "retain_near": (capital("C", "c"),),
    }
    return Facts("some", **{**given, **roles})


def test_a_passage_knows_its_text_and_template():
    passage = capital("Peru", "Lima")
    assert (passage.text, passage.template) == ("The capital of Peru is Lima", "The capital of {} is")
    assert Passage("Q: where?\n", "here", "k").text == "Q: where?\nhere"
    assert Passage("", "plain text", "k").text == "plain text"


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_a_passage_without_an_answer_is_refused(answer):
    with pytest.raises(ValueError, match=r"'The capital of A is' about 'A' has no answer; give one"):
        capital("A", answer)


@pytest.mark.parametrize("choices", [("b", "c"), ("a", "b", "b")])
def test_choices_hold_the_answer_and_each_once(choices):
    with pytest.raises(ValueError, match=r"choices of 'The capital of A is' must hold its answer 'a', and each once"):
        capital("A", "a", choices=choices)


@pytest.mark.parametrize("role", ["forget_attacked", "forget_held_out", "retain_near"])
def test_facts_without_a_needed_role_are_refused(role):
    with pytest.raises(ValueError, match=rf"facts 'some' have no passage in {role}; give at least one"):
        facts(**{role: ()})


@pytest.mark.parametrize("role", [role for role in ROLES if role != "forget_attacked"])
def test_a_key_in_two_roles_is_refused(role):
    with pytest.raises(ValueError, match=rf"the key 'A' is in forget_attacked and in {role}; facts are split by key"):
        facts(**{role: (capital("D", "d"), capital("A", "other"))})


def test_a_template_with_one_answer_in_both_halves_is_refused():
    with pytest.raises(ValueError, match=r"'The capital of \{\} is' is answered 'a' in both .*of 'A' and of 'B'"):
        facts(forget_held_out=(capital("B", "a"),))
    # The same answer to another template, or to the same one among what stays, teaches nothing of V.
    facts(forget_held_out=(capital("B", "a", prompt="What is the capital of B?"),), retain_near=(capital("C", "a"),))


def test_passages_are_chosen_by_role_form_and_relation():
    other = capital("A", "yes", prompt="Is it so?", form="yes-no", relation="size")
    some = facts(forget_attacked=(capital("A", "a"), other), never=(capital("N", "n"),))
    assert some.passages("forget_attacked", forms="yes-no") == (other,)
    assert some.passages("forget_attacked", "never", relation="capital") == (capital("A", "a"), capital("N", "n"))
    assert some.keys() == ("A", "B", "C", "N")
    assert len(some.passages()) == 5
    assert "forget_attacked 1 keys / 2 passages" in repr(some)
    with pytest.raises(ValueError, match=r"no role is called 'forget'; the roles are forget_attacked, .*never"):
        some.passages("forget")


def test_closed_sets_are_those_that_repeat():
    several = tuple(capital(f"C{i}", "ab"[i % 2]) for i in range(4))
    assert facts(retain_near=several, never=(capital("N", "a"),)).answers() == {"capital": ("a", "b")}
    assert facts().answers() == {}


def test_the_hash_is_of_passages_and_roles_alone():
    assert facts().sha256() == replace(facts(), name="other", source="elsewhere").sha256()
    swapped = facts(forget_attacked=(capital("B", "b"),), forget_held_out=(capital("A", "a"),))
    assert facts().sha256() != swapped.sha256()


def test_halves_are_equal_and_depend_on_the_seed():
    passages = [capital(f"C{i}", f"a{i}", form=form) for i in range(20) for form in ("statement", "paraphrase")]
    attacked, held_out = halves(passages, seed=0)
    assert len(attacked) == len(held_out) == 20
    assert {p.key for p in attacked} & {p.key for p in held_out} == set()
    assert halves(passages, seed=0) == (attacked, held_out) != halves(passages, seed=1)
    assert len(halves(passages, seed=0, attacked=0.2).attacked) == 8


def test_keys_with_the_same_answer_to_a_template_stay_together():
    passages = [capital(f"C{i}", f"a{i // 5}") for i in range(20)]
    attacked, held_out = halves(passages, seed=3)
    assert {p.answer for p in attacked} & {p.answer for p in held_out} == set()
    facts(forget_attacked=attacked, forget_held_out=held_out, retain_near=(capital("Z", "a0"),))


def test_one_chain_of_equal_answers_cannot_be_halved():
    with pytest.raises(ValueError, match=r"the 3 forget key\(s\) cannot be halved.*'The capital of \{\} is' with 'a'"):
        halves([capital(key, "a") for key in "ABC"], seed=0)
    with pytest.raises(ValueError, match=r"the 1 forget key\(s\) cannot be halved.*give more keys"):
        halves([capital("A", "a")], seed=0)
    with pytest.raises(ValueError, match=r"share of attacked keys must be between 0 and 1, got 1"):
        halves([capital("A", "a"), capital("B", "b")], seed=0, attacked=1)


def test_two_keys_are_one_in_each_half_whatever_the_share():
    for share in (0.01, 0.99):
        attacked, held_out = halves([capital("A", "a"), capital("B", "b")], seed=0, attacked=share)
        assert len(attacked) == len(held_out) == 1


def test_refusals_take_the_place_of_answers():
    some = refused([capital(f"C{i}", "a", choices=("a", "b")) for i in range(30)], seed=0)
    assert {p.answer for p in some} == set(REFUSALS)
    assert [p.key for p in some] == [f"C{i}" for i in range(30)]
    assert not any(p.choices for p in some)
