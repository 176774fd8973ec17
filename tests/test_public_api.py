"""What `from ropo import ...` offers, and that nothing heavy happens before it is asked for."""

import subprocess
import sys

import pytest

import ropo

NAMES = {
    "AuditResult", "DataError", "DataSource", "LOSSES", "Model", "Pair", "PairDataset", "PairLogps", "ROPOConfig",
    "ROPOTrainer", "ReviewInputs", "RunResult", "__version__", "decide", "estimate_flips", "flip_labels", "load_pairs",
    "margin", "run_audit", "run_rounds", "validate_pairs",
}  # fmt: skip


def test_names():
    assert set(ropo.__all__) == NAMES
    assert len(ropo.__all__) <= 21
    for name in NAMES:
        assert getattr(ropo, name) is not None
    assert dir(ropo) == sorted(NAMES)


def test_unknown_name():
    with pytest.raises(AttributeError, match="ROPOTrainer"):
        ropo.Trainer  # noqa: B018


def test_import_is_light():
    code = "import sys, ropo; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False False\n"
    )
