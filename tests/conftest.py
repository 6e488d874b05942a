import gc
import os

# Before any import of the stack: no network, no telemetry, no trackers, one thread a worker.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
from hypothesis import settings

# What fails here fails everywhere; machines are slow at times.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_no_garbage():
    """Accelerate collects garbage after each training, which with all libraries in sight takes as long as the rest."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    from hf_eff.testing.tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture
def model():
    from hf_eff.testing.tiny import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def pool():
    from hf_eff.testing.tiny import tiny_pool

    return tiny_pool()


@pytest.fixture(scope="session")
def target():
    from hf_eff.testing.tiny import tiny_target

    return tiny_target()
