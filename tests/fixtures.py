"""Small models, a small text, and a guard that a call left everything as it was: `conftest` gives them to pytest."""

import functools
import gc
import inspect
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import align_module_device
from plotly import basedatatypes
from safetensors import torch as safetensors_torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import transformer_bridge
from transformer_lens.model_bridge.generalized_components import attention, base, block, embedding, unembedding
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer

from relearn_lens import progress
from relearn_lens.__main__ import main
from relearn_lens.models import toy as toy_module
from relearn_lens.models.loading import load_tagger
from relearn_lens.models.model import Model, Tagger
from relearn_lens.runs import experiment, preparation
from relearn_lens.runs.settings import Experiment
from relearn_lens.text.corpus import Corpus, build_corpus
from relearn_lens.text.encoding import Encoded, encode
from tests.made import HOOKS, Pool


def pytest_collection_finish() -> None:
    """What is imported stays: to look through all of it again and again for what is not used takes seconds."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 10, 10)


def _unsynced(_: int) -> None:
    """In the place of `os.fsync`: tests kill processes, not machines. Processes that they start wait for the disk."""


os.fsync = _unsynced


@functools.cache
def _no_methods(kind: type) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if not isinstance(inspect.getattr_static(kind, name), FunctionType))


def _attributes(module: nn.Module) -> list[str]:
    """What `dir` lists, without methods, parameters and buffers."""
    return sorted({*_no_methods(type(module)), *vars(module), *module._modules})


# A bridge looks for hook points in every attribute of every module, twice: a third of the time that it takes to make.
setattr(transformer_bridge, "dir", _attributes)  # noqa: B010 (the module has none of its own)


@functools.cache
def _parameters_of(function: Callable) -> inspect.Signature:
    """Of a method without `self`."""
    return inspect.signature(function.__get__(object()))


def _signature(of: Any) -> inspect.Signature:
    """`inspect.signature`, looked at once for the methods of a class."""
    return _parameters_of(of.__func__) if isinstance(of, MethodType) else inspect.signature(of)


def _copied(point: HookPoint, _: dict[int, Any]) -> HookPoint:
    made = HookPoint.__new__(HookPoint)
    vars(made).update(
        {name: value.copy() if isinstance(value, dict | list) else value for name, value in vars(point).items()}
    )
    return made


# A bridge makes its blocks by copies of one that has no hooks yet: half of the time that a small one takes.
HookPoint.__deepcopy__ = _copied  # pyright: ignore[reportAttributeAccessIssue]

_flattened = safetensors_torch._flatten_as_ptr


def _flat(tensors: dict[str, torch.Tensor], alive: list[Any]) -> dict[str, Any]:
    if any(each.device.type != "cpu" or not each.nbytes or not each.is_contiguous() for each in tensors.values()):
        return _flattened(tensors, alive)
    safetensors_torch._evaluate_tensors_for_save(tensors)
    return {
        name: safetensors_torch.TensorSpec(
            dtype=str(each.dtype).split(".")[-1], shape=each.shape, data_ptr=each.data_ptr(), data_len=each.nbytes
        )
        for name, each in tensors.items()
    }


# Where each tensor lies is looked up by way of ctypes and NumPy: half of the time that a small file takes to write.
if hasattr(safetensors_torch, "TensorSpec") and sys.byteorder == "little":
    safetensors_torch._flatten_as_ptr = _flat

# A figure takes the names of its properties apart (`title_font_size`), few names thousands of times.
basedatatypes._str_to_dict_path_full = functools.cache(basedatatypes._str_to_dict_path_full)

_begin: dict[tuple[Any, ...], Model] = {}


def _begins(how: Experiment, labels: tuple[str, ...], **which: Any) -> Model:
    if how.model != "toy":
        return preparation.load(how, labels, **which)
    key = how.task, how.head, how.device, labels, *sorted(which.items())
    if key not in _begin:
        _begin[key] = preparation.load(how, labels, **which)
    return _begin[key]


# A run loads another model for the base of each seed and for its twin, of which it reads the weights: of the toy, once.
experiment.load = _begins

_NOTHING = nullcontext()


def _aligned(module: nn.Module, device: torch.device | None = None) -> AbstractContextManager[Any]:
    """`align_module_device`, which does nothing for a module that Accelerate has not hooked."""
    plain = device is None and type(module).__getattr__ is nn.Module.__getattr__ and "_hf_hook" not in vars(module)
    return _NOTHING if plain else align_module_device(module, device)


# A bridge does both at every call of every part, which takes an eighth of a small model's pass.
for part in (attention, block, embedding):
    vars(part)["inspect"] = SimpleNamespace(**{**vars(inspect), "signature": _signature})
for part in (base, unembedding):
    vars(part)["align_module_device"] = _aligned

LABELS = ("O", "LOC", "PER")
N_LAYERS, D_MODEL, D_MLP, CONTEXT = 3, 32, 48, 24

PIECES = [
    "the",
    "a",
    "old",
    "road",
    "to",
    "town",
    "and",
    "saw",
    "left",
    "in",
    "was",
    "cold",
    "he",
    ".",
    ",",
    "rome",
    "paul",
    "york",
    "new",
    "par",
    "##is",
    "an",
    "##na",
    "lin",
    "##hol",
    "##m",
    "con",
    "##stan",
    "##ti",
    "##no",
    "##ple",
]
VOCAB = {piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES])}

# LOC and PER open a span, -LOC and -PER go on with it. Sub-words: par ##is, an ##na, lin ##hol ##m,
# con ##stan ##ti ##no ##ple; zebra is unknown.
TEXT = """
    The old road to Paris/LOC .
    Anna/PER saw Rome/LOC and New/LOC York/-LOC , Paris/LOC .
    he left
    Paul/PER Anna/-PER saw Linholm/LOC in the cold .
    Rome/LOC
    the town was old and cold , and Constantinople/LOC was old .
    Anna/PER left a cold town .
    Constantinople/LOC Rome/LOC Paris/LOC and Linholm/LOC .
    a zebra saw Paul/PER in York/LOC
    Paul/PER and Anna/PER left Rome/LOC to Paul/PER .
    the cold , old , cold , old road was cold and old , and he left to the old town .
"""


def sentences_of(text: str) -> list[list[tuple[str, str, bool]]]:
    """`word/LABEL` opens a span, `word/-LABEL` goes on with one."""
    made = []
    for line in text.strip().splitlines():
        sentence = []
        for item in line.split():
            word, _, label = item.partition("/")
            sentence.append((word, label.removeprefix("-") or "O", bool(label) and label[0] != "-"))
        made.append(sentence)
    return made


def unchecked(function: Callable) -> Callable:
    """A function as users call it: without the type checks of the test run, which would hide its own errors."""
    bare = inspect.unwrap(function)
    return contextmanager(bare) if inspect.isgeneratorfunction(bare) else bare


def warmed(tagger: Tagger) -> Tagger:
    """A bridge installs some hooks of its own at its first forward pass; let it."""
    with torch.no_grad():
        tagger(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))
    return tagger


@pytest.fixture(scope="session")
def toy_model() -> toy_module.Toy:
    """The planted model, shared: for tests that only read it."""
    made = toy_module.load(sentences=120)
    warmed(made.tagger)
    return made


@pytest.fixture(scope="session")
def toys() -> Pool[Tagger]:
    return Pool(toy_module.tagger)


@pytest.fixture
def toy(toys: Pool[Tagger], toy_model: toy_module.Toy) -> toy_module.Toy:
    """The planted model, a test's own."""
    return replace(toy_model, tagger=toys.lend()())


@pytest.fixture(scope="session")
def taught_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `made.small_taught` keeps its models, for all processes of the test run."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "taught"


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 3 layers with random weights, gains and biases too, and its WordPiece tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = BertForMaskedLM(config)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    model.save_pretrained(folder)
    BertTokenizer(vocab=VOCAB, do_lower_case=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_model(bert_folder: Path) -> Tagger:
    """The small BERT as a tagger in eval mode, shared: for tests that only read it."""
    tagger = load_tagger(bert_folder, LABELS, device="cpu")
    tagger.eval()
    return warmed(tagger)


@pytest.fixture(scope="session")
def berts(bert_folder: Path) -> Pool[Tagger]:
    return Pool(lambda: load_tagger(bert_folder, LABELS, device="cpu"))


@pytest.fixture
def bert(berts: Pool[Tagger]) -> Tagger:
    """The small BERT as a tagger in eval mode, a test's own."""
    return berts.lend()()


@pytest.fixture
def plain(bert_folder: Path) -> BertModel:
    """The same weights in Hugging Face's own model: the oracle."""
    return BertModel.from_pretrained(bert_folder, attn_implementation="eager", add_pooling_layer=False).eval()


@pytest.fixture(scope="session")
def tokenizer(bert_folder: Path) -> Any:
    """The small BERT's tokenizer, loaded from its folder."""
    return BertTokenizer.from_pretrained(bert_folder)


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """Eleven sentences of 1 to 20 words; names are 1 to 5 sub-words."""
    return build_corpus(sentences_of(TEXT), name="tiny", label_names=LABELS)


@pytest.fixture(scope="session")
def encoded(corpus: Corpus, tokenizer: Any) -> Encoded:
    """The small text in the small BERT's sub-words."""
    return encode(corpus, tokenizer, context=CONTEXT)


@pytest.fixture
def error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that fails; gives its message."""
    monkeypatch.delenv("RELEARN_LENS_TRACEBACK", raising=False)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["relearn-lens", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 1
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.startswith("error: ")
        assert said.count("error: ") == 1
        return said.removeprefix("error: ").rstrip("\n")

    return call


@pytest.fixture
def one_line(error: Callable[..., str]) -> Callable[..., str]:
    """The same, of a message that is one line."""

    def call(*arguments: str) -> str:
        said = error(*arguments)
        assert "\n" not in said
        return said

    return call


Untouched = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def untouched() -> Untouched:
    """`with untouched(model): ...` asserts that the block left no trace.

    Hooks, weights, gradients and their flags, each module's own mode, the grad mode and the three global generators
    are as before. `weights=False` for blocks that are meant to change weights.
    """

    @contextmanager
    def guard(*models: nn.Module, weights: bool = True) -> Iterator[None]:
        before = [_state(model, weights) for model in models], _globals()
        yield
        for model, (modules, tensors) in zip(models, before[0], strict=True):
            now_modules, now_tensors = _state(model, weights)
            changed = [name for name, was in modules.items() if now_modules.get(name) != was]
            assert not changed, f"hooks or modes differ: {changed[:5]}"
            assert now_tensors.keys() == tensors.keys()
            for name, was in tensors.items():
                assert _same(now_tensors[name], was), f"{name} differs"
        for name, value in _globals().items():
            assert _same(value, before[1][name]), f"{name} moved"

    return guard


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, tuple):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.array_equal(a, b))


def _state(model: nn.Module, weights: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    parts = {"": model, "bridge": model.bridge} if isinstance(model, Model) else {"": model}
    modules, tensors = {}, {}
    for prefix, part in parts.items():
        for name, module in part.named_modules():
            # A bridge has hooks of its own on some hook points, so they are counted.
            hooks = {k: len(v) for k, v in vars(module).items() if k.endswith(HOOKS) and isinstance(v, dict) and v}
            modules[f"{prefix}:{name}"] = (module.training, hooks)
        for name, weight in part.named_parameters():
            tensors[f"{prefix}:{name}"] = (
                weight.requires_grad,
                weight.grad is None,
                len(weight._backward_hooks or ()),
                weight.detach().clone() if weights else id(weight),
            )
    return modules, tensors


def _globals() -> dict[str, Any]:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002  (the generator that must not move)
    assert isinstance(numpy_state, dict)
    return {
        "torch's generator": torch.get_rng_state(),
        "numpy's generator": (numpy_state["state"]["key"], numpy_state["state"]["pos"]),
        "python's generator": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "optimiser hooks": len(_global_optimizer_post_hooks),
        "default dtype": str(torch.get_default_dtype()),
    }


@contextmanager
def ticks(stop: BaseException | None = None) -> Iterator[list[int]]:
    """For a while, how much was done at each report of progress; `stop` is raised at the first that did something."""
    counted, before = [], [0]

    def take(what: str, done: int, total: int) -> None:
        if stop is not None and done:
            raise stop
        if done > before[-1]:
            counted.append(done - before[-1])
            before.append(done)

    with progress.reported(take), progress.task("a test", 10**9):
        yield counted
