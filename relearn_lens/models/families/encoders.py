"""Encoders for TransformerLens that are built like its BERT or RoBERTa: ELECTRA, DeBERTa v2 and v3, ModernBERT.

Source: Clark et al. 2020; He et al. 2021; Warner et al. 2024 for the models; the names are those of Hugging Face's
classes for masked language modelling.
"""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    RotaryEmbeddingBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.supported_architectures.bert import BertArchitectureAdapter

from relearn_lens.models.families import set_up


class _LikeBert(BertArchitectureAdapter):
    """BERT's blocks, and what comes before and after them under other names."""

    def _norm(self, name: str) -> NormalizationBridge:
        return NormalizationBridge(name=name, config=self.cfg, use_native_layernorm_autograd=True)

    def prepare_model(self, hf_model: Any) -> None:
        """BERT's own looks for a pooler and other heads, which these models do not have."""
        ArchitectureAdapter.prepare_model(self, hf_model)

    def _renamed(self, blocks: str, **parts: Any) -> None:
        """BERT's blocks under the name that this family has for their list, between the family's own parts."""
        shape = self.component_mapping["blocks"]  # pyright: ignore[reportOptionalSubscript]
        shape.name = blocks
        self.component_mapping = {**parts, "blocks": shape}


class ElectraArchitectureAdapter(_LikeBert):
    """ELECTRA, generator or discriminator.

    Where its embeddings are narrower than its hidden states (the small models), `embed_ln` is the layer that widens
    them: as in BERT, the last to make the first hidden state.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self._renamed(
            "electra.encoder.layer",
            embed=EmbeddingBridge(name="electra.embeddings.word_embeddings"),
            token_type_embed=EmbeddingBridge(name="electra.embeddings.token_type_embeddings"),
            pos_embed=PosEmbedBridge(name="electra.embeddings.position_embeddings"),
            embed_ln=self._norm("electra.embeddings.LayerNorm"),
            mlm_head=LinearBridge(name="generator_predictions.dense"),
            ln_final=self._norm("generator_predictions.LayerNorm"),
            unembed=UnembeddingBridge(name="generator_lm_head"),
        )

    def prepare_model(self, hf_model: Any) -> None:
        super().prepare_model(hf_model)
        if hasattr(hf_model.electra, "embeddings_project"):
            self.components["embed_ln"] = LinearBridge(name="electra.embeddings_project")


class DebertaV2ArchitectureAdapter(_LikeBert):
    """DeBERTa v2 and v3. Positions are told to attention alone, by vectors that all blocks share."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self._renamed(
            "deberta.encoder.layer",
            embed=EmbeddingBridge(name="deberta.embeddings.word_embeddings"),
            embed_ln=self._norm("deberta.embeddings.LayerNorm"),
            unembed=UnembeddingBridge(name="cls.predictions.decoder"),
        )
        attention: Any = self.components["blocks"].submodules["attn"]
        for part, name in zip("qkv", ("query_proj", "key_proj", "value_proj"), strict=True):
            attention.submodules[part].name = f"self.{name}"

    def prepare_model(self, hf_model: Any) -> None:
        super().prepare_model(hf_model)
        if not hasattr(hf_model, "cls"):  # legacy=false: its head reads the embedding's own weights
            self.components["unembed"] = UnembeddingBridge(name="lm_predictions.lm_head.dense")


class ModernBertArchitectureAdapter(ArchitectureAdapter):
    """ModernBERT: a pre-norm encoder with rotary positions and a gated MLP.

    Queries, keys and values are one matrix, and so are gate and up projection.
    """

    supports_generation: bool = False
    supports_fold_ln = False  # the first block has no norm before its attention
    supports_center_writing_weights = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        set_up(self.cfg, "rotary")
        self.weight_processing_conversions = {}

        def norm(name: str) -> NormalizationBridge:
            return NormalizationBridge(name=name, config=self.cfg, use_native_layernorm_autograd=True)

        self.component_mapping = {
            "embed": EmbeddingBridge(name="model.embeddings.tok_embeddings"),
            "embed_ln": norm("model.embeddings.norm"),
            "rotary_emb": RotaryEmbeddingBridge(name="model.rotary_emb"),
            "blocks": BlockBridge(
                name="model.layers",
                config=self.cfg,
                submodules={
                    "ln1": norm("attn_norm"),
                    "attn": AttentionBridge(
                        name="attn",
                        config=self.cfg,
                        submodules={"Wqkv": LinearBridge(name="Wqkv"), "o": LinearBridge(name="Wo")},
                        maintain_native_attention=True,
                        fused_qkv=True,
                    ),
                    "ln2": norm("mlp_norm"),
                    "mlp": MLPBridge(
                        name="mlp",
                        config=self.cfg,
                        submodules={"in": LinearBridge(name="Wi"), "out": LinearBridge(name="Wo")},
                    ),
                },
            ),
            "ln_final": norm("model.final_norm"),
            "mlm_head": LinearBridge(name="head.dense"),
            "unembed": UnembeddingBridge(name="decoder"),
        }
