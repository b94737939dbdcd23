"""Round to nearest with scales by least squares.

A group's scale is searched over candidates around the one that maps the extreme value to the end of the range. Each
candidate rounds the group to integers u = code - zero; the best scale for these is <w, u> / <u, u>, which leaves the
squared error <w, w> - <w, u>^2 / <u, u>, so the candidate with the largest <w, u>^2 / <u, u> wins. The candidates are
coarse steps of the range's end, then finer ones around the best. The scale is refitted to its own codes, stored in
fp16, and the codes are rounded against the stored scale.

The products are weighted by the importance of each input column where one is given: with the column's mean square, the
error that counts is that of the layer's output (as if inputs were uncorrelated), not of the weights.

Groups are laid out as vector lanes (see rtn_search.py): the result does not depend on vector width, thread count or how
a matrix is cut into blocks of rows. The kernels run on the calling thread without the GIL; the threads of the pour are
what makes them parallel.
"""

from __future__ import annotations

import numpy as np

from converters.quantize.half import to_fp16
from converters.quantize.rtn_search import round_codes, search_asymmetric, search_symmetric
from converters.quantize.scheme import Scheme
from converters.quantize.tensor import F16, F32, U8, QuantTensor

_INT4_END = np.arange(-1.0, 2.1, 0.5)  # on 8: where the extreme value lands
_INT4_PLAIN = 5  # of these are tried where all columns count the same: clipping more of the range gains nothing
_INT4_FINE = np.array([0.97, 0.985, 1.015, 1.03], np.float32)  # factors on the best of them
_INT8_END = np.arange(-2, 2.1, 1)  # on 127
_INT8_FINE = np.array([0.996, 1.004], np.float32)
# Factors on the scale that spans an asymmetric group's range.
_SPANS = (np.arange(70, 106, 3) / 100).astype(np.float32)


def quantize_rtn(weight: F32, scheme: Scheme, importance: F32 | None = None) -> QuantTensor:
    """Quantize rows f32[out, in] of a matrix; `in` must be a multiple of the scheme's group size.

    importance: f32[in], positive: how much an error in each column counts. None: all the same.
    OverflowError if a scale does not fit fp16.
    """
    rows, width = weight.shape
    group = scheme.group_size_for(width)
    assert scheme.is_integer and width % group == 0, (scheme.name, weight.shape)
    groups = np.ascontiguousarray(weight).reshape(rows, -1, group)
    counts = None if importance is None else np.ascontiguousarray(importance, np.float32).reshape(-1, group)
    stored, zero = choose_scales(groups, counts, scheme)
    codes = round_codes(groups, stored.astype(np.float32), zero, lowest_code(scheme), (1 << scheme.bits) - 1)
    return QuantTensor(codes.reshape(rows, width), stored, None if scheme.symmetric else zero, scheme.bits)


def choose_scales(groups: F32, counts: F32 | None, scheme: Scheme) -> tuple[F16, U8]:
    """Scales f16[rows, m] as they are stored and zeros u8[rows, m] for groups f32[rows, m, size].

    counts: f32[m, size], positive: how much an error in each column counts. OverflowError if a scale does not fit fp16.
    """
    top = (1 << scheme.bits) - 1
    if scheme.symmetric:
        middle = 1 << (scheme.bits - 1)
        steps, fine = _steps(scheme.bits, weighted=counts is not None)
        scale = search_symmetric(groups, counts, steps, fine, lowest_code(scheme) - middle, top - middle)
        return to_fp16(scale, groups), np.broadcast_to(np.uint8(middle), scale.shape)
    scale, zero = search_asymmetric(groups, counts, _SPANS, top)
    return to_fp16(_round_significand(scale), groups), zero


def lowest_code(scheme: Scheme) -> int:
    """The least code that is used: -128 is left out, as in Q8_0."""
    return 1 if scheme.symmetric and scheme.bits == 8 else 0


def _steps(bits: int, weighted: bool) -> tuple[F32, F32]:
    """Where the extreme value may land, f32[candidates], and factors on the best of these, f32[n]."""
    if bits == 8:
        return (127 + _INT8_END).astype(np.float32), _INT8_FINE
    end = _INT4_END if weighted else _INT4_END[:_INT4_PLAIN]
    # -8 is further out than +7: mapping the extreme value to the far or the near end are different candidates.
    return np.concatenate([-8 - end, 7 + end]).astype(np.float32), _INT4_FINE


def _round_significand(scale: F32) -> F32:
    """Round to 7 significant bits, on fp16's subnormal grid below: then scale * zero, zero < 16, is exact in fp16."""
    mantissa, exponent = np.frexp(scale)
    rounded: F32 = np.ldexp(np.rint(mantissa * 128) / 128, exponent).astype(np.float32)
    return rounded
