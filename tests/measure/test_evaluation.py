"""seqeval and nervaluate as oracles for span F1; the bootstrap against its formula; prediction on the toy model."""

from itertools import groupby
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nervaluate import Evaluator
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support as seqeval_scores

from relearn_lens.find.targets import TARGETS, concept_in
from relearn_lens.measure.evaluation import OVERALL, Scores, SpanScores, evaluate, predict, score_spans
from relearn_lens.measure.guesses import guesses, to_read
from relearn_lens.models import toy
from relearn_lens.models.model import Tagger, reading, tags_of
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import Corpus, build_corpus
from relearn_lens.text.encoding import encode
from tests.fixtures import ticks

LABELS = ("O", "A", "B", "never")
TAGS = tags_of(LABELS)


def corpus_of(sentences: list[list[str]], label_names: tuple[str, ...] = LABELS) -> Corpus:
    """A corpus of BIO tags, its words numbered."""
    words = [[(f"w{i}", t[2:] or "O", t[0] == "B") for i, t in enumerate(s)] for s in sentences]
    return build_corpus(words, name="made", label_names=label_names)


def scored(true: list[list[str]], guess: list[list[str]]) -> SpanScores:
    """Scores of guessed tags, through the corpus and the tag indices."""
    flat = [TAGS.index(tag) for sentence in guess for tag in sentence]
    return score_spans(corpus_of(true), np.array(flat), TAGS)


def well_formed(kinds: list[str]) -> list[str]:
    """BIO tags of words of these kinds, every run of one kind a span."""
    return ["O" if kind == "O" else f"{'BI'[i > 0]}-{kind}" for kind, run in groupby(kinds) for i, _ in enumerate(run)]


def kinds(true: list[list[str]], guess: list[list[str]]) -> list[str]:
    """The labels that somebody has."""
    return sorted({tag[2:] for sentence in (*true, *guess) for tag in sentence} - {""})


def micro_f1(true: list[list[str]], guess: list[list[str]]) -> float:
    """seqeval's F1 over all spans; its default mode is that of conlleval."""
    return cast(float, seqeval_scores(true, guess, average="micro")[2])


LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=6)
TRUE = st.sampled_from(["O", "A", "B"])
GUESS = st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"])


def draw(data, tags=GUESS) -> tuple[list[list[str]], list[list[str]]]:
    """True and guessed tags of some sentences."""
    lengths = data.draw(LENGTHS)
    true = [well_formed(data.draw(st.lists(TRUE, min_size=n, max_size=n))) for n in lengths]
    return true, [data.draw(st.lists(tags, min_size=n, max_size=n)) for n in lengths]


@pytest.mark.filterwarnings("ignore:.*ill-defined")
@settings(max_examples=50, deadline=None)
@given(st.data())
def test_score_spans_agrees_with_seqeval(data):
    true, guess = draw(data)
    ours, seen = scored(true, guess), kinds(true, guess)
    if not seen:  # seqeval gives up on a text without spans
        return
    theirs = seqeval_scores(true, guess, average=None)
    for mine, his in zip((ours.precision, ours.recall, ours.f1), theirs[:3], strict=True):
        assert [mine[label] for label in seen] == pytest.approx(list(np.atleast_1d(his)), abs=1e-9)
    assert ours.f1[OVERALL] == pytest.approx(micro_f1(true, guess), abs=1e-9)
    assert [ours.support()[label] for label in seen] == list(np.atleast_1d(theirs[3]))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_value_from_counts_equals_nervaluate(data):
    true, guess = draw(data)
    ours = scored(true, guess)
    theirs = Evaluator(true, guess, tags=["A", "B"], loader="list").evaluate()
    for label in kinds(true, guess):
        assert ours.value(label) == pytest.approx(theirs["entities"][label]["strict"].f1, abs=1e-9)
        assert ours.value(OVERALL) == pytest.approx(theirs["overall"]["strict"].f1, abs=1e-9)
        assert ours.value(OVERALL) == pytest.approx(ours.f1[OVERALL], abs=1e-9)
    for label in ours.labels:
        assert ours.value(label) == pytest.approx(ours.f1[label], abs=1e-9, nan_ok=True)


@pytest.mark.filterwarnings("ignore:.*ill-defined")
@settings(max_examples=50, deadline=None)
@given(st.data())
def test_value_of_several_labels_is_the_f1_of_their_spans_together(data):
    true, guess = draw(data, st.sampled_from(["O", "B-A", "B-B", "B-never"]))

    def only(tags):
        return [[tag if tag[2:] in ("A", "never") else "O" for tag in sentence] for sentence in tags]

    ours = scored(true, guess).value(("A", "never"))
    assert np.nan_to_num(ours) == pytest.approx(micro_f1(only(true), only(guess)), abs=1e-9)


def test_score_spans_counts_by_hand():
    # Sentence 0: A right, B has the wrong end. Sentence 1: A called B. Sentence 2: an I- without a B- opens a span.
    true = [["B-A", "I-A", "O", "B-B"], ["B-A"], ["O", "B-B"]]
    guess = [["B-A", "I-A", "B-B", "I-B"], ["B-B"], ["O", "I-B"]]
    scores = scored(true, guess)
    assert scores.labels == ("A", "B", "never")
    #                              A: right, predicted, true   B          never
    assert scores.counts.tolist() == [
        [[1, 1, 1], [0, 1, 1], [0, 0, 0]],
        [[0, 0, 1], [0, 1, 0], [0, 0, 0]],
        [[0, 0, 0], [1, 1, 1], [0, 0, 0]],
    ]
    assert scores.support() == {"A": 2, "B": 2, "never": 0, OVERALL: 4}
    assert scores.precision["A"] == 1
    assert scores.recall["A"] == pytest.approx(1 / 2)
    assert scores.f1["A"] == pytest.approx(2 / 3)
    assert scores.f1["B"] == pytest.approx(2 / 5)
    assert scores.value(("A", "B")) == scores.value(OVERALL) == pytest.approx(2 * 2 / (4 + 4))


def test_neighbouring_spans_of_one_label_stay_two():
    scores = scored([["B-A", "B-A", "I-A"]], [["B-A", "I-A", "I-A"]])
    assert scores.counts[0, 0].tolist() == [0, 1, 2]


def test_score_of_a_label_that_nobody_has_is_nan():
    scores = scored([["B-A"], ["O"]], [["O"], ["B-A"]])
    assert scores.f1["A"] == scores.value("A") == 0
    assert np.isnan(scores.f1["never"])
    assert np.isnan(scores.value("never"))
    assert np.isnan(scores.value(("B", "never")))
    assert scores.value(("A", "never")) == 0


def test_overall_of_a_text_without_any_span_is_nan_in_both():
    scores = scored([["O"]], [["O"]])
    assert np.isnan(scores.value(OVERALL))
    assert np.isnan(scores.f1[OVERALL])


def test_value_refuses_a_label_that_there_is_not():
    with pytest.raises(ValueError, match=r"'nothing'.*A, B"):
        scored([["B-A"]], [["B-A"]]).value("nothing")


# --- the bootstrap


def random_scores(n: int, seed: int = 0, right: float = 0.6) -> SpanScores:
    """Scores of `n` sentences of one A each, some of them found."""
    found = np.random.default_rng(seed).random(n) < right
    true, guess = [["B-A", "O"]] * n, [["B-A", "O"] if f else ["O", "B-A"] for f in found]
    return scored(true, guess)


def test_resampled_follows_its_draws():
    # One sentence of three is right, each has one true and one predicted span, so F1 of a draw is the share of that
    # sentence in it: 0, 1/3, 2/3 or 1, with binomial(3, 1/3) probabilities.
    scores = scored([["B-A"]] * 3, [["B-A"], ["B-B"], ["B-B"]])
    drawn = scores.resampled(OVERALL, n=20_000, seed=1)
    share = [float(np.mean(np.isclose(drawn, k / 3))) for k in range(4)]
    assert share == pytest.approx([8 / 27, 12 / 27, 6 / 27, 1 / 27], abs=0.015)


def test_resampled_depends_on_nothing_but_the_seed(untouched):
    scores = random_scores(30)
    with untouched():
        assert (scores.resampled("A", n=50, seed=3) == scores.resampled("A", n=50, seed=3)).all()
        assert (scores.resampled("A", n=50, seed=3) != scores.resampled("A", n=50, seed=4)).any()


def test_resampled_draws_of_two_scores_are_paired():
    # The second finds exactly the sentences that the first misses: every draw of F1 of one is 1 minus the other.
    n, found = 40, np.random.default_rng(0).random(40) < 0.4
    true = [["B-A"]] * n
    one, other = (scored(true, [["B-A"] if f else ["B-B"] for f in which]) for which in (found, ~found))
    total = one.resampled(OVERALL, n=200, seed=5) + other.resampled(OVERALL, n=200, seed=5)
    assert total == pytest.approx(np.ones(200), abs=1e-12)
    assert not (one.resampled("A", seed=5) - random_scores(40).resampled("A", seed=5) == 0).all()
    again = scored(true, [["B-A"] if f else ["B-B"] for f in found])
    assert (one.resampled("A", n=200, seed=5) - again.resampled("A", n=200, seed=5) == 0).all()


def test_interval_contains_the_value_and_its_level_orders_it():
    scores = random_scores(60)
    low, high = scores.interval("A")
    assert 0 <= low < scores.value("A") < high <= 1
    narrow = scores.interval("A", level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert scores.interval("A") == (low, high)


def test_interval_of_a_share_is_that_of_the_binomial():
    # F1 here is a plain share of n sentences, whose standard error is known.
    n, scores = 400, random_scores(400)
    p = scores.value("A")
    low, high = scores.interval("A", n=4000)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / n), rel=0.1)


def test_interval_shrinks_with_the_root_of_the_sentences():
    small, large = random_scores(50), random_scores(800)
    widths = [high - low for low, high in (s.interval("A", n=3000) for s in (small, large))]
    spread = [np.sqrt(s.value("A") * (1 - s.value("A"))) for s in (small, large)]
    assert (widths[0] / spread[0]) / (widths[1] / spread[1]) == pytest.approx(4, rel=0.15)


def test_interval_of_a_score_without_spread_is_the_value():
    scores = scored([["B-A"]] * 5, [["B-A"]] * 5)
    assert scores.interval(OVERALL) == (1, 1)


def test_interval_of_a_label_that_nobody_has_is_nan():
    assert np.isnan(scored([["B-A"]] * 5, [["B-A"]] * 5).interval("never")).all()


def test_interval_of_a_rare_label_leaves_out_draws_without_it():
    # One sentence of twenty has the label and it is right: F1 is 1 wherever it is defined.
    scores = scored([["B-B"], *[["O"]] * 19], [["B-B"], *[["O"]] * 19])
    assert scores.value("B") == 1
    assert scores.interval("B") == (1, 1)


# --- prediction with a model


NAMES = {"place": toy.PLACES, "person": toy.PERSONS}


def made(*sentences: str) -> Corpus:
    """A corpus of toy words, names labelled."""
    kind = {str(name): label for label, names in NAMES.items() for name in names}
    return build_corpus(
        [[(w, kind.get(w, "O"), w in kind) for w in s.split()] for s in sentences],
        name="made",
        label_names=toy.LABELS,
    )


@pytest.fixture
def tagger(toy_model) -> Tagger:
    return toy_model.tagger


def test_predict_reads_the_planted_model_and_the_first_sub_word(tagger):
    corpus = made("Mira walked from Tarn to Linholm .", "in Velda the baker met Castor and Ilse .")
    encoded = encode(corpus, tagger.tokenizer, context=tagger.context)
    assert encoded.n_tokens == corpus.n_words + 2  # Linholm and Castor are two sub-words each
    tags = [tagger.tags[k] for k in predict(tagger, encoded)]
    want = ["B-" + k if k != "O" else k for k in (corpus.label_names[i] for i in corpus.label)]
    assert tags == want
    assert evaluate(tagger, corpus).f1 == {"person": 1, "place": 1, OVERALL: 1}
    assert evaluate(tagger, encoded).support() == {"person": 3, "place": 3, OVERALL: 6}


def test_predict_calls_words_outside_that_truncation_cut_off(tagger):
    long = " ".join(["the"] * 30 + ["Tarn"] * 4)  # the context is 32
    corpus = made("in Tarn .", long)
    cut = encode(corpus, tagger.tokenizer, context=tagger.context, long="truncate")
    tags = [tagger.tags[k] for k in predict(tagger, cut)]
    assert tags[:3] == ["O", "B-place", "O"]
    assert tags[3 + 30 :] == ["B-place", "B-place", "O", "O"]
    split = encode(corpus, tagger.tokenizer, context=tagger.context, long="split")
    assert [tagger.tags[k] for k in predict(tagger, split)][3 + 30 :] == ["B-place"] * 4
    assert evaluate(tagger, cut).counts[1, 1].tolist() == [2, 2, 4]


def test_predict_does_not_depend_on_the_batches(tagger):
    text = encode(toy.corpus(sentences=30), tagger.tokenizer, context=tagger.context)
    with ticks() as counted:
        small = predict(tagger, text, max_tokens=16)
    assert (small == predict(tagger, text)).all()
    assert len(counted) > 10
    assert sum(counted) == text.n_tokens


def test_evaluate_refuses_labels_that_the_tagger_does_not_know(tagger):
    with pytest.raises(ValueError, match=r"corpus 'made' has labels \['A', 'B'\] that the tagger does not know"):
        evaluate(tagger, corpus_of([["B-A", "B-B"]], ("O", "A", "B")))


def test_evaluate_takes_a_text_with_fewer_labels(tagger):
    text = build_corpus([[("Tarn", "place", True), ("Mira", "O", False)]], name="places")
    scores = evaluate(tagger, text)
    assert scores.f1["place"] == 1
    assert scores.counts[0].tolist() == [[0, 1, 0], [1, 1, 1]]  # Mira is predicted to be a person


def test_evaluate_leaves_the_model_as_it_was(toy, untouched):
    evaluate(toy.tagger, toy.corpus)  # TransformerLens hooks up its norms at the first forward pass
    toy.tagger.train()
    list(toy.tagger.modules())[5].eval()  # every module has its own mode back
    with untouched(toy.tagger):
        evaluate(toy.tagger, toy.corpus)


# --- margins


def slow_margins(tagger: Tagger, corpus: Corpus) -> list[list[tuple[str, float]]]:
    """Of each sentence, label and margin of each word that has a label: a sentence and a word at a time."""
    found, tagger = [], tagger.eval()
    for sentence in corpus:
        pieces = [tagger.tokenizer(word.text, add_special_tokens=False)["input_ids"] for word in sentence]
        ids = torch.tensor([[piece for word in pieces for piece in word]])
        with torch.no_grad():
            logits = tagger(ids, torch.ones_like(ids))[0].double().numpy()
        firsts = np.cumsum([0, *map(len, pieces)])[:-1]
        margins = []
        for word, first in zip(sentence, firsts, strict=True):
            if word.label != "O":
                own = [x for x, tag in zip(logits[first], tagger.tags, strict=True) if tag[2:] == word.label]
                other = [x for x, tag in zip(logits[first], tagger.tags, strict=True) if tag[2:] != word.label]
                margins.append((word.label, np.logaddexp(*own) - max(other)))
        found.append(margins)
    return found


@pytest.mark.parametrize("max_tokens", [20, 4096])
def test_margin_agrees_with_a_slow_loop(toy, untouched, max_tokens):
    evaluate(toy.tagger, toy.corpus)
    with torch.no_grad():  # so that some words are on the wrong side
        toy.tagger.head.weight.mul_(0.2).add_(0.05 * torch.randn(5, 32, generator=torch.manual_seed(0)))
    toy.tagger.train()
    with untouched(toy.tagger):
        scores = evaluate(toy.tagger, toy.corpus, max_tokens=max_tokens)
    margin, slow = scores.margin, slow_margins(toy.tagger, toy.corpus)
    assert margin.labels == scores.labels == ("person", "place")
    for k, wanted in enumerate((("person",), ("place",), ("person", "place"))):
        sums = [[x for label, x in sentence if label in wanted] for sentence in slow]
        np.testing.assert_allclose(margin.total[:, k], [sum(x) for x in sums], atol=1e-4)
        assert margin.count[:, k].tolist() == [len(x) for x in sums]
        together = [x for sentence in sums for x in sentence]
        for label in (wanted, *wanted, OVERALL)[: 2 if len(wanted) == 1 else 1]:
            assert margin.value(label) == pytest.approx(np.mean(together), abs=1e-5)
    assert margin.value(OVERALL) == pytest.approx(margin.value(("place", "person")))
    assert min(together) < 0 < max(together)
    assert margin.support() == dict(zip((*margin.labels, OVERALL), margin.count.sum(0), strict=True))


def test_margin_is_the_one_that_attribution_takes(toy):
    scores = evaluate(toy.tagger, toy.corpus)
    encoded = toy.tagger.encode(toy.corpus)
    is_concept, carries = concept_in(toy.tagger, toy.corpus, Concept("place"), "margin")
    with reading(toy.tagger):
        said = []
        for batch in encoded.batches():
            logits = toy.tagger(batch.ids, batch.mask).flatten(0, 1)[batch.subword[batch.first]]
            said.append(TARGETS["margin"].of(logits, is_concept)[torch.from_numpy(carries)[batch.words]])
    assert scores.margin.value("place") == pytest.approx(float(torch.cat(said).mean()), abs=1e-5)


def test_margin_comes_from_the_pass_that_predicts(toy):
    evaluate(toy.tagger, toy.corpus)
    seen: list[int] = []
    handle = toy.tagger.bridge.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    scores = evaluate(toy.tagger, toy.corpus, max_tokens=64)
    handle.remove()
    assert len(seen) == len(toy.tagger.encode(toy.corpus).cuts(max_tokens=64))
    assert scores.margin.count[:, -1].sum() == scores.margin.support()[OVERALL] > 0


def test_margin_leaves_out_what_has_no_label_or_was_cut_off(tagger):
    corpus = made("in Tarn .", " ".join(["the"] * 30 + ["Tarn"] * 4), "the river")  # the context is 32
    cut = encode(corpus, tagger.tokenizer, context=tagger.context, long="truncate")
    margin = evaluate(tagger, cut).margin
    assert margin.count.tolist() == [[0, 1, 1], [0, 2, 2], [0, 0, 0]]
    assert np.isnan(margin.value("person"))
    split = encode(corpus, tagger.tokenizer, context=tagger.context, long="split")
    assert evaluate(tagger, split).margin.count[1].tolist() == [0, 4, 4]


def test_margin_has_an_interval_over_sentences(toy):
    margin = evaluate(toy.tagger, toy.corpus).margin
    low, high = margin.interval("place", n=2000)
    per_word = margin.total[:, 1].sum() / margin.count[:, 1].sum()
    assert low < per_word < high
    # that of a ratio of sums, by the delta method
    residual = margin.total[:, 1] - per_word * margin.count[:, 1]
    error = np.sqrt(len(residual)) * residual.std() / margin.count[:, 1].sum()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert isinstance(margin, Scores)
    assert repr(margin).startswith("Margin(logits, mean over words: person ")


def test_margin_of_a_language_model_is_its_loss_negative():
    model = toy.language_model()
    scores = evaluate(model, toy.corpus(sentences=20), concept=Concept("place"))
    margin = scores.margin
    assert isinstance(margin, Scores)
    for label in (*scores.labels, OVERALL):
        assert margin.value(label) == pytest.approx(-scores.loss[label])
    assert margin.support() == scores.support()
    low, high = scores.interval("place", seed=3)
    assert margin.interval("place", seed=3) == pytest.approx((-high, -low))


def test_tags_scored_without_a_model_have_no_margin():
    assert scored([["B-A"]], [["B-A"]]).margin is None


def test_a_tagger_whose_logits_are_not_finite_is_refused(bert, corpus):
    with torch.no_grad():
        next(bert.trunk.parameters())[5:].fill_(float("nan"))
    with pytest.raises(ValueError, match=r"logits of the tagger are not finite .*; look at the weights"):
        evaluate(bert, corpus)


# --- what a model says of a few sentences


def test_guesses_are_the_labels_of_the_predicted_tags(toy, untouched):
    text = to_read(toy.corpus, Concept("place"))
    with untouched(toy.tagger):
        found = guesses(toy.tagger, text, Concept("place"))
    tags = iter(predict(toy.tagger, encode(text, toy.tagger.tokenizer)))
    said = [[(toy.tagger.tags[next(tags)][2:] or "O",) for _ in sentence] for sentence in text]
    assert [list(sentence) for sentence in found.said] == said
    assert found.words == tuple(tuple(word.text for word in sentence) for sentence in text)
    assert found.true == tuple(tuple(word.label for word in sentence) for sentence in text)


def test_guesses_of_a_language_model_are_the_likeliest_tokens_at_the_concept(untouched):
    made, concept = toy.language_model(), Concept("place")
    text = to_read(toy.corpus(sentences=20), concept, 3)
    with untouched(made):
        found = guesses(made, text, concept, k=2)
    encoded = made.encode(text)
    for batch in encoded.batches():
        with torch.no_grad():
            logits = made(batch.ids, batch.mask).flatten(0, 1)[batch.subword[batch.first] - 1]
        flat = [(w, t, s) for words, true, said in zip(found.words, found.true, found.said, strict=True)
                for w, t, s in zip(words, true, said, strict=True)]  # fmt: skip
        for word, row in zip(batch.words.tolist(), logits, strict=True):
            _, true, said = flat[word]
            best = [made.tokenizer.decode([int(i)]).strip() for i in row.argsort(descending=True)[:2]]
            assert list(said) == (best if true == "place" else [])


def test_to_read_takes_short_sentences_with_the_concept_by_the_text_alone():
    text = corpus_of([
        ["O", "B-A"], ["O", "O"], ["B-A", "O", "B-B"], ["O"] * 30 + ["B-A"], ["B-A"], ["B-B", "B-A", "O", "O"],
    ])  # fmt: skip
    assert [len(s) for s in to_read(text, Concept("A"))] == [2, 3, 1, 4]
    assert [len(s) for s in to_read(text, Concept("A"), 2)] == [3, 4]
    assert to_read(text, Concept("A"), longest=0).n_sentences == 0


def test_to_read_takes_no_sentence_twice():
    words = [("w", "O", False), ("x", "A", True)]
    text = build_corpus([words, words, [*words, *words]], name="made", label_names=LABELS)
    assert [len(s) for s in to_read(text, Concept("A"))] == [2, 4]
