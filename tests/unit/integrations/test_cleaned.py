"""`cleaned.jsonl` in the loaders of other trainers, with the configuration that docs/formats.md gives."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from datasets import Dataset

from ropo.config import ROPOConfig
from ropo.run.align import run_audit

pytestmark = pytest.mark.filterwarnings("ignore")  # other projects' deprecations are not ours to judge

PAGE = (Path(__file__).parents[3] / "docs" / "formats.md").read_text().split("## Using the cleaned data elsewhere")[1]


def given(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def as_messages(row):
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}


@pytest.fixture(params=["text", "messages"])
def layout(request):
    return request.param


@pytest.fixture
def cleaned(layout, model_folder, pairs, tmp_path) -> Path:
    """What an audit that drops six of twenty pairs writes."""
    rows = [{"prompt": one.prompt, "chosen": one.chosen, "rejected": one.rejected} for one in pairs]
    rows = [as_messages(row) for row in rows] if layout == "messages" else rows
    config = ROPOConfig(output_dir=str(tmp_path / "audit"), rho="0.3", use_cpu=True)
    return run_audit(model_folder, rows, config).folder / "cleaned.jsonl"


def rows_of(path):
    return Dataset.from_json(str(path), cache_dir=str(path.parent / "cache"))


def texts_of(path, name):
    values = [json.loads(line)[name] for line in path.read_text().splitlines()]
    return [value if isinstance(value, str) else value[0]["content"] for value in values]


def test_trl_trains_on_it(cleaned, model_folder, tmp_path):
    trl = pytest.importorskip("trl")
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "O"), max_steps=2, logging_steps=1, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = trl.DPOTrainer(str(model_folder), args=args, train_dataset=rows_of(cleaned))
    trainer.train()
    assert len(trainer.train_dataset) == 14
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_llama_factory_reads_it(layout, cleaned, tokenizer):
    data = pytest.importorskip("llamafactory.data")
    converter = pytest.importorskip("llamafactory.data.converter")
    parser = pytest.importorskip("llamafactory.data.parser")
    processor = pytest.importorskip("llamafactory.data.processor")
    of_text, of_messages = given("json")
    (cleaned.parent / "dataset_info.json").write_text(of_text if layout == "text" else of_messages)
    lines = [json.loads(line) for line in cleaned.read_text().splitlines()]
    if layout == "messages":  # what the command on the page does
        lines = [{**line, "chosen": line["chosen"][0], "rejected": line["rejected"][0]} for line in lines]
    [attributes] = parser.get_dataset_list(["cleaned"], str(cleaned.parent))
    path = cleaned.parent / attributes.dataset_name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = SimpleNamespace(streaming=False, preprocessing_num_workers=1, overwrite_cache=True, cutoff_len=512)
    aligned = converter.align_dataset(rows_of(path), attributes, args, SimpleNamespace(local_process_index=0))
    read = processor.PairwiseDatasetProcessor(
        template=data.TEMPLATES["empty"], tokenizer=tokenizer, processor=None, data_args=args
    )
    found = read.preprocess_dataset(aligned.to_dict())
    for name in ("chosen", "rejected"):
        labels = [[one for one in ids if one >= 0] for ids in found[f"{name}_labels"]]
        assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in labels] == texts_of(cleaned, name)
    assert len(labels) == 14


def test_axolotl_reads_it(cleaned, tokenizer):
    dpo = pytest.importorskip("axolotl.prompt_strategies.dpo")
    dictionaries = pytest.importorskip("axolotl.utils.dict")
    [config] = given("yml")
    config = dictionaries.DictDefault(yaml.safe_load(config))
    [source] = config["datasets"]
    transform, how = dpo.load(source["type"], config, dataset_idx=0)
    found = rows_of(cleaned).map(lambda row: transform(row, tokenizer=tokenizer), **how)
    for name in ("chosen", "rejected"):
        assert found[name] == [f"{text}</s>" for text in texts_of(cleaned, name)]
    prompts = [f"<s>user:{text}</s><s>assistant:" for text in texts_of(cleaned, "prompt")]
    assert found["prompt"] == prompts
    assert len(prompts) == 14
