"""Encoders that normalise after adding: Hugging Face's own model as oracle; hooks and weights say the same."""

import pytest
import torch
import transformers

from relearn_lens.models.loading import load_tagger
from relearn_lens.models.model import Tagger, hidden, reading
from relearn_lens.neurons.sites import SITES, Neurons, site_of, streaming
from relearn_lens.remove.ablation import ablated, prune_
from tests.fixtures import CONTEXT, D_MLP, D_MODEL, LABELS, N_LAYERS, VOCAB
from tests.made import Pool

IDS = torch.tensor([[5, 9, 7, 20, 22, 6], [8, 11, 30, 5, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
REAL = MASK.bool()


@pytest.fixture(scope="module", params=["distilbert", "roberta"])
def folder(request, tmp_path_factory):
    """A random encoder of 3 layers in a folder, with the small BERT's words."""
    if request.param == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=len(VOCAB), dim=D_MODEL, hidden_dim=D_MLP, n_layers=N_LAYERS, n_heads=4,
            max_position_embeddings=CONTEXT, sinusoidal_pos_embds=False,
        )  # fmt: skip
    else:
        config = transformers.RobertaConfig(
            vocab_size=len(VOCAB), hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=N_LAYERS,
            num_attention_heads=4, max_position_embeddings=CONTEXT + 1, pad_token_id=0, type_vocab_size=1,
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModelForMaskedLM.from_config(config)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    tmp_path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(tmp_path)
    transformers.BertTokenizer(vocab=VOCAB, do_lower_case=True).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def taggers(folder) -> Pool[Tagger]:
    return Pool(lambda: load_tagger(folder, LABELS, device="cpu"))


@pytest.fixture
def tagger(taggers) -> Tagger:
    return taggers.lend()()


def test_every_layer_and_the_logits_equal_hugging_faces(folder, tagger):
    plain = transformers.AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    seen: list[torch.Tensor] = []
    with reading(tagger), streaming(tagger.bridge, site_of(tagger.bridge), lambda _, x: seen.append(x)):
        hidden(tagger.bridge, IDS, MASK)
    with torch.no_grad():
        own = plain(IDS, attention_mask=MASK, output_hidden_states=True)
        logits = tagger.bridge(IDS, attention_mask=MASK, return_type="logits")
    for mine, theirs in zip(seen, own.hidden_states, strict=True):
        torch.testing.assert_close(mine[REAL], theirs[REAL], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[REAL], own.logits[REAL], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("where", list(SITES))
@pytest.mark.parametrize("sever", ["out", "both"])
def test_ablated_equals_pruned(tagger, where, sever):
    site = site_of(tagger.bridge, where)
    mask = torch.rand(len(site.layers), site.width, generator=torch.Generator().manual_seed(0)) < 0.3
    chosen = Neurons(mask, site)
    with reading(tagger):
        before = tagger(IDS, MASK)[REAL]
        with ablated(tagger, chosen):
            by_hook = tagger(IDS, MASK)[REAL]
        prune_(tagger, chosen, sever=sever)
        torch.testing.assert_close(tagger(IDS, MASK)[REAL], by_hook, atol=1e-5, rtol=0)
    assert (by_hook - before).abs().max() > 1e-3


def test_every_weight_gets_a_gradient(tagger):
    tagger(IDS, MASK).square().sum().backward()
    assert [name for name, weight in tagger.named_parameters() if weight.grad is None] == []
