"""llama.cpp through the C API in the shared library of xllamacpp, whose Python API gives no logits."""

import ctypes
import sys

import numpy as np


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    ]


class _Parameters(ctypes.Structure):
    """Of a model or a context, passed and returned by value: larger than any version's, so that no field is named.

    The first fields of a context's are n_ctx, n_batch and n_ubatch.
    """

    _fields_ = [("words", ctypes.c_uint32 * 256)]


_POINTERS = (
    "llama_model_load_from_file",
    "llama_init_from_model",
    "llama_model_get_vocab",
    "llama_get_logits_ith",
    "llama_adapter_lora_init",
    "llama_get_memory",
)


class LlamaCpp:
    """A model in GGUF with one sequence of at most 512 tokens; ends the program where llama.cpp refuses it."""

    def __init__(self, file: str, *, adapter: str | None = None, n_threads: int | None = None) -> None:
        import xllamacpp.xllamacpp as extension

        self._library = library = ctypes.CDLL(extension.__file__)
        for name in ("llama_model_default_params", "llama_context_default_params"):
            getattr(library, name).restype = _Parameters
        for name in _POINTERS:
            getattr(library, name).restype = ctypes.c_void_p
        library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Parameters]
        library.llama_init_from_model.argtypes = [ctypes.c_void_p, _Parameters]
        library.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
        library.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        library.llama_set_n_threads.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
        library.llama_get_memory.argtypes = [ctypes.c_void_p]
        library.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
        self._log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        library.llama_log_set(self._log, None)
        library.llama_backend_init()
        model = library.llama_model_load_from_file(file.encode(), library.llama_model_default_params())
        if not model:
            sys.exit(f"llama.cpp does not load {file}")
        parameters = library.llama_context_default_params()
        parameters.words[0] = parameters.words[1] = parameters.words[2] = 512
        self._context = library.llama_init_from_model(model, parameters)
        if n_threads is not None:
            library.llama_set_n_threads(self._context, n_threads, n_threads)
        if adapter:
            self._add(model, adapter)
        vocabulary = ctypes.c_void_p(library.llama_model_get_vocab(ctypes.c_void_p(model)))
        self._n_words = library.llama_vocab_n_tokens(vocabulary)

    def _add(self, model: int, adapter: str) -> None:
        library = self._library
        lora = library.llama_adapter_lora_init(ctypes.c_void_p(model), adapter.encode())
        if not lora:
            sys.exit(f"llama.cpp does not load {adapter}")
        if hasattr(library, "llama_set_adapters_lora"):  # since November 2025
            adapters, scales = (ctypes.c_void_p * 1)(lora), (ctypes.c_float * 1)(1.0)
            library.llama_set_adapters_lora(ctypes.c_void_p(self._context), adapters, ctypes.c_size_t(1), scales)
        else:
            library.llama_set_adapter_lora(ctypes.c_void_p(self._context), ctypes.c_void_p(lora), ctypes.c_float(1.0))

    def clear(self) -> None:
        """Forget the sequence."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def logits(self, ids: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        """Continue the sequence by ``ids`` (n_tokens,): the logits (n_tokens, vocabulary), or (1, vocabulary)."""
        tokens = np.ascontiguousarray(ids, dtype=np.int32)
        wanted = np.zeros(len(ids), dtype=np.int8) if last_only else np.ones(len(ids), dtype=np.int8)
        wanted[-1] = 1
        batch = _Batch(n_tokens=len(ids), token=tokens.ctypes.data, logits=wanted.ctypes.data)
        if self._library.llama_decode(self._context, batch):
            sys.exit("llama_decode failed")
        rows = [self._library.llama_get_logits_ith(self._context, int(index)) for index in np.flatnonzero(wanted)]
        floats = ctypes.POINTER(ctypes.c_float)
        return np.stack([np.ctypeslib.as_array(ctypes.cast(row, floats), (self._n_words,)).copy() for row in rows])
