"""What parameter names mean: the vocabulary of Hugging Face, timm, nanoGPT, GGUF and plain PyTorch models."""

from __future__ import annotations

import re

__all__ = [
    "EMBEDDING",
    "FUSED_GATE",
    "FUSED_KV",
    "FUSED_QKV",
    "GPT2_PROJECTION",
    "HEAD",
    "INTERLEAVED_QKV",
    "KEY_VALUE",
    "NORM",
    "POSITION",
    "QUERY",
    "STATE_BUFFER",
    "TOKEN",
    "is_attention_output",
]

# Tables that are indexed by token, position or type. "patch_embed.proj" does not match: its role is "proj".
EMBEDDING = re.compile(
    r"(wte|wpe|shared|embed_(tokens|positions|in|layer)|relative_attention_bias|\w*position_bias_table"
    r"|(\w+_)?(embed|embeds|embedding|embeddings|emb|embs|embd)(_table)?|\w*embedding_table|token_types)$",
    re.IGNORECASE,
)
POSITION = re.compile(r"(wpe|\w*pos\w*|token_type\w*|relative\w*)$", re.IGNORECASE)
# Learned vectors that are put into the sequence as they are.
TOKEN = re.compile(r"(\w+_)?(token|tokens|registers)$", re.IGNORECASE)
HEAD = re.compile(r"(lm_head|embed_out|unembed|unembedding|vocab_projector|lm_logits|prediction_head)$", re.IGNORECASE)
NORM = re.compile(r"(\w*norm\w*|ln|ln_\w+|\w+_ln|ln\d+|bn|bn\d+|gn\d*)$", re.IGNORECASE)
STATE_BUFFER = re.compile(
    r"(running_mean|running_var|num_batches_tracked|inv_freq|cos_cached|sin_cached|freqs_cis|masked_bias|\w*mask"
    r"|tril|position_ids)$"
)
# Hugging Face GPT-2 keeps these as Conv1D, (in, out); nanoGPT gives the same names to nn.Linear, (out, in).
GPT2_PROJECTION = re.compile(r"(^|\.)h\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_proj|c_fc)\.weight$")

FUSED_QKV = re.compile(r"(c_attn|qkv|qkv_proj|wqkv|to_qkv|\w+_qkv|qkv_\w+|in_proj_weight)$", re.IGNORECASE)
INTERLEAVED_QKV = re.compile(r"query_key_value$")
FUSED_KV = re.compile(r"(kv|kv_proj|wkv|to_kv|key_value|c_attn)$", re.IGNORECASE)
FUSED_GATE = re.compile(r"(gate_up_proj|gate_up|gate_and_up_proj|gate_proj_up_proj)$", re.IGNORECASE)

QUERY = re.compile(r"(q|q_proj|query|query_proj|wq|to_q|q_lin|q_proj_weight|q_attn|attn_q|linear_q)$", re.IGNORECASE)
KEY_VALUE = re.compile(
    r"([kv]|[kv]_proj|key|value|key_proj|value_proj|w[kv]|to_[kv]|[kv]_lin|[kv]_proj_weight|attn_[kv]|linear_[kv])$",
    re.IGNORECASE,
)
_OUTPUT = re.compile(r"(o|o_proj|out_proj|wo|to_out|out_lin|attn_output|linear_out)$", re.IGNORECASE)
_ATTENTION = re.compile(r"\w*(attn|attention)\w*$", re.IGNORECASE)


def is_attention_output(segments: list[str]) -> bool:
    """Whether a path is the projection after attention, whose columns belong to heads.

    Args:
        segments: Parts of the path, the parameter's own name last.

    Returns:
        True for ``self_attn.o_proj.weight``, ``attn.c_proj.weight``, ``attention.output.dense.weight`` and the like.

    Example:
        >>> is_attention_output("encoder.layer.0.attention.output.dense.weight".split("."))
        True
        >>> is_attention_output("encoder.layer.0.output.dense.weight".split("."))
        False
    """
    modules = segments[:-1]
    if modules and modules[-1].isdigit():  # diffusers: to_out.0 is the matrix, to_out.1 the dropout
        modules = modules[:-1]
    if not modules:
        return False
    last, before = modules[-1], modules[-2] if len(modules) > 1 else ""
    if _OUTPUT.match(last):
        return True
    if last in ("c_proj", "proj", "dense"):
        inside = modules[-3] if before == "output" and len(modules) > 2 else before
        return bool(_ATTENTION.match(inside))
    return False
