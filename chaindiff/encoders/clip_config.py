"""What open_clip_config.json may say. It is data that may come from anywhere: no field names code, files or places."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveFloat, create_model

from chaindiff.specs.base import Spec, UpToMillion, UpToThousand

Pixels = Annotated[int, Field(gt=0, le=10_000)]
Sides = Pixels | Annotated[list[Pixels], Field(min_length=2, max_length=2)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]
Spread = Annotated[list[PositiveFloat], Field(min_length=3, max_length=3)]
Options = dict[str, bool | float | str] | None
# Of timm's own networks: with a place before it (hf-hub:, local-dir:) timm would fetch what lies there.
TimmName = Annotated[str, Field(pattern=r"^[\w.\-]+$", description="a network of timm, by its bare name")]


def _config(name: str, fields: dict[Any, str], **others: Any) -> type[BaseModel]:
    """A config whose fields are optional, written by type; `others` as pydantic takes them."""
    made: Any = {field: (kind | None, None) for kind, names in fields.items() for field in names.split()}
    return create_model(name, __base__=Spec, **made, **others)


TokenizerConfig = _config(
    "TokenizerConfig", {Literal["canonicalize", "lower", "whitespace"]: "clean", bool: "strip_sep_token"}
)
_BLOCKS = "qk_norm scaled_cosine_attn scale_heads scale_attn_inner scale_attn scale_fc"
VisionConfig = _config(
    "VisionConfig",
    {
        UpToMillion: "width head_width patch_size attn_pooler_queries attn_pooler_heads",
        UpToThousand | list[UpToThousand]: "layers",
        float: "mlp_ratio ls_init_value patch_dropout timm_drop timm_drop_path",
        bool: f"attentional_pool no_ln_pre final_ln_after_pool output_tokens timm_model_pretrained timm_proj_bias "
        f"{_BLOCKS}",
        str: "pos_embed_type pool_type block_type timm_pool timm_proj",
        TimmName: "timm_model_name",
        Options: "act_kwargs norm_kwargs",
    },
    image_size=(Sides, 224),
)
_TEXT: dict[Any, str] = {
    UpToMillion: "context_length width heads",
    UpToThousand: "layers",
    float: "mlp_ratio ls_init_value",
    Annotated[int, Field(gt=0, le=10_000_000)]: "vocab_size",
    Annotated[int, Field(ge=0, le=10_000_000)]: "pad_id eos_id",
    bool: f"embed_cls no_causal_mask final_ln_after_pool proj_bias output_tokens hf_model_pretrained {_BLOCKS}",
    # The names of the hub's models: whatever they are, the folder itself is read in their place.
    str: "pool_type proj_type block_type tokenizer_mode hf_model_name hf_tokenizer_name hf_proj_type hf_pooler_type",
    Options: "act_kwargs norm_kwargs",
    TokenizerConfig: "tokenizer_kwargs",
}
TextConfig = _config("TextConfig", _TEXT)
MultimodalConfig = _config("MultimodalConfig", {**_TEXT, UpToThousand: "layers dim_head n_queries attn_pooler_heads"})


class PreprocessConfig(Spec):
    """What is done to images before they enter the model; the defaults are the values of OpenAI's CLIP."""

    size: Sides = 224
    mode: Literal["RGB"] = "RGB"
    mean: Channels = Field(default=[0.48145466, 0.4578275, 0.40821073])
    std: Spread = Field(default=[0.26862954, 0.26130258, 0.27577711])
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0


ModelConfig = _config(
    "ModelConfig",
    {
        float: "init_logit_scale init_logit_bias",
        bool: "quick_gelu custom_text nonscalar_logit_scale",
        MultimodalConfig: "multimodal_cfg",
    },
    embed_dim=(UpToMillion, ...),
    vision_cfg=(VisionConfig, ...),
    text_cfg=(TextConfig, ...),
)


class ClipConfig(Spec):
    """The part of open_clip_config.json that open_clip reads."""

    model_cfg: ModelConfig  # type: ignore[valid-type]
    preprocess_cfg: PreprocessConfig = PreprocessConfig()
