"""Heads that were trained elsewhere: what of them serves a text with other labels."""

import warnings
from typing import Any

import pytest
import torch
import transformers

from relearn_lens.models.heads import tags_of, trained_head
from relearn_lens.models.loading import load_tagger
from tests.fixtures import LABELS, VOCAB


def model(names: list[str], folder: Any = None) -> Any:
    """A BERT with a head for these classes; saved to a folder if one is given."""
    config = transformers.BertConfig(
        vocab_size=len(VOCAB), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        made = transformers.BertForTokenClassification(config).eval()
        made.classifier.bias.copy_(torch.arange(len(names)) + 1.0)
    if folder is not None:
        made.save_pretrained(folder)
        transformers.BertTokenizer(vocab=VOCAB, do_lower_case=True).save_pretrained(folder)
    return made


@pytest.mark.parametrize(
    ("names", "of_tag", "note"),
    [
        (["I-PER", "B-LOC", "O", "B-PER", "I-LOC"], {t: t for t in tags_of(LABELS)}, ""),
        (
            ["O", "B-MISC", "I-MISC", "B-PER", "I-PER", "B-LOC", "I-LOC"],
            {t: t for t in tags_of(LABELS)},
            "B-MISC, I-MISC left out",
        ),
        (["O", "B-LOC", "I-LOC", "I-PER"], {t: t for t in tags_of(LABELS) if t != "B-PER"}, "B-PER drawn fresh"),
        (
            ["O", "LOC", "PER", "[PAD]"],
            {"O": "O", "I-LOC": "LOC", "I-PER": "PER"},
            "B-LOC, B-PER drawn fresh and [PAD] left out",
        ),
        (
            ["O", "B-LOC", "I-LOC"],
            {"O": "O", "B-LOC": "B-LOC", "I-LOC": "I-LOC"},
            "B-PER, I-PER drawn fresh",
        ),
    ],
)
def test_rows_are_taken_by_name(names, of_tag, note):
    plain = model(names)
    found = trained_head(plain, LABELS)
    assert [tags_of(LABELS)[i] for i in found.rows] == list(of_tag)
    rows = [names.index(name) for name in of_tag.values()]
    assert torch.equal(found.weight, plain.classifier.weight[rows])
    assert torch.equal(found.bias, plain.classifier.bias[rows])
    assert found.note == note


def test_a_tagger_has_the_rows_that_fit_and_fresh_ones_beside(tmp_path):
    plain = model(["O", "I-PER", "B-MISC"], tmp_path)
    with pytest.warns(UserWarning, match="B-LOC, I-LOC, B-PER drawn fresh and B-MISC left out"):
        tagger = load_tagger(tmp_path, LABELS, device="cpu", seed=3)
    fresh = load_tagger(tmp_path, LABELS, device="cpu", seed=3, head="fresh")
    kept = [0, 4]
    assert torch.equal(tagger.head.weight[kept], plain.classifier.weight[:2])
    assert torch.equal(tagger.head.weight[1:4], fresh.head.weight[1:4])
    assert not fresh.head.bias.any()
    assert torch.equal(fresh.trunk.state_dict().popitem()[1], tagger.trunk.state_dict().popitem()[1])


def test_a_head_that_fits_says_nothing(tmp_path):
    model(list(tags_of(LABELS)), tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load_tagger(tmp_path, LABELS, device="cpu")
    assert not [w for w in said if "head" in str(w.message)]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"LABEL_{i}" for i in range(5)], r"its 5 classes have no names; write them into id2label .* head='fresh'"),
        (["0", "1", "2"], r"its 3 classes have no names"),
        (["O", "B-GPE", "I-GPE"], r"none of these labels is there; name the labels of the text as the model does, or"),
        (["NONE", "B-LOC", "I-LOC", "B-PER", "I-PER"], "there is no O; name"),
        (["O", "B-LOC", "I-LOC", "E-LOC", "S-LOC"], r"E-LOC, S-LOC are of another scheme than BIO; draw a fresh head"),
        ([f"B-{i}" for i in range(40)] + ["O"], r"trained for B-0, .*, B-7, \.\.\., B-39, O, and the labels"),
    ],
)
def test_a_head_that_serves_nothing_is_refused(names, said):
    with pytest.raises(ValueError, match=said):
        trained_head(model(names), LABELS)


def test_a_head_of_several_layers_is_refused_with_a_way_on(tmp_path):
    tags = dict(enumerate(tags_of(LABELS)))
    config = transformers.ModernBertConfig(
        vocab_size=len(VOCAB), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=2, cls_token_id=2, eos_token_id=3, sep_token_id=3,
        id2label=tags, label2id={tag: i for i, tag in tags.items()},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        transformers.ModernBertForTokenClassification(config).save_pretrained(tmp_path)
    transformers.BertTokenizer(vocab=VOCAB, do_lower_case=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not one linear layer .*; draw a fresh head with head='fresh'"):
        load_tagger(tmp_path, LABELS, device="cpu")
    assert load_tagger(tmp_path, LABELS, device="cpu", head="fresh").tags == tags_of(LABELS)


def test_an_unknown_head_is_refused(bert_folder):
    # What a plain run of Python gets; under these tests the types are checked first.
    with pytest.raises((ValueError, TypeError), match=r"unknown head 'new'; known: trained, fresh|head"):
        load_tagger(bert_folder, LABELS, head="new")  # pyright: ignore[reportArgumentType]
