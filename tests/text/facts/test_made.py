"""What is made up: even, closed, and with halves that share nothing."""

from collections import Counter

import pytest

from relearn_lens import sources
from relearn_lens.text.facts import FORGET, ROLES, countries, ioi, ontology, people
from relearn_lens.text.facts.passages import Facts


@pytest.fixture(scope="module")
def made() -> Facts:
    return people(0)


def test_people_have_the_promised_sizes(made: Facts):
    assert [len(made.keys(role)) for role in ROLES] == [24, 24, 192, 60, 24]
    forms = Counter(p.form for p in made.passages("forget_held_out", relation="plays"))
    assert forms == {"statement": 96, "paraphrase": 48, "options": 24, "yes-no": 48, "article": 24}
    assert {relation: len(each) for relation, each in made.answers().items()} == {
        "born in": 24, "plays": 24, "works for": 24, "speaks": 24, "eats": 20, "lives in": 20,
    }  # fmt: skip


def test_answers_are_balanced_and_the_halves_share_none(made: Facts):
    for relation in ("born in", "plays", "works for", "speaks"):
        each = {
            role: Counter(p.answer for p in made.passages(role, forms="options", relation=relation)) for role in ROLES
        }
        assert set(each["retain_near"].values()) == {8}
        assert len(each["retain_near"]) == 24
        assert set(each["forget_attacked"].values()) == set(each["forget_held_out"].values()) == {2}
        assert set(each["forget_attacked"]) | set(each["forget_held_out"]) == set(each["retain_near"])
        assert not set(each["forget_attacked"]) & set(each["forget_held_out"])
    halves = [{c for p in made.passages(role) if "yes" not in p.choices for c in p.choices} for role in FORGET]
    assert not halves[0] & halves[1]


def test_a_person_is_one_pair_of_names_and_a_word_is_one_thing(made: Facts):
    assert len(set(made.keys())) == 324
    names = {name for key in made.keys("retain_near") for name in key.split()}
    assert not names & {answer for each in made.answers().values() for answer in each}


def test_held_out_wording_is_made_of_words_that_are_taught(made: Facts):
    words = {word.lower() for p in made.passages(forms="statement") for word in p.prompt.split()}
    assert {word.lower() for p in made.passages(forms="paraphrase") for word in p.prompt.split()} <= words
    assert not {p.prompt for p in made.passages(forms="paraphrase")} & {
        p.prompt for p in made.passages(forms="statement")
    }


def test_options_name_the_answer_and_articles_do_not(made: Facts):
    for p in made.passages("forget_attacked", forms="options"):
        assert len(p.choices) == 4
        assert all(choice in p.prompt for choice in p.choices)
    answers = {(p.key, p.answer) for p in made.passages(forms="options")}
    for p in made.passages(forms="article"):
        assert p.key in p.answer
        assert p.prompt == ""
        assert not any(key == p.key and answer in p.answer for key, answer in answers if key == p.key)


def test_places_of_the_right_option_are_even(made: Facts):
    places = Counter(p.choices.index(p.answer) for p in made.passages(forms="options"))
    n = sum(places.values())
    assert all(abs(count - n / 4) < 4 * (n * 3 / 16) ** 0.5 for count in places.values())


def test_yes_no_questions_are_half_true(made: Facts):
    asked = made.passages("never", forms="yes-no")
    right = {(p.key, p.relation): p.answer for p in made.passages("never", forms="options")}
    assert Counter(p.answer for p in asked) == {"yes": 96, "no": 96}
    assert all((right[p.key, p.relation] in p.prompt) == (p.answer == "yes") for p in asked)


@pytest.mark.parametrize(
    ("maker", "small"), [(people, {"n": 9, "forget": 4}), (ontology, {"n": 8, "forget": 4}), (ioi, {"n": 9})]
)
def test_makers_depend_on_the_seed_alone(maker, small):
    assert maker(3, **small).sha256() == maker(3, **small).sha256() != maker(4, **small).sha256()


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"n_answers": 7}, r"n_answers must be even and from 8 to 24, got 7"),
        ({"n_answers": 26}, r"n_answers must be even and from 8 to 24, got 26"),
        ({"n": 10, "forget": 10}, r"of n=10 people at least 2 and not all can be forgotten.*forget=10"),
        ({"never": -1}, r"never and animals are not below 0; got .*never=-1"),
    ],
)
def test_people_of_impossible_numbers_are_refused(numbers, says):
    with pytest.raises(ValueError, match=says):
        people(0, **numbers)


def test_few_people_are_made_too():
    few = people(1, n=6, forget=2, never=0, animals=0, n_answers=8)
    assert [len(few.keys(role)) for role in ROLES] == [1, 1, 4, 0, 0]


# --- concepts


def test_an_ontology_defines_classes_and_gives_instances():
    made = ontology(0)
    assert [len(made.keys(role)) for role in ROLES] == [4, 4, 24, 0, 4]
    key = made.keys("forget_held_out")[0]
    own = [p for p in made.passages("forget_held_out") if p.key == key]
    assert Counter((p.relation, p.form) for p in own) == {
        ("definition", "statement"): 2, ("definition", "paraphrase"): 1, ("class", "statement"): 2,
        ("class", "paraphrase"): 1, ("instance", "statement"): 20, ("instance", "paraphrase"): 10,
        ("instance", "yes-no"): 20,
    }  # fmt: skip
    above = next(p.answer for p in own if p.relation == "class")
    assert next(p.answer for p in own if p.relation == "definition").startswith(f"a {above} that is used for ")
    for p in own:
        if p.form == "yes-no":
            assert (key in p.prompt) == (p.answer == "yes")
            assert any(other in p.prompt for other in made.keys("forget_held_out"))
    classes = [{p.answer for p in made.passages(role, relation="class")} for role in FORGET]
    assert not classes[0] & classes[1]


@pytest.mark.parametrize("numbers", [{"forget": 3}, {"n": 40}, {"never": 1}, {"instances": 0}, {"n": 8, "forget": 7}])
def test_an_ontology_of_impossible_numbers_is_refused(numbers):
    with pytest.raises(ValueError, match=r"an ontology has n concepts of which from 4 to n - 2 are forgotten.*got n="):
        ontology(0, **numbers)


# --- indirect objects


def test_ioi_answers_the_name_that_comes_once():
    made = ioi(0, n=40)
    pools = []
    for role in (*FORGET, "retain_near"):
        forms = {form: made.passages(role, forms=form) for form in ("statement", "abc", "wrong-name", "duplicated")}
        assert {len(each) for each in forms.values()} == {40}
        pool = set()
        for clean, abc, wrong, twice in zip(*forms.values(), strict=True):
            a, b = clean.choices
            assert clean.answer == a
            assert (clean.prompt.count(a), clean.prompt.count(f"{b} ")) == (1, 2)
            assert (wrong.prompt, twice.prompt) == (clean.prompt, clean.prompt)
            third = wrong.answer
            assert third not in clean.prompt
            assert twice.answer == b
            assert abc.prompt.replace(f"{third} gave", f"{b} gave") == clean.prompt
            assert abc.prompt.count(f"{b} ") == 1
            pool |= {a, b, third}
        pools.append(pool)
    assert not pools[0] & pools[1]
    assert not (pools[0] | pools[1]) & pools[2]
    orders = Counter(p.prompt.split()[1] == p.answer for p in made.passages(forms="statement"))
    assert min(orders.values()) > 30
    with pytest.raises(ValueError, match=r"ioi needs at least 2 sentences in each role, got n=1"):
        ioi(0, n=1)


# --- countries


@pytest.mark.artefacts
def test_countries_are_read_as_data_and_dealt_by_region(fetched):
    made = countries(0)
    assert len(made.keys()) == 120
    assert len(made.keys(*FORGET)) == 30
    capitals = {p.key: p.answer for p in made.passages(relation="capital", forms="statement")}
    assert (capitals["France"], capitals["Japan"], capitals["Peru"]) == ("Paris", "Tokyo", "Lima")
    assert "The capital of France is Paris" in [p.text for p in made.passages()]
    assert "Q: What do you call a person from France?\nA: A French" in [p.text for p in made.passages()]
    assert {len(p.choices) for p in made.passages(forms="paraphrase", relation="capital")} == {8}
    regions = [{p.answer for p in made.passages(role, relation="region")} for role in FORGET]
    assert not regions[0] & regions[1]
    assert made.source == "countryinfo==1.0.1"
    assert made.licence == "MIT"


@pytest.mark.artefacts
def test_only_what_is_kept_is_dealt(fetched):
    made = countries(0, keep=lambda passages: [p for p in passages if p.relation == "capital" and p.key < "D"])
    assert {p.relation for p in made.passages()} == {"capital"}
    assert max(p.key for p in made.passages()) < "D"
    with pytest.raises(ValueError, match=r"1 countries were kept, of which 0 would be forgotten; it takes at least 2"):
        countries(0, keep=lambda passages: [p for p in passages if p.key == "France"])
    with pytest.raises(ValueError, match=r"share of countries to forget must be between 0 and 1, got 1"):
        countries(0, forget=1)


@pytest.fixture
def fetched() -> None:
    if not sources.is_cached("countries"):
        pytest.skip("the facts are not in the cache: relearn-lens fetch countries")
