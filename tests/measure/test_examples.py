"""Activations that are kept are those of the neurons and words that they are named by."""

import torch

from relearn_lens.measure.examples import examples
from relearn_lens.measure.guesses import to_read
from relearn_lens.neurons.sites import Neurons, site_of
from relearn_lens.text.concept import Concept


def test_values_are_those_of_the_hidden_states(bert, plain, corpus, untouched):
    concept, site = Concept("LOC"), site_of(bert.bridge, "resid")
    neurons = Neurons.of(site, [("embed", 3), ("1", 0), ("1", 7)])
    with untouched(bert):
        kept = examples(bert, corpus, concept, neurons, sentences=3)
    assert kept is not None
    text = to_read(corpus, concept, 3)
    assert kept.neurons == ("LembedN3", "L1N0", "L1N7")
    assert [len(words) for words in kept.sentences] == (text.start[1:] - text.start[:-1]).tolist()
    row = 0
    for i, words in enumerate(kept.sentences):
        encoded = bert.encode(text.take([i]))
        (batch,) = encoded.batches()
        with torch.no_grad():
            states = plain(batch.ids, batch.mask, output_hidden_states=True).hidden_states
        pieces = [states[0][0], states[2][0]]
        of_word = batch.word_of.cpu()
        for word in range(len(words)):
            here = batch.subword[of_word == word]
            expected = [pieces[0][here].mean(0)[3], *pieces[1][here].mean(0)[[0, 7]]]
            torch.testing.assert_close(kept.activations[row], torch.stack(expected), atol=1e-5, rtol=1e-4)
            row += 1
    assert [shown for shown, _ in kept.of("L1N7")] == list(kept.sentences)
    assert torch.tensor([v for _, values in kept.of("L1N7") for v in values]).equal(kept.activations[:, 2])
    assert kept.of("L2N7") == []
