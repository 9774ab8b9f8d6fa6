"Fixtures shared by all tests; what needs the reference data skips where it is absent."
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared():
    "Folder of the reference data beside the checkout."
    path = ROOT.parent / "shared"
    if not path.is_dir(): pytest.skip("reference data absent")
    return path


@pytest.fixture(scope="session")
def golden(shared):
    "Open a golden file by name: `golden('pr610')`."
    return lambda name: np.load(shared / "golden" / f"{name}.npz")
