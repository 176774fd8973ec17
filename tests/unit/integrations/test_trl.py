"""TRL on audited labels: what TRL gives where nothing is filtered, and weights, flips and loss where it is."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from ropo.config import ROPOConfig
from ropo.losses.margin_losses import ropo
from ropo.provenance import read_json
from ropo.run.align import run_audit, run_rounds
from ropo.run.result import AuditResult

trl = pytest.importorskip("trl", reason="installed by the extra `trl`")
from ropo.integrations.trl import AuditedDPOTrainer, ropo_of_dpo  # noqa: E402 - needs TRL

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own deprecations are not ours to judge

COMMON = {
    "learning_rate": 1e-3, "per_device_train_batch_size": 4, "num_train_epochs": 2, "lr_scheduler_type": "linear",
    "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no", "beta": 0.1, "max_length": 64, "seed": 7,
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "report_to": "none",
}  # fmt: skip


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
PAGE = Path(__file__).parents[3] / "docs" / "trl.md"


@pytest.fixture
def rows(pairs) -> Dataset:
    return Dataset.from_list([{"prompt": one.prompt, "chosen": one.chosen, "rejected": one.rejected} for one in pairs])


@pytest.fixture
def audited(model_folder, rows, tmp_path) -> AuditResult:
    """A finished audit that keeps every pair."""
    return run_audit(model_folder, rows, ROPOConfig(output_dir=str(tmp_path / "audited"), rho="0", use_cpu=True))


def config(folder, **options):
    return trl.DPOConfig(output_dir=str(folder), **{**COMMON, **options})


def losses(trainer):
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weighing(audited, **weights):
    """The same audit with other weights, by place."""
    changed = audited.weights.copy()
    for place, weight in weights.items():
        changed[int(place[1:])] = weight
    return replace(audited, weights=changed)


@pytest.mark.parametrize("adapter", [None, LORA])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_where_nothing_is_filtered_it_is_trl(accumulation, adapter, model_folder, tokenizer, rows, tmp_path):
    """Two changed lines, the import and the name; the losses are the same numbers."""
    found = []
    for kind in (trl.DPOTrainer, AuditedDPOTrainer):
        args = config(tmp_path / kind.__name__, gradient_accumulation_steps=accumulation, learning_rate=1e-2)
        torch.manual_seed(3)  # TRL before 1.5 draws a new adapter from here
        trainer = kind(
            str(model_folder), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter
        )
        found.append(losses(trainer))
    assert found[0] == found[1]
    assert len(found[0]) == {1: 10, 2: 6}[accumulation]
    assert max(found[0]) - min(found[0]) > 0.05  # something was learned, so equality means something
    assert trainer.audit.folder == tmp_path / "AuditedDPOTrainer-audit"
    assert trainer.audit.report.exists()
    assert len(trainer.audit.suspects(5)) <= 5


def test_the_script_of_the_page_needs_two_changed_lines(model_folder, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [diff] = re.findall(r"^```diff\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = diff.splitlines()
    assert [sum(line.startswith(sign) for line in lines) for sign in "-+"] == [2, 2]
    here = "DPOConfig(max_steps=2, logging_steps=1, use_cpu=True, bf16=False, report_to='none', "
    for sign in "-+":
        script = "\n".join(line[1:] for line in lines if line[:1] in (" ", sign) and "load_dataset" not in line)
        script = script.replace("Qwen/Qwen2.5-0.5B-Instruct", str(model_folder)).replace("DPOConfig(", here)
        names = {"dataset": rows}
        exec(compile(script, "page", "exec"), names)
        assert names["trainer"].state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert names["trainer"].audit.report == Path("model-audit/report.html")


def test_what_the_audit_drops_is_absent(model_folder, rows, tmp_path):
    """Training is TRL's on `cleaned.jsonl` as it is written, and as long as on all pairs."""
    trainer = AuditedDPOTrainer(
        str(model_folder), args=config(tmp_path / "O"), train_dataset=rows, audit={"rho": 0.3, "num_folds": 4}
    )
    cleaned = trainer.audit.folder / "cleaned.jsonl"
    alone = trl.DPOTrainer(
        str(model_folder),
        args=config(tmp_path / "alone", num_train_epochs=2 * 20 / 14),
        train_dataset=Dataset.from_json(str(cleaned), cache_dir=str(tmp_path / "cache")),
    )
    assert len(trainer.train_dataset) == len(alone.train_dataset) == 14
    assert losses(trainer) == losses(alone)
    assert trainer.state.max_steps == 12  # 3 batches an epoch; 10 steps on all pairs, and no less


def test_a_weight_is_a_count(model, model_folder, tokenizer, audited, rows, tmp_path):
    """Weight 0 is a pair that is absent, 2 one that is there twice: the same sum of losses, and its gradient."""
    other = type(model)(model.config)  # a reference with margins that differ
    twice = rows.select([0, 0, *range(2, 20)])
    sums = []
    for kind, data, options in (
        (AuditedDPOTrainer, rows, {"audit": weighing(audited, w0=2.0, w1=0.0)}),
        (trl.DPOTrainer, twice, {}),
    ):
        args = config(tmp_path / kind.__name__, per_device_train_batch_size=20)
        trainer = kind(str(model_folder), other, args=args, train_dataset=data, processing_class=tokenizer, **options)
        (batch,) = trainer.get_train_dataloader()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        gradient = trainer.model.lm_head.weight.grad
        sums.append((len(trainer.train_dataset) * loss.detach(), len(trainer.train_dataset) * gradient))
    assert len(trainer.train_dataset) == 20
    for ours, theirs in zip(*sums, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert abs(sums[0][0] - 20 * np.log(2)) > 0.1  # margins are not 0, so weights mean something


def test_beta_follows_the_filter(model_folder, audited, rows, tmp_path):
    found = replace(audited.beta, facts={"given": 0.3, "factor": 2.5})
    args = config(tmp_path / "trl")
    trainer = AuditedDPOTrainer(str(model_folder), args=args, train_dataset=rows, audit=replace(audited, beta=found))
    assert (trainer.args.beta, trainer.beta, args.beta) == (0.25, 0.25, 0.1)


@pytest.mark.parametrize("alpha", [0.0, 6.0])
def test_accumulation_changes_nothing(alpha, model_folder, audited, rows, tmp_path):
    audit = weighing(audited, w0=0.5, w3=2.0, w7=0.25)
    audit = replace(audit, alpha=replace(audit.alpha, value=alpha))
    once, twice = (
        losses(
            AuditedDPOTrainer(
                str(model_folder), args=config(tmp_path / name, **options), train_dataset=rows, audit=audit
            )
        )
        for name, options in (
            ("once", {}),
            ("twice", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        )
    )
    assert once == pytest.approx(twice, abs=1e-5)
    assert max(once) - min(once) > 0.05


def test_its_robust_loss_is_that_of_a_run(model_folder, rows, tmp_path):
    """The same losses, step by step, as `run_rounds` with the same α."""
    trainer = AuditedDPOTrainer(
        str(model_folder), args=config(tmp_path / "trl"), train_dataset=rows, audit={"alpha": 6, "rho": 0}
    )
    theirs = losses(trainer)
    options = {**COMMON, "loss": "ropo", "alpha": "6", "rho": "0", "train_sampling_strategy": "random"}
    run_rounds(model_folder, rows, ROPOConfig(output_dir=str(tmp_path / "ours"), **options))
    log = read_json(tmp_path / "ours" / "rounds" / "00" / "training_log.json")
    ours = [line["loss"] for line in log if "loss" in line]
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert max(ours) - min(ours) > 0.05


def test_evaluation_is_by_the_same_loss_without_weights(model, model_folder, audited, rows, tmp_path):
    other = type(model)(model.config)
    audit = weighing(replace(audited, alpha=replace(audited.alpha, value=6.0)), w0=2.0)
    found = {}
    for name, kind, options in (("dpo", trl.DPOTrainer, {}), ("ropo", AuditedDPOTrainer, {"audit": audit})):
        args = config(tmp_path / name, per_device_eval_batch_size=1)
        trainer = kind(str(model_folder), other, args=args, train_dataset=rows, eval_dataset=rows, **options)
        batches = [trainer._prepare_inputs(batch) for batch in trainer.get_eval_dataloader()]
        found[name] = torch.stack([trainer.compute_loss(trainer.model, batch) for batch in batches]).detach()
    torch.testing.assert_close(found["ropo"], ropo_of_dpo(found["dpo"], alpha=6.0))
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(float(found["ropo"].mean()))


def test_the_robust_loss_from_that_of_dpo():
    """Value and gradient, as far out as single precision goes."""
    h = torch.linspace(-60, 60, 121, requires_grad=True)
    ours = ropo_of_dpo(-torch.nn.functional.logsigmoid(h), alpha=14.0)
    theirs = ropo(h, alpha=14.0)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss.sum(), h)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_a_flipped_pair_is_swapped(model_folder, audited, rows, tmp_path):
    decisions = audited.decisions.astype("<U8")
    decisions[3] = "flip"
    trainer = AuditedDPOTrainer(
        str(model_folder), args=config(tmp_path / "O"), train_dataset=rows, audit=replace(audited, decisions=decisions)
    )
    for i, row in enumerate(trainer.train_dataset):
        chosen, rejected = ("rejected", "chosen") if i == 3 else ("chosen", "rejected")
        assert row["chosen"].startswith(rows[i][chosen]), i
        assert row["rejected"].startswith(rows[i][rejected]), i


def test_a_model_object_and_messages(model, tokenizer, pairs, tmp_path):
    """As in a script that loads the model itself; the model is saved for the audit, and left as it is."""
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": pair.prompt}],
                "chosen": [{"role": "assistant", "content": pair.chosen}],
                "rejected": [{"role": "assistant", "content": pair.rejected}],
            }
            for pair in pairs
        ]
    )
    model.save_pretrained(tmp_path / "M")  # where TRL finds the reference
    tokenizer.save_pretrained(tmp_path / "M")
    given = type(model).from_pretrained(tmp_path / "M")
    trainer = AuditedDPOTrainer(
        given, None, config(tmp_path / "O", max_steps=3), None, rows, audit={"decision_rule": "posterior", "rho": 0.2}
    )
    assert len(losses(trainer)) == 3
    assert sum(trainer.train_dataset["ropo_weight"]) == pytest.approx(16, abs=1e-3)
    assert trainer.audit.ledger.num_rows == 20
    assert (trainer.audit.folder / "initial_model").is_dir()


def test_a_model_with_an_adapter_takes_a_finished_audit(model_folder, model, audited, rows, tmp_path):
    """As after training an adapter on demonstrations; TRL measures margins against that adapter."""
    with_adapter = get_peft_model(type(model).from_pretrained(model_folder), LORA)
    audit = weighing(audited, w0=2.0, w1=0.0)
    trainer = AuditedDPOTrainer(with_adapter, args=config(tmp_path / "O"), train_dataset=rows, audit=audit)
    found = losses(trainer)
    assert len(trainer.train_dataset) == 19
    assert max(found) - min(found) > 0.01
    with pytest.raises(ValueError, match="got one with an adapter"):
        AuditedDPOTrainer(with_adapter, args=config(tmp_path / "P"), train_dataset=rows)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train_dataset": "stream"}, "needs train_dataset as a datasets.Dataset"),
        ({"train_dataset": None}, "needs train_dataset as a datasets.Dataset"),
        ({"audit": {"alpha": 6}, "loss_type": "hinge"}, "needs loss_type 'sigmoid' alone"),
        ({"audit": {"alpha": 6}, "use_weighting": True}, "got use_weighting"),
        ({"audit": {"loss": "hinge"}}, "It is loss_type of DPOConfig here"),
        ({"audit": {"sft_weight": 1.0}}, "audit needs no sft_weight; got 1.0"),
        ({"audit": "other"}, "is of other pairs"),
        ({"tokenizer": 1}, "unexpected keyword argument 'tokenizer'"),
    ],
)
def test_refusals_come_before_an_audit(options, says, model_folder, rows, tmp_path, monkeypatch, request):
    audited = request.getfixturevalue("audited") if options.get("audit") == "other" else None
    monkeypatch.setattr("ropo.integrations.trl.run_audit", lambda *_, **__: pytest.fail("audited"))
    loss = {name: options.pop(name) for name in ("loss_type", "use_weighting") if name in options}
    if options.get("train_dataset") == "stream":
        options["train_dataset"] = rows.to_iterable_dataset()
    if options.get("audit") == "other":
        options |= {"audit": audited, "train_dataset": rows.select(range(19))}
    with pytest.raises((TypeError, ValueError), match=says):
        AuditedDPOTrainer(str(model_folder), args=config(tmp_path / "O", **loss), **{"train_dataset": rows, **options})


def test_a_loss_of_the_batch_is_refused_where_pairs_have_weights(model_folder, audited, rows, tmp_path):
    """AOT sorts the pairs of a batch; of one pair it would be DPO."""
    given = {"train_dataset": rows, "audit": weighing(audited, p3=0.5)}
    with pytest.raises(ValueError, match="Weights of pairs need a loss of pairs alone; got loss_type 'aot'"):
        AuditedDPOTrainer(str(model_folder), args=config(tmp_path / "O", loss_type="aot"), **given)


def test_an_audit_for_another_loss_is_refused(model_folder, rows, tmp_path):
    """Its alpha is that of another formula."""
    options = {"loss": "ropo_v1", "alpha": 2.0, "loss_args": {"gamma": 0.1}, "rho": "0", "use_cpu": True}
    audit = run_audit(model_folder, rows, ROPOConfig(output_dir=str(tmp_path / "v1"), **options))
    with pytest.raises(ValueError, match="needs to be one for the loss ropo or dpo; got one for 'ropo_v1'"):
        AuditedDPOTrainer(str(model_folder), args=config(tmp_path / "O"), train_dataset=rows, audit=audit)


def test_without_trl_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "ropo.integrations.trl")
    with pytest.raises(ImportError, match=r'needs TRL; it is not installed\. Run: pip install "trl>=1\.0"$'):
        import_module("ropo.integrations.trl")


SCRIPT = """
import json, sys
from pathlib import Path
from datasets import Dataset
from ropo.integrations.trl import AuditedDPOTrainer, DPOConfig
here = Path(sys.argv[1])
trainer = AuditedDPOTrainer(
    sys.argv[2], args=DPOConfig(**json.loads(sys.argv[3])),
    train_dataset=Dataset.from_list(json.loads((here / "rows.json").read_text())),
    audit={"alpha": 6, "decision_rule": "posterior", "rho": 0.2},
)
trainer.train()
if trainer.is_world_process_zero():
    print([line["loss"] for line in trainer.state.log_history if "loss" in line])
"""


@pytest.mark.slow
def test_two_processes_are_one(model_folder, rows, tmp_path):
    """Audit, weights and the robust loss."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "rows.json").write_text(json.dumps(rows.to_list()))
    found = []
    for number in (1, 2):
        options = {**COMMON, "output_dir": str(tmp_path / f"O{number}"), "per_device_train_batch_size": 4 // number}
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={number}", "--master_port=29743"]
        done = subprocess.run(
            [sys.executable, *launcher, "script.py", ".", str(model_folder), json.dumps(options)],
            capture_output=True, text=True, check=True, cwd=tmp_path,
        )  # fmt: skip
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert len(found[0]) == 10
    assert max(found[0]) - min(found[0]) > 0.05
