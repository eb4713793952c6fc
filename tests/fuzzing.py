"""Bad input by the thousand: what tests/test_fuzz.py tries a little of and `python -m tests.benchmarks fuzz` much of.

Each check takes one drawn case and says how it ended: `"valid"`, or the name of one of our errors. Anything else is a
crash: an error of another type, or one that was not raised by a `raise` of this package.
"""
# ruff: noqa: E501  (lists of odd words)

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import json
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

import relearn_lens
from relearn_lens.models import toy
from relearn_lens.runs import presets, settings, store, summary
from relearn_lens.text import conll, tags
from relearn_lens.text.concept import Concept
from relearn_lens.text.corpus import Corpus, build_corpus
from relearn_lens.text.encoding import encode

PACKAGE = Path(relearn_lens.__file__).parent
OURS = (ValueError, OSError, FloatingPointError)
"""The types of our errors: what the command line turns into one line."""


@functools.cache
def _raises(file: str) -> frozenset[int]:
    """The lines of a file that a `raise` statement covers."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    lines = [range(n.lineno, (n.end_lineno or n.lineno) + 1) for n in ast.walk(tree) if isinstance(n, ast.Raise)]
    return frozenset(line for span in lines for line in span)


def ours(error: BaseException) -> bool:
    """Whether an error is one that this package raised on purpose: of our types, by a `raise` of ours, with a text."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    inside = Path(last.filename).is_relative_to(PACKAGE)
    deliberate = inside and last.lineno in _raises(last.filename)
    return isinstance(error, OURS) and deliberate and len(str(error)) > 20


def outcome(check: Callable[[], object]) -> str:
    """How a case ended.

    Raises:
        AssertionError: it crashed; from the error itself.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check()
    except Exception as error:
        if not ours(error):
            raise AssertionError(f"not one of our errors: {type(error).__name__}: {str(error)[:300]}") from error
        return type(error).__name__
    return "valid"


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        yield Path(folder)


# --- corpora as files

WORDS = st.one_of(
    st.sampled_from(
        ["Rome", "the", "#tag", "#", "-DOCSTART-", "a\u0085b", "naïve", "שלום", "مرحبا", "👩‍👩‍👧", "🏳️‍🌈", "\u200f", "\ufeff", "<b>", "&amp;",
         "</script><script>", "'; DROP", "\x01", "\x1b[31m", "e\u0301", "\u2028", "x" * 3000, "B-LOC", "O", "\u00a0", "ﷺ"]
    ),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\n\r\t "), min_size=1, max_size=8),
)  # fmt: skip
TAGS = st.one_of(
    st.sampled_from(
        ["O", "B-LOC", "I-LOC", "E-LOC", "S-LOC", "L-LOC", "U-LOC", "M-LOC", "LOC", "B-PER", "I-PER", "I-", "B", "-", "--",
         "B--LOC", "b-loc", "B-LOC,B-PER", "O-LOC", "-LOC", "I-<i>", "B-地名", "0", "_", "B-O", "I-O"]
    ),
    st.text(st.characters(exclude_categories=("Cs", "Cc", "Zs")), min_size=1, max_size=4),
)  # fmt: skip
ROWS = st.lists(
    st.one_of(
        st.tuples(WORDS, TAGS),
        st.tuples(WORDS, TAGS, TAGS),
        st.tuples(WORDS),
        st.tuples(st.just("")),
        st.just(("# text = a comment",)),
        st.just(("-DOCSTART- O",)),
    ),
    max_size=30,
)
TAME_TAGS = st.sampled_from(["O", "O", "B-LOC", "I-LOC", "E-LOC", "S-LOC", "B-PER", "I-PER", "B-地名", "I-<i>"])
EVEN_ROWS = st.lists(
    st.one_of(*[st.tuples(WORDS, TAME_TAGS)] * 6, st.just(("",)), st.just(("# text = x",))), max_size=30
)
CODECS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7", "shift_jis")
ASKED = (
    "utf-8",
    "latin-1",
    "utf-16",
    "cp1252",
    "ascii",
    "utf-7",
    "idna",
    "base64",
    "no-such",
    "undefined",
    "unicode_escape",
    "",
)


@st.composite
def corpus_files(draw: Any) -> dict[str, Any]:
    """The bytes of a file in columns, and how it is read."""
    separator = draw(st.sampled_from(["\t", "\t", " ", " ", "  ", "\t ", ","]))
    end = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
    wrote = draw(st.sampled_from(("utf-8",) * 9 + CODECS))
    if draw(st.integers(0, 9)) == 0:
        content = draw(st.binary(max_size=200))
    else:
        rows = draw(ROWS if draw(st.integers(0, 3)) == 0 else EVEN_ROWS)
        lines = [separator.join(row) for row in rows]
        text = end.join(lines) * draw(st.sampled_from([1, 1, 1, 40]))
        content = text.encode(wrote, errors="replace")
    if draw(st.integers(0, 5)) == 0 and content:
        at = draw(st.integers(0, len(content) - 1))
        content = (
            content[:at] + draw(st.sampled_from([b"\0", b"\xff", b"\xed\xa0\x80", b"\x1a", b""])) + content[at + 1 :]
        )
    return {
        "content": content,
        "encoding": draw(st.sampled_from([wrote] * 30 + list(ASKED))),
        "scheme": draw(st.sampled_from(["auto"] * 9 + [*tags.SCHEMES, "BIO"])),
        "column": draw(st.sampled_from([-1] * 15 + [0, 1, 2, -2, 99, -99])),
    }


def check_corpus(case: dict[str, Any]) -> None:
    """Read the file, split it, hash it, show it, encode it."""
    with _scratch() as folder:
        path = folder / "text.conll"
        path.write_bytes(case["content"])
        corpus = conll.read_conll(path, **{k: case[k] for k in ("encoding", "scheme", "column")})
    assert corpus.n_words == sum(map(len, corpus))
    assert (corpus.label >= 0).all() and corpus.label.max() < len(corpus.label_names)  # noqa: PT018
    corpus.sha256()
    corpus._repr_html_()
    encode(corpus, _tokenizer(), context=16)
    if len(corpus) >= 3:
        assert sum(map(len, corpus.split(seed=0))) == len(corpus)


@functools.cache
def _tokenizer() -> Any:
    return toy.tokenizer()


# --- sentences from Python, and tokenizers that fall short

WILD = st.one_of(WORDS, st.just(""), st.just("\ud800"), st.just("\0"), st.none(), st.integers(), st.just(b"bytes"))
SENTENCES = st.lists(st.lists(st.tuples(WORDS | WILD, TAGS | WILD, st.booleans()), max_size=8), max_size=6)


@st.composite
def texts(draw: Any) -> dict[str, Any]:
    """Sentences as a user hands them over, and what the tokenizer lacks."""
    tame = st.lists(
        st.lists(st.tuples(WORDS, TAME_TAGS, st.booleans()), min_size=1, max_size=8), min_size=1, max_size=6
    )
    words = draw(SENTENCES if draw(st.integers(0, 3)) == 0 else tame)
    return {
        "sentences": words,
        "labels": draw(st.sampled_from([None] * 8 + [["O", "O"], ["O", "LOC"], ["LOC"], [5], []])),
        "lacks": draw(st.sampled_from([""] * 6 + ["pad", "unk", "both"])),
        "context": draw(st.sampled_from([None, None, 16, 16, 4, 1, 0, -3])),
        "long": draw(st.sampled_from(["split"] * 4 + ["truncate"] * 2 + ["error", "drop"])),
        "reading": draw(st.sampled_from(["word"] * 5 + ["before"] * 3 + ["after"])),
        "opening": draw(st.booleans()),
    }


def tokenizer_without(lacks: str) -> Any:
    """The toy's tokenizer, without a padding token or an unknown one, which makes it drop words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if lacks not in ("unk", "both"):
        made = toy.tokenizer()
    else:
        backend = Tokenizer(models.BPE({"R": 0, "o": 1, "m": 2, "e": 3, "t": 4, "h": 5}, []))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="R")
    if lacks in ("pad", "both"):
        made.pad_token = None
    return made


_short_of = functools.cache(tokenizer_without)


def check_text(case: dict[str, Any]) -> None:
    """Build a corpus and encode it; the batches are what a model would get."""
    # As users call them: the type checks of the test run would refuse the wildest cases before our own words do.
    corpus = inspect.unwrap(build_corpus)(case["sentences"], name="fuzz", label_names=case["labels"])
    corpus._repr_html_()
    corpus.sha256()
    tokenizer = _short_of(case["lacks"])
    made = inspect.unwrap(encode)(
        corpus, tokenizer, context=case["context"], long=case["long"], reading=case["reading"], opening=case["opening"]
    )
    known = len(tokenizer)
    for batch in made.batches(max_tokens=64):
        assert int(batch.ids.max()) < known
        assert len(batch.label) == len(batch.words) == len(batch.offset)


# --- settings

KEYS = [key for key, _, _ in settings.fields()]
VALUES = st.one_of(
    st.sampled_from(
        ["nan", "inf", "-inf", "-1", "0", "1e400", "1" * 5000, "0x" + "f" * 6000, "none", "true", "[]", "[[]]", "{}", "{a=1}",
         '"', "'", "[1,", "1979-05-27", "07:32:00", "[" * 2000, "1\nother = 2", "\\u0000", "\0", "😀", "שלום", '["a", 1]',
         "cuda:99999999999999999999", "toy", "[0.6, nan, 0.2]", "[0.5, 0.5]", "[0, 0]", "[-1]", "1e-300", "1e12", "1e30", "4294967296", "[4294967296]", "9" * 30, " ", ""]
    ),
    st.text(max_size=12),
    st.floats().map(str),
    st.integers().map(str),
)  # fmt: skip
ODD_KEYS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", ".", "..", "prune.", ".prune", "prune.fraction.x", "model.x", "a." * 5000, "ключ", "__class__", "data"]
    ),
)
SETS = st.lists(st.tuples(st.sampled_from(KEYS) | ODD_KEYS, VALUES).map("=".join) | st.text(max_size=10), max_size=5)
GOOD_SETS = st.lists(
    st.sampled_from(
        ["prune.fraction=0.5", "seeds=[1, 2]", "concept=['place', 'מקום']", "threads=none", "measure=['auroc']", "corpus=hf:ü",
         "data.parts=[0.5, 0.25, 0.25]", "retrain.lr=1e-9", "protocol=published", "measure.max_memory=1e-3", "model=👩‍👩‍👧",
         "data.concept_share=none", "finetune.epochs=0.001", "device=cuda:7", 'corpus="conll:a\\tb"', "prune.sever=gain"]
    ),
    max_size=4,
)  # fmt: skip
PLAIN: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TOMLS = st.one_of(
    st.lists(st.tuples(st.sampled_from([*KEYS, "preset", "measure", "prune"]), VALUES).map(" = ".join), max_size=5).map("\n".join),
    st.text(max_size=60),
    st.sampled_from(
        ["preset = 5", "preset = ['names']", "[prune]\nfraction = 'a'", "prune = 5", "[measure]\nwhat = 5", "measure = 'x'",
         "[[prune]]\nfraction = 1", "protocol = ['published']", "protocol = 5", "a" + ".a" * 3000 + " = 1", "\ufeffmodel = 'x'",
         "preset = 'names'\npreset = 'toy'", "[data]\nparts = {a = 1}", "concept = []", "concept = [5]", "seeds = []"]
    ),
)  # fmt: skip


@st.composite
def settings_texts(draw: Any) -> dict[str, Any]:
    """A preset or a TOML file, `--set` strings and changes from Python."""
    toml = draw(TOMLS) if draw(st.integers(0, 3)) == 0 else None
    return {
        "source": draw(st.sampled_from(["toy", "names", "lo2024"] * 4 + ["no-such", "", "x.toml", "."]))
        if toml is None
        else None,
        "toml": toml,
        "codec": draw(st.sampled_from(["utf-8"] * 5 + ["utf-16", "latin-1"])),
        "changes": draw(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), PLAIN, max_size=1)),
        "sets": draw(SETS if draw(st.booleans()) else GOOD_SETS),
    }


def check_settings(case: dict[str, Any]) -> None:
    """Resolve them; what is accepted must survive its own file."""
    with _scratch() as folder:
        source: str | Path = case["source"]
        if case["toml"] is not None:
            source = folder / "my.toml"
            source.write_bytes(case["toml"].encode(case["codec"], errors="replace"))
        made = presets.settings_of(source, case["changes"], case["sets"])
        (folder / "again.toml").write_text(made.to_toml(), encoding="utf-8")
        assert presets.settings_of(folder / "again.toml") == made


# --- run folders

KINDS = ("remove", "truncate", "flip", "swap", "folder", "empty", "json", "key", "deep", "link", "meta")


@functools.cache
def finished_run() -> Path:
    """One small finished run of the toy, shared by all cases."""
    from tests.made import tiny

    path = Path(tempfile.mkdtemp(prefix="fuzz-run-"))
    import atexit

    atexit.register(shutil.rmtree, path, ignore_errors=True)
    store.run(
        tiny(measure__what=["probeless", "top_words"], arms=["concept", "random"], retrain__steps=[2]), path / "run"
    )
    return path / "run"


@st.composite
def damages(draw: Any) -> list[dict[str, Any]]:
    """What happens to the files of a run folder."""
    one = st.fixed_dictionaries(
        {
            "kind": st.sampled_from(KINDS),
            "file": st.integers(0, 50),
            "other": st.integers(0, 50),
            "at": st.floats(0, 1, exclude_max=True),
            "bit": st.integers(0, 7),
            "value": PLAIN,
        }
    )
    return draw(st.lists(one, min_size=1, max_size=3))


def _harm(folder: Path, damage: dict[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    path, other = files[damage["file"] % len(files)], files[damage["other"] % len(files)]
    manifest, content = folder / "manifest.json", path.read_bytes()
    at = int(damage["at"] * len(content))
    match damage["kind"]:
        case "remove":
            path.unlink()
        case "truncate":
            path.write_bytes(content[:at])
        case "flip" if content:
            if path.suffix == ".safetensors" and damage["bit"] % 2:
                at = int(damage["at"] * min(len(content), 3000))  # the header is where structure is
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << damage["bit"]]) + content[at + 1 :])
        case "swap":
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
        case "folder":
            path.unlink()
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "json" | "deep" if not manifest.is_dir():
            manifest.write_text("[" * 100_000 if damage["kind"] == "deep" else json.dumps(damage["value"]))
        case "link":
            path.unlink()
            path.symlink_to(folder / "nowhere")
        case "key" if manifest.is_file():
            with contextlib.suppress(ValueError, RecursionError):
                said = json.loads(manifest.read_text(encoding="utf-8"))
                if isinstance(said, dict) and said:
                    name = sorted(said)[damage["other"] % len(said)]
                    said[name] = damage["value"]
                    if damage["bit"] < 3:
                        del said[name]
                    manifest.write_text(json.dumps(said))
        case "meta":
            _harm_meta(folder, damage)


def _harm_meta(folder: Path, damage: dict[str, Any]) -> None:
    """Put another value somewhere into the JSON of a file of tensors, which stays a good safetensors file."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    files = sorted((folder / "tensors").glob("*.safetensors"))
    path = files[damage["file"] % len(files)] if files else None
    with contextlib.suppress(Exception):  # damaged already
        assert path is not None
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            meta = json.loads(file.metadata()["relearn-lens"])
        places: list[tuple[Any, Any]] = []
        todo: list[Any] = [meta]
        while todo:
            here = todo.pop()
            items = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
            for key, value in items:
                places.append((here, key))
                todo.append(value)
        inside, key = places[int(damage["at"] * len(places))]
        inside[key] = damage["value"]
        save_file(tensors, path, metadata={"relearn-lens": json.dumps(meta)})


def check_run(case: list[dict[str, Any]]) -> None:
    """Load a run folder to which this happened, and make its tables."""
    with _scratch() as above:
        folder = above / "run"
        shutil.copytree(finished_run(), folder)
        for damage in case:
            _harm(folder, damage)
        result = store.load_run(folder)
        result.to_dataframe()
        if {damage["kind"] for damage in case} & {"flip", "swap", "meta"}:  # else what was loaded is as it was written
            summary.summary(result)


# --- models

SPOILS = ("nan", "inf", "-inf", "huge", "none")


@st.composite
def models(draw: Any) -> dict[str, Any]:
    """One weight of the toy that is not what it should be, and what is asked of the model."""
    return {
        "weight": draw(st.integers(0, 10_000)),
        "at": draw(st.floats(0, 1, exclude_max=True)),
        "spoil": draw(st.sampled_from(SPOILS)),
        "whole": draw(st.booleans()),
        "task": draw(st.sampled_from(["measure", "measure", "train", "attribute", "top_words"])),
        "score": draw(st.sampled_from(["probeless", "auroc", "dprime", "probe"])),
        "site": draw(st.sampled_from(["resid", "mlp_post"])),
    }


@functools.cache
def _toy() -> tuple[Any, Corpus, dict[str, torch.Tensor]]:
    made = toy.load(sentences=24)
    return made.tagger, made.corpus, {name: value.clone() for name, value in made.tagger.weights().items()}


def check_model(case: dict[str, Any]) -> None:
    """Measure, attribute or train with a weight that is NaN, infinite or huge: numbers, or a refusal, never NaN."""
    from relearn_lens.measure.tracking import measure
    from relearn_lens.models.training import finetune_

    tagger, corpus, weights = _toy()
    tagger.load_weights(weights)
    value = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "huge": 1e38, "none": 1.0}[case["spoil"]]
    names = sorted(weights)
    flat = tagger.weights()[names[case["weight"] % len(names)]].view(-1)
    if case["whole"]:
        flat.fill_(value)
    else:
        flat[int(case["at"] * len(flat))] = value
    try:
        if case["task"] == "train":
            losses = [pause.loss for pause in finetune_(tagger, corpus, epochs=1, batch_size=12)]
            assert all(map(_finite, losses))
            return
        what: list[Any] = [{"attribute": "conductance", "top_words": "top_words"}.get(case["task"], case["score"])]
        found = measure(
            tagger, corpus, Concept("place", ["place"]), site=case["site"], what=[w for w in what if w != "probe"]
        )
        assert found.saliency.score.isfinite().all()
    finally:
        tagger.load_weights(weights)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


STRATEGIES: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None], float]] = {
    "corpus files": (corpus_files(), check_corpus, 0.37),
    "sentences and tokenizers": (texts(), check_text, 0.25),
    "settings": (settings_texts(), check_settings, 0.27),
    "run folders": (damages(), check_run, 0.08),
    "models": (models(), check_model, 0.03),
}
"""Name to what is drawn, how it is checked, and its share of all cases."""
