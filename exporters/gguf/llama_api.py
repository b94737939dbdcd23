"""llama.cpp's C functions and structures, found in the extension module of the xllamacpp wheel, which exports them.

Structures are passed by value, so their layout must be that of the build. They are never filled from scratch: the
library returns its defaults, known default values prove the layout, and only the few fields named here are changed.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_ubyte, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import MappingProxyType

from converters.errors import UsageError

# Threads of libgomp spin this often before they sleep. Its default, 300,000, makes llama.cpp several times slower as
# soon as another process wants a processor.
SPIN_COUNT = "1000"
GGML_TYPE_F32 = 0
GGML_TYPE_F16 = 1
FLASH_ATTENTION_OFF = 0
LOG_WARNING = 3  # ggml_log_level: errors are 4, continued lines 5

LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class ModelParams(Structure):
    """llama_model_params, opaque: its defaults are used as they are. Larger than any build's, so the call is safe."""

    _fields_ = (("data", c_ubyte * 512),)


class ContextParams(Structure):
    """llama_context_params (llama.h) up to the KV cache types, and room for the rest, which is passed on as it is."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("rest", c_ubyte * 400),
    )


# llama_context_default_params() of the builds whose structure is the one above.
CONTEXT_DEFAULTS = MappingProxyType(
    {
        "n_ctx": 512,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_seq_max": 1,
        "n_rs_seq": 0,
        "n_outputs_max": 0,
        "rope_scaling_type": -1,
        "pooling_type": -1,
        "attention_type": -1,
        "flash_attn_type": -1,
        "yarn_attn_factor": -1.0,
        "yarn_orig_ctx": 0,
        "cb_eval": None,
        "type_k": GGML_TYPE_F16,
        "type_v": GGML_TYPE_F16,
    }
)


class Batch(Structure):
    """llama_batch: with pos null, positions continue from the last call; with seq_id null, in sequence 0."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


# name -> (result type, argument types)
_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (LogCallback, c_void_p)),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_n_ctx_train": (c_int32, (c_void_p,)),
    "llama_model_meta_val_str": (c_int32, (c_void_p, c_char_p, c_char_p, ctypes.c_size_t)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_vocab_get_attr": (c_int32, (c_void_p, c_int32)),
    "llama_vocab_get_add_bos": (c_bool, (c_void_p,)),
    "llama_vocab_bos": (c_int32, (c_void_p,)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_detokenize": (c_int32, (c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool)),
}


@dataclass(frozen=True, slots=True)
class LlamaLibrary:
    """The loaded library, with result and argument types set on every function of _FUNCTIONS.

    `log` has the last warnings and errors that it would have printed.
    """

    functions: ctypes.CDLL
    log: deque[str]

    def context_params(self) -> ContextParams:
        """The build's default context parameters. UsageError if their layout is not the known one."""
        params: ContextParams = self.functions.llama_context_default_params()
        found = {name: getattr(params, name) for name in CONTEXT_DEFAULTS}
        if found != CONTEXT_DEFAULTS:
            raise UsageError(
                "this build of llama.cpp has another layout of llama_context_params",
                where="xllamacpp",
                expected=str(dict(CONTEXT_DEFAULTS)),
                found=str(found),
                mend="Install the version that tundish's lock file names.",
            )
        return params


_LOG: deque[str] = deque(maxlen=30)


@LogCallback  # type: ignore[untyped-decorator]  # ctypes' function types are classes that wrap a callable
def _keep_log(level: int, text: bytes, _user_data: object) -> None:
    """Lives as long as the process, since llama.cpp holds on to it."""
    line = text.decode(errors="replace").strip()
    if level >= LOG_WARNING and line.strip("."):  # loading shows its progress as dots
        _LOG.append(line)


@cache
def load_library() -> LlamaLibrary:
    """The C library inside xllamacpp, its messages kept instead of printed. UsageError if it lacks a function."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when libgomp is loaded, that is by the next line
    path = import_module("xllamacpp.xllamacpp").__file__
    library = ctypes.CDLL(path)
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise UsageError(
                "xllamacpp does not export a function of llama.cpp",
                where=str(path),
                expected=name,
                mend="Install the version that tundish's lock file names.",
            ) from error
        function.restype, function.argtypes = result, list(arguments)
    library.llama_log_set(_keep_log, None)
    library.llama_backend_init()
    return LlamaLibrary(library, _LOG)
