"""Ways back through activations: a tensor that is added to them, or a direction that is taken out of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from relearn_lens import progress
from relearn_lens.methods import Rate, Size
from relearn_lens.models.model import LanguageModel, Model, encoded_for, hidden, only_training, reading, widest
from relearn_lens.models.training import Checkpoint
from relearn_lens.neurons.sites import Site, site_of, streaming, token_site, token_vectors
from relearn_lens.relearn.attack import ATTACKED, GENERAL, NEAR, STILL, Material, Passing, only_facts, texts
from relearn_lens.text.encoding import Encoded
from relearn_lens.text.facts import TRAINED, Facts, Passage
from relearn_lens.text.facts.encoded import encode_passages

Layers = tuple[Annotated[int, Field(ge=0, le=10_000)], ...]
Add = Callable[[int, Tensor, Tensor], Tensor]
"""`(row of the tensor, the tensor, activations) -> activations`."""


@dataclass(frozen=True)
class Place:
    """Where a tensor is added, and to what."""

    site: Site
    rows: Mapping[int, int]
    """Layer of the site to the first row of the tensor that is added there."""
    shape: tuple[int, int]
    """Rows and coordinates of the tensor."""
    add: Add

    def adding(self, model: Model, tensor: Float[Tensor, "row d_model"]) -> AbstractContextManager[None]:
        """For a while, add a tensor to the activations."""

        def visit(layer: int, activations: Tensor) -> Tensor | None:
            return self.add(self.rows[layer], tensor, activations) if layer in self.rows else None

        return streaming(model.bridge, self.site, visit)


class Perturbing(Passing):
    """A tensor that is added to activations and fitted to T by Adam, in eval mode; the weights stand still.

    It starts at 0, and after every step each of its vectors is put back to an L2 norm of at most `cap` times the mean
    norm of the activations that it is added to, over the tokens of T.
    """

    cap: Size = Field(default=0.5, description="largest L2 norm, in mean norms of the activations there")
    lr: Rate = Field(default=1e-3, description="learning rate of Adam")
    steps: int = Field(default=64, ge=1, le=10**6, description="steps of Adam")
    batch_size: int = Field(default=16, ge=1, le=100_000, description="passages or sentences per step")

    def place(self, model: Any, text: Encoded) -> Place:
        """Where the tensor is added.

        Raises:
            ValueError: layers that the model does not have.
        """
        raise NotImplementedError

    def text(self, model: Any, facts: Material, seed: int) -> Encoded:
        """What the tensor is fitted to."""
        return encoded_for(model, texts(model, facts, ATTACKED, what=self.name))

    def applied(self, model: Any, facts: Material, *, seed: int = 0) -> AbstractContextManager[Checkpoint]:
        text = self.text(model, facts, seed)
        return self._block(model, text, self.place(model, text), seed)

    @contextlib.contextmanager
    def _block(self, model: Model, text: Encoded, place: Place, seed: int) -> Iterator[Checkpoint]:
        tensor, checkpoint = self.fitted(model, text, place, seed=seed)
        with place.adding(model, tensor):
            yield checkpoint

    def fitted(
        self, model: Model, text: Encoded, place: Place, *, seed: int = 0
    ) -> tuple[Float[Tensor, "row d_model"], Checkpoint]:
        """The tensor, and the training that made it; the model is only read.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        tensor = torch.zeros(place.shape, device=model.device, requires_grad=True)
        adam = torch.optim.Adam([tensor], lr=self.lr)
        tokens, sums, n = 0, 0.0, 0
        with (
            reading(model),
            only_training((), model.parameters()),
            progress.task(f"fitting ({self.name})", self.steps),
        ):
            longest = self.cap * _norms(model, text, place).to(tensor.device)
            epochs = (text.shuffled(batch_size=self.batch_size, seed=seed, epoch=epoch) for epoch in count())
            batches = chain.from_iterable(epochs)
            for step in range(self.steps):
                batch = text.batch(next(batches)).to(model.device)
                with torch.enable_grad(), place.adding(model, tensor):
                    nats = model.losses(batch)
                    loss = nats.mean()
                if not loss.isfinite():
                    raise FloatingPointError(
                        f"{self.name}: the loss is {float(loss)} at step {step}; use a smaller cap or learning rate"
                    )
                (tensor.grad,) = torch.autograd.grad(loss, tensor)
                adam.step()
                tensor.mul_((longest / tensor.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0))
                tokens, sums, n = tokens + batch.n_tokens, sums + float(nats.detach().sum()), n + len(nats)
                progress.advance()
        pieces = self.steps * self.batch_size
        return tensor.detach(), Checkpoint(
            pieces / text.n_pieces, self.steps, tokens, sums / n, {"loss": sums / n}, "step"
        )


class Latent(Perturbing):
    """A vector for each of some blocks is added to its output on every token, and fitted to T.

    Source: Che et al. 2025 and Schwinn et al. 2024 perturb each prompt by itself; ours is one for all prompts, so that
    what it brings back of V is not what it was fitted to.
    """

    name: ClassVar[str] = "latent"
    source: ClassVar[str] = "Che et al. 2025; Schwinn et al. 2024; one vector for all prompts is ours"

    layers: Layers | None = Field(default=None, description="blocks whose output is changed, from 0; none: the middle")

    def place(self, model: Any, text: Encoded) -> Place:
        site, blocks = site_of(model.bridge, "resid"), int(model.bridge.cfg.n_layers)
        layers = (blocks // 2,) if self.layers is None else self.layers
        _check_layers(model, layers, self.name)
        rows = {site.layers.index(str(layer)): row for row, layer in enumerate(layers)}
        return Place(site, rows, (len(layers), site.width), _everywhere)


class Embedding(Perturbing):
    """One vector is added to the embedding of every token, and fitted to T.

    Source: Schwinn et al. 2024; one vector for all prompts is ours.
    """

    name: ClassVar[str] = "embedding"
    source: ClassVar[str] = "Schwinn et al. 2024; one vector for all prompts is ours"

    def place(self, model: Any, text: Encoded) -> Place:
        site = token_site(model.bridge)
        return Place(site, {0: 0}, (1, site.width), _everywhere)


class SoftPrompt(Perturbing):
    """Vectors in front of every prompt, fitted to T.

    Prompts are asked behind as many full stops (`asked`), whose embeddings are what the vectors begin as and differ
    from by `cap`. Texts without them are read as they are.

    Source: Lester et al. 2021; as an attack: Schwinn et al. 2024.
    """

    name: ClassVar[str] = "soft_prompt"
    source: ClassVar[str] = "Lester et al. 2021; Schwinn et al. 2024"

    tokens: int = Field(default=8, ge=1, le=1000, description="vectors in front of a prompt")

    def asked(self, passages: Sequence[Passage], facts: Facts, *, seed: int = 0) -> tuple[Passage, ...]:
        """Each behind full stops."""
        return tuple(replace(p, prompt=self._stops() + p.prompt) for p in passages)

    def text(self, model: Any, facts: Material, seed: int) -> Encoded:
        known = only_facts(facts, self.name)
        texts(model, known, ATTACKED, what=self.name)  # refuses a tagger, and facts without any
        passages = self.asked(known.passages(ATTACKED, forms=TRAINED), known)
        return encode_passages(passages, model.tokenizer, context=model.context, name=known.name)

    def place(self, model: Any, text: Encoded) -> Place:
        ids = model.tokenizer(self._stops().strip(), add_special_tokens=False)["input_ids"]
        begins = text.ids[text.piece_start[:-1, None] + torch.arange(len(ids)).numpy()]
        if len(ids) != self.tokens or not (begins == ids).all():
            raise ValueError(
                f"soft_prompt: {self.tokens} full stops before a prompt are not as many tokens of their own to the "
                f"tokenizer of {model.tokenizer.name_or_path!r}; use `embedding` or `latent`"
            )
        with torch.no_grad():
            stops = token_vectors(model.bridge, torch.tensor(ids, device=model.device)).detach()
        start, site = len(text.prefix), token_site(model.bridge)
        end = start + len(ids)

        def add(_: int, tensor: Tensor, activations: Tensor) -> Tensor:
            if activations.shape[1] < end:
                return activations
            here = (activations[:, start:end] == stops.to(activations.dtype)).flatten(1).all(1)
            shift = F.pad(tensor, (0, 0, start, activations.shape[1] - end)).to(activations.dtype)
            return activations + here[:, None, None] * shift

        return Place(site, {0: 0}, (len(ids), site.width), add)

    def _stops(self) -> str:
        return ". " * self.tokens


class DirectionAblated(Passing):
    """Takes out of the hidden states of every block, on every token, the direction in which T differs from what stays.

    The direction of a block is the mean of its output where the answers of T are predicted, minus the mean where those
    of the retained facts near by are (of a tagger: on the words themselves), of the model as it is; h becomes
    h - (h . r) r for that r of length 1.

    Source: Arditi et al. 2024; as an attack on removals: Łucki et al. 2024.
    """

    name: ClassVar[str] = "direction_ablated"
    source: ClassVar[str] = "Arditi et al. 2024; Łucki et al. 2024"

    layers: Layers | None = Field(default=None, description="blocks whose output is changed, from 0; none: all")

    def applied(self, model: Any, facts: Material, *, seed: int = 0) -> AbstractContextManager[Checkpoint]:
        sides = [
            encoded_for(model, texts(model, facts, *roles, what=self.name)) for roles in ((ATTACKED,), (NEAR, GENERAL))
        ]
        layers = range(int(model.bridge.cfg.n_layers)) if self.layers is None else self.layers
        _check_layers(model, layers, self.name)
        return self._block(model, sides, layers)

    @contextlib.contextmanager
    def _block(self, model: Model, sides: list[Encoded], layers: Sequence[int]) -> Iterator[Checkpoint]:
        site = site_of(model.bridge, "resid")
        wanted = {site.layers.index(str(layer)) for layer in layers}
        difference = torch.sub(*(mean_states(model, text, site) for text in sides)).to(model.device)
        directions = F.normalize(difference, dim=1)

        def without(layer: int, activations: Tensor) -> Tensor | None:
            if layer not in wanted:
                return None
            direction = directions[layer].to(activations.dtype)
            return activations - (activations @ direction)[..., None] * direction

        with streaming(model.bridge, site, without):
            yield STILL


def mean_states(model: Model, text: Encoded, site: Site) -> Float[Tensor, "layer d_model"]:
    """The mean hidden state of every layer of a site where the sub-words that carry the loss are predicted (of a
    tagger: on them), float32."""
    sums = torch.zeros(len(site.layers), site.width, dtype=widest(model.device), device=model.device)
    n, positions = 0, torch.empty(0)

    def visit(layer: int, activations: Tensor) -> None:
        sums[layer] += activations.flatten(0, 1)[positions].to(sums.dtype).sum(0)

    with reading(model), streaming(model.bridge, site, visit):
        for batch in text.batches(device=model.device):
            positions = batch.subword - int(isinstance(model, LanguageModel))
            n += len(positions)
            hidden(model.bridge, batch.ids, batch.mask)
    return (sums / n).float()


def _everywhere(row: int, tensor: Tensor, activations: Tensor) -> Tensor:
    return activations + tensor[row].to(activations.dtype)


def _norms(model: Model, text: Encoded, place: Place) -> Float[Tensor, "row 1"]:
    """The mean norm of the activations that each row is added to, over the tokens of a text."""
    sums, n, mask = torch.zeros(place.shape[0], dtype=torch.float64), 0, torch.empty(0)

    def visit(layer: int, activations: Tensor) -> None:
        if layer in place.rows:
            lengths = activations.float().norm(dim=-1)[mask.bool()].sum().double().cpu()
            if len(place.rows) == 1:
                sums.add_(lengths)
            else:
                sums[place.rows[layer]] += lengths

    with streaming(model.bridge, place.site, visit):
        for batch in text.batches(device=model.device):
            mask, n = batch.mask, n + batch.n_tokens
            hidden(model.bridge, batch.ids, batch.mask)
    return (sums / n).float()[:, None]


def _check_layers(model: Model, layers: Sequence[int], what: str) -> None:
    blocks = int(model.bridge.cfg.n_layers)
    if not layers or max(layers) >= blocks or len(set(layers)) < len(layers):
        raise ValueError(f"{what}: layers = {list(layers)}: this model has blocks 0 to {blocks - 1}, each once")
