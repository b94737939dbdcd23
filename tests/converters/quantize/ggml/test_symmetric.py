"""Q3_K, Q6_K, IQ4_NL and IQ4_XS: ggml reads the blocks as we do, and its own quantizer leaves more error."""

from __future__ import annotations

import numpy as np
import pytest

from tests.converters.quantize.ggml.oracle import ggml_dequantize
from tests.converters.quantize.ggml.symmetric_oracle import (
    CASES,
    IMPORTANCES,
    IQ4_NL,
    IQ4_XS,
    Q3_K,
    Q6_K,
    SAMPLE_ROWS,
    Kind,
    random_blocks,
    require_no_more_error,
    require_pieces_make_the_same_bytes,
    require_refusal_of_too_large_values,
    sample_matrix,
)

KINDS = pytest.mark.parametrize("kind", [Q3_K, Q6_K, IQ4_NL, IQ4_XS], ids=lambda kind: kind.name)


@KINDS
def test_any_blocks_have_ggmls_values(kind: Kind) -> None:
    blocks = random_blocks(kind, 40, 10)
    # By bytes, since -0.0 is not 0.0 here.
    assert kind.dequantize(blocks).tobytes() == ggml_dequantize(kind.name, blocks).tobytes()


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("case", CASES)
@KINDS
def test_the_error_is_no_larger_than_ggmls(kind: Kind, case: str, importance: str) -> None:
    require_no_more_error(kind, CASES[case].astype(np.float32), IMPORTANCES[importance])


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("case", ["normal", "laplace", "heavy tails"])
@KINDS
def test_the_error_is_as_much_smaller_as_it_was(kind: Kind, case: str, importance: str) -> None:
    bound = kind.bounds[importance]
    require_no_more_error(kind, CASES[case].astype(np.float32), IMPORTANCES[importance], bound)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE_ROWS)
@KINDS
def test_the_error_on_a_real_matrix_is_no_larger_than_ggmls(kind: Kind, name: str) -> None:
    values = sample_matrix(name)
    random = np.random.default_rng(1)
    lognormal = random.lognormal(0, 2, (values.shape[1],)).astype(np.float32)
    uniform = random.uniform(0.1, 2, (values.shape[1],)).astype(np.float32)
    for label, importance in (("none", None), ("uniform", uniform), ("squares of lognormal", lognormal)):
        require_no_more_error(kind, values, importance, kind.bounds[label])


@pytest.mark.parametrize("rows", [0, 1, 2, 23, 45])
@KINDS
def test_rows_do_not_depend_on_their_neighbours(kind: Kind, rows: int) -> None:
    require_pieces_make_the_same_bytes(kind, rows)


@pytest.mark.parametrize("size", [1e9, 1e13, 1e30, 3e38])
@KINDS
def test_too_large_values_are_refused(kind: Kind, size: float) -> None:
    values = np.full((3, 512), 0.1, np.float32)
    values[1, 300] = -size
    require_refusal_of_too_large_values(kind, values)


@KINDS
def test_the_largest_values_that_fit(kind: Kind) -> None:
    values = np.full((1, 256), 0.7 * 65504 * kind.numbers, np.float32)
    values[0, ::3] *= -1
    assert np.allclose(kind.dequantize(kind.quantize(values, None)), values, rtol=kind.coarse[0])


@KINDS
def test_constants_survive(kind: Kind) -> None:
    values = np.repeat(np.array([[0.3], [-0.3], [1e-3], [-7], [0]], np.float32), 256, axis=1)
    for importance in (None, IMPORTANCES["uniform"]):
        counts = None if importance is None else importance[:256]
        assert np.allclose(kind.dequantize(kind.quantize(values, counts)), values, rtol=kind.coarse[1])
