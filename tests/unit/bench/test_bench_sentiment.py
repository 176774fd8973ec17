"""Controlled sentiment on a made-up corpus: right labels, shared draws, nothing half-made."""

import json
import os
import random
import zipfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ropo.data.tokenize import encode_prompts, tokenize_pairs
from ropo_bench import sentiment
from ropo_bench.task import TaskOptions
from ropo_bench.tasks import TASKS
from ropo_bench.word_reward import WordReward

SHARED = Path(os.environ.get("ROPO_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))
REAL = SHARED / "sentence_polarity.zip"
GOOD, BAD = ("lovely", "great", "moving", "funny"), ("awful", "dull", "flat", "weak")


def corpus(num=400):
    rng = random.Random(0)
    found = {True: set(), False: set()}
    while len(found[True]) + len(found[False]) < num:
        is_positive = rng.random() < 0.5
        start = (
            f"{rng.choice(('the', 'this', 'that'))} {rng.choice(('film', 'story', 'plot'))} {rng.choice(('is', 'was'))}"
        )
        words = rng.sample(GOOD if is_positive else BAD, 3)
        found[is_positive].add(f"{start} {words[0]} , {words[1]} and {words[2]} .")
    return {kind: sorted(lines) for kind, lines in found.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for name, is_positive in sentiment.FILES.items():
        (folder / name).write_text("".join(f"{line} \n" for line in corpus()[is_positive]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentiment, "BLOCK", 60)
        patch.setattr(sentiment, "NUM_WARMUP_STEPS", 10)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("made_once")


@pytest.fixture(scope="module")
def made(folder, source, _small):
    return sentiment.prepare(folder, source)


def test_task_has_right_labels(folder, source, made):
    task = TASKS["sentiment"](folder, TaskOptions(num_pairs=30, num_held_out=10, seed=1, source=source))
    assert [pair.row for pair in [*task.pairs, *task.held_out]] == list(range(40))
    assert len({pair.id for pair in [*task.pairs, *task.held_out]}) == 40
    assert not {pair.prompt for pair in task.pairs} & {pair.prompt for pair in task.held_out}
    truth = WordReward.load(made / "gold_reward.json")
    for pair in [*task.pairs, *task.held_out]:
        gap = truth("", pair.chosen) - truth("", pair.rejected)
        assert gap >= sentiment.MIN_GAP
        chosen, rejected = task.gold_rewards([pair.prompt] * 2, [pair.chosen, pair.rejected])
        assert chosen - rejected == gap
    assert truth("", "lovely and great") > 1 > -1 > truth("", "awful and dull")
    assert json.loads((made / "about.json").read_text())["gold_accuracy"] > 0.95


def test_same_seed_same_pairs_and_longer_lists_begin_with_shorter_ones(made):
    short, long = (sentiment.make_pairs(made, num, seed=3) for num in (10, 60))
    assert short == long[:10]
    ids = [{pair.id for pair in sentiment.make_pairs(made, 20, seed=seed)} for seed in (3, 4)]
    assert not ids[0] & ids[1]


def test_what_is_made_is_used_again(folder, source, made, monkeypatch):
    before = sentiment.make_pairs(made, 20, seed=5)

    def refuse(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(sentiment, "pretrain", refuse)
    monkeypatch.setattr("ropo.sampling.transformers_engine.TransformersEngine.sample", refuse)
    assert sentiment.prepare(folder, source) == made
    assert sentiment.make_pairs(made, 20, seed=5) == before
    with pytest.raises(AssertionError, match="made again"):
        sentiment.make_pairs(made, 20, seed=6)


def test_other_data_or_a_killed_run_leaves_nothing_behind(tmp_path, source, made, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    for name in sentiment.FILES:
        (other / name).write_text((source / name).read_text() + "one more line\n")

    def die(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sentiment, "pretrain", lambda *_, **__: 1.0)
    monkeypatch.setattr(sentiment, "write_json", die)  # when model and reward are written
    with pytest.raises(KeyboardInterrupt):
        sentiment.prepare(made.parent, other)
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_text_goes_through_tokens_unchanged(made):
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    pairs = sentiment.make_pairs(made, 20, seed=3)
    tokens = tokenize_pairs(pairs, tokenizer, max_length=sentiment.MAX_LENGTH)
    assert not tokens.problems
    for pair, ids, prompt in zip(
        pairs, tokens.tokens, encode_prompts([p.prompt for p in pairs], tokenizer), strict=True
    ):
        assert ids.prompt.tolist() == prompt  # apart or joined
        assert ids.chosen.tolist() == [*tokenizer(pair.chosen)["input_ids"], tokenizer.eos_token_id]
        assert tokenizer.decode(ids.chosen, skip_special_tokens=True) == pair.chosen
        assert tokenizer.unk_token_id not in ids.chosen


def test_half_a_response_makes_no_pair(made):
    tokenizer = AutoTokenizer.from_pretrained(made / "model")

    def is_whole(**change):
        known = {"prompt": 0, "text": "lovely and great", "num_tokens": 3, "is_finished": True}
        return sentiment._is_whole(sentiment.Sample(**{**known, **change}), tokenizer)

    assert is_whole()
    assert not is_whole(is_finished=False)
    assert not is_whole(text="", num_tokens=0)
    assert not is_whole(num_tokens=4)  # one of the four was <unk>


def test_the_parts_do_not_depend_on_order_and_prompts_are_known_words(made, source):
    snippets = sentiment.read_snippets(source)
    one, other = sentiment.split_snippets(snippets), sentiment.split_snippets(snippets[::-1])
    assert [set(part) for part in one] == [set(part) for part in other]
    assert 0.5 < len(one[0]) / len(snippets) < 0.7
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    found = sentiment.find_prompts(
        ["the film is lovely", "the film is awful", "the , is", "unheard film is", "the film"], tokenizer
    )
    assert sorted(found["train"] + found["held_out"]) == ["the film is "]


def test_a_zip_file_and_either_encoding_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("some/folder/rt-polarity.pos", "déjà vu\x85 and more \n\n".encode("latin-1"))
        archive.writestr("some/folder/rt-polarity.neg", "cliché\n".encode())
    found = sentiment.read_snippets(tmp_path / "data.zip")
    assert [(one.text, one.is_positive) for one in found] == [("déjà vu\x85 and more", True), ("cliché", False)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "got none"),
        ("nowhere.zip", "does not exist"),
        ("empty", "no rt-polarity.pos"),
        ("text", "zip file or a folder"),
    ],
)
def test_missing_data_is_named(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no zip")
    with pytest.raises(ValueError, match=f"task sentiment needs .*{message}"):
        TASKS["sentiment"](
            tmp_path,
            TaskOptions(num_pairs=1, num_held_out=1, seed=0, source=None if name is None else tmp_path / name),
        )


def test_too_little_data_ends(made):
    with pytest.raises(ValueError, match=r"of which 5 pairs .*99"):
        sentiment.make_pairs(made, 5, seed=3, min_gap=99.0)


@pytest.mark.skipif(not REAL.exists(), reason="the sentence polarity data is not here")
def test_the_real_data():
    snippets = sentiment.read_snippets(REAL)
    assert len(snippets) == 10662
    assert sum(one.is_positive for one in snippets) == 5331
    for_model, for_reward = sentiment.split_snippets(snippets)
    reward = sentiment.fit_reward(for_reward)
    assert sentiment.accuracy_of(reward, for_model) > 0.72
