"""Eight devices on the CPU, strict dtypes for the mathematics, bounded memory."""

import os

# Read by XLA once, when its first backend starts.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0",  # most of the time goes into compiling
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

# Rank promotion stays allowed: one identity (R, R) serves any stack of layers.
STRICT = {"test_orthogonalize", "test_stiefel", "test_spectral", "test_transforms"}


@pytest.fixture(autouse=True)
def strict_dtypes(request):
    """Tests of layers 0-3 never mix dtypes by implicit promotion."""
    if request.module.__name__ not in STRICT:
        yield
        return
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Compiled functions of one module do not stay for the next."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    """A glob of small files of text."""
    import samples  # not above: it loads what the hook for types has yet to see

    return samples.write_corpus(tmp_path_factory.mktemp("text") / "corpus")
