"""A worker that holds one artifact open in its runtime and times greedy decoding on request.

    python -m benchmarks.runtimes gguf model.gguf --threads 2 --tokens 64

For every line on stdin it decodes once more, from the same prompt, and answers with a line of JSON: the seconds of
each step. Two such workers, asked in turn, compare two artifacts under the same conditions of the machine.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROMPT = tuple(range(1000, 1016))  # ids: any short prompt will do

Steps = Callable[[int], list[float]]
"""Decodes that many tokens after PROMPT; returns the seconds of each step but the prompt's."""


def open_gguf(path: Path, threads: int) -> Steps:
    """llama.cpp as llama-bench runs it: default context parameters."""
    from exporters.gguf.llama_api import Batch, load_library

    library = load_library()
    c = library.functions
    model = c.llama_model_load_from_file(os.fsencode(path), c.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}: {' / '.join(library.log)}")
    params = library.context_params()
    params.n_threads = params.n_threads_batch = threads
    context = c.llama_init_from_model(model, params)
    size = int(c.llama_vocab_n_tokens(c.llama_model_get_vocab(model)))

    def decode(ids: tuple[int, ...]) -> int:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        flags = (ctypes.c_int8 * len(ids))(*[0] * (len(ids) - 1), 1)
        status = c.llama_decode(context, Batch(n_tokens=len(ids), token=tokens, logits=flags))
        assert status == 0, status
        row = c.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(row, (size,)).argmax())

    import numpy as np

    def steps(count: int) -> list[float]:
        c.llama_memory_clear(c.llama_get_memory(context), True)
        token = decode(PROMPT)
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            token = decode((token,))
            seconds.append(time.perf_counter() - start)
        return seconds

    return steps


def open_onnx(path: Path, threads: int) -> Steps:
    """onnxruntime-genai's token loop."""
    import onnxruntime_genai as og

    config = og.Config(str(path))
    session = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)

    def steps(count: int) -> list[float]:
        params = og.GeneratorParams(model)
        # As long as a user's default would be is unfair to nobody, but the cache of a long context takes gigabytes.
        length = len(PROMPT) + count + 2
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = og.Generator(model, params)
        generator.append_tokens(list(PROMPT))
        generator.generate_next_token()
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            generator.generate_next_token()
            seconds.append(time.perf_counter() - start)
        return seconds

    return steps


def open_openvino(path: Path, threads: int) -> Steps:
    """openvino-genai's LLMPipeline with its defaults; it reports the durations itself."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    pipeline = genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
    ids = np.array([PROMPT], np.int64)
    prompt = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))

    def steps(count: int) -> list[float]:
        settings = pipeline.get_generation_config()
        settings.do_sample = False
        settings.ignore_eos = True
        settings.max_new_tokens = count + 1
        result = pipeline.generate(prompt, settings)
        assert len(result.tokens[0]) == count + 1
        times = result.perf_metrics.raw_metrics.m_new_token_times
        return [(float(later) - float(earlier)) / 1e3 for earlier, later in itertools.pairwise(times)]

    return steps


def open_mlx(path: Path, threads: int) -> Steps:
    """mlx-lm's own loop, one token behind the evaluation as it is there. MLX chooses its threads itself."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model = load(str(path))[0]

    def steps(count: int) -> list[float]:
        times = []
        for _ in generate_step(mx.array(PROMPT), model, max_tokens=count + 1):
            times.append(time.perf_counter())
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    return steps


RUNTIMES: dict[str, Callable[[Path, int], Steps]] = {
    "gguf": open_gguf,
    "onnx": open_onnx,
    "openvino": open_openvino,
    "mlx": open_mlx,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtimes")
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    steps = RUNTIMES[options.runtime](options.path, options.threads)
    steps(min(8, options.tokens))  # first use allocates
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(steps(options.tokens)), flush=True)


if __name__ == "__main__":
    main()
