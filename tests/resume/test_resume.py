"""A run that is killed after any stage, or in the middle of one, ends as if it had never been killed."""

import copy
import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ropo import stages
from ropo.audit.features import by_features
from ropo.config import ROPOConfig
from ropo.models.source import Model
from ropo.provenance import hash_file, hash_tensors, read_json
from ropo.run.align import run_rounds
from ropo.train.trainer import ROPOTrainer

SCORED = {"features": ["linear"], "models": ["fold 0", "fold 1"]}
ROUNDS = ["train", "score", "decide", "resample", "train", "score", "decide"]


def config(folder, **options):
    common = {
        "output_dir": str(folder), "learning_rate": 3e-3, "per_device_train_batch_size": 4, "logging_steps": 3,
        "save_strategy": "steps", "save_steps": 2, "max_length": 64, "max_new_tokens": 24, "num_candidates": 8,
        "use_cpu": True, "disable_tqdm": True, "rho": "0.3", "max_length_ratio": 30.0, "rounds": 2, "num_folds": 2,
        "decision_rule": "lowest_loss", "sample_from": "policy", "selection_rule": "uncertainty_aware",
        "max_repetition": 1.0, "max_resampled_share": 1.0,
    }  # fmt: skip
    return ROPOConfig(**{**common, **options})


def outputs(folder: Path) -> dict[str, str]:
    """Digest of every file that does not name a time or a place."""
    skip = ("manifest.json", "summary.json", "README.md", "training_args.bin", "ropo_config.json")
    return {
        str(path.relative_to(folder)): hash_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in skip
        and not path.name.startswith("report")
        and "reference_cache" not in path.parts
    }


def whole(model_folder, pairs, tmp_path, **options):
    folder = tmp_path / "whole"
    run_rounds(model_folder, pairs, config(folder, **options))
    return outputs(folder)


@pytest.fixture
def dying_stages(monkeypatch):
    """Every stage kills its run when it is done; the names of those that were made, and how to end this."""
    made, run = [], stages.Stages.run

    def dying(self, name, inputs, files, make, **options):
        def make_then_die():
            make()
            made.append(name)

        before = len(made)
        digest = run(self, name, inputs, files, make_then_die, **options)
        if len(made) > before:
            raise KeyboardInterrupt
        return digest

    monkeypatch.setattr(stages.Stages, "run", dying)
    return made, lambda: monkeypatch.setattr(stages.Stages, "run", run)


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["features", "models"])
def test_killed_after_every_stage(scorer, model_folder, pairs, tmp_path, dying_stages):
    """One run, killed after each of its stages in turn; every start repeats none of those done before."""
    folder, (made, live) = tmp_path / "killed", dying_stages
    all_stages = ["reference", *SCORED[scorer], "judge", *ROUNDS]
    for _ in all_stages:
        with pytest.raises(KeyboardInterrupt):
            run_rounds(model_folder, pairs, config(folder, scorer=scorer))
    live()
    summary = run_rounds(model_folder, pairs, config(folder, scorer=scorer)).summary
    assert made == all_stages
    assert summary["num_resampled"] > 0  # so that the second round had new pairs to train on
    assert outputs(folder) == whole(model_folder, pairs, tmp_path, scorer=scorer)


def dies_at_its_third_step(monkeypatch, place):
    """Kill the training whose checkpoints lie in a folder of that name, once; all its steps, as they come."""
    steps, step = [], ROPOTrainer.training_step

    def dying(self, *args, **kwargs):
        if Path(self.args.output_dir).name == place:
            steps.append(self.state.global_step)
            if len(steps) == 3:
                raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ROPOTrainer, "training_step", dying)
    return steps


@pytest.mark.parametrize(
    ("place", "scorer"),
    [pytest.param("fold_0_checkpoints", "models", marks=pytest.mark.slow), ("checkpoints", "features")],
)
def test_killed_inside_training(place, scorer, model_folder, pairs, tmp_path, monkeypatch):
    """Training goes on from its last checkpoint, that of a fold model with the margins of its earlier checks."""
    folder = tmp_path / "killed"
    steps = dies_at_its_third_step(monkeypatch, place)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(model_folder, pairs, config(folder, scorer=scorer))
    run_rounds(model_folder, pairs, config(folder, scorer=scorer))
    assert steps[:4] == [0, 1, 2, 2]  # the checkpoint was written after step 2
    assert outputs(folder) == whole(model_folder, pairs, tmp_path, scorer=scorer)


@pytest.mark.slow
def test_checkpoints_of_other_pairs_are_not_gone_on_with(model_folder, pairs, tmp_path, monkeypatch):
    """Margins that come out otherwise change what is trained on, and are no other run: training then begins anew."""
    folder = tmp_path / "killed"
    steps = dies_at_its_third_step(monkeypatch, "checkpoints")
    with pytest.raises(KeyboardInterrupt):
        run_rounds(model_folder, pairs, config(folder))

    def reversed_features(question):
        scores = by_features(question)
        return replace(scores, margins=-scores.margins, views=-scores.views)

    monkeypatch.setattr("ropo.audit.run.SCORERS", {"features": reversed_features})
    run_rounds(model_folder, pairs, config(folder))
    assert steps[:5] == [0, 1, 2, 0, 1]
    run_rounds(model_folder, pairs, config(tmp_path / "whole"))
    assert outputs(folder) == outputs(tmp_path / "whole")


def test_an_adapter_run_is_taken_up_again(model_folder, pairs, tmp_path, monkeypatch):
    """`peft` keeps target modules as a set, ordered otherwise in every process, and writes into what it gets."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    folder = tmp_path / "run"
    options = {"num_candidates": 0, "rounds": 1}
    first = run_rounds(model_folder, pairs, config(folder, **options), peft_config=lora).summary
    assert read_json(folder / "ropo_config.json")["adapter"]["target_modules"] == [
        "k_proj", "o_proj", "q_proj", "v_proj",
    ]  # fmt: skip
    monkeypatch.setattr("ropo.models.source.Model.load", lambda *_, **__: pytest.fail("a model was loaded"))
    again = run_rounds(model_folder, pairs, config(folder, **options), peft_config=lora).summary
    assert again["seconds"] == first["seconds"]


def test_a_mistake_is_corrected_in_the_same_folder(model_folder, pairs, tmp_path):
    """As long as nothing is trained, nothing is lost."""
    folder, options = tmp_path / "run", {"num_candidates": 0, "rounds": 1, "num_folds": 0, "rho": "0"}
    for name in ("q_prj", "q_proj"):
        lora = LoraConfig(r=4, target_modules=[name], task_type="CAUSAL_LM")
        if name == "q_prj":
            with pytest.raises(ValueError, match="q_prj"):
                run_rounds(model_folder, pairs, config(folder, **options), peft_config=lora)
        else:
            run_rounds(model_folder, pairs, config(folder, **options), peft_config=lora)
    with pytest.raises(ValueError, match="with other settings"):
        run_rounds(model_folder, pairs, config(folder, **options))


def test_a_second_adapter_is_refused(model_folder, pairs, tmp_path, tokenizer):
    """`peft` would put a new adapter in its place, and the reference would keep it."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"one adapter; got .*adapter, .*settings of a new one"):
        run_rounds(tmp_path / "adapter", pairs, config(tmp_path / "run"), peft_config=LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"model .*with an adapter\."):
        run_rounds(model, pairs, config(tmp_path / "run"), processing_class=tokenizer)


def test_learned_positions_end(pairs, tokenizer, tmp_path):
    """Beyond them a CPU says that an index is out of range, and a GPU less."""
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=24, **shape)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"gpt2 .*24 positions; .*max_length to 24"):
        run_rounds(tmp_path / "gpt2", pairs, config(tmp_path / "run"))


def test_another_chat_template_is_another_run(model_folder, pairs, tmp_path, tokenizer):
    folder, options = tmp_path / "run", {"num_candidates": 0, "rounds": 1, "num_folds": 0, "rho": "0"}
    run_rounds(model_folder, pairs, config(folder, **options), processing_class=tokenizer)
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace(":", "=")
    with pytest.raises(ValueError, match="other settings:\n  tokenizer"):
        run_rounds(model_folder, pairs, config(folder, **options), processing_class=other)


def test_another_end_token_is_another_run(model_folder, pairs, tmp_path, tokenizer):
    folder, options = tmp_path / "run", {"num_candidates": 0, "rounds": 1, "num_folds": 0, "rho": "0"}
    run_rounds(model_folder, pairs, config(folder, **options), processing_class=tokenizer)
    other = copy.deepcopy(tokenizer)
    other.eos_token = other.convert_ids_to_tokens(5)
    with pytest.raises(ValueError, match="other settings:\n  tokenizer"):
        run_rounds(model_folder, pairs, config(folder, **options), processing_class=other)


def _shifted(folder):
    """The model with other weights; its files have the same names and sizes."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


def test_other_weights_in_the_same_folder_are_another_run(model_folder, pairs, tmp_path):
    options = {"num_candidates": 0, "rounds": 1, "num_folds": 0, "rho": "0"}
    mine = shutil.copytree(model_folder, tmp_path / "M")
    run_rounds(mine, pairs, config(tmp_path / "run", **options))
    _shifted(mine).save_pretrained(mine)
    with pytest.raises(ValueError, match="other settings:\n  model"):
        run_rounds(mine, pairs, config(tmp_path / "run", **options))


def test_a_model_object_is_the_one_that_is_trained(model_folder, pairs, tmp_path, tokenizer, monkeypatch):
    """One that was saved in the folder before gives way as long as nothing is trained, and is refused after that."""
    options = {"num_candidates": 0, "rounds": 1, "num_folds": 0, "rho": "0"}
    first, second = AutoModelForCausalLM.from_pretrained(model_folder), _shifted(model_folder)
    with monkeypatch.context() as patch:
        patch.setattr(ROPOTrainer, "train_or_resume", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_rounds(first, pairs, config(tmp_path / "run", **options), processing_class=tokenizer)
    run_rounds(second, pairs, config(tmp_path / "run", **options), processing_class=tokenizer)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "initial_model")
    assert hash_tensors(saved.state_dict()) == hash_tensors(second.state_dict())
    with pytest.raises(ValueError, match="began with another"):
        run_rounds(first, pairs, config(tmp_path / "run", **options), processing_class=tokenizer)
    weights = tmp_path / "run" / "initial_model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    run_rounds(second, pairs, config(tmp_path / "run", **options), processing_class=tokenizer)
    assert weights.read_bytes() == whole


def test_the_tokenizer_is_of_the_revision_of_the_model(model_folder, pairs, tmp_path, monkeypatch):
    seen, load = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **options: seen.append(options) or load(name))
    options = {"num_candidates": 0, "rounds": 1, "num_folds": 0, "rho": "0"}
    run_rounds(Model(model_folder, load_options={"revision": "v2"}), pairs, config(tmp_path / "run", **options))
    assert seen[0] == {"revision": "v2", "trust_remote_code": False}


def test_half_precision_files_are_trained_in_single_precision(model_folder, tmp_path):
    """A step of 1e-6 is lost in bfloat16, which is what most models of the hub are saved in."""
    AutoModelForCausalLM.from_pretrained(model_folder).to(torch.bfloat16).save_pretrained(tmp_path / "M")
    assert Model(str(tmp_path / "M")).load().dtype == torch.float32
    assert Model(str(tmp_path / "M"), load_options={"dtype": "bfloat16"}).load().dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options", [{}, {"sample_from": "reference", "selection_rule": "min_loss"}], ids=["policy", "reference"]
)
def test_models_of_earlier_stages_are_not_kept(options, model_folder, pairs, tmp_path, monkeypatch):
    """A trainer and its callbacks hold each other; on a GPU a dead model beside the next one is one too many."""
    alive, models, load = [], weakref.WeakSet(), Model.load

    def watching(self, *args, **kwargs):
        from_pretrained = AutoModelForCausalLM.from_pretrained

        def counting(*some, **options):
            alive.append(len(models))
            return from_pretrained(*some, **options)

        with monkeypatch.context() as patch:
            patch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
            found = load(self, *args, **kwargs)
        models.add(found)
        return found

    monkeypatch.setattr(Model, "load", watching)
    gc.disable()  # it might come by on its own
    try:
        run_rounds(model_folder, pairs, config(tmp_path / "run", **options))
    finally:
        gc.enable()
    assert len(alive) > 8
    assert set(alive) == {0}


def test_finished_run_does_nothing(model_folder, pairs, tmp_path, monkeypatch):
    folder = tmp_path / "done"
    first = run_rounds(model_folder, pairs, config(folder)).summary
    monkeypatch.setattr("ropo.models.source.Model.load", lambda *_, **__: pytest.fail("a model was loaded"))
    again = run_rounds(model_folder, pairs, config(folder)).summary
    assert again["seconds"] == first["seconds"]


def test_one_more_round(model_folder, pairs, tmp_path):
    folder = tmp_path / "more"
    run_rounds(model_folder, pairs, config(folder, rounds=1, num_candidates=0))
    before = hash_file(folder / "rounds" / "00" / "model" / "model.safetensors")
    summary = run_rounds(model_folder, pairs, config(folder, rounds=2, num_candidates=0)).summary
    assert hash_file(folder / "rounds" / "00" / "model" / "model.safetensors") == before
    assert [this["round"] for this in summary["rounds"]] == [0, 1]


@pytest.mark.slow
def test_fewer_rounds_are_those_of_a_shorter_run(model_folder, pairs, tmp_path):
    """New pairs that the last round made for a round after it stay on the disk, and out of the results."""
    run_rounds(model_folder, pairs, config(tmp_path / "long", rounds=3, num_candidates=3))
    run_rounds(model_folder, pairs, config(tmp_path / "fresh", rounds=2, num_candidates=3))
    found = run_rounds(model_folder, pairs, config(tmp_path / "long", rounds=2, num_candidates=3))
    fresh = read_json(tmp_path / "fresh" / "summary.json")
    assert found.summary["rounds"] == fresh["rounds"]
    assert hash_file(tmp_path / "long" / "ledger.parquet") == hash_file(tmp_path / "fresh" / "ledger.parquet")
    assert (tmp_path / "long" / "rounds" / "01" / "resampled.jsonl").read_text()
    again = run_rounds(model_folder, pairs, config(tmp_path / "long", rounds=3, num_candidates=3)).summary
    assert again["rounds"][1]["num_resampled"] > 0


def test_other_settings_are_refused(model_folder, pairs, tmp_path):
    folder = tmp_path / "run"
    run_rounds(model_folder, pairs, config(folder, num_candidates=0, rounds=1))
    with pytest.raises(ValueError, match=r"learning_rate: 0\.003 there, 0.001 now"):
        run_rounds(model_folder, pairs, config(folder, num_candidates=0, rounds=1, learning_rate=1e-3))
    with pytest.raises(ValueError, match=r"pairs: content \w{8} there, .* \w{8} now"):
        run_rounds(model_folder, pairs[:-1], config(folder, num_candidates=0, rounds=1))
    run_rounds(
        model_folder, pairs, config(folder, num_candidates=0, rounds=1, logging_steps=5)
    )  # changes nothing that counts


def test_foreign_folder_is_left_alone(model_folder, pairs, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        run_rounds(model_folder, pairs, config(folder))
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_carry_on_starts_from_the_last_model(model_folder, pairs, tmp_path):
    logs = {}
    for start in ("restart", "carry_on"):
        run_rounds(model_folder, pairs, config(tmp_path / start, round_start=start, rho="0"))
        logs[start] = json.loads((tmp_path / start / "rounds" / "01" / "training_log.json").read_text())
    assert logs["restart"][0]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert abs(logs["carry_on"][0]["rewards/margins"]) > 0.05
