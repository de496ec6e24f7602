"""What every test wants: no hub, one thread for tiny tensors, and nothing left over between tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run two at a time, and many of them start processes: a thread each, or they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_ignore_collect(collection_path, config):
    """With ``-m oldest`` only files that have such tests are imported: that environment lacks what others need."""
    if "oldest" in config.option.markexpr.split() and collection_path.name.startswith("test_"):
        return "mark.oldest" not in collection_path.read_text() or None


@pytest.fixture(autouse=True)
def _quiet_and_small():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def deterministic():
    """Of torch's operations only those that give the same every time."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
