"""`--dry_run`: everything is checked as before a run, the cost is printed, and nothing is written."""

import json

import pytest
from transformers import AutoModelForCausalLM

from ropo import ROPOConfig
from ropo.cli.main import main
from ropo.run.align import dry_run
from ropo.run.forecast import Plan


@pytest.fixture
def data(pairs, tmp_path):
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(command, model_folder, data, output, *more):
    words = ["--model_name_or_path", model_folder, "--dataset_name", data, "--output_dir", output, "--use_cpu"]
    return main([command, *map(str, words), "--max_length=64", "--dry_run", *more])


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_pairs_for_evaluation_need_no_annotators(model_folder, data, tmp_path):
    named = tmp_path / "named.jsonl"
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    named.write_text("".join(json.dumps({**line, "worker": f"w{i % 3}"}) + "\n" for i, line in enumerate(lines)))
    data.write_text("".join(json.dumps({**line, "prompt": "Q" + line["prompt"]}) + "\n" for line in lines))
    more = ["--annotator_column=worker", f"--eval_dataset_name={data}"]
    assert run("train", model_folder, named, tmp_path / "O", *more) == 0


@pytest.mark.parametrize(
    ("command", "more", "stages"),
    [
        ("train", ["--rho=0.2", "--rounds=2", "--num_candidates=2"], ["reference", "audit", "rounds", "sampling"]),
        ("train", ["--use_peft", "--rho=0", "--num_folds=0", "--loss=dpo"], ["reference", "rounds"]),
        ("audit", [], ["reference", "audit"]),
    ],
)
def test_it_prints_the_cost_and_writes_nothing(command, more, stages, model_folder, data, tmp_path, capsys):
    before = files(tmp_path)
    assert run(command, model_folder, data, tmp_path / "out", *more) == 0
    said = capsys.readouterr().out
    rows = [line.split("  ")[1] for line in said.splitlines() if line.startswith("  ")]
    kinds = ["weights", "gradients", "optimizer", "activations", "all"]
    assert rows == [*stages, "report", "all stages", *kinds]
    assert "disk" in said
    assert "Assumed:" in said
    assert files(tmp_path) == before


def test_bad_data_is_refused_as_in_a_run(model_folder, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b"}\n')
    assert run("train", model_folder, path, tmp_path / "out") == 1
    assert "rejected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_run_is_refused_as_in_a_run(model_folder, data, tmp_path, capsys):
    output = tmp_path / "out"
    (output / "rounds" / "00").mkdir(parents=True)
    (output / "rounds" / "00" / "manifest.json").write_text("{}")
    (output / "ropo_config.json").write_text('{"options": {}}')
    before = files(output)
    assert run("train", model_folder, data, output) == 2
    assert "holds a run with other settings" in capsys.readouterr().err
    assert files(output) == before


def test_a_plan_in_python(model_folder, tokenizer, pairs, tmp_path):
    """Of a model object, too, which a run would save in its folder."""
    args = ROPOConfig(output_dir=str(tmp_path / "out"), num_folds=0, rho="0", loss="dpo", use_cpu=True, max_length=64)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    plan = dry_run(model, pairs, args, processing_class=tokenizer)
    assert isinstance(plan, Plan)
    assert [stage.name for stage in plan.stages] == ["reference", "rounds", "report"]
    weights = sum(4 * weight.numel() for weight in model.parameters())
    assert (plan.memory.weights, plan.memory.optimizer) == (weights, 2 * weights)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="num_folds of 2 or more"):
        dry_run(model_folder, pairs, args, is_audit=True)
