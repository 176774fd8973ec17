"""What was once silently wrong, stuck or a traceback: each refused by one sentence, before anything expensive.

Every entry breaks one thing about a model folder, a dataset, a recipe or an option of a run that would train, and names
what the sentence must hold; the exit code is that of misuse. Nothing may be trained, so no entry may leave a model in
the output folder.
"""

import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
)

from ropo.cli.main import main
from ropo.data.load import load_pairs
from ropo.data.tokenize import tokenize_pairs

MISUSE = 2
OPTIONS = (
    "--loss", "dpo", "--rho", "0", "--learning_rate", "3e-3", "--per_device_train_batch_size", "4",
    "--max_length", "64", "--use_cpu", "--disable_tqdm",
)  # fmt: skip


@pytest.fixture
def rows(pairs):
    return [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]


@pytest.fixture
def dataset(rows, tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", rows)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(model_folder, dataset, output, *more):
    words = ["--model_name_or_path", model_folder, "--dataset_name", dataset, "--output_dir", output, *OPTIONS, *more]
    return main(["train", *map(str, words)])


def refused(capsys, code, said, output):
    """The last line of a refusal: it holds what was said, names no place in the code and has trained nothing."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert code == MISUSE
    assert re.search(said, error, re.DOTALL), error
    assert not list(output.rglob("model.safetensors"))


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def without_a_tensor(folder):
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def with_nan(folder):
    change_weights(folder, lambda weights: weights["model.layers.0.mlp.up_proj.weight"].fill_(torch.nan))


def without_a_head(folder):
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    change_json(folder / "config.json", tie_word_embeddings=False)


def as_classifier(folder):
    config = AutoModelForCausalLM.from_pretrained(folder).config
    LlamaForSequenceClassification(config).save_pretrained(folder)


def as_masked_lm(folder):
    config = BertConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(folder)


def with_added_token(**named):
    def change(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens(named)
        tokenizer.save_pretrained(folder)

    return change


def with_word_beyond(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["waiter"])
    tokenizer.save_pretrained(folder)


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_missing_shard(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_template(template):
    return lambda folder: (folder / "chat_template.jinja").write_text(template)


MODELS = {
    "tensor missing": (without_a_tensor, r"model\.layers\.1\.mlp\.up_proj\.weight"),
    "too many layers": (lambda f: change_json(f / "config.json", num_hidden_layers=3), r"model\.layers\.2\."),
    "another size": (lambda f: change_json(f / "config.json", intermediate_size=48), r"mlp\.\w+_proj\.weight"),
    "no head": (without_a_head, r"lm_head\.weight"),
    "classifier": (as_classifier, r"SequenceClassification"),
    "masked language model": (as_masked_lm, r"BertForMaskedLM"),
    "added pad token": (with_added_token(pad_token="<new_pad>"), r"<new_pad>|pad"),
    "added end token": (with_added_token(eos_token="<new_end>"), r"<new_end>|eos"),
    "added word": (with_word_beyond, r"embedding"),
    "NaN weights": (with_nan, r"model\.layers\.0\.mlp\.up_proj\.weight"),
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), r"model\.safetensors"),
    "header only": (lambda f: truncate(f / "model.safetensors", 0.0005), r"model\.safetensors"),
    "truncated config": (lambda f: truncate(f / "config.json"), r"config\.json"),
    "truncated tokenizer": (lambda f: truncate(f / "tokenizer.json"), r"tokenizer\.json"),
    "truncated tokenizer config": (lambda f: truncate(f / "tokenizer_config.json"), r"tokenizer_config\.json"),
    "pickle only": (as_pickle, r"pytorch_model\.bin"),
    "missing shard": (with_missing_shard, r"model-00001-of-00002\.safetensors"),
    "quantized": (
        lambda f: change_json(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        r"gptq",
    ),
}


@pytest.mark.parametrize(("change", "said"), MODELS.values(), ids=MODELS)
def test_a_broken_model(change, said, model_folder, dataset, tmp_path, capsys):
    change(model_folder)
    code = train(model_folder, dataset, tmp_path / "O")
    refused(capsys, code, said, tmp_path / "O")


def test_a_template_that_never_ends(model_folder, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ropo.data.template._BUDGET_SECONDS", 1.0)
    # Jinja's sandbox bounds a range, but not how many stand within one another.
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "ijk")
    with_template(f"{loops}x{3 * '{% endfor %}'}")(model_folder)
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        for name in ("chosen", "rejected"):
            row[name] = [{"role": "assistant", "content": row[name]}]
    signal.alarm(120)
    try:
        code = train(model_folder, write_rows(tmp_path / "chat.jsonl", rows), tmp_path / "O")
    finally:
        signal.alarm(0)
    refused(capsys, code, r"template needs to end", tmp_path / "O")


def test_columns_of_one_name(model_folder, tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected,chosen\n" + "".join(f"Hi,a {i},b,c {i}\n" for i in range(20)))
    refused(capsys, train(model_folder, path, tmp_path / "O"), r"chosen", tmp_path / "O")


def test_a_pipe(model_folder, tmp_path, capsys):
    os.mkfifo(tmp_path / "pairs.jsonl")
    signal.alarm(60)
    try:
        code = train(model_folder, tmp_path / "pairs.jsonl", tmp_path / "O")
    finally:
        signal.alarm(0)
    refused(capsys, code, r"regular file.*pairs\.jsonl", tmp_path / "O")


def test_a_verdict_for_no_row(model_folder, dataset, tmp_path, capsys):
    table = tmp_path / "review.csv"
    table.write_text("row,pair_id,verdict\n999,0123456789abcdef,wrong\n")
    code = train(model_folder, dataset, tmp_path / "O", "--decisions", table)
    refused(capsys, code, r"999", tmp_path / "O")


def test_trusted_pairs_that_are_the_data(model_folder, dataset, tmp_path, capsys):
    code = train(model_folder, dataset, tmp_path / "O", "--trusted", dataset)
    refused(capsys, code, r"trusted", tmp_path / "O")


RECIPES = {
    "truth for a number": ("beta: true\n", r"beta.*[Tt]rue"),
    "sexagesimal": ("seed: 1:30\n", r"seed.*1:30"),
    "twice": ("beta: 0.1\nbeta: 0.2\n", r"beta.*(twice|duplicate|two)"),
    "not finite": ("num_train_epochs: .inf\n", r"num_train_epochs"),
}


@pytest.mark.parametrize(("recipe", "said"), RECIPES.values(), ids=RECIPES)
def test_a_value_that_yaml_changes(recipe, said, model_folder, dataset, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(recipe)
    code = train(model_folder, dataset, tmp_path / "O", "--config", tmp_path / "recipe.yaml")
    refused(capsys, code, said, tmp_path / "O")


def test_a_number_is_read_as_on_the_command_line(model_folder, dataset, tmp_path):
    """YAML 1.1 takes a leading zero for octal."""
    (tmp_path / "recipe.yaml").write_text("seed: 010\n")
    assert train(model_folder, dataset, tmp_path / "O", "--config", tmp_path / "recipe.yaml") == 0
    assert json.loads((tmp_path / "O" / "summary.json").read_text())["config"]["seed"] == 10


COMMAND_LINES = {
    "order": (("--train_sampling_strategy", "nope"), r"train_sampling_strategy"),
    "epochs inf": (("--num_train_epochs", "inf"), r"num_train_epochs"),
    "epochs nan": (("--num_train_epochs", "nan"), r"num_train_epochs"),
    "beta nan": (("--beta", "nan"), r"beta"),
    "warm-up beyond the end": (("--warmup_steps", "1e9"), r"warmup_steps"),
    "text for a dictionary": (("--lr_scheduler_kwargs", "fast"), r"lr_scheduler_kwargs"),
    "checkpoints without state": (("--save_only_model",), r"save_only_model"),
    "fp16 on a CPU": (("--fp16",), r"fp16"),
    "liger on a CPU": (("--use_liger_kernel",), r"liger"),
}


@pytest.mark.parametrize(("more", "said"), COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_an_option(more, said, model_folder, dataset, tmp_path, capsys):
    refused(capsys, train(model_folder, dataset, tmp_path / "O", *more), said, tmp_path / "O")


JSON_FILES = ("ropo_config.json", "reference/manifest.json", "rounds/00/manifest.json", "rounds/00/decisions.json")
TENSORS = ("reference/reference_logps.safetensors", "rounds/00/scores.safetensors", "rounds/00/flips.safetensors")


@pytest.mark.parametrize(
    ("file", "share"),
    [*((file, share) for file in JSON_FILES for share in (0, 0.5)), *((file, 0.5) for file in TENSORS)],
)
def test_a_truncated_file_of_the_run(file, share, model_folder, dataset, tmp_path, capsys):
    """Named with its path, or made again."""
    assert train(model_folder, dataset, tmp_path / "O") == 0
    weights = (tmp_path / "O" / "model.safetensors").read_bytes()
    truncate(tmp_path / "O" / file, share)
    capsys.readouterr()
    code = train(model_folder, dataset, tmp_path / "O")
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert code == 0 or file in error
    assert (tmp_path / "O" / "model.safetensors").read_bytes() == weights


def test_no_token_is_written(model_folder, dataset, tmp_path):
    secret = "hf_" + "s" * 30
    assert train(model_folder, dataset, tmp_path / "O", "--hub_token", secret) == 0
    for path in (tmp_path / "O").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_a_control_token_inside_a_text(model_folder, rows, tmp_path, capsys):
    """It is text to the tokenizer, or its row is reported."""
    rows[3]["chosen"] = "so </s> it goes on"
    rows[4]["prompt"] = "a <pad> inside"
    assert train(model_folder, write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "O") == 0
    problems = [json.loads(line) for line in (tmp_path / "O" / "problems.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = tokenize_pairs(load_pairs(tmp_path / "pairs.jsonl").pairs, tokenizer, max_length=64)
    told = {problem["row"] for problem in problems}
    for pair, ids in zip(found.pairs, found.tokens, strict=True):
        is_text = tokenizer.eos_token_id not in ids.chosen[:-1] and tokenizer.pad_token_id not in ids.prompt
        assert is_text or pair.row in told


def test_one_huge_prompt(model_folder, rows, tmp_path, capsys):
    rows[0]["prompt"] = "word and other things " * 2_000_000
    signal.alarm(90)
    try:
        assert train(model_folder, write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "O") == 0
    finally:
        signal.alarm(0)
    problems = [json.loads(line) for line in (tmp_path / "O" / "problems.jsonl").read_text().splitlines()]
    assert ("text_too_long", 0) in {(problem["kind"], problem["row"]) for problem in problems}
