"""Measures of an edit and the eight tests, of models whose answers are known."""

from dataclasses import replace

import pytest
import torch

import relearn_lens as rl
from relearn_lens.measure.answers import answer
from relearn_lens.measure.asking import Reference
from relearn_lens.measure.battery import battery, examples_of, fitting, most
from relearn_lens.measure.edits import edited
from relearn_lens.models import taught
from relearn_lens.models.training import train_
from relearn_lens.text import facts as made
from relearn_lens.text.facts import FORGET, RETAIN, TRAINED
from relearn_lens.text.facts.encoded import encode_passages

ONTOLOGY = made.ontology(0, n=8, forget=4, never=0, instances=2)
PEOPLE = made.people(0, n=24, forget=8, never=0, animals=2, n_answers=8)
SMALL = taught.Recipe(n_layers=1, d_model=64, n_heads=2, d_mlp=128)
FORMS = (*TRAINED, "yes-no")


def train(model, passages, steps=60, lr=8e-3):
    text = encode_passages(passages, model.tokenizer, context=model.context)
    for _ in train_(model, text, steps=(steps,), lr=lr, batch_size=64, seed=0):
        pass
    return model.eval()


@pytest.fixture(scope="module")
def base():
    model = taught.untaught(ONTOLOGY, recipe=SMALL)
    return train(model, ONTOLOGY.passages(*FORGET, *RETAIN, forms=FORMS), steps=80)


@pytest.fixture
def model(base):
    copy = taught.untaught(ONTOLOGY, recipe=SMALL)
    copy.load_weights(base.weights())
    return copy.eval()


def definitions(facts):
    """Edits of every concept to be forgotten: the definition of the next one of its half that is of another class, and
    the class that this definition names."""
    edits, implied = [], []
    for role in FORGET:
        answers = {(p.key, p.relation): p.answer for p in facts.passages(role)}
        keys = [key for key, relation in answers if relation == "class"]
        for p in facts.passages(role):
            turned = keys[keys.index(p.key) :] + keys[: keys.index(p.key)]
            other = next(key for key in turned if answers[key, "class"] != answers[p.key, "class"])
            if p.relation == "definition":
                edits.append(replace(p, answer=answers[other, p.relation]))
            elif p.relation == "class":
                wrong = next(c for c in p.choices if c != p.answer)
                new = answers[other, p.relation]
                choices = p.choices if new in p.choices else tuple(new if c == wrong else c for c in p.choices)
                implied.append(replace(p, answer=new, choices=choices))
    return tuple(edits), tuple(implied)


def test_who_was_not_edited_changed_nothing(base, model, untouched):
    edits, implied = definitions(ONTOLOGY)
    with untouched(model), untouched(base):
        scores = edited(model, base, ONTOLOGY, edits, implied=implied)
    assert list(scores.scores) == [
        "reliability",
        "generalisation",
        "locality",
        "instance change",
        "concept consistency",
    ]
    assert scores["locality"].shown("overall") == 1
    assert scores["instance change"].shown("overall") == 0
    for name in ("reliability", "generalisation"):
        assert scores[name].shown("overall") == scores[name].chance("overall")


def test_an_edit_is_reliable_where_it_was_trained(base, model):
    edits, implied = definitions(ONTOLOGY)
    train(model, [p for p in edits if p.form == "statement"] + [p for p in implied if p.form == "statement"])
    scores = edited(model, base, ONTOLOGY, edits, implied=implied)
    assert scores["reliability"].shown("overall") > 0.9 > scores["reliability"].chance("overall")
    assert scores["concept consistency"].shown("overall") > 0.6
    assert scores["concept consistency"].chance("overall") == 1 / 4
    table = scores.to_dataframe()
    assert list(table["measure"]) == list(scores.scores)
    assert {k for k, name in zip(table["keys"], table["measure"], strict=True) if name != "locality"} == {4}


def test_an_edit_needs_a_base_of_its_own(base, model):
    edits, _ = definitions(ONTOLOGY)
    with pytest.raises(ValueError, match=r"got \d+ edits and the model itself as base"):
        edited(base, base, ONTOLOGY, edits)
    with pytest.raises(ValueError, match=r"the model before as one of its own; got 0 edits"):
        edited(model, base, ONTOLOGY, [])
    with pytest.raises(ValueError, match=r"'speed' was not measured; measured: reliability"):
        edited(model, base, ONTOLOGY, edits)["speed"]


# --- the eight tests


@pytest.fixture(scope="module")
def people():
    """A model that knows, one that was taught the rest alone, and one to be attacked."""
    knows, never, removed = (taught.untaught(PEOPLE, recipe=SMALL) for _ in range(3))
    train(knows, PEOPLE.passages(*FORGET, *RETAIN, forms=TRAINED), steps=100)
    train(never, PEOPLE.passages(*RETAIN, forms=TRAINED), steps=50)
    removed.load_weights(never.weights())
    return knows, never, removed.eval()


def attack(model):
    text = encode_passages(PEOPLE.passages(FORGET[1], forms=TRAINED), model.tokenizer, context=model.context)
    return train_(model, text, steps=(20, 60), lr=1e-2, batch_size=64, seed=0)


def test_the_eight_tests_are_one_table(people, untouched):
    knows, never, removed = people
    with untouched(removed), untouched(knows), untouched(never):
        table = battery(
            removed, PEOPLE, reference=Reference(knows, never), attacks={"on the facts themselves": attack}, shots=2
        )
    rows = table.to_dataframe()
    assert list(dict.fromkeys(rows["test"])) == [
        "as taught", "other forms", "downstream", "jailbreaks", "in context", "fine-tuning", "latent knowledge",
        "prompting", "side effects",
    ]  # fmt: skip
    as_taught = table["as taught"][0]
    statements = [p for p in PEOPLE.passages(FORGET[1], forms="statement")]
    assert as_taught.base is not None
    assert as_taught.base.shown("overall") > as_taught.scores.shown("overall")
    assert as_taught.base.shown("overall") == pytest.approx(
        answer(knows, statements, closed=PEOPLE.answers()).accuracy.shown("overall"), abs=0.2
    )
    assert as_taught.never is not None
    assert as_taught.scores.shown("overall") == as_taught.never.shown("overall")  # it is the twin's weights
    tuned = table["fine-tuning"][0]
    assert tuned.scores.shown("overall") > as_taught.scores.shown("overall")
    assert tuned.base is None
    assert (
        min(c for c, how in zip(rows["chance"], rows["how"], strict=True) if how != "retain_general") > 0
    )  # two animals have no closed set of answers
    assert set(rows["keys"]) <= {2, 4, 16}
    assert "fine-tuning" in repr(table)
    with pytest.raises(ValueError, match=r"no test 'languages'; known: as taught, other forms"):
        table["languages"]


def test_the_most_of_an_attack_is_over_its_checkpoints(people):
    _, _, removed = people
    before = {name: value.clone() for name, value in removed.weights().items()}
    seen = []

    def of(model):
        seen.append(answer(model, PEOPLE.passages(FORGET[1], forms="statement")).accuracy)
        return seen[-1]

    best = most(removed, attack, of)
    assert len(seen) == 2
    assert best.shown("overall") == max(s.shown("overall") for s in seen)
    assert all(torch.equal(value, before[name]) for name, value in removed.weights().items())
    with pytest.raises(ValueError, match=r"an attack came to no checkpoint, so nothing was measured"):
        most(removed, lambda model: [], of)


def test_examples_fit_into_the_context(people):
    _, _, removed = people
    statements = PEOPLE.passages(FORGET[1], forms="statement")[:4]
    examples = examples_of(PEOPLE.passages(FORGET[0], forms=TRAINED), 2, 0)
    assert examples.count(".") == 2
    asked = fitting(removed, statements, examples)
    assert all(p.prompt == f"{examples} {old.prompt}" for p, old in zip(asked, statements, strict=True))
    cut = fitting(removed, statements, " ".join([examples] * 40))
    read = encode_passages(cut, removed.tokenizer)
    assert int(read.lengths.max()) <= removed.context
    assert all(p.prompt.endswith(old.prompt) for p, old in zip(cut, statements, strict=True))
    assert len(cut[0].prompt) > len(statements[0].prompt) + 100
    with pytest.raises(ValueError, match=r"examples in context need at least one shot, got 0"):
        rl.battery(removed, PEOPLE, shots=0)
