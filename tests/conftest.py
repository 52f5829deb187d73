"""What every test file shares: the import path, one thread, and world.py's tiny checkpoints, written once a run."""
import functools
import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
torch.set_num_threads(1)                           # with tiny tensors more threads only wait for each other,
os.environ.setdefault("OMP_NUM_THREADS", "1")      # here and in the processes that tests start


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(kind, layout="original", pack="one") -> its folder, written on first use. Shared: read only."""
    import world

    @functools.cache
    def folder(kind, layout="original", pack="one"):
        return world.write(tmp_path_factory.mktemp(f"{kind}-{layout}-{pack}"), kind, layout, pack)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint):
    """model(kind) -> a float32 LLaVA on the CPU, loaded on first use. Shared: a test puts back what it changes."""
    import llava_min

    @functools.cache
    def loaded(kind):
        return llava_min.load(str(checkpoint(kind)), dtype="float32", device="cpu")
    return loaded
