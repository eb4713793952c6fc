"""What the output owes to each neuron: integrated gradients of every neuron of every layer at once.

1. Each word's token embeddings go on a straight line from a baseline to their own: x(a) = x0 + a (x - x0).
2. At each node of a quadrature one forward pass keeps the activations X of all layers in one graph, and one backward
   pass gives df/dX of all of them, where f is what the model says for the concept, summed over the concept's words.
3. The conductance of a neuron is the integral of df/dX dX/da over the path. Every quadrature is a pair (nodes, W), and
   the integral is the sum over i, j of W[i, j] df/dX(node i) X(node j), summed over positions and sentences.
4. In a layer that everything goes through, the sum over its neurons is f(x) - f(x0): what is missing is reported.

`form="layer"` puts the straight line into the activations of one layer instead, a pass per layer and node.
Source: Sundararajan, Taly, Yan 2017 (integrated gradients); Dhamdhere, Sundararajan, Yan 2018 (conductance). captum's
LayerConductance and LayerIntegratedGradients compute the same for one layer at a time; its sums are here by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from beartype import beartype as typechecker
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from relearn_lens import methods, progress
from relearn_lens.find.baselines import baseline_of
from relearn_lens.find.quadrature import QUADRATURES, Rule
from relearn_lens.find.saliency import Saliency
from relearn_lens.find.targets import check_target, concept_in, target_of
from relearn_lens.methods import Attributing
from relearn_lens.models import processes
from relearn_lens.models.model import (
    LanguageModel,
    Model,
    bridge_of,
    encoded_for,
    hidden,
    only_training,
    reading,
    widest,
)
from relearn_lens.names import explained, known_name
from relearn_lens.neurons.sites import Site, ordered, site_of, streaming, token_site
from relearn_lens.text import markup
from relearn_lens.text.concept import Concept, concept_of
from relearn_lens.text.corpus import Corpus
from relearn_lens.text.encoding import Encoded

Form = Literal["conductance", "layer"]


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """What a concept's output owes to each neuron, in the target's unit per concept word; signed."""

    score: Float[Tensor, "layer neuron"]
    """Summed over positions (padding left out) and sentences, divided by the concept's words; float32 on the CPU."""
    delta: Float[Tensor, " layer"]
    """Sum over the neurons of a layer minus `change`. See `is_cut_set` for what it says."""
    change: float
    """f(x) - f(x0): from every word at the baseline to the text as it is, per concept word."""
    n_words: int
    """Words that carry the concept."""
    n_pieces: int
    """Sentences, or parts of one that was too long, with such a word: all that was run."""
    target: str
    unit: str
    """Unit of `score`, `delta` and `change`."""
    baseline: str
    """The one that was taken where `"auto"` was asked."""
    quadrature: str
    steps: int
    form: Form
    concept: str
    site: Site

    @property
    def is_cut_set(self) -> bool:
        """Whether everything goes through each layer (`resid`): then `delta` is an error, which more steps make small.

        MLP units are by-passed by the residual stream: there `delta` is what the layer's MLP does not account for.
        """
        return self.site.name == "resid"

    def saliency(self) -> Saliency:
        """The size of each neuron's attribution, as scores to rank, choose and plot by."""
        kind = "layer_ig" if self.form == "layer" else self.form
        return Saliency(self.score.abs(), kind, self.unit, self.concept, self.site)

    def __repr__(self) -> str:
        largest = int(self.score.abs().argmax())
        most = f"most {self.site.neuron(largest)} at {self.score.flatten()[largest]:.3g} of {self.change:.3g}"
        missing = f"; at most {self.delta.abs().max():.2g} of a layer missing" if self.is_cut_set else ""
        return f"Attribution({self.concept}, {self.form}, {self.site.name}; {most} {self.unit}{missing})"

    def _repr_html_(self) -> str:
        """What the output owes to each layer and to the neurons that it owes most, signed."""
        signed = self.score.flatten()
        rows = [[self.site.neuron(i), f"{signed[i]:+.4g}"] for i in ordered(signed.abs())[:8].tolist()]
        sizes = self.score.abs().sum(1)
        share = dict(zip(self.site.layers, (sizes / sizes.sum()).tolist(), strict=True))
        return markup.box(
            repr(self),
            markup.bars(["layer", "share of all attribution"], share),
            markup.table(["neuron", f"attribution ({self.unit})"], rows),
        )


@dataclass(frozen=True)
class Plan:
    """What an attribution will cost."""

    steps: int
    """Nodes of the quadrature."""
    pieces: int
    """Sentences, or parts of one that was too long, with a word of the concept."""
    chunks: int
    """Groups of pieces, alike in length, that are finished one after the other."""
    pieces_per_chunk: int
    """Of the largest."""
    peak_bytes: int
    """Tensors that live at the same time beside the model's weights, estimated from one step of the longest piece."""
    max_bytes: int
    """Asked for."""
    forwards: int
    """Forward passes, each of one chunk or more than one step of it."""
    backwards: int
    tokens: int
    """Tokens that go forward and backward, once per step: what progress is counted in."""

    def __str__(self) -> str:
        mb = 2**20
        over = f", above the {self.max_bytes / mb:,.0f} asked for: one piece needs that much"
        return (
            f"{self.pieces:,} pieces at {self.steps} steps in {self.chunks:,} chunks of at most "
            f"{self.pieces_per_chunk:,}: {self.forwards:,} forward and {self.backwards:,} backward passes, about "
            f"{self.peak_bytes / mb:,.0f} MiB{over if self.peak_bytes > self.max_bytes else ''}"
        )


@explained
def attribute(
    model: Model,
    text: Corpus | Encoded,
    concept: Concept | str,
    how: Attributing | None = None,
    *,
    site: str | Site = "resid",
    form: Form = "conductance",
    seed: int = 0,
    on_plan: Callable[[Plan], object] | None = None,
    **fields: Any,
) -> Attribution:
    """Attribute what the model says for a concept, on the words that carry it, to every neuron of a site.

    `how` says all about target, path and memory; its fields can be given as keywords too. A word's logits are those of
    its first sub-word: a tagger's there, a language model's on the token before. Only sentences with a word of the
    concept are run; `sentences` takes a sample of so many of them, drawn by `seed`.

    `target` is a name in `TARGETS`, a `Target`, or a function `(logits["word tag"], is_concept["tag"]) -> ["word"]`.
    `"auto"` is a language model's log-probability of the word, and a tagger's margin: it is what the tagger decides by,
    it does not saturate as the log-probability does, and it does not move when all logits do, as the concept's own
    logit would. Its price is a kink where another tag becomes the best other one, so the smooth targets gain more
    accuracy from more steps.

    `baseline` is what stands in place of each word at the start of the path: the embedding of the tokenizer's mask,
    padding or end token (separator, or end of text), or the `"mean"` of all embeddings. `"auto"` is the first of mask,
    padding and end that the tokenizer has and that is not all zeros. Special tokens and padding stay as they are.
    `"zero"` is there by name alone: no text is embedded as zeros, and a LayerNorm blows up the first step away from
    them, which inflates scores, in some models by orders of magnitude.

    The quadrature, a name in `QUADRATURES` or a function, has `steps` nodes (`"gauss-legendre"`) or intervals (the
    others). More steps make `delta` small where it is an error; look at it before a close call. `max_memory` bounds the
    MB of tensors beside the weights; `on_plan` is called with the plan before the run. Progress is in the tokens of
    each pass times its steps.

    Raises:
        ValueError: a name that is not known, a concept or a baseline that model, tokenizer or text lack, or an
            argument out of range; all before any forward pass. Attributions that are not finite, after it.
    """
    run = _Run(model, text, concept_of(concept), methods.of(Attributing, how, fields), site, form, seed)
    with run.hooked():
        plan, chunks = run.plan()
        if on_plan:
            on_plan(plan)
        shared = processes.is_shared(len(chunks))
        times = processes.size() if shared else 1
        with progress.task("attribution", plan.tokens):
            for pieces, at_once in processes.share(chunks):
                run.add(pieces, at_once, times)
        if shared:
            run.together()
    return run.attribution()


@explained
def attribution_plan(
    model: Model,
    text: Corpus | Encoded,
    concept: Concept | str,
    how: Attributing | None = None,
    *,
    site: str | Site = "resid",
    form: Form = "conductance",
    seed: int = 0,
    **fields: Any,
) -> Plan:
    """What `attribute` with the same arguments will cost, from one forward pass over the longest sentence.

    Raises:
        ValueError: as `attribute` does.
    """
    run = _Run(model, text, concept_of(concept), methods.of(Attributing, how, fields), site, form, seed)
    with run.hooked():
        return run.plan()[0]


def _pieces(
    encoded: Encoded, carries: Bool[np.ndarray, " word"], concept: Concept, sentences: int | None, seed: int
) -> Int[np.ndarray, " piece"]:
    """The pieces with a word of the concept, or those of a sample of sentences; longest first."""
    pieces = np.flatnonzero(np.add.reduceat(carries[encoded.word_of], encoded.piece_start[:-1]) > 0)
    if not len(pieces):
        raise ValueError(
            f"no word that carries concept {concept.name!r} is left in {encoded.corpus.name!r} (the model's context "
            "cut them off); use a larger corpus, or long='split'"
        )
    if sentences is not None:
        first = encoded.word_of[encoded.piece_start[pieces]]
        sentence = np.searchsorted(encoded.corpus.start, first, side="right")
        every = np.unique(sentence)
        chosen = np.random.default_rng(seed).permutation(every)[:sentences]
        pieces = pieces[np.isin(sentence, chosen)]
    return pieces[np.argsort(-encoded.lengths[pieces], kind="stable")]


class _Run:
    """One attribution under way: its checked arguments, the path through the hooks, and running sums."""

    def __init__(
        self, model: Model, text: Corpus | Encoded, concept: Concept, how: Attributing, site: str | Site, form: str,
        seed: int,
    ):  # fmt: skip
        bridge_of(model)  # says what is none
        rule = how.quadrature
        for what, name, known in (("form", form, get_args(Form)), ("quadrature", rule, QUADRATURES)):
            if not callable(name):
                known_name(what, name, known)
        self.model, self.concept, self.max_bytes = model, concept.name, how.max_bytes
        self.form = cast(Form, form)
        self.steps = how.steps
        self.site, self.target = site_of(model.bridge, site), target_of(how.target, model)
        corpus = text.corpus if isinstance(text, Encoded) else text
        is_concept, self.carries = concept_in(model, corpus, concept, how.target)
        check_target(self.target, is_concept)
        self.baseline, self.start = baseline_of(model, how.baseline)
        self.encoded = encoded_for(model, text)
        self.carries = self.carries & np.isin(np.arange(len(self.carries)), self.encoded.read_words)
        self.pieces = _pieces(self.encoded, self.carries, concept, how.sentences, seed)

        self.quadrature = rule if isinstance(rule, str) else getattr(rule, "__name__", "quadrature")
        points: Rule = (QUADRATURES[rule] if isinstance(rule, str) else rule)(how.steps)
        device = model.device
        self.is_concept = is_concept.to(device)
        self.nodes, self.weights = (t.to(device, torch.float32) for t in points)
        wide = widest(device)
        units = self.site.width * self.site.size
        self.total = torch.zeros(len(self.site.layers), units, dtype=wide, device=device)
        self.change, self.n_words = 0.0, 0
        self.seen: list[Tensor] = []
        self.put: tuple[int, Tensor] | None = None

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """For a while: the model reads, its weights need no gradient, and the hooks are in place."""
        model, bridge = self.model, self.model.bridge
        with (
            # Frozen weights cost neither their gradients nor the inputs that those would be made from.
            only_training((), (*model.parameters(), *bridge.original_model.parameters())),
            reading(model),
            streaming(bridge, token_site(bridge), self._tokens),
            streaming(bridge, self.site, self._layer, units=True),
        ):
            yield

    def plan(self) -> tuple[Plan, list[tuple[np.ndarray, int]]]:
        """The plan, and the chunks: pieces and how many steps of them go into one pass."""
        row, activations = self._measure()
        n, lengths = len(self.nodes), self.encoded.lengths[self.pieces]
        layers = len(self.site.layers) if self.form == "layer" else 1

        def peak(at_once: int) -> int:
            """Bytes that a piece as long as the longest needs: its graph, and what it keeps from other steps."""
            if self.form == "layer":
                return at_once * row + 3 * activations
            # The end has no graph, but the matrix product of one layer (and its float32 copies in a narrower model).
            product = -(-n // len(self.site.layers)) * (1 if self.dtype == torch.float32 else 4)
            return max(at_once * row + 2 * (n - at_once) * activations, (2 * n + product) * activations)

        chunks, peaks, i = [], [], 0
        while i < len(lengths):
            # Memory grows at least in proportion to length, so for shorter pieces this errs on the safe side. A tenth
            # is left for what the estimate misses.
            room = self.max_bytes * 9 * int(lengths[0]) // (10 * int(lengths[i]))
            # Steps before pieces: the steps of a piece are alike in length and need no padding.
            at_once = max(k for k in range(1, n + 1) if k == 1 or peak(k) <= room)
            size = min(max(1, room // peak(at_once)), len(lengths) - i, -(-len(lengths) // processes.size()))
            chunks.append((self.pieces[i : i + size], at_once))
            peaks.append(size * peak(at_once) * int(lengths[i]) // int(lengths[0]))
            i += size
        passes = sum(-(-n // at_once) for _, at_once in chunks) * layers
        return Plan(
            steps=n,
            pieces=len(lengths),
            chunks=len(chunks),
            pieces_per_chunk=max(len(pieces) for pieces, _ in chunks),
            peak_bytes=max(peaks),
            max_bytes=self.max_bytes,
            forwards=passes + len(chunks),
            backwards=passes,
            tokens=int(lengths.sum()) * n * layers,
        ), chunks

    def _measure(self) -> tuple[int, int]:
        """Bytes of one step of the longest piece, and those of its activations alone, by one forward pass."""
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage  # alive, so that no other gets its address

        self._load(self.pieces[:1])
        # What is packed for a backward pass that never comes need not be unpacked.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
            self._said(self.nodes[:1])
        activations, self.dtype = sum(x.nbytes for x in self.seen), self.seen[0].dtype
        for x in self.seen:
            keep(x)
        self.seen = []
        for weight in (*self.model.parameters(), *self.model.buffers()):
            kept.pop(weight.untyped_storage().data_ptr(), None)
        sizes = [storage.nbytes() for storage in kept.values()]
        # On top come the activations' gradients, and what one operation needs beside what it saves.
        return sum(sizes) + activations + max(sizes), activations

    def add(self, pieces: Int[np.ndarray, " piece"], at_once: int, times: int) -> None:
        """Add the attributions of some pieces, so many steps in each pass."""
        self._load(pieces)
        self.n_words += len(self.words)
        with torch.no_grad():
            start, end = self._said(self.nodes.new_tensor([0.0, 1.0])).tolist()
        self.change += end - start
        with torch.enable_grad():
            (self._layer_ig if self.form == "layer" else self._conductance)(at_once, times)

    def attribution(self) -> Attribution:
        """What was added so far, per word of the concept.

        Raises:
            ValueError: it is not finite.
        """
        # A head's attribution is that of its units together.
        score = self.total.cpu().unflatten(1, (self.site.width, self.site.size)).sum(2) / self.n_words
        change = self.change / self.n_words
        for name, row in zip(self.site.layers, score, strict=True):
            if not row.isfinite().all():
                raise ValueError(
                    f"attributions to {self.site.name} in layer {name!r} are not finite (NaN or infinite); look at the "
                    "model's weights, or load it with a wider dtype"
                )
        return Attribution(
            score.float(),
            (score.sum(1) - change).float(),
            change,
            n_words=self.n_words,
            n_pieces=len(self.pieces),
            target=self.target.name,
            unit=f"{self.target.unit} per word".strip(),
            baseline=self.baseline,
            quadrature=self.quadrature,
            steps=self.steps,
            form=cast(Form, self.form),
            concept=self.concept,
            site=self.site,
        )

    def together(self) -> None:
        """Take in what other processes added."""
        sums = torch.tensor([self.change, self.n_words], dtype=torch.float64)
        processes.sum_(self.total, sums)
        self.change, self.n_words = float(sums[0]), round(float(sums[1]))

    def _conductance(self, at_once: int, times: int) -> None:
        """Every step goes forward and backward once, for all layers."""
        xs: list[list[Tensor]] = [[] for _ in self.site.layers]
        slopes: list[list[Tensor]] = [[] for _ in self.site.layers]
        for nodes in self.nodes.split(at_once):
            gradients = list(torch.autograd.grad(self._said(nodes).sum(), self.seen))
            for x, slope in zip(xs, slopes, strict=True):
                x.append(self._real(self.seen.pop(0).detach()))
                slope.append(self._real(gradients.pop(0)))
            progress.advance(len(self.real) * len(nodes) * times)
        for total in self.total:
            # One layer at a time, and nothing twice: what is done with goes.
            moved = self.weights @ torch.cat(xs.pop(0)).float().flatten(1)
            slope = torch.cat(slopes.pop(0))
            total += moved.view_as(slope).mul_(slope).sum(0).sum(0, dtype=total.dtype)

    def _layer_ig(self, at_once: int, times: int) -> None:
        """The activations of one layer after the other go on a straight line, all else is as in the text."""
        ends = [x.unflatten(0, (2, -1)) for x in self.seen]
        speed = self.weights @ self.nodes  # W of an X that goes from 0 to 1 on a straight line
        for layer, (start, end) in enumerate(ends):
            start, way = start.float(), end.float() - start.float()
            for nodes, weights in zip(self.nodes.split(at_once), speed.split(at_once), strict=True):
                x = (start + nodes.view(-1, 1, 1, 1) * way).flatten(0, 1).to(end.dtype).requires_grad_()
                self.put = layer, x
                (gradient,) = torch.autograd.grad(self._said(torch.ones_like(nodes)).sum(), x)
                self.put = None
                slope = (weights.view(-1, 1, 1) * self._real(gradient)).sum(0)
                self.total[layer] += (slope * self._real(way)[0]).sum(0, dtype=self.total.dtype)
                progress.advance(len(self.real) * len(nodes) * times)

    def _load(self, pieces: Int[np.ndarray, " piece"]) -> None:
        """Take up some pieces: where their words, their tokens and the concept's words are."""
        batch, device = self.encoded.batch(pieces), self.nodes.device
        carries = torch.from_numpy(self.carries)[batch.words]
        self.words = batch.subword[batch.first[carries]].to(device)
        is_word = torch.zeros(batch.ids.numel(), dtype=torch.bool).index_fill_(0, batch.subword, True)
        self.is_word = is_word.view(*batch.ids.shape, 1).to(device)
        self.real = batch.mask.flatten().nonzero().flatten().to(device)
        self.ids, self.mask = batch.ids.to(device), batch.mask.to(device)

    def _said(self, nodes: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
        """f at some nodes of the path, in one forward pass; every layer's activations are in `seen`."""
        n, self.at, self.seen = len(nodes), nodes, []
        ids, mask = self.ids.repeat(n, 1), self.mask.repeat(n, 1)
        if isinstance(self.model, LanguageModel):
            words = self._own_and_others(self.model, hidden(self.model.bridge, ids, mask))
        else:
            words = self.model(ids, mask).float().unflatten(0, (n, -1)).flatten(1, 2)[:, self.words]
        return self.target.of(words.flatten(0, 1), self.is_concept).view(n, -1).sum(1)

    def _own_and_others(
        self, model: LanguageModel, states: Float[Tensor, "row token d_model"]
    ) -> Float[Tensor, "node word 2"]:
        """Logit of each word's own first token, and the logsumexp of all others', on the token before."""
        before = states.unflatten(0, (-1, len(self.ids))).flatten(1, 2)[:, self.words - 1]
        logits = model.logits(before).float()
        own = self.ids.flatten()[self.words].expand(len(logits), -1)[..., None]
        others = logits.scatter(-1, own, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logits.gather(-1, own), others], -1)

    def _tokens(self, _: int, x: Float[Tensor, "row token d_model"]) -> Float[Tensor, "row token d_model"]:
        """Move the words to the current nodes of the path."""
        end = x.float().unflatten(0, (len(self.at), -1))
        start = torch.where(self.is_word, self.start, end)
        return (start + self.at.view(-1, 1, 1, 1) * (end - start)).flatten(0, 1).to(x.dtype)

    def _layer(self, layer: int, x: Float[Tensor, "row token neuron"]) -> Tensor | None:
        """Keep a layer's activations, or replace them."""
        if self.put is not None:
            return self.put[1] if self.put[0] == layer else None
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # the graph begins here: nothing below the first layer is needed
        self.seen.append(x)
        return x

    def _real(self, x: Float[Tensor, "row token neuron"]) -> Float[Tensor, "node position neuron"]:
        """Without the padding; rows are nodes times pieces."""
        x = x.unflatten(0, (-1, len(self.ids))).flatten(1, 2)
        return x if len(self.real) == x.shape[1] else x[:, self.real]
