"""The β of a training on filtered labels: as far from the reference as all labels would lead."""

import numpy as np
import pytest
from scipy.special import logit

from ropo.audit import run as audit_run
from ropo.audit.weights import Choice, Why, resolve_beta
from ropo.config import ROPOConfig
from ropo.provenance import hash_file
from ropo.run.align import run_rounds


def config(folder, **options):
    common = {
        "output_dir": str(folder), "learning_rate": 3e-3, "per_device_train_batch_size": 4, "max_length": 96,
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "num_folds": 4,
    }  # fmt: skip
    return ROPOConfig(**{**common, **options})


def test_training_is_by_the_beta_that_the_audit_has_found(model_folder, pairs, tmp_path, monkeypatch):
    found = Choice(value=0.75, why=Why.SAME_DISTANCE, facts={"given": 0.3, "factor": 2.5})
    with monkeypatch.context() as patch:
        patch.setattr(audit_run.Audit, "_beta", lambda *_, **__: found)
        result = run_rounds(model_folder, pairs, config(tmp_path / "found"))
    assert (result.audit.beta, result.rounds[0].beta) == (found, found)
    assert (result.summary["beta"], result.summary["beta_why"]) == (0.75, "same_distance")
    run_rounds(model_folder, pairs, config(tmp_path / "given", beta=0.75, adapt_beta=False))
    run_rounds(model_folder, pairs, config(tmp_path / "other"))
    weights = [hash_file(tmp_path / name / "model.safetensors") for name in ("found", "given", "other")]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    ("before", "after"), [([1, 1, 1], [0, 0, 1]), ([1, 1, 1], [1, 1, 1]), ([-1, -1, 1], [1, 1, 0])]
)
def test_labels_that_do_not_pull_harder_leave_beta_as_it_is(before, after):
    """Whatever a rule does, beta neither falls nor turns negative."""
    margins, before, after = (np.tile(np.array(one, float), 20) for one in ([2.0, 1.0, -1.0], before, after))
    found = resolve_beta(0.3, margins, before=before, after=after)
    assert (found.value, found.why) == (0.3, Why.GIVEN)


def test_a_pull_that_may_be_none_is_not_divided_by():
    """Labels that are coin flips pull by chance alone; what a filter leaves of them pulls 20 times as hard."""
    factors = []
    for seed in range(200):
        margins = np.random.default_rng(seed).normal(size=400)
        kept = np.where(margins > 0, 1.0, 0.0)
        copies = {"before": np.ones(1600), "after": np.tile(kept, 4), "clusters": np.tile(np.arange(400), 4)}
        found = [
            resolve_beta(1.0, margins, before=np.ones(400), after=kept).value,
            resolve_beta(1.0, np.tile(margins, 4), **copies).value,  # four copies of a pair are no more evidence
        ]
        assert found[0] == pytest.approx(found[1])
        factors.append(found[0])
    assert np.mean(np.array(factors) > 1) < 0.1
    assert max(factors) < 15


@pytest.mark.parametrize("flip_rate", [0.1, 0.3])
def test_with_the_beta_of_right_labels_the_optimum_lies_as_far_from_the_reference(flip_rate):
    """DPO of one direction: β·δ is the log-odds of its labels, here of preferences that are right in 60 of 100."""
    margins = np.where(np.arange(1000) < 1000 * ((1 - flip_rate) * 0.6 + flip_rate * 0.4), 1.0, -1.0)
    right = np.where(np.arange(1000) < 600, 1.0, -1.0)
    beta = resolve_beta(0.3, margins, before=np.ones(1000), after=right * margins)
    noisy, clean = (np.mean(labels > 0) for labels in (margins, right))
    assert logit(clean) / beta.value == pytest.approx(logit(noisy) / 0.3, rel=0.02)
