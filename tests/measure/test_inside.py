"""What probes read and what the model says: four states, held-out keys, and shuffled answers."""

import numpy as np
import pytest
import torch

from relearn_lens.measure import inside
from relearn_lens.measure.asking import ask
from relearn_lens.measure.inside import GONE, LUCKY, RETAINED, STATES, SUPPRESSED, KnownInside
from relearn_lens.models import taught
from relearn_lens.models.training import train_
from relearn_lens.text import facts as made
from relearn_lens.text.facts import FORGET, RETAIN, TRAINED
from relearn_lens.text.facts.encoded import encode_passages

FACTS = made.people(0, n=40, forget=12, never=0, animals=2, n_answers=8)
SMALL = taught.Recipe(n_layers=2, d_model=64, n_heads=2, d_mlp=128)


@pytest.fixture(scope="module")
def model():
    small = taught.untaught(FACTS, recipe=SMALL)
    text = encode_passages(FACTS.passages(*FORGET, *RETAIN, forms=TRAINED), small.tokenizer, context=small.context)
    for _ in train_(small, text, steps=(130,), lr=5e-3, batch_size=64, seed=0):
        pass
    return small.eval()


def test_a_probe_reads_what_was_planted_and_not_what_was_dealt_anew():
    rng = np.random.default_rng(0)
    key = np.repeat(np.arange(60), 2)
    y = rng.integers(6, size=60)[key]
    states = (np.eye(16)[y] + 0.1 * rng.normal(size=(120, 16))).astype(np.float32)
    folds = key % inside.FOLDS
    dealt = rng.permutation(y[::2])[key]
    told = inside._held_out(states, np.stack([y, dealt]), folds, 6, 1e-2)
    assert (told[0] == y).all()
    assert (told[1] == y).mean() < 0.5
    assert ((told >= 0) & (told < 6)).all()


def test_who_knows_is_read_and_answers(model, untouched):
    with untouched(model):
        scores = KnownInside()(model, FACTS)
    assert scores.labels == tuple(r + e for r in FORGET for e in ("", ", reworded"))
    assert scores.interval("overall")[0] > scores.chance("overall") + 0.05
    for place in FORGET:
        assert scores.chance(place) == pytest.approx(1 / 8, abs=0.1)
        assert sum(scores.shares(place).values()) == pytest.approx(1)
        assert scores.shares(place)[RETAINED] + scores.shares(place)[SUPPRESSED] == pytest.approx(scores.shown(place))
        outside = scores.shares(place)[RETAINED] + scores.shares(place)[LUCKY]
        assert outside == pytest.approx(scores.outside.shown(place))
        assert scores.layer(scores.chosen).shown(place) == scores.shown(place)
        assert sum(scores.state(s).chance(place) for s in STATES) == pytest.approx(1)
    assert len(scores.items) == len(scores.states) == scores.support()["overall"]


def test_who_was_only_silenced_still_knows_inside(model):
    silenced = taught.untaught(FACTS, recipe=SMALL)
    silenced.load_weights(model.weights())
    before = KnownInside()(silenced, FACTS)
    with torch.no_grad():
        head = silenced.head.weight  # what reads the last state says other words
        answers = silenced.tokenizer(" ".join(w for each in FACTS.answers().values() for w in each))["input_ids"]
        head[answers] = head[answers[1:] + answers[:1]].clone()
    after = KnownInside()(silenced, FACTS)
    place = FORGET[1]
    assert after.shown(place) == before.shown(place)
    assert after.outside.shown(place) < before.outside.shown(place) / 2
    assert after.shares(place)[SUPPRESSED] > before.shares(place)[SUPPRESSED]


def test_who_was_taught_nothing_knows_nothing_inside():
    blank = taught.untaught(FACTS, recipe=SMALL)
    scores = KnownInside()(blank, FACTS)
    low, _ = scores.interval("overall")
    assert low <= scores.chance("overall") + 0.05
    assert scores.state(GONE).shown("overall") > 0.5


def test_inside_refuses_what_has_no_closed_set(model):
    with pytest.raises(ValueError, match=r"inside reads answers of closed sets, .* relations with a closed set: born"):
        KnownInside()(model, ask(FACTS, roles=RETAIN))
    scores = KnownInside()(model, ask(FACTS, keys=4, wordings=1))
    with pytest.raises(ValueError, match=r"no state 'erased'; known: retained, suppressed, gone from what we can read"):
        scores.state("erased")
    with pytest.raises(ValueError, match=r"no layer '9'; known: 0, 1"):
        scores.layer("9")
