"""Eight CPU devices, one compilation cache, strict dtypes for the mathematics."""

import importlib.metadata
import os

# Compiling dominates the tests. XLA reads its flags once, and aborts on unknown ones:
# jaxlib 0.12 has no fusion emitters to turn off.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

STRICT = {"test_linalg", "test_stiefel", "test_spectral", "test_transforms"}


@pytest.fixture(autouse=True)
def strict_dtypes(request):
    """Tests of layers 0-3 promote neither dtypes nor ranks implicitly."""
    if request.module.__name__ not in STRICT:
        yield
        return
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield


@pytest.fixture(autouse=True, scope="session")
def compilation_cache(tmp_path_factory):
    """Programs compile once per session, over all workers and their subprocesses."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        yield


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Frees the compiled functions of a module before the next."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    """A glob of small text files."""
    import samples  # not above: it loads what the hook for types has yet to see

    return samples.write_corpus(tmp_path_factory.mktemp("text") / "corpus")
