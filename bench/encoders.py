"""Small text encoders of random weights, for sweeps of pipelines that were built without: prompts are encoded once."""

from __future__ import annotations

from typing import Any

from headscope._extras import require

_LAYERS, _HEADS = 2, 8


def give_encoders(pipeline: Any) -> None:
    """Give a pipeline of `headscope.bench.denoisers` the tokenizers and text encoders that it lacks.

    They are on the CPU and in float32, as wide as the denoiser expects, two layers deep.
    """
    if getattr(pipeline, "transformer", None) is not None:
        config = pipeline.transformer.config
        encoder = _clip("CLIPTextModel", config.pooled_projection_dim)
        pipeline.register_modules(
            tokenizer=_words(),
            text_encoder=encoder,
            tokenizer_2=_letters(),
            text_encoder_2=_t5(config.joint_attention_dim),
        )
    elif pipeline.unet.config.get("addition_embed_type") == "text_time":
        config = pipeline.unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        # the two encoders' tokens side by side
        half = config.cross_attention_dim // 2
        pipeline.register_modules(
            tokenizer=_words(),
            text_encoder=_clip("CLIPTextModel", half),
            tokenizer_2=_words(),
            text_encoder_2=_clip("CLIPTextModelWithProjection", half, pooled),
        )
    elif hasattr(pipeline, "text_encoder"):
        width = pipeline.unet.config.cross_attention_dim
        pipeline.register_modules(tokenizer=_words(), text_encoder=_clip("CLIPTextModel", width))


def _words() -> Any:
    """Bytes, bytes that end a word, and two specials; no merges."""
    letters = require("tokenizers.pre_tokenizers", "diffusers").ByteLevel.alphabet()
    tokens = [*sorted(letters), *(f"{token}</w>" for token in sorted(letters)), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return _transformers().CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _letters() -> Any:
    """Printable ASCII, letter by letter, as T5 cuts text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return _transformers().T5Tokenizer(vocab=pieces + [(chr(code), -3.0) for code in range(33, 127)], extra_ids=0)


def _clip(kind: str, width: int, pooled: int = 512) -> Any:
    transformers, words = _transformers(), _words()
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=width,
        num_attention_heads=_HEADS,
        num_hidden_layers=_LAYERS,
        max_position_embeddings=77,
        projection_dim=pooled,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return getattr(transformers, kind)(config).eval()


def _t5(width: int) -> Any:
    transformers = _transformers()
    config = transformers.T5Config(
        vocab_size=len(_letters()), d_model=width, d_kv=16, d_ff=width, num_layers=_LAYERS, num_heads=_HEADS
    )
    return transformers.T5EncoderModel(config).eval()


def _transformers() -> Any:
    return require("transformers", "diffusers")
