"""Products of matrices on a CPU are those of float64, whatever library computes them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.runtime import products
from weighted_mtp_core.runtime.products import product, write_product

SIZES = st.integers(1, 70)


def factors(rows, others, columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + 100 * others)
    left_NI, right_IM = (
        torch.randn(shape, generator=generator) for shape in ((rows, columns), (columns, others))
    )
    return left_NI.to(dtype), right_IM.to(dtype).T


@given(SIZES, SIZES, SIZES, st.booleans())
def test_a_product_is_that_of_float64(rows, others, columns, is_contiguous):
    left_NI, right_MI = factors(rows, others, columns)
    right_MI = right_MI.contiguous() if is_contiguous else right_MI

    found = product(left_NI, right_MI)

    expected = left_NI.double() @ right_MI.double().T
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("has_onednn", [False, True])
def test_a_product_can_be_written_to_some_columns_of_a_tensor(has_onednn, monkeypatch):
    if not has_onednn:
        monkeypatch.setattr(products, "_calls_onednn", lambda _: False)
    left_NI, right_MI = factors(5, 8, 3)
    out_NM = torch.zeros(5, 20)

    write_product(left_NI, right_MI, out_NM=out_NM[:, 6:14])

    torch.testing.assert_close(out_NM[:, 6:14], left_NI @ right_MI.T)
    assert not out_NM[:, :6].any()
    assert not out_NM[:, 14:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_have_the_bits_of_torch(dtype):
    left_NI, right_MI = factors(5, 8, 3, dtype)

    assert torch.equal(product(left_NI, right_MI), left_NI @ right_MI.T)


@given(st.integers(1, 40), st.integers(0, 40))
def test_what_follows_a_factor_in_memory_does_not_change_a_product(rows, following):
    left_NI, right_MI = factors(rows, 8, 3)
    storage = torch.full((rows + following, 3), torch.nan)
    storage[:rows] = left_NI

    torch.testing.assert_close(product(storage[:rows], right_MI), left_NI @ right_MI.T)
    assert storage[rows:].isnan().all()


def test_onednn_sees_few_different_numbers_of_rows(monkeypatch):
    seen, padded = set(), products._with_more_rows
    monkeypatch.setattr(products, "_with_more_rows", lambda factor: note(seen, padded(factor)))

    for rows in range(1, 193):
        product(torch.ones(rows, 3), torch.ones(4, 3))

    assert seen == set(range(16, 193, 16))


def note(seen, factor):
    seen.add(len(factor))
    return factor


def test_without_rows_a_product_is_empty():
    assert product(torch.zeros(0, 3), torch.ones(4, 3)).shape == (0, 4)
