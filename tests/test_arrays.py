"""What a record says about arrays: their checksums, and whether they are finite."""

import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from sct_jax.training import arrays


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(arrays, "_PIECE", 64)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(300, dtype=np.float32).reshape(3, 100),
        np.asfortranarray(np.arange(300, dtype=np.float32).reshape(3, 100)),
        np.arange(7, dtype=np.int32),
        np.zeros((0, 5), np.float32),
        np.float32(3),
        jnp.arange(99, dtype=jnp.bfloat16),
        jnp.arange(40) > 7,
    ],
    ids=lambda x: f"{x.dtype}{list(x.shape)}",
)
def test_a_checksum_is_that_of_all_bytes_in_order(array):
    described = {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "crc32": zlib.crc32(np.asarray(array).tobytes()),
    }
    assert arrays.describe({"x": array}) == {"x": described}
    on_host = {"x": np.asarray(array)}
    assert arrays.summarise(on_host)["leaves"] == {"x": described}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 50, 99])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_one_number_that_is_not_finite_is_found(value, place, dtype):
    array = np.ones(100, dtype)
    array[place] = value
    whole = {"params/a": np.ones(3, np.float32)}
    assert arrays.summarise(whole)["finite"]
    assert not arrays.summarise({"opt_state/x": array, **whole})["finite"]
    assert not arrays.summarise({**whole, "params/x": array})["finite"]
    # Of the guard and the counts nothing is asked.
    assert arrays.summarise({"guard/x": array, **whole})["finite"]


def test_a_sum_beyond_the_largest_number_is_no_infinity():
    array = np.full(100, 3e38, np.float32)
    assert arrays.summarise({"params/x": array})["finite"]
