"""DistilBERT for TransformerLens: a post-norm encoder like BERT, with its own names and no token types.

Found by `TransformerBridge.boot_transformers` through the entry point `transformer_lens.architectures`. Source: Sanh et
al. 2019 for the model; the names are those of Hugging Face's `DistilBertForMaskedLM`.
"""

from __future__ import annotations

from typing import Any

from transformer_lens.conversion_utils.conversion_steps import RearrangeTensorConversion
from transformer_lens.conversion_utils.param_processing_conversion import ParamProcessingConversion
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)

from relearn_lens.models.families import set_up


class DistilBertArchitectureAdapter(ArchitectureAdapter):
    """Names of DistilBERT's parts in TransformerLens's terms."""

    supports_generation: bool = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        set_up(self.cfg, "standard")
        # The LayerNorms come after the sum: folding them into the next weights would be wrong.
        self.supports_fold_ln = False

        def rearranged(pattern: str) -> ParamProcessingConversion:
            return ParamProcessingConversion(
                tensor_conversion=RearrangeTensorConversion(pattern, h=self.cfg.n_heads),
            )

        self.weight_processing_conversions = {
            **{
                f"blocks.{{i}}.attn.{part}.weight": rearranged("(h d_head) d_model -> h d_model d_head")
                for part in "qkv"
            },
            **{f"blocks.{{i}}.attn.{part}.bias": rearranged("(h d_head) -> h d_head") for part in "qkv"},
            "blocks.{i}.attn.o.weight": rearranged("d_model (h d_head) -> h d_head d_model"),
        }

        def norm(name: str) -> NormalizationBridge:
            return NormalizationBridge(name=name, config=self.cfg, use_native_layernorm_autograd=True)

        self.component_mapping = {
            "embed": EmbeddingBridge(name="distilbert.embeddings.word_embeddings"),
            "pos_embed": PosEmbedBridge(name="distilbert.embeddings.position_embeddings"),
            "embed_ln": norm("distilbert.embeddings.LayerNorm"),
            "blocks": BlockBridge(
                name="distilbert.transformer.layer",
                submodules={
                    "ln1": norm("sa_layer_norm"),
                    "ln2": norm("output_layer_norm"),
                    "attn": AttentionBridge(
                        name="attention",
                        config=self.cfg,
                        submodules={
                            "q": LinearBridge(name="q_lin"),
                            "k": LinearBridge(name="k_lin"),
                            "v": LinearBridge(name="v_lin"),
                            "o": LinearBridge(name="out_lin"),
                        },
                    ),
                    "mlp": MLPBridge(
                        name="ffn",
                        config=self.cfg,
                        submodules={"in": LinearBridge(name="lin1"), "out": LinearBridge(name="lin2")},
                    ),
                },
            ),
            "mlm_head": LinearBridge(name="vocab_transform"),
            "ln_final": norm("vocab_layer_norm"),
            "unembed": UnembeddingBridge(name="vocab_projector"),
        }

    def prepare_model(self, hf_model: Any) -> None:
        """Read the MLP's width, which DistilBERT calls by a name that TransformerLens does not know."""
        super().prepare_model(hf_model)
        self.cfg.d_mlp = int(hf_model.config.hidden_dim)
