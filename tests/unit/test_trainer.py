"""One training stage: what a step minimises, what is logged, what stops it, what survives a restart."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, TrainingArguments

from ropo.config import ROPOConfig
from ropo.data.tokenize import tokenize_pairs
from ropo.data.validate import DataError
from ropo.logps.batch import Batching
from ropo.logps.cache import reference_logps
from ropo.logps.score import score_pairs
from ropo.losses import LOSSES, bind_loss
from ropo.models.fit import check_adapter
from ropo.pairs import Pair, PairLogps
from ropo.provenance import read_json
from ropo.run.align import run_audit, run_rounds
from ropo.train import trainer as ours
from ropo.train.dataset import PairDataset
from ropo.train.metrics import METRICS
from ropo.train.objective import losses_of as losses_at
from ropo.train.sharding import settle
from ropo.train.trainer import ROPOTrainer

BATCHING = Batching(pad_token_id=0)
OPTIONS = {
    **{loss: {"loss_args": {"flip_rate": 0.1}} for loss in ("cdpo", "rdpo", "forward_corrected")},
    "ropo_v1": {"alpha": 2.0, "loss_args": {"gamma": 0.1}},
}


def config(folder, **options):
    common = {
        "output_dir": str(folder), "learning_rate": 1e-3, "per_device_train_batch_size": 4, "logging_steps": 1,
        "save_strategy": "no", "max_length": 128, "use_cpu": True, "disable_tqdm": True, "warmup_steps": 0,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return ROPOConfig(**{**common, **options})


def losses_of(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(loss, model, tokenizer, pairs, tmp_path):
    """Each loss lowers itself on a batch it sees again and again, and starts at its value at margin 0."""
    args = config(
        tmp_path, loss=loss, num_train_epochs=6, per_device_train_batch_size=20, **OPTIONS.get(loss, {}),
        **({"learning_rate": 3e-4} if loss == "ipo" else {}),
    )  # fmt: skip
    trainer = ROPOTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    losses = losses_of(trainer)
    if not LOSSES[loss].per_token:
        assert losses[0] == pytest.approx(
            trainer.training_objective.loss_of_margin(torch.zeros(20)).mean().item(), abs=1e-4
        )
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_weighted(loss, model, tokenizer, pairs, tmp_path):
    """A weight multiplies the loss of its pair: the mean over all pairs, whatever their weights, is what is logged."""
    args = config(
        tmp_path, loss=loss, max_steps=1, learning_rate=1e-9, per_device_train_batch_size=20, **OPTIONS.get(loss, {})
    )
    weights = torch.rand(20).tolist()
    weighted = [replace(pair, weight=weight) for pair, weight in zip(pairs, weights, strict=True)]
    trainer = ROPOTrainer(model, args, train_dataset=weighted, processing_class=tokenizer)
    trainer.train()
    given = {}
    if "reference_ratio" in LOSSES[loss].inputs:
        given["reference_ratio"] = trainer.train_dataset.reference.chosen - trainer.train_dataset.reference.rejected
    if "weight" in LOSSES[loss].inputs:
        given["weight"] = torch.tensor(weights)
    of_pairs = trainer.training_objective.loss_of_margin(trainer.gather_first_margins(), **given)
    assert losses_of(trainer)[0] == pytest.approx((of_pairs * torch.tensor(weights)).mean().item(), rel=1e-4)


def test_first_step_is_the_formula(model, tokenizer, pairs, tmp_path):
    """With given weights and a reference that is not the start, the logged loss is the weighted mean of the formula."""
    tokenized = tokenize_pairs(pairs[:4], tokenizer, max_length=128)
    reference = reference_logps(model, tokenized.tokens, BATCHING, cache_dir=tmp_path / "cache")
    shifted = type(reference)(chosen=reference.chosen - 3.0, rejected=reference.rejected + 2.0)
    weights = [1.0, 0.5, 0.0, 0.25]
    dataset = PairDataset(tokenized.pairs, tokenized.tokens, reference=shifted, weights=weights)
    trainer = ROPOTrainer(
        model,
        config(tmp_path, loss="ropo", alpha=6.0, beta=0.2, max_steps=1),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    h, a = 0.2 * 5.0, 6.0
    value = 4 * a / (1 + a) ** 2 * (math.log1p(math.exp(-h)) + a / (1 + math.exp(h)))
    assert losses_of(trainer)[0] == pytest.approx(value * sum(weights) / 4, rel=1e-4)
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == pytest.approx(h, rel=1e-4)
    assert {*METRICS} - {"loss/sft", "loss/router"} <= set(first)
    assert trainer.gather_first_margins().tolist() == pytest.approx([h] * 4, rel=1e-3)


@pytest.fixture
def trainer(model, tokenizer, pairs, tmp_path):
    return ROPOTrainer(model, config(tmp_path), train_dataset=pairs[:4], processing_class=tokenizer)


def test_a_training_alone_says_which_alpha_it_takes(model, tokenizer, pairs, tmp_path, caplog):
    """Nothing is estimated here, and an unfiltered robust loss goes far; a run and whoever gives a number know that."""
    for options, is_told in (({}, True), ({"alpha": 6}, False), ({"loss": "dpo"}, False)):
        caplog.clear()
        ROPOTrainer(model, config(tmp_path, **options), train_dataset=pairs, processing_class=tokenizer)
        assert ("alpha is 14, " in caplog.text) is is_told
    caplog.clear()
    run_rounds(model, pairs, config(tmp_path / "O", num_folds=2), processing_class=tokenizer)
    assert "alpha is 14" not in caplog.text


def test_deepspeed_does_not_round_what_stands_beside_a_batch(trainer, monkeypatch):
    """`Trainer` casts every number of a batch to the precision of the weights; a reference would lose whole nats."""
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    reference = torch.tensor([-312.57, -310.12])
    found = trainer._prepare_inputs({"pieces": [{"reference_chosen": reference}]})
    assert torch.equal(found["pieces"][0]["reference_chosen"], reference)


def test_sharded_models_hand_out_float32():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    plugin = SimpleNamespace(mixed_precision_policy=policy)
    settle(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=None)))
    assert plugin.mixed_precision_policy.output_dtype is None
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16


def test_habits_from_trl_are_answered(model, tokenizer, pairs, tmp_path):
    given = {"train_dataset": pairs, "processing_class": tokenizer}
    with pytest.raises(TypeError, match=r"takes no ref_model\."):
        ROPOTrainer(model, config(tmp_path), ref_model=model, **given)
    with pytest.raises(TypeError, match=r"takes no data_collator\.$"):
        ROPOTrainer(model, config(tmp_path), data_collator=None, **given)
    theirs = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match=r"ROPOTrainer .*ROPOConfig .*TrainingArguments"):
        ROPOTrainer(model, theirs, **given)
    for run in (run_rounds, run_audit):
        with pytest.raises(TypeError, match=f"{run.__name__} .*ROPOConfig .*got TrainingArguments"):
            run(model, pairs, theirs)
    with pytest.raises(ValueError, match=r"processing_class .*got none"):
        ROPOTrainer(model, config(tmp_path), train_dataset=pairs)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_bigcode"])
def test_no_dropout_is_left(family, tokenizer, pairs, tmp_path):
    """Neither as a module nor as a number of any name: before training every margin is 0, in packed rows, too."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
    more = {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}.get(family, {"intermediate_size": 64})
    config_class = CONFIG_MAPPING[family]
    model = AutoModelForCausalLM.from_config(
        config_class(vocab_size=len(tokenizer), attention_dropout=0.5, pad_token_id=0, **shape, **more)
    )
    args = config(tmp_path, max_steps=1, learning_rate=1e-9)
    trainer = ROPOTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    assert trainer.gather_first_margins()[:4].abs().max() < 1e-4


@pytest.mark.parametrize(("rho", "num_steps"), [("0", 3), ("0.5", 4)])
def test_pairs_that_the_data_gives_no_weight_make_no_steps(rho, num_steps, model_folder, pairs, tmp_path):
    """As if they were not there; six of the others are kept, in two batches, which are read 10 / 6 times."""
    weighted = [replace(pair, weight=float(pair.row % 2)) for pair in pairs]
    run_rounds(model_folder, weighted, config(tmp_path / "O", rho=rho, loss="dpo", num_folds=2))
    log = read_json(tmp_path / "O" / "rounds" / "00" / "training_log.json")
    assert log[-1]["step"] == num_steps


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_with_sft(loss, model, tokenizer, pairs, tmp_path):
    """Every loss takes the term, weighted as its pair is; before the first step its value is that of the model."""
    tokens = tokenize_pairs(pairs, tokenizer, max_length=128).tokens
    before = score_pairs(model, tokens, BATCHING)
    weights = torch.arange(20.0) / 20
    weighted = [replace(pair, weight=weight) for pair, weight in zip(pairs, weights.tolist(), strict=True)]
    found = []
    for sft_weight in (0.0, 0.5):
        args = config(
            tmp_path, loss=loss, max_steps=1, learning_rate=0, per_device_train_batch_size=20, sft_weight=sft_weight,
            **OPTIONS.get(loss, {}),
        )  # fmt: skip
        trainer = ROPOTrainer(model, args, train_dataset=weighted, processing_class=tokenizer)
        trainer.train()
        found.append(trainer.state.log_history[0])
    term = -before.chosen / before.chosen_tokens
    assert found[1]["loss"] - found[0]["loss"] == pytest.approx(0.5 * (weights * term).mean().item(), rel=1e-4)
    assert found[1]["loss/sft"] == pytest.approx(term.mean().item(), rel=1e-4)
    assert "loss/sft" not in found[0]


@pytest.mark.parametrize("loss", ["ropo", "simpo", "plc_dpo"])
def test_accumulation_changes_nothing(loss, model_folder, tokenizer, pairs, tmp_path):
    """Batch 8, and 2 times 4, take the same steps, even where the last step is smaller."""
    weights = [1.0, 0.2] * 10
    found = []
    for batch, accumulation in ((8, 1), (4, 2)):
        args = config(
            tmp_path / str(batch),
            loss=loss,
            sft_weight=0.3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        trainer = ROPOTrainer(
            str(model_folder), args, processing_class=tokenizer,
            train_dataset=[Pair(**{**pair_fields(pair), "weight": w}) for pair, w in zip(pairs, weights, strict=True)],
        )  # fmt: skip
        trainer.train()
        found.append((losses_of(trainer), weights_of(trainer)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("loss", ["ropo", "simpo"])
def test_pieces_change_nothing(loss, model_folder, tokenizer, pairs, tmp_path):
    """A batch that is taken in pieces by tokens takes the steps of the whole batch, accumulated or not."""
    found = []
    for max_tokens, batch, accumulation in ((None, 8, 1), (150, 8, 1), (1, 4, 2)):
        args = config(
            tmp_path / str(max_tokens),
            loss=loss,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_tokens_per_batch=max_tokens,
        )
        trainer = ROPOTrainer(str(model_folder), args, train_dataset=pairs, processing_class=tokenizer)
        num_pieces = len(trainer.data_collator([trainer.train_dataset[i] for i in range(batch)])["pieces"])
        assert (num_pieces > 1) == (max_tokens is not None)
        trainer.train()
        found.append((losses_of(trainer), weights_of(trainer), trainer.gather_first_margins()))
    for losses, weights, margins in found[1:]:
        assert losses == pytest.approx(found[0][0], abs=1e-5)
        torch.testing.assert_close(weights, found[0][1], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(margins, found[0][2], rtol=1e-3, atol=1e-4)


def test_evaluation_in_pieces(model, tokenizer, pairs, tmp_path):
    found = []
    for max_tokens in (None, 100):
        args = config(tmp_path, loss="dpo", max_tokens_per_batch=max_tokens, per_device_eval_batch_size=8)
        trainer = ROPOTrainer(model, args, eval_dataset=pairs, processing_class=tokenizer)
        with torch.no_grad():
            trainer.eval_dataset.reference.chosen[:] -= 7.0
        found.append(trainer.evaluate())
        assert not trainer.gather_eval_margins().isnan().any()
    for name in ("eval_loss", "eval_rewards/margins"):
        assert found[1][name] == pytest.approx(found[0][name], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens_per_batch": 0}, "1 or more; got 0"),
        ({"max_tokens_per_batch": 512, "loss": "dr_dpo"}, "dr_dpo needs the whole batch"),
        ({"max_tokens_per_batch": 512, "loss": "rappo"}, "rappo needs the whole batch"),
    ],
)
def test_pieces_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_pieces_are_refused_where_accelerate_shards_the_model(tmp_path, monkeypatch):
    """Processes with other numbers of pieces would wait for each other for ever."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="max_tokens_per_batch needs"):
        config(tmp_path, max_tokens_per_batch=512)


def pair_fields(pair):
    return {name: getattr(pair, name) for name in ("prompt", "chosen", "rejected", "row")}


def test_lora_trains_against_its_base(model_folder, tokenizer, pairs, tmp_path):
    trainer = ROPOTrainer(
        str(model_folder),
        config(tmp_path, loss="dpo", num_train_epochs=4, learning_rate=1e-2),
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses_of(trainer)[-1] < 0.6


def test_an_adapter_that_does_not_fit_costs_no_reference(model, tokenizer, pairs, tmp_path, monkeypatch):
    """It is tried on a copy without weights, which leaves the model as it is."""
    monkeypatch.setattr("ropo.train.dataset.reference_logps", lambda *_, **__: pytest.fail("scored"))
    before = {name: (id(one), one.clone()) for name, one in model.named_parameters()}
    with pytest.raises(ValueError, match=r"adapter .*: Target modules"):
        ROPOTrainer(
            model, config(tmp_path), train_dataset=pairs, processing_class=tokenizer,
            peft_config=LoraConfig(target_modules=["foo"]),
        )  # fmt: skip
    for name, one in model.named_parameters():
        assert before[name][0] == id(one)
        assert torch.equal(before[name][1], one)


@pytest.mark.parametrize("begin", ["pissa", "olora", "orthogonal", False])
def test_an_adapter_that_reads_weights_to_begin_is_let_through(begin, model):
    check_adapter(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=begin))


@pytest.mark.parametrize(
    "adapter",
    [
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        LoHaConfig(target_modules=["q_proj"]),
        OFTConfig(target_modules=["q_proj"], oft_block_size=8),
        VeraConfig(target_modules=["q_proj"]),
    ],
    ids=lambda one: one.peft_type.value,
)
def test_adapters_that_begin_at_the_reference_are_let_through(adapter, model):
    check_adapter(model, adapter)


@pytest.mark.parametrize(
    "adapter",
    [
        PromptTuningConfig(num_virtual_tokens=5),
        PrefixTuningConfig(num_virtual_tokens=5),
        MultitaskPromptTuningConfig(num_virtual_tokens=5),
        FourierFTConfig(target_modules=["q_proj"], n_frequency=50),
        LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]]),
    ],
    ids=lambda one: one.peft_type.value,
)
def test_an_adapter_that_begins_elsewhere_is_refused(adapter, model, tokenizer, pairs, tmp_path):
    """As `init_lora_weights=False` is: margins are measured from the reference."""
    adapter.task_type = "CAUSAL_LM"
    with pytest.raises(ValueError, match=f"got peft_type {adapter.peft_type.value}"):
        ROPOTrainer(
            model, config(tmp_path), train_dataset=pairs, processing_class=tokenizer, peft_config=adapter
        )  # fmt: skip


def test_an_adapter_that_wants_to_be_called_is_refused(model, tokenizer, pairs, tmp_path):
    adapter = AdaLoraConfig(target_modules=["q_proj"], total_step=20)
    with pytest.raises(ValueError, match="got ADALORA"):
        ROPOTrainer(model, config(tmp_path), train_dataset=pairs, processing_class=tokenizer, peft_config=adapter)


@pytest.mark.parametrize("start", ["restart", "carry_on"])
def test_the_dropout_of_a_new_adapter_is_that_of_all_rounds(start, model_folder, pairs, tmp_path, monkeypatch):
    """It was asked for."""
    found, train = [], ROPOTrainer.train_or_resume

    def watching(self, made_from, **how):
        found.append({one.p for name, one in self.model.named_modules() if name.endswith("lora_dropout.default")})
        train(self, made_from, **how)

    monkeypatch.setattr(ROPOTrainer, "train_or_resume", watching)
    lora = LoraConfig(target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    args = config(tmp_path / "O", rounds=2, round_start=start, num_folds=0, rho="0.2", max_steps=1)
    run_rounds(model_folder, pairs, args, peft_config=lora)
    assert found == [{0.1}, {0.1}]


def test_only_a_refusal_of_the_adapter_refuses_it(model, monkeypatch):
    """Quantized weights have more to them than the copy has; what `peft` misses there is no fault of the settings."""

    def miss(*_):
        raise AttributeError("'Parameter' object has no attribute 'compress_statistics'")

    monkeypatch.setattr("ropo.models.fit.add_adapter", miss)
    check_adapter(model, LoraConfig(target_modules=["q_proj"]))


def test_an_adapter_begins_where_the_seed_says(model_folder, tokenizer, pairs, tmp_path):
    """Whatever was drawn before; and the caller's configuration is his."""
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    before, found = lora.to_dict(), []
    for noise, seed in ((1, 7), (2, 7), (2, 8)):
        torch.manual_seed(noise)
        policy = AutoModelForCausalLM.from_pretrained(model_folder)
        trainer = ROPOTrainer(
            policy, config(tmp_path, seed=seed), train_dataset=pairs, processing_class=tokenizer, peft_config=lora
        )
        found.append(torch.cat([p.flatten() for name, p in trainer.model.named_parameters() if "lora_A" in name]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    assert lora.to_dict() == before


def test_non_finite_loss_names_the_pairs(model, tokenizer, pairs, tmp_path):
    tokenized = tokenize_pairs(pairs, tokenizer, max_length=128)
    reference = reference_logps(model, tokenized.tokens, BATCHING, cache_dir=tmp_path / "c")
    reference.chosen[3] = float("nan")
    dataset = PairDataset(tokenized.pairs, tokenized.tokens, reference=reference)
    trainer = ROPOTrainer(model, config(tmp_path), train_dataset=dataset, processing_class=tokenizer)
    with pytest.raises(FloatingPointError, match=f"row 3 .pair {pairs[3].id}.*step 0"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"over {tokens:,} tokens\. Set max_tokens_per_batch to {half} or less"),
        ({"loss": "dr_dpo"}, r"over {tokens:,} tokens\. This loss sees the pairs of a step at once: lower max_length"),
        ({"per_device_train_batch_size": 1}, "It was a single pair: lower max_length"),
    ],
)
def test_what_to_do_when_memory_is_short(options, message, model, tokenizer, pairs, tmp_path, monkeypatch):
    """The device's own message counts bytes; ours says which option to change."""
    trainer = ROPOTrainer(model, config(tmp_path, **options), train_dataset=pairs[:4], processing_class=tokenizer)
    tokens = sum(len(pair) - 2 for pair in trainer.train_dataset.tokens)

    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(ours, "FORWARDS", {trainer.layout: short})
    said = message.format(tokens=tokens, half=tokens // 2)
    with pytest.raises(torch.OutOfMemoryError, match=f"{said}.*allocate 2.00 GiB"):
        trainer.train()


def test_a_gradient_too_small_to_matter_is_none(model, tokenizer, pairs, tmp_path):
    """A pair at a margin of 85 has a gradient of 1e-37, and products with such numbers take many times as long."""
    tokenized = tokenize_pairs(pairs[:4], tokenizer, max_length=128)
    gradients = []
    for h in ([1.0, 85.0, 30.0, -85.0], [1.0, 1e9, 30.0, -85.0]):
        reference = reference_logps(model, tokenized.tokens, BATCHING, cache_dir=tmp_path / "c")
        reference = PairLogps(chosen=reference.chosen - torch.tensor(h) / 0.2, rejected=reference.rejected)
        dataset = PairDataset(tokenized.pairs, tokenized.tokens, reference=reference)
        trainer = ROPOTrainer(
            model, config(tmp_path, loss="dpo", beta=0.2), train_dataset=dataset, processing_class=tokenizer
        )
        seen, margin_of = [], trainer.training_objective.margin

        def watched(logps, inputs, seen=seen, margin_of=margin_of):
            logps.chosen.register_hook(seen.append)
            return margin_of(logps, inputs)

        trainer.training_objective.margin = watched
        batch = trainer.get_train_dataloader().collate_fn([dataset[i] for i in range(4)])
        trainer.training_step(trainer.model, batch)
        gradients.append(seen[0])
    dust, none = gradients
    assert dust[1] == 0
    assert torch.equal(dust, none)  # the others have what they had
    assert dust[2] == pytest.approx(-0.2 / 4 * math.exp(-30), rel=1e-3)
    assert dust[3] == pytest.approx(-0.2 / 4, rel=1e-6)


def test_re_po_learns_who_is_reliable(model, tokenizer, pairs, tmp_path):
    """The annotator whose labels contradict the policy loses reliability; the other does not."""
    who = ["good", "bad"] * 10
    labelled = [Pair(**{**pair_fields(pair), "annotator": name}) for pair, name in zip(pairs, who, strict=True)]
    tokenized = tokenize_pairs(labelled, tokenizer, max_length=128)
    reference = reference_logps(model, tokenized.tokens, BATCHING, cache_dir=tmp_path / "c")
    sign = torch.tensor([1.0, -1.0] * 10)
    biased = type(reference)(chosen=reference.chosen - 40.0 * sign, rejected=reference.rejected)
    dataset = PairDataset(tokenized.pairs, tokenized.tokens, reference=biased)
    trainer = ROPOTrainer(
        model, config(tmp_path, loss="re_po", learning_rate=1e-6), train_dataset=dataset, processing_class=tokenizer
    )
    trainer.train()
    learned = dict(zip(dataset.annotators, trainer.training_objective.reliability[:-1].tolist(), strict=True))
    assert learned["bad"] < 0.75
    assert learned["good"] > 0.89


def test_re_po_learns_the_same_however_a_step_is_divided(model, tokenizer, pairs, tmp_path):
    """Reliability moves once an optimizer step; it moved with every batch of it (.898 by one, .872 by 32)."""
    tokenized, found = tokenize_pairs(pairs, tokenizer, max_length=128), []
    reference = reference_logps(model, tokenized.tokens, BATCHING, cache_dir=tmp_path / "cache")
    shifted = type(reference)(chosen=reference.chosen + torch.arange(20.0), rejected=reference.rejected)
    for size, accumulation in ((20, 1), (5, 4), (1, 20)):
        args = config(
            tmp_path / str(size), loss="re_po", learning_rate=1e-12, max_steps=3, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        dataset = PairDataset(tokenized.pairs, tokenized.tokens, reference=shifted)
        trainer = ROPOTrainer(copy.deepcopy(model), args, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        found.append(trainer.training_objective.reliability)
    assert found[0][0] != pytest.approx(0.9, abs=1e-3)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-5)


def test_other_evaluation_sets_have_metrics_of_their_own(model, tokenizer, pairs, tmp_path):
    """Fewer pairs and more than those of the first, and another prefix."""
    args = config(tmp_path, loss="dpo", per_device_eval_batch_size=4)

    def tokenized(some):
        made = tokenize_pairs(some, tokenizer, max_length=128)
        reference = reference_logps(model, made.tokens, BATCHING, cache_dir=tmp_path / "cache")
        shift = 3.0 * torch.arange(len(made.pairs))
        return PairDataset(
            made.pairs,
            made.tokens,
            reference=type(reference)(chosen=reference.chosen - shift, rejected=reference.rejected),
        )

    alone = {}
    for number in (3, 8, 12):
        trainer = ROPOTrainer(model, args, eval_dataset=tokenized(pairs[:number]), processing_class=tokenizer)
        alone[number] = trainer.evaluate()["eval_rewards/margins"]
    trainer = ROPOTrainer(model, args, eval_dataset=tokenized(pairs[:8]), processing_class=tokenizer)
    for number in (8, 3, 12, 8):
        found = trainer.evaluate(tokenized(pairs[:number]), metric_key_prefix="test")
        assert found["test_rewards/margins"] == pytest.approx(alone[number], rel=1e-5)
        assert len(trainer.gather_eval_margins()) == number
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(alone[8], rel=1e-5)


def test_a_loss_without_reference_has_no_rewards(model, tokenizer, pairs, tmp_path):
    tokenized = tokenize_pairs(pairs[:4], tokenizer, max_length=128)
    reference = reference_logps(model, tokenized.tokens, BATCHING, cache_dir=tmp_path / "cache")
    dataset = PairDataset(tokenized.pairs, tokenized.tokens, reference=reference)
    args = config(tmp_path, loss="simpo", beta=2.0)
    found = ROPOTrainer(model, args, eval_dataset=dataset, processing_class=tokenizer).evaluate()
    assert "eval_rewards/margins" in found
    assert "eval_rewards/chosen" not in found


@pytest.mark.parametrize("loss", ["dr_dpo", "rappo", "re_po", "plc_dpo", "gamma_po"])
def test_losses_that_see_more_than_a_margin_rank_pairs_as_dpo_does(loss):
    margins = np.array([-3.0, 0.0, 1.0, 4.0])
    np.testing.assert_allclose(losses_at(margins, bind_loss(loss, beta=0.1, options={})), np.logaddexp(0, -margins))


WHOLE_BATCH = [name for name, spec in LOSSES.items() if spec.needs_whole_batch]


@pytest.mark.parametrize("loss", WHOLE_BATCH)
def test_a_loss_of_the_batch_refuses_a_batch_in_parts(loss, tmp_path):
    with pytest.raises(ValueError, match=f"{loss} .*whole batch .*gradient_accumulation_steps=2"):
        config(tmp_path, loss=loss, gradient_accumulation_steps=2)


@pytest.mark.parametrize("loss", WHOLE_BATCH)
def test_a_loss_of_the_batch_sees_all_processes(loss, model, tokenizer, pairs, tmp_path, monkeypatch):
    """The second of two processes: its pairs get the losses and gradients that they have in the batch of both."""
    trainer = ROPOTrainer(model, config(tmp_path, loss=loss), train_dataset=pairs, processing_class=tokenizer)
    h = torch.tensor([-2.0, 0.5, 1.0, -0.3, 0.1, 0.7])
    ratio = torch.tensor([-1.0, 0.2, -0.4, -0.1, 0.3, -2.0])
    weight = torch.tensor([1.0, 0.5, 0.25, 1.0, 0.3, 0.7])
    everywhere = {"reference_chosen": ratio, "reference_rejected": torch.zeros(6), "weight": weight}
    alone = h.clone().requires_grad_()
    expected = trainer.training_objective.loss(alone, everywhere, progress=0.0)
    (slope,) = torch.autograd.grad(expected.sum(), alone)

    def gather(here):
        return torch.cat([next(one[:3] for one in (h, ratio, weight) if here.equal(one[3:])), here])

    mine, inputs = h[3:].clone().requires_grad_(), {name: values[3:] for name, values in everywhere.items()}
    monkeypatch.setattr("ropo.train.objective.gather", gather)
    monkeypatch.setattr("ropo.train.objective.PartialState", lambda: SimpleNamespace(process_index=1))
    found = trainer.training_objective.loss(mine, inputs, progress=0.0)
    torch.testing.assert_close(found, expected[3:])
    torch.testing.assert_close(torch.autograd.grad(found.sum(), mine)[0], slope[3:])


def test_rappo_drops_what_the_reference_contradicts(model, tokenizer, pairs, tmp_path):
    """Of four pairs the two worst are the reference's own choice; the worse of the other two is left out."""
    tokenized = tokenize_pairs(pairs[:4], tokenizer, max_length=128)
    policy = reference_logps(model, tokenized.tokens, BATCHING, cache_dir=tmp_path / "c")
    ratio = torch.tensor([600.0, -10.0, -20.0, 400.0])
    trainer = ROPOTrainer(
        model,
        config(tmp_path, loss="rappo", beta=0.1, max_steps=1),
        train_dataset=PairDataset(
            tokenized.pairs, tokenized.tokens, reference=PairLogps(chosen=policy.chosen, rejected=policy.chosen - ratio)
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = torch.nn.functional.softplus(-0.1 * (policy.chosen - policy.rejected - ratio))
    dropped = 1 if losses[1] > losses[2] else 2
    assert losses[[0, 3]].min() > losses[dropped]
    expected = (losses.sum() - losses[dropped]) / 3
    assert losses_of(trainer)[0] == pytest.approx(expected.item(), rel=1e-4)


def test_plc_dpo_knows_moments_and_progress(model, tokenizer, pairs, tmp_path):
    """After some steps the moments are those of the margins seen, and the progress is the share of steps done."""
    trainer = ROPOTrainer(model, config(tmp_path, loss="plc_dpo"), train_dataset=pairs, processing_class=tokenizer)
    seen, loss, loss_of_margin = [], trainer.training_objective.loss, trainer.training_objective.loss_of_margin

    def watched(h, inputs, **progress):
        trainer.training_objective.loss_of_margin = lambda h, **given: (
            seen.append((h.detach(), given)) or loss_of_margin(h, **given)
        )
        losses = loss(h, inputs, **progress)
        trainer.training_objective.loss_of_margin = loss_of_margin  # what is logged reads it too
        return losses

    trainer.training_objective.loss = watched
    trainer.train()
    assert [given["progress"] for _, given in seen] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert seen[0][1]["moments"].tolist() == [0.0, 0.0]
    weights = torch.tensor([0.98**3, 0.98**2, 0.98, 1.0])
    margins = torch.stack([h for h, _ in seen[:4]])
    expected = [
        (weights * of_step).sum() / weights.sum() for of_step in (margins.mean(1), margins.var(1, correction=0))
    ]
    torch.testing.assert_close(seen[4][1]["moments"], torch.stack(expected), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("loss", ["ropo", "re_po", "plc_dpo"])
def test_checkpoint_resumes_to_the_same_model(loss, model_folder, tokenizer, pairs, tmp_path):
    """Stopped after step 3 and taken up from its checkpoint, a run ends where it would have ended."""

    def run(folder, *, resume=None):
        args = config(folder, loss=loss, num_train_epochs=2, save_strategy="steps", save_steps=3, save_total_limit=None)
        trainer = ROPOTrainer(str(model_folder), args, train_dataset=pairs, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == whole.state.global_step == 10
    torch.testing.assert_close(weights_of(resumed), weights_of(whole), rtol=0, atol=0)
    torch.testing.assert_close(resumed.training_objective.reliability, whole.training_objective.reliability)
    torch.testing.assert_close(resumed.training_objective.moments, whole.training_objective.moments, rtol=0, atol=0)
    assert (whole.training_objective.moments[0] > 0) == (loss == "plc_dpo")
    torch.testing.assert_close(resumed.gather_first_margins(), whole.gather_first_margins())


@pytest.mark.parametrize(
    ("order", "step"),
    [("group_by_length", 5), ("group_by_length", 7), ("group_by_length", 8), ("random", 7), ("batch_rebalance", 7)],
)
def test_an_epoch_goes_on_in_its_order(order, step, model_folder, tokenizer, pairs, tmp_path):
    """Grouped by length, an epoch's order is drawn from the global generator: a resumed one must draw the same."""

    def run(folder, resume=None):
        args = config(
            folder, num_train_epochs=3, save_strategy="steps", save_steps=1, save_total_limit=None,
            train_sampling_strategy=order,
        )  # fmt: skip
        trainer = ROPOTrainer(str(model_folder), args, train_dataset=pairs, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert resumed.state.global_step == whole.state.global_step == 15
    torch.testing.assert_close(weights_of(resumed), weights_of(whole), rtol=0, atol=0)


def test_the_reference_is_scored_in_batches_of_the_given_size(model, tokenizer, pairs, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "ropo.train.dataset.reference_logps",
        lambda *some, **how: sizes.append(some[2].max_tokens) or reference_logps(*some, **how),
    )
    ROPOTrainer(model, config(tmp_path, max_tokens_per_batch=100), train_dataset=pairs, processing_class=tokenizer)
    assert sizes == [100]


def test_evaluation_logs_the_same_metrics(model, tokenizer, pairs, tmp_path):
    trainer = ROPOTrainer(
        model, config(tmp_path), train_dataset=pairs[:8], eval_dataset=pairs[8:], processing_class=tokenizer
    )
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(1.9147, abs=1e-3)  # ropo at margin 0, alpha 14
    assert trainer.state.log_history[-1]["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_re_po_judges_others_by_the_annotators_it_has_learned(model, tokenizer, pairs, tmp_path):
    """The evaluation set numbers its annotators its own way; who was never seen is as reliable as all were at first."""
    names = ["anna", "bert", "carl"]
    train = [replace(pair, annotator=names[i % 3]) for i, pair in enumerate(pairs)]
    others = [replace(pair, annotator=name) for pair, name in zip(pairs, ["zoe", "carl", "adam", "bert"], strict=False)]
    args = config(tmp_path, loss="re_po", loss_args={"reliability": 0.8})
    trainer = ROPOTrainer(model, args, train_dataset=train, eval_dataset=others, processing_class=tokenizer)
    trainer.training_objective.reliability[:3] = torch.tensor([0.1, 0.2, 0.3])
    seen = trainer.training_objective.reliability[trainer.eval_dataset.annotator_of]
    assert seen.tolist() == pytest.approx([0.8, 0.3, 0.8, 0.2])
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_no_pairs(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no row found"):
        ROPOTrainer(model, config(tmp_path), train_dataset=[], processing_class=tokenizer)


def test_bad_data_is_refused_or_left_out(model, tokenizer, pairs, tmp_path):
    rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    rows[2]["chosen"] = rows[2]["rejected"]
    trainer = ROPOTrainer(model, config(tmp_path), train_dataset=rows, processing_class=tokenizer)
    assert [pair.row for pair in trainer.train_dataset.pairs] == [0, 1, *range(3, 20)]
    with pytest.raises(DataError, match="1 of 21 rows"):
        ROPOTrainer(model, config(tmp_path), train_dataset=[*rows, {"prompt": "x"}], processing_class=tokenizer)
    with pytest.raises(ValueError, match="of their own"):
        ROPOTrainer(model, config(tmp_path), train_dataset=[*pairs, pairs[0]], processing_class=tokenizer)


def test_dataset_lengths_must_agree(pairs):
    with pytest.raises(ValueError, match="per pair"):
        PairDataset(pairs, [], weights=[1.0])
