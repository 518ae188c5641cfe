"""What config.json says of what a model computes: in whatever version of the library's words."""

from typing import Any

from mergekit_moe.errors import ExpertError

# Fields of a config.json that say what a model computes; those of a fine-tune must be its base's.
_STRUCTURE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "hidden_act"),
    *("hidden_activation", "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_pct", "rms_norm_eps"),
    *("layer_norm_eps", "norm_epsilon", "norm_eps", "attention_bias", "mlp_bias", "use_bias", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping"),
    *("final_logit_softcapping", "embedding_multiplier", "logits_scaling", "residual_multiplier", "no_rope_layers"),
    *("attention_multiplier", "use_parallel_residual", "qk_layernorm", "image_size", "patch_size", "num_channels"),
    *("qkv_bias", "projection_dim"),
)


def differing_fields(config: dict[str, Any], base: dict[str, Any], what: str) -> list[str]:
    """Return what two configs say differently of what a model computes, as "field mine against base's".

    Versions of the library write the same thing in several ways, and leave out what is the default: configs that don't
    agree to the letter are read by the library's own class, which is worth its import only then.
    """
    if _structure(config) == _structure(base):
        return []
    if config.get("model_type") == base.get("model_type"):
        config, base = canonical(config, what), canonical(base, "base_model")
    mine, right = _structure(config), _structure(base)
    return [f"{field} {mine[field]!r} against {right[field]!r}" for field in right if mine[field] != right[field]]


def _structure(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config says of what the model computes, each tower's part under that part's name."""
    parts = {"": config, **{f"{part}.": config.get(part) or {} for part in ("vision_config", "text_config")}}
    return {f"{part}{field}": values.get(field) for part, values in parts.items() for field in _STRUCTURE}


def canonical(config: dict[str, Any], what: str) -> dict[str, Any]:
    """Return a config as the library's own class understands it, every default filled in."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    try:
        read = AutoConfig.for_model(config["model_type"], **values).to_dict()
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ExpertError(f"{what}: config.json can't be read: {' '.join(str(error).split())}") from None
    if isinstance(read.get("rope_parameters"), dict):  # `type` is an older name of `rope_type`, kept beside it
        read["rope_parameters"] = {key: value for key, value in read["rope_parameters"].items() if key != "type"}
    return read
