"""The parity harness's cases, for pytest. Every case says why it exists, in
batchrenorm_cuda/parity/cases.py.
"""

from __future__ import annotations

import pytest

from batchrenorm_cuda.parity.cases import CASES, FLOATS, Case


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def each_case(cases=CASES, dtypes=FLOATS):
    """Parametrizes a test over `case` and `dtype`, leaving out the pairs that a case does not ask
    for."""
    pairs = [(case, dtype) for case in cases for dtype in dtypes if dtype in case.dtypes]
    ids = [f"{case}-{str(dtype).removeprefix('torch.')}" for case, dtype in pairs]
    return pytest.mark.parametrize(("case", "dtype"), pairs, ids=ids)
