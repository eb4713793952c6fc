"""Loading: a model by name, from a folder or from the hub, wrapped in a TransformerBridge, with a head on it.

Only safetensors are read and no code that a checkpoint brings is run. Whatever is wrong with a model is said in one
sentence, before or instead of what transformers says.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from types import MethodType
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import NormalizationBridge
from transformer_lens.model_bridge.sources import detect_tokenizer_bos_eos

from relearn_lens import sources
from relearn_lens.models import families
from relearn_lens.models.folders import check_folder, check_plain, check_tokenizer, check_whole
from relearn_lens.models.gguf import dequantised, quiet, silent
from relearn_lens.models.heads import TrainedHead, trained_head
from relearn_lens.models.model import LanguageModel, Tagger, seeded
from relearn_lens.names import explained, known_name, meant

Head = Literal["trained", "fresh"]
"""Whether a tagger keeps what fits of the head that a model was trained with."""

_MODELS = [name for name, source in sources.SOURCES.items() if source.kind == "model"]


@explained
def load_tagger(
    model: str | Path | TransformerBridge | nn.Module,
    labels: Sequence[str],
    *,
    tokenizer: Any = None,
    head: Head = "trained",
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tagger:
    """A model with a tagging head for the given labels (`corpus.label_names`).

    `model` is a source name (`"minilm"`), a local Hugging Face folder, a name on the hub, a bridge, or a Hugging Face
    model that is loaded already (with its `tokenizer`; the model is wrapped in place). The head is fresh, drawn by
    `seed`; but a model for token classification keeps the rows of its own that are named as the BIO tags of these
    labels are, in any order, and warns if that is not all of them. `head="fresh"` keeps none.

    Raises:
        ValueError: labels without `"O"` first; a folder that holds no model, or one that is no plain float one; a
            family that has no adapter; a trained head with none of these labels, or without names.
        OSError: the name is neither a folder nor to be had from the hub.
    """
    known_name("head", head, get_args(Head))
    trained = None
    if isinstance(model, TransformerBridge):
        bridge = model
    elif isinstance(model, nn.Module):
        if head == "trained" and _has_trained_head(getattr(model, "config", None)):
            trained = trained_head(model, labels)
        bridge = _bridge_of(model, tokenizer, device=device, dtype=dtype)
    else:
        where = _place(model)
        bridge = load_bridge(where, device=device, dtype=dtype, seed=seed)
        if head == "trained" and str(model) not in sources.SOURCES:
            trained = _head_in(where, labels)
    tagger = Tagger(bridge, labels, seed=seed).eval()
    if trained is not None:
        trained.put_on(tagger.head)
        if trained.note:
            warnings.warn(f"of the head that this model was trained with, {trained.note}", stacklevel=2)
    return tagger


def _has_trained_head(config: Any) -> bool:
    """Whether a configuration is of a model for token classification."""
    named = getattr(config, "architectures", None)
    return isinstance(named, list) and any(str(name).endswith("ForTokenClassification") for name in named)


def _head_in(where: str, labels: Sequence[str]) -> TrainedHead | None:
    """The head of a checkpoint for token classification; None for any other."""
    from transformers import AutoConfig, AutoModelForTokenClassification

    with _in_our_words(where), silent():
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        if not _has_trained_head(config):
            return None
        plain = AutoModelForTokenClassification.from_pretrained(where, use_safetensors=True, trust_remote_code=False)
    return trained_head(plain, labels)


def _bridge_of(
    model: Any, tokenizer: Any, *, device: str | torch.device | None, dtype: torch.dtype
) -> TransformerBridge:
    """A bridge around a Hugging Face model that is loaded already; the body of one for token classification."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

    if tokenizer is None:
        raise ValueError("a loaded model needs its tokenizer: load_tagger(model, labels, tokenizer=tokenizer)")
    if not hasattr(model, "base_model_prefix"):
        raise ValueError(f"a {type(model).__name__} is no Hugging Face model; pass a bridge, or a folder")
    if _has_trained_head(model.config):
        auto: Any = AutoModelForMaskedLM if type(model.config) in MODEL_FOR_MASKED_LM_MAPPING else AutoModelForCausalLM
        with silent(), seeded(0):
            whole = auto.from_config(model.config, attn_implementation="eager")
        whole.base_model.load_state_dict(model.base_model.state_dict())
        model = whole
    else:
        model.set_attn_implementation("eager")
    there = device_of(device) if device else next(model.parameters()).device
    _check_dtype(dtype)
    model.to(device=there, dtype=dtype)
    return _wrapped(model, str(model.config._name_or_path or "model"), tokenizer, device=there, dtype=dtype)


@explained
def load_language_model(
    model: str | Path | TransformerBridge,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """A causal language model with its own vocabulary head: a source (`"smollm2"`), a local Hugging Face folder, a name
    on the hub, or a bridge.

    Raises:
        ValueError: a model that does not predict the next token; as `load_bridge`.
        OSError: the name is neither a folder nor to be had from the hub.
    """
    bridge = model if isinstance(model, TransformerBridge) else load_bridge(model, device=device, dtype=dtype)
    return LanguageModel(bridge).eval()


@explained
def load_bridge(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> TransformerBridge:
    """A TransformerBridge of a source, a local Hugging Face folder, or a model on the hub; in eval mode.

    Only safetensors are read. Parts that the checkpoint lacks are drawn with `seed` (the language-model head that the
    bridge asks for and this package never computes). Without `device`: CUDA if there is one, else the CPU.

    Raises:
        ValueError: a folder that holds no model, or one that is no plain float one; a family that has no adapter.
        OSError: the name is neither a folder nor to be had from the hub.
    """
    from transformers import AutoConfig, AutoTokenizer

    device = device_of(device)
    _check_dtype(dtype)
    where = _place(model)
    with quiet():
        with _in_our_words(where):
            config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        check_plain(config.to_dict(), where)
        auto = _auto_class(config, where)
        check_tokenizer(where)
        with _in_our_words(where):
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
            with seeded(seed):
                hf_model, report = auto.from_pretrained(
                    where, dtype=dtype, attn_implementation="eager", use_safetensors=True, trust_remote_code=False,
                    output_loading_info=True,
                )  # fmt: skip
        check_whole(hf_model, report["missing_keys"], tokenizer, where)
    torch.nn.Module.to(hf_model, device)
    return _wrapped(hf_model, where, tokenizer, device=device, dtype=dtype)


def device_of(device: str | torch.device | None) -> torch.device:
    """A device by its name; without one CUDA if there is one, else the CPU.

    Raises:
        ValueError: there is no such device, or not on this machine.
    """
    n = torch.cuda.device_count()
    try:
        there = torch.device(device or ("cuda" if n else "cpu"))
    except RuntimeError:
        raise ValueError(f"device = {device!r}: cpu, cuda, cuda:1 and so on, or mps is wanted") from None
    if there.type == "cuda" and (there.index or 0) >= n:
        raise ValueError(f"device = {str(device)!r}: this machine has {n} CUDA device(s); use cpu, or leave it out")
    if there.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device = 'mps': this machine has none; use cpu, or leave it out")
    return there


def _check_dtype(dtype: object) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype = {dtype!r}: weights are torch.float32, torch.bfloat16 or torch.float16")


def _place(model: str | Path) -> str:
    """The folder that a model is in, fetched or dequantised first where that is needed, or its name on the hub."""
    where = str(sources.fetch(str(model))) if str(model) in sources.SOURCES else str(model)
    folder = Path(where)
    if "/" not in where and not folder.exists() and (near := meant(where, [*_MODELS, "toy"])):
        # The hub has no model of such a name, and says so only after many tries.
        hint = "; the planted toy is made by rl.toy.tagger()" if where == "toy" else near
        raise ValueError(f"no model {where!r}: no folder, and no source ({', '.join(_MODELS)}){hint}")
    if folder.is_file():
        if folder.suffix != ".gguf":
            raise ValueError(f"{where!r} is a file; pass the folder that holds it, with config.json and the tokenizer")
        return str(dequantised(folder))
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and (packed := sorted(folder.glob("*.gguf"))):
        folder = dequantised(packed[0])
        where = str(folder)
    if folder.is_dir():
        check_folder(folder)
    elif where.count("/") > 1 or where.startswith((".", "/", "~")):
        raise ValueError(f"no model folder at {where!r}")
    else:
        _ask_hub(where)
    return where


def _ask_hub(name: str) -> None:
    """Refuse a name that is not in the hub's cache and that the hub does not give: its client asks for half a minute.

    Raises:
        OSError: the hub has no such model, keeps it closed, or is not to be reached.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
    except Exception as error:  # of the hub, of the network, or of a name that cannot be one
        raise _not_given(name, error) from error


def _not_given(name: str, error: Exception) -> OSError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return OSError(
        f"cannot load model {name!r}: it is no source ({', '.join(sources.SOURCES)}), no local folder, and the hub did "
        f"not give it ({reason}). Download it once where there is a network (`hf download NAME --local-dir DIR`) and "
        f"pass the folder{meant(name, _MODELS)}"
    )


def _auto_class(config: Any, where: str) -> Any:
    """The class of transformers that loads a model of this configuration with its vocabulary head."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
    )

    for kinds, auto in (
        (MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM),
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    ):
        if type(config) in kinds:
            families.check(str(getattr(kinds[type(config)], "__name__", "")), config, where)
            return auto
    raise ValueError(
        f"{where!r} is a {config.model_type!r} model; only masked and causal language models work, of the types "
        f"{', '.join(families.TYPES)}"
    )


@contextlib.contextmanager
def _in_our_words(where: str) -> Iterator[None]:
    """Whatever transformers raises while it reads a model, as a sentence that says what to do."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"the *.safetensors weights in {where!r} are damaged ({error}); fetch or save the model again"
        ) from error
    except ImportError:
        raise  # a package that is missing
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        if Path(where).is_dir():
            raise OSError(f"cannot load the model in {where!r}: {reason}") from error
        if full := sources.unwritable(error):
            raise OSError(
                full.errno,
                f"cannot load model {where!r} from the hub: its cache cannot be written ({full}); set HF_HOME to a "
                "folder that can, or give a local folder",
            ) from error
        raise _not_given(where, error) from error
    except Exception as error:  # a config.json or tokenizer of wrong values ends in any error that there is
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot load model {where!r}: {reason}. Its config.json or its tokenizer is damaged, or asks for code of "
            "its own, which is never run; fetch it again, or save it again with save_pretrained(folder)"
        ) from error


def _wrapped(model: Any, name: str, tokenizer: Any, *, device: torch.device, dtype: torch.dtype) -> TransformerBridge:
    """A bridge in eval mode around a Hugging Face model that is where it should be."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    # TransformerLens goes by this name, and a checkpoint that was saved with another head names that.
    model.config.architectures = [type(model).__name__]
    families.check(type(model).__name__, model.config, name)
    # TransformerLens loads a tokenizer that has a first token anew, so that it puts that before every text, which a
    # trained head never saw; and it gives one tokens that it lacks. So it sees a copy.
    copy = deepcopy(tokenizer)
    copy.bos_token = None
    with _in_our_words(name):
        bridge = TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=copy, device=device, dtype=dtype)
    bridge.tokenizer = None  # only then is the next one taken as it is
    bridge.tokenizer = tokenizer
    bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(tokenizer)
    for module in bridge.modules():
        if isinstance(module, NormalizationBridge):
            module._hf_autograd_forward_with_hooks = MethodType(_norm, module)  # pyright: ignore[reportAttributeAccessIssue]
    bridge.eval()
    return bridge


def _norm(self: NormalizationBridge, states: torch.Tensor) -> torch.Tensor:
    """A norm as the model computes it. What TransformerLens computes beside it for hooks, which takes as long as the
    norm ten times over, is left out where there are none."""
    points = self.hook_scale, self.hook_normalized
    if self.original_component is None or any(point.fwd_hooks or point.bwd_hooks for point in points):
        return NormalizationBridge._hf_autograd_forward_with_hooks(self, states)
    return self.original_component(states).to(states.dtype)
