"""What the output owes to each neuron: integrated gradients of every neuron of every layer at once.

1. Each word's token embeddings go on a straight line from a reference to their own: x(a) = x0 + a (x - x0).
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
from typing import Any, Literal, get_args

import numpy as np
import torch
from beartype import beartype as typechecker
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from relearn_lens.concept import Concept
from relearn_lens.corpus import OUTSIDE, Corpus
from relearn_lens.encoding import Encoded
from relearn_lens.models import LanguageModel, Model, Tagger, encoded_for, hidden, reading
from relearn_lens.neurons import Neuron, Site, site_of, streaming, token_site, token_vectors
from relearn_lens.saliency import Saliency

Form = Literal["conductance", "layer"]
Reference = Literal["auto", "mask", "pad", "end", "mean", "zero"]
Rule = tuple[Float[Tensor, " node"], Float[Tensor, "node node"]]
"""Nodes in [0, 1] and W, float64: the integral of g dx/da over the path is the sum of W[i, j] g(node i) x(node j)."""

MEMORY = 512 * 2**20


@dataclass(frozen=True)
class Target:
    """What the output says for a concept, one number per word.

    For a language model there are two "tags": the word's own first token, which is the concept, and all other tokens
    together (their logsumexp).
    """

    name: str
    unit: str
    says: str
    of: Callable[[Float[Tensor, "word tag"], Bool[Tensor, " tag"]], Float[Tensor, " word"]]


def _concept(logits: Float[Tensor, "word tag"], is_concept: Bool[Tensor, " tag"]) -> Float[Tensor, " word"]:
    return logits[:, is_concept].logsumexp(1)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("logit", "logit", "logsumexp of the concept's tag logits", _concept),
        Target(
            "logprob",
            "nat",
            "log-probability of the concept's tags; saturates where the tagger is sure",
            lambda logits, is_concept: _concept(logits, is_concept) - logits.logsumexp(1),
        ),
        Target(
            "margin",
            "logit",
            "the concept's logit minus the highest logit of another tag: above 0 the tagger says the concept; for a "
            "language model the log-odds of the word's token",
            lambda logits, is_concept: _concept(logits, is_concept) - logits[:, ~is_concept].amax(1),
        ),
    )
}


def gauss_legendre(steps: int) -> Rule:
    """Gauss-Legendre nodes; dX/da at a node is that of the polynomial through X at all nodes.

    W[i, j] = w_i D[i, j] with the barycentric differentiation matrix D. Exact where X(a) is a polynomial below degree
    `steps` and the integrand one below `2 steps`. Source: Berrut & Trefethen 2004, section 9.3, for D.
    """
    nodes, weights = _legendre(steps)
    gaps = nodes[:, None] - nodes + np.eye(steps)
    # Barycentric weights 1 / prod(gaps), as logarithms: the products underflow for many nodes.
    size, sign = np.log(np.abs(gaps)).sum(1), np.sign(gaps).prod(1)
    slopes = np.exp(size[:, None] - size) * sign[:, None] * sign / gaps
    np.fill_diagonal(slopes, 0)
    np.fill_diagonal(slopes, -slopes.sum(1))  # a constant has no slope
    return torch.from_numpy(nodes), torch.from_numpy(weights[:, None] * slopes)


def riemann(steps: int) -> Rule:
    """`steps` equal intervals: the mean of the gradients at an interval's two ends times X's increment."""
    nodes, left = captum_riemann(steps)
    return nodes, (left + left.roll(1, 0)) / 2


def captum_gauss_legendre(steps: int) -> Rule:
    """captum's LayerConductance with `method="gausslegendre"` and `n_steps=steps`.

    The gradient at each of `steps + 1` nodes times X's increment to the next; the path before the first and after the
    last is left out.
    """
    return torch.from_numpy(_legendre(steps + 1)[0]), _next_increment(steps)


def captum_riemann(steps: int) -> Rule:
    """captum's LayerConductance with `method="riemann_trapezoid"`: the gradient at the start of each interval."""
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64), _next_increment(steps)


def _legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return (1 + nodes) / 2, weights / 2


def _next_increment(steps: int) -> Float[Tensor, "node node"]:
    """W of the gradient at node i times X(node i + 1) - X(node i); nothing at the last node."""
    here = torch.eye(steps + 1, dtype=torch.float64)
    here[-1] = 0
    return here.roll(1, 1) - here


QUADRATURES: dict[str, Callable[[int], Rule]] = {
    "gauss-legendre": gauss_legendre,
    "riemann": riemann,
    "captum-gauss-legendre": captum_gauss_legendre,
    "captum-riemann": captum_riemann,
}


@jaxtyped(typechecker=typechecker)
@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """What a concept's output owes to each neuron, in the target's unit per concept word; signed."""

    score: Float[Tensor, "layer neuron"]
    """Summed over positions (padding left out) and sentences, divided by the concept's words; float32 on the CPU."""
    delta: Float[Tensor, " layer"]
    """Sum over the neurons of a layer minus `change`. See `is_cut_set` for what it says."""
    change: float
    """f(x) - f(x0): from every word at the reference to the text as it is, per concept word."""
    n_words: int
    """Words that carry the concept."""
    n_pieces: int
    """Sentences, or parts of one that was too long, with such a word: all that was run."""
    target: str
    unit: str
    """Unit of `score`, `delta` and `change`."""
    reference: str
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
        layer, index = divmod(int(self.score.abs().argmax()), self.site.width)
        most = f"most {Neuron(self.site.layers[layer], index)} at {self.score[layer, index]:.3g} of {self.change:.3g}"
        missing = f"; at most {self.delta.abs().max():.2g} of a layer missing" if self.is_cut_set else ""
        return f"Attribution({self.concept}, {self.form}, {self.site.name}; {most} {self.unit}{missing})"


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
    bytes_per_row: int
    """Measured: one step of the longest piece, forward and backward."""
    peak_bytes: int
    """Tensors that live at the same time beside the model's weights, estimated from `bytes_per_row`."""
    max_memory: int
    forwards: int
    """Forward passes, each of one chunk or more than one step of it."""
    backwards: int
    tokens: int
    """Tokens that go forward and backward, once per step: what the calls of `tick` sum to."""

    def __str__(self) -> str:
        mb = 2**20
        over = f", above the {self.max_memory / mb:,.0f} asked for: one piece needs that much"
        return (
            f"{self.pieces:,} pieces at {self.steps} steps in {self.chunks:,} chunks of at most "
            f"{self.pieces_per_chunk:,}: {self.forwards:,} forward and {self.backwards:,} backward passes, about "
            f"{self.peak_bytes / mb:,.0f} MiB{over if self.peak_bytes > self.max_memory else ''}"
        )


def attribute(
    model: Model,
    text: Corpus | Encoded,
    concept: Concept,
    *,
    site: str | Site = "resid",
    target: str | Target | Callable = "auto",
    reference: Reference = "auto",
    quadrature: str | Callable[[int], Rule] = "gauss-legendre",
    steps: int = 16,
    form: Form = "conductance",
    max_memory: int = MEMORY,
    sentences: int | None = None,
    seed: int = 0,
    tick: Callable[[int], object] | None = None,
    on_plan: Callable[[Plan], object] | None = None,
) -> Attribution:
    """Attribute what the model says for a concept, on the words that carry it, to every neuron of a site.

    A word's logits are those of its first sub-word: a tagger's there, a language model's on the token before. Only
    sentences with a word of the concept are run; `sentences` takes a sample of so many of them, drawn by `seed`.

    `target` is a name in `TARGETS`, a `Target`, or a function `(logits["word tag"], is_concept["tag"]) -> ["word"]`.
    `"auto"` is a language model's log-probability of the word, and a tagger's margin: it is what the tagger decides by,
    it does not saturate as the log-probability does, and it does not move when all logits do, as the concept's own
    logit would. Its price is a kink where another tag becomes the best other one, so the smooth targets gain more
    accuracy from more steps.

    `reference` is what stands in place of each word at the start of the path: the embedding of the tokenizer's mask,
    padding or end token (separator, or end of text), or the `"mean"` of all embeddings. `"auto"` is the first of mask,
    padding and end that the tokenizer has and that is not all zeros. Special tokens and padding stay as they are.
    `"zero"` is there by name alone: no text is embedded as zeros, and a LayerNorm blows up the first step away from
    them, which inflates scores, in some models by orders of magnitude.

    The quadrature, a name in `QUADRATURES` or a function, has `steps` nodes (`"gauss-legendre"`) or intervals (the
    others). More steps make `delta` small where it is an error; look at it before a close call. `max_memory` bounds the
    bytes of tensors beside the weights; `on_plan` is called with the plan before the run, `tick` with the tokens of
    each pass times its steps.

    Raises:
        ValueError: a name that is not known, a concept or a reference that tagger, tokenizer or text lack, or an
            argument out of range; all before any forward pass. Attributions that are not finite, after it.
    """
    run = _Run(
        model, text, concept, site=site, target=target, reference=reference, quadrature=quadrature, steps=steps,
        form=form, max_memory=max_memory, sentences=sentences, seed=seed,
    )  # fmt: skip
    with run.hooked():
        plan, chunks = run.plan()
        if on_plan:
            on_plan(plan)
        for pieces, at_once in chunks:
            run.add(pieces, at_once, tick or (lambda _: None))
    # A head's attribution is that of its units together.
    score = run.total.cpu().unflatten(1, (run.site.width, run.site.size)).sum(2) / run.n_words
    change = run.change / run.n_words
    for name, row in zip(run.site.layers, score, strict=True):
        if not row.isfinite().all():
            raise ValueError(
                f"attributions to {run.site.name} in layer {name!r} are not finite (NaN or infinite); look at the "
                "model's weights, or load it with a wider dtype"
            )
    return Attribution(
        score.float(),
        (score.sum(1) - change).float(),
        change,
        n_words=run.n_words,
        n_pieces=len(run.pieces),
        target=run.target.name,
        unit=f"{run.target.unit} per word".strip(),
        reference=run.reference,
        quadrature=run.quadrature,
        steps=steps,
        form=form,
        concept=concept.name,
        site=run.site,
    )


def attribution_plan(model: Model, text: Corpus | Encoded, concept: Concept, **settings: Any) -> Plan:
    """What `attribute` with the same keywords will cost, from one forward pass over the longest sentence.

    Raises:
        ValueError: as `attribute` does.
    """
    run = _Run(model, text, concept, **settings)
    with run.hooked():
        return run.plan()[0]


def target_of(target: str | Target | Callable, model: Model | None = None) -> Target:
    """A target by name; a `Target` or a function is taken as it is, `"auto"` is by the kind of model.

    Raises:
        ValueError: the target is not known.
    """
    if isinstance(target, Target):
        return target
    if callable(target):
        return Target(getattr(target, "__name__", "target"), "", (target.__doc__ or "").strip(), target)
    if target == "auto":
        return TARGETS["logprob" if isinstance(model, LanguageModel) else "margin"]
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known: auto, {', '.join(TARGETS)}")
    return TARGETS[target]


def _check_concept(
    tagger: Model, corpus: Corpus, concept: Concept, target: str | Target | Callable
) -> tuple[Bool[Tensor, " tag"], Bool[np.ndarray, " word"]]:
    """Which of the model's tags are the concept's, and which words of the corpus carry it."""
    if not isinstance(tagger, Tagger):
        classes = concept.classes(corpus)
        return torch.tensor([True, False]), classes.carries[classes.of_word]
    if concept.words and isinstance(target, str):
        raise ValueError(
            f"concept {concept.name!r} is given by words, which have no tags, so a tagger says nothing of it: "
            "attribution needs a concept by labels, or a target function"
        )
    classes = concept.classes(corpus)
    if unknown := [label for label in concept.labels if label not in tagger.label_names]:
        raise ValueError(
            f"the tagger has no tags for label {unknown[0]!r} of concept {concept.name!r}; it was made for "
            f"{', '.join(tagger.label_names)}"
        )
    # B-x and I-x carry label x, "O" itself.
    is_concept = torch.tensor([(tag if tag == OUTSIDE else tag[2:]) in concept.labels for tag in tagger.tags])
    return is_concept, classes.carries[classes.of_word]


def _check_target(target: Target, is_concept: Bool[Tensor, " tag"]) -> None:
    """Try a target on logits of three words."""
    logits = torch.zeros(3, len(is_concept), requires_grad=True)
    with torch.enable_grad():
        said = target.of(logits, is_concept)
    if not isinstance(said, Tensor) or said.shape != (3,) or not said.requires_grad:
        found = f"shape {tuple(said.shape)}" if isinstance(said, Tensor) else type(said).__name__
        raise ValueError(
            f"target {target.name!r} must turn logits of shape (word, tag) into one number per word that has a "
            f"gradient; for 3 words it gave {found}"
        )


def _pieces(
    encoded: Encoded, carries: Bool[np.ndarray, " word"], concept: Concept, sentences: int | None, seed: int
) -> Int[np.ndarray, " piece"]:
    """The pieces with a word of the concept, or those of a sample of sentences; longest first."""
    found = np.flatnonzero(np.add.reduceat(carries[encoded.word_of], encoded.piece_start[:-1]) > 0)
    if not len(found):
        raise ValueError(
            f"no word that carries concept {concept.name!r} is left in {encoded.corpus.name!r} (the model's context "
            "cut them off); use a larger corpus, or long='split'"
        )
    if sentences is not None:
        first = encoded.word_of[encoded.piece_start[found]]
        sentence = np.searchsorted(encoded.corpus.start, first, side="right")
        every = np.unique(sentence)
        chosen = np.random.default_rng(seed).permutation(every)[:sentences]
        found = found[np.isin(sentence, chosen)]
    return found[np.argsort(-encoded.lengths[found], kind="stable")]


def _reference(tagger: Model, asked: str) -> tuple[str, Float[Tensor, " d_model"]]:
    """The vector at the start of the path, float32, and its name."""
    tokenizer, bridge = tagger.tokenizer, tagger.bridge
    rows = int(bridge.cfg.d_vocab)
    tokens: dict[str, int] = {}
    for name, kind in (("mask", "mask"), ("pad", "pad"), ("end", "sep"), ("end", "eos")):
        text, token = getattr(tokenizer, f"{kind}_token"), getattr(tokenizer, f"{kind}_token_id")
        # A bridge gives every tokenizer an end token, which for one that does not know it is the unknown token.
        if token is not None and token < rows and tokenizer.convert_ids_to_tokens(token) == text:
            tokens.setdefault(name, token)

    def vectors(ids: Any) -> Tensor:
        return token_vectors(bridge, torch.as_tensor(ids, device=tagger.device)).float()

    with reading(tagger):
        if asked == "mean":
            sums = [vectors(ids).sum(0) for ids in torch.arange(rows).split(8192)]
            return asked, torch.stack(sums).sum(0) / rows
        if asked == "zero":
            return asked, torch.zeros_like(vectors([0])[0])
        for name in tokens if asked == "auto" else {asked} & set(tokens):
            vector = vectors([tokens[name]])[0]
            if vector.any():
                return name, vector
            if asked != "auto":
                raise ValueError(
                    f"the embedding of the {asked} token is all zeros, which no text is near to; use another "
                    "reference, or ask for reference='zero' by name"
                )
    raise ValueError(
        f"reference {asked!r} was asked for, but the tokenizer of {tokenizer.name_or_path!r} has no such token with an "
        f"embedding; it has {', '.join(tokens) or 'none of mask, pad, end'}: use one of these, or reference='mean'"
    )


class _Run:
    """One attribution under way: its checked arguments, the path through the hooks, and running sums."""

    def __init__(
        self,
        tagger: Model,
        text: Corpus | Encoded,
        concept: Concept,
        *,
        site: str | Site = "resid",
        target: str | Target | Callable = "auto",
        reference: str = "auto",
        quadrature: str | Callable[[int], Rule] = "gauss-legendre",
        steps: int = 16,
        form: str = "conductance",
        max_memory: int = MEMORY,
        sentences: int | None = None,
        seed: int = 0,
    ):
        self.tagger, self.form, self.max_memory = tagger, form, max_memory
        self.site, self.target = site_of(tagger.bridge, site), target_of(target, tagger)
        for what, asked, known in (
            ("form", form, get_args(Form)),
            ("reference", reference, get_args(Reference)),
            ("quadrature", quadrature, QUADRATURES),
        ):
            if not callable(asked) and asked not in known:
                raise ValueError(f"unknown {what} {asked!r}; known: {', '.join(known)}")
        for what, value, least in (("steps", steps, 2), ("max_memory", max_memory, 1), ("sentences", sentences, 1)):
            if value is not None and value < least:
                raise ValueError(f"{what} must be at least {least}, got {value}")
        corpus = text.corpus if isinstance(text, Encoded) else text
        is_concept, self.carries = _check_concept(tagger, corpus, concept, target)
        _check_target(self.target, is_concept)
        self.reference, self.start = _reference(tagger, reference)
        self.encoded = encoded_for(tagger, text)
        self.carries = self.carries & np.isin(np.arange(len(self.carries)), self.encoded.read_words)
        self.pieces = _pieces(self.encoded, self.carries, concept, sentences, seed)

        self.quadrature = quadrature if isinstance(quadrature, str) else getattr(quadrature, "__name__", "quadrature")
        rule = (QUADRATURES[quadrature] if isinstance(quadrature, str) else quadrature)(steps)
        device = tagger.device
        self.is_concept = is_concept.to(device)
        self.nodes, self.weights = (t.to(device, torch.float32) for t in rule)
        wide = torch.float32 if device.type == "mps" else torch.float64
        units = self.site.width * self.site.size
        self.total = torch.zeros(len(self.site.layers), units, dtype=wide, device=device)
        self.change, self.n_words = 0.0, 0
        self.seen: list[Tensor] = []
        self.put: tuple[int, Tensor] | None = None

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """For a while: the model reads, its weights need no gradient, and the hooks are in place."""
        tagger, bridge = self.tagger, self.tagger.bridge
        weights = {id(p): p for part in (tagger, bridge.original_model) for p in part.parameters()}.values()
        flags = [(weight, weight.requires_grad) for weight in weights]
        try:
            # Frozen weights cost neither their gradients nor the inputs that those would be made from.
            for weight, _ in flags:
                weight.requires_grad_(False)
            with (
                reading(tagger),
                streaming(bridge, token_site(bridge), self._tokens),
                streaming(bridge, self.site, self._layer, units=True),
            ):
                yield
        finally:
            for weight, flag in flags:
                weight.requires_grad_(flag)

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
            room = self.max_memory * 9 * int(lengths[0]) // (10 * int(lengths[i]))
            # Steps before pieces: the steps of a piece are alike in length and need no padding.
            at_once = max(k for k in range(1, n + 1) if k == 1 or peak(k) <= room)
            size = min(max(1, room // peak(at_once)), len(lengths) - i)
            chunks.append((self.pieces[i : i + size], at_once))
            peaks.append(size * peak(at_once) * int(lengths[i]) // int(lengths[0]))
            i += size
        passes = sum(-(-n // at_once) for _, at_once in chunks) * layers
        return Plan(
            steps=n,
            pieces=len(lengths),
            chunks=len(chunks),
            pieces_per_chunk=max(len(pieces) for pieces, _ in chunks),
            bytes_per_row=row,
            peak_bytes=max(peaks),
            max_memory=self.max_memory,
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
        for weight in (*self.tagger.parameters(), *self.tagger.buffers()):
            kept.pop(weight.untyped_storage().data_ptr(), None)
        sizes = [storage.nbytes() for storage in kept.values()]
        # On top come the activations' gradients, and what one operation needs beside what it saves.
        return sum(sizes) + activations + max(sizes), activations

    def add(self, pieces: Int[np.ndarray, " piece"], at_once: int, tick: Callable[[int], object]) -> None:
        """Add the attributions of some pieces, so many steps in each pass."""
        self._load(pieces)
        self.n_words += len(self.words)
        with torch.no_grad():
            start, end = self._said(self.nodes.new_tensor([0.0, 1.0])).double().tolist()
        self.change += end - start
        with torch.enable_grad():
            (self._layer_ig if self.form == "layer" else self._conductance)(at_once, tick)

    def _conductance(self, at_once: int, tick: Callable[[int], object]) -> None:
        """Every step goes forward and backward once, for all layers."""
        xs: list[list[Tensor]] = [[] for _ in self.site.layers]
        slopes: list[list[Tensor]] = [[] for _ in self.site.layers]
        for nodes in self.nodes.split(at_once):
            gradients = list(torch.autograd.grad(self._said(nodes).sum(), self.seen))
            for x, slope in zip(xs, slopes, strict=True):
                x.append(self._real(self.seen.pop(0).detach()))
                slope.append(self._real(gradients.pop(0)))
            tick(len(self.real) * len(nodes))
        for total in self.total:
            # One layer at a time, and nothing twice: what is done with goes.
            moved = self.weights @ torch.cat(xs.pop(0)).float().flatten(1)
            slope = torch.cat(slopes.pop(0))
            total += moved.view_as(slope).mul_(slope).sum(0).sum(0, dtype=total.dtype)

    def _layer_ig(self, at_once: int, tick: Callable[[int], object]) -> None:
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
                tick(len(self.real) * len(nodes))

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
        if isinstance(self.tagger, LanguageModel):
            words = self._own_and_others(self.tagger, hidden(self.tagger.bridge, ids, mask))
        else:
            words = self.tagger(ids, mask).float().unflatten(0, (n, -1)).flatten(1, 2)[:, self.words]
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
