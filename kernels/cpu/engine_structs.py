"""The C structs of the native decoder (`src/engine.h`), field by field."""

from __future__ import annotations

import ctypes


class KvFormat(ctypes.Structure):
    """ql::KvFormat of src/kv_cache.h."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("wide", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("rotate", ctypes.c_int32),
    )


class Linear(ctypes.Structure):
    """QlLinear of src/engine.h."""

    _fields_ = (
        ("tiled", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("form", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("act_group", ctypes.c_int64),
        ("dense_type", ctypes.c_int32),
        ("mode", ctypes.c_int32),
    )


class Linears(ctypes.Structure):
    """QlLinears."""

    _fields_ = (
        ("linears", ctypes.POINTER(Linear)),
        ("count", ctypes.c_int64),
    )


class Rope(ctypes.Structure):
    """QlRope."""

    _fields_ = (
        ("inverse_frequencies", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("reserved", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    """QlLayer."""

    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("attention_out_norm", ctypes.c_void_p),
        ("ffn_norm", ctypes.c_void_p),
        ("ffn_out_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("key_basis", ctypes.c_void_p),
        ("qkv", Linears),
        ("o", Linears),
        ("gate_up", Linears),
        ("down", Linears),
        ("intermediate", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("attention_scale", ctypes.c_float),
        ("attention_softcap", ctypes.c_float),
        ("rope", ctypes.c_int32),
        ("query_bits", ctypes.c_int32),
        ("key", KvFormat),
        ("value", KvFormat),
        ("sinks", ctypes.c_int64),
    )


class Model(ctypes.Structure):
    """QlModel."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("ropes", ctypes.POINTER(Rope)),
        ("final_norm", ctypes.c_void_p),
        ("embedding", Linears),
        ("head", Linears),
        ("enter", Linears),
        ("leave", Linears),
        ("layer_count", ctypes.c_int64),
        ("rope_count", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("embedding_scale", ctypes.c_float),
        ("norm_epsilon", ctypes.c_float),
        ("logit_scale", ctypes.c_float),
        ("logit_softcap", ctypes.c_float),
        ("activation", ctypes.c_int32),
        ("integer_attention", ctypes.c_int32),
    )


class Step(ctypes.Structure):
    """QlStep."""

    _fields_ = (
        ("tokens", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("embeddings", ctypes.c_void_p),
        ("wanted", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("best", ctypes.c_void_p),
        ("hidden_states", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("wanted_count", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


STRUCTS = (Linear, Rope, Layer, Model, Step)
