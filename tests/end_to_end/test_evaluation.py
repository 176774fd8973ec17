"""`ropo export` and `ropo win_rate` as a user types them: a tiny model, CPU, offline."""

import json
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from ropo.cli.main import main
from ropo.evaluate.win_rate import WinRate
from ropo.judge.endpoint import EndpointJudge
from ropo.sampling.engine import Response
from ropo.sampling.transformers_engine import TransformersEngine

CONVERSATIONS = [
    {"question_id": 81, "category": "writing", "turns": ["the soup was good .", "not and"]},
    {"question_id": 82, "category": "math", "turns": ["it was cold", "far too loud !"], "reference": ["a", "b"]},
    {"question_id": 83, "category": "writing", "turns": ["Ünïcödé 🦊"]},
]
INSTRUCTIONS = [
    {"instruction": text, "output": "the soup was good .", "generator": "reference", "dataset": "koala"}
    for text in ("the waiter was kind .", "it was cold , slow", "Human: hi\n\nquote \" and {braces}")
]  # fmt: skip


@pytest.fixture
def mt_bench(tmp_path):
    path = tmp_path / "mt_bench" / "question.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS))
    return path


@pytest.fixture
def alpaca_eval(tmp_path):
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(INSTRUCTIONS))
    return path


@pytest.fixture
def sampled(monkeypatch, tokenizer):
    """The prompts that the engine was given, call by call, and their temperatures."""
    calls, sample = [], TransformersEngine.sample

    def counting(self, prompts, sampling, advance):
        calls.append((sampling.temperature, [tokenizer.decode(prompt.ids) for prompt in prompts]))
        return sample(self, prompts, sampling, advance)

    monkeypatch.setattr(TransformersEngine, "sample", counting)
    return calls


def export(model, benchmark, questions, output, *more):
    words = ["--model_name_or_path", model, "--benchmark", benchmark, "--questions", questions, "--output_dir", output]
    return main(["export", *map(str, words), "--max_new_tokens", "12", *more])


def lines(path):
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def test_mt_bench_is_a_conversation(model_folder, mt_bench, sampled, capsys):
    folder = mt_bench.parent
    assert export(model_folder, "mt_bench", mt_bench, folder) == 0
    assert [temperature for temperature, _ in sampled] == [1e-4, 0.7, 1e-4, 0.7]  # math, writing, turn by turn
    rows = lines(folder / "model_answer" / "tiny_model.jsonl")
    assert [row["question_id"] for row in rows] == [81, 82, 83]
    assert [len(row["choices"][0]["turns"]) for row in rows] == [2, 2, 1]
    assert {row["model_id"] for row in rows} == {"tiny_model"}
    first, second = rows[1]["choices"][0]["turns"]
    assert first == first.strip()
    [prompt] = sampled[2][1]
    turns = ("user:it was cold", f"assistant:{first}", "user:far too loud !")
    assert prompt == "".join(f"<s>{turn}</s>" for turn in turns) + "<s>assistant:"
    assert second
    said = capsys.readouterr().out
    assert "3 questions, 5 answers" in said
    assert "Temperature 0 or 0.7, top_p 1, " in said
    assert str(folder / "model_answer" / "tiny_model.jsonl") in said
    # nothing but the answers stands where FastChat looks for answers
    assert [path.name for path in (folder / "model_answer").iterdir()] == ["tiny_model.jsonl"]


def test_a_killed_export_goes_on_and_ends_in_the_same_file(model_folder, mt_bench, tmp_path, sampled, monkeypatch):
    monkeypatch.setattr("ropo.evaluate.answers.time.time", lambda: 1.5)
    assert export(model_folder, "mt_bench", mt_bench, tmp_path / "whole") == 0
    expected = (tmp_path / "whole" / "model_answer" / "tiny_model.jsonl").read_bytes()
    all_calls, killed = list(sampled), tmp_path / "killed"
    sample = TransformersEngine.sample

    def dying(self, prompts, sampling, advance):
        if len(sampled) == 2:
            raise KeyboardInterrupt
        return sample(self, prompts, sampling, advance)

    sampled.clear()
    with monkeypatch.context() as context:
        context.setattr(TransformersEngine, "sample", dying)
        with pytest.raises(KeyboardInterrupt):
            export(model_folder, "mt_bench", mt_bench, killed)
    assert not (killed / "model_answer").exists()
    monkeypatch.setattr("ropo.evaluate.answers.time.time", lambda: 99.0)
    sampled.clear()
    assert export(model_folder, "mt_bench", mt_bench, killed) == 0
    assert sampled == all_calls[2:]  # the first turn is not asked again
    assert (killed / "model_answer" / "tiny_model.jsonl").read_bytes() == expected
    sampled.clear()
    assert export(model_folder, "mt_bench", mt_bench, killed) == 0
    assert sampled == []
    assert (killed / "model_answer" / "tiny_model.jsonl").read_bytes() == expected


def test_other_options_and_another_model_are_no_resume(model_folder, mt_bench, tmp_path, capsys):
    output = tmp_path / "O"
    assert export(model_folder, "mt_bench", mt_bench, output) == 0
    before = (output / "model_answer" / "tiny_model.jsonl").read_bytes()
    assert export(model_folder, "mt_bench", mt_bench, output, "--temperature", "1", "--seed", "3") == 2
    said = capsys.readouterr().err
    assert "temperature ([0.0, 0.7] before, [1.0] now)" in said
    assert "seed (0 before, 3 now)" in said
    mt_bench.write_text(json.dumps(CONVERSATIONS[0]) + "\n")
    assert export(model_folder, "mt_bench", mt_bench, output) == 2
    assert "got another questions" in capsys.readouterr().err
    mt_bench.write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS))
    # files of the same names and sizes: a model trained again into the same folder
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    model.save_pretrained(model_folder)
    assert export(model_folder, "mt_bench", mt_bench, output) == 2
    assert "got another model" in capsys.readouterr().err
    assert (output / "model_answer" / "tiny_model.jsonl").read_bytes() == before
    assert export(model_folder, "mt_bench", mt_bench, output, "--name", "retrained") == 0
    rows = lines(output / "model_answer" / "retrained.jsonl")
    assert rows[1]["choices"] != json.loads(before.splitlines()[1])["choices"]


def test_seed_and_temperature_reach_the_engine(model_folder, alpaca_eval, tmp_path):
    def outputs(name, *more):
        assert export(model_folder, "alpaca_eval", alpaca_eval, tmp_path, "--name", name, *more) == 0
        return [row["output"] for row in json.loads((tmp_path / name / "model_outputs.json").read_text())]

    assert outputs("a") == outputs("b")
    assert outputs("a2", "--temperature", "3") != outputs("c", "--temperature", "3", "--seed", "1")
    # one token holds all of a tiny top_p, whatever the seed
    one = ("--temperature", "3", "--top_p", "1e-6")
    assert outputs("f", *one) == outputs("g", *one, "--seed", "1")
    assert outputs("d", "--temperature", "0") == outputs("e", "--temperature", "0", "--seed", "1")


def test_white_space_around_an_answer_goes_but_in_plain_text(model_folder, alpaca_eval, tmp_path, monkeypatch, capsys):
    def saying(self, prompts, sampling, advance):
        return [[Response(text="\n two\nlines \n", num_tokens=3, is_finished=False)] for _ in prompts]

    monkeypatch.setattr(TransformersEngine, "sample", saying)
    for name, more, expected in (("chat", (), "two\nlines"), ("plain", ("--plain_text",), "\n two\nlines \n")):
        assert export(model_folder, "alpaca_eval", alpaca_eval, tmp_path, "--name", name, *more) == 0
        rows = json.loads((tmp_path / name / "model_outputs.json").read_text())
        assert {row["output"] for row in rows} == {expected}
    assert "3 cut at max_new_tokens." in capsys.readouterr().out


def test_empty_answers_are_counted(model_folder, alpaca_eval, tmp_path, monkeypatch, capsys):
    def saying(self, prompts, sampling, advance):
        return [[Response(text=" \n", num_tokens=1, is_finished=True)] for _ in prompts]

    monkeypatch.setattr(TransformersEngine, "sample", saying)
    assert export(model_folder, "alpaca_eval", alpaca_eval, tmp_path, "--plain_text", "--use_cpu") == 0
    assert "average, 3 empty." in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", ["arena_hard", "arena_hard_2024"])
def test_arena_hard(benchmark, model_folder, tmp_path):
    row = {
        "arena_hard": {"uid": "0a", "category": "hard_prompt", "prompt": "the soup"},
        "arena_hard_2024": {"question_id": "0a", "category": "arena-hard-v0.1", "turns": [{"content": "the soup"}]},
    }[benchmark]
    questions = tmp_path / "question.jsonl"
    questions.write_text(json.dumps(row) + "\n")
    assert export(model_folder, benchmark, questions, tmp_path) == 0
    [found] = lines(tmp_path / "model_answer" / "tiny_model.jsonl")
    if benchmark == "arena_hard":
        assert found["messages"][0] == {"role": "user", "content": "the soup"}
        assert found["messages"][1]["content"]["answer"]
    else:
        assert 0 < found["choices"][0]["turns"][0]["token_len"] <= 12


def test_plain_text_and_models_without_chat_template(model_folder, alpaca_eval, mt_bench, tmp_path, sampled, capsys):
    (model_folder / "chat_template.jinja").unlink()
    assert export(model_folder, "alpaca_eval", alpaca_eval, tmp_path / "O") == 2
    assert "a chat template" in capsys.readouterr().err
    assert not (tmp_path / "O").exists()
    assert export(model_folder, "alpaca_eval", alpaca_eval, tmp_path / "O", "--plain_text") == 0
    assert sorted(sampled[0][1]) == sorted(row["instruction"] for row in INSTRUCTIONS)
    assert export(model_folder, "mt_bench", mt_bench, tmp_path / "P", "--plain_text") == 2
    assert "got mt_bench" in capsys.readouterr().err


def test_an_adapter_answers(model, model_folder, tokenizer, alpaca_eval, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    for name in (model_folder, tmp_path / "adapter"):
        assert export(name, "alpaca_eval", alpaca_eval, tmp_path / "O", "--temperature", "0") == 0
    found = [
        json.loads((tmp_path / "O" / name / "model_outputs.json").read_text()) for name in ("tiny_model", "adapter")
    ]
    assert [row["output"] for row in found[0]] != [row["output"] for row in found[1]]
    with torch.no_grad():  # its model is trained again, in the same folder
        model.lm_head.weight.mul_(-1)
    model.save_pretrained(model_folder)
    assert export(tmp_path / "adapter", "alpaca_eval", alpaca_eval, tmp_path / "O", "--temperature", "0") == 2
    assert "got another model" in capsys.readouterr().err


def test_misuse_of_export(model_folder, alpaca_eval, mt_bench, tmp_path, capsys):
    output = tmp_path / "O"
    for (benchmark, questions, *more), code, said in [
        (("alpaca_eval", tmp_path / "none.json"), 2, "none.json is not there. Get alpaca_eval.json of https://"),
        (("alpaca_eval", mt_bench), 1, f"{mt_bench}, row 0 (line 1): alpaca_eval needs a text in `instruction`"),
        (
            ("alpaca_eval", alpaca_eval, "--temprature", "1"),
            2,
            "unknown option --temprature. Did you mean temperature?",
        ),
        (
            (
                "alpaca_eval",
                alpaca_eval,
                "--use_cpu",
                "--generation_engine",
                "server",
                "--generation_url",
                "http://localhost:1/v1",
                "--generation_model",
                "m",
            ),
            2,
            "use_cpu needs generation_engine transformers; got server. Leave it out.",
        ),
    ]:
        assert export(model_folder, benchmark, questions, output, *more) == code
        assert said in capsys.readouterr().err
    assert main(["export", "--benchmark", "mt_bench"]) == 2
    assert "--model_name_or_path is missing." in capsys.readouterr().err
    assert export(tmp_path / "nope", "alpaca_eval", alpaca_eval, output) == 2
    assert "model_name_or_path needs a folder" in capsys.readouterr().err
    assert not output.exists()


# Win rates.


@pytest.fixture
def reward_folder(tokenizer, tmp_path):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        initializer_range=0.2, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def win_rate(outputs, baseline, output, *more):
    words = ["--outputs", outputs, "--baseline", baseline, "--output_dir", output, *more]
    return main(["win_rate", *map(str, words)])


def test_export_and_win_rate_join(model_folder, reward_folder, alpaca_eval, tmp_path, capsys):
    assert export(model_folder, "alpaca_eval", alpaca_eval, tmp_path / "results") == 0
    outputs, folder = tmp_path / "results" / "tiny_model" / "model_outputs.json", tmp_path / "W"
    capsys.readouterr()
    judge = ("--judge", "reward_model", "--judge_model", reward_folder)
    assert win_rate(outputs, alpaca_eval, folder, *judge) == 0
    said = capsys.readouterr().out
    found = json.loads((folder / "win_rate.json").read_text())
    assert f"{found['rate']['value']:.1%} won" in said
    assert (found["outputs"]["name"], found["baseline"]["name"]) == ("tiny_model", "reference")
    assert sum(found["counts"].values()) == 3
    assert found["counts"]["undecided"] == 0
    rows = lines(folder / "comparisons.jsonl")
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in INSTRUCTIONS]
    assert {row["outcome"] for row in rows} <= {"win", "loss"}
    # the other way round, the same judge says the opposite
    assert win_rate(alpaca_eval, outputs, tmp_path / "V", *judge) == 0
    back = json.loads((tmp_path / "V" / "win_rate.json").read_text())
    assert back["mean_p_better"] == pytest.approx(1 - found["mean_p_better"], abs=1e-5)
    assert back["counts"]["win"] == found["counts"]["loss"]


@pytest.fixture
def chat_server(monkeypatch, serve):
    """A judge that says what a test wants it to say, by the response that stands first."""
    monkeypatch.setattr("ropo.judge.options.EndpointJudge", partial(EndpointJudge, sleep=lambda _: None))
    asked, answer = [], {}

    def reply(request):
        asked.append(request.body["messages"][0]["content"])
        first = asked[-1].split("=== response A")[1].split("=== response B")[0]
        return 200, {"choices": [{"message": {"content": answer["of"](first)}}]}

    return f"{serve(reply).url}/v1", asked, answer


def test_win_rate_of_an_endpoint(chat_server, tmp_path, capsys):
    url, asked, answer = chat_server
    ours = ["we win", "we lose", "only first", "unreadable", "same"]
    for name in "AB":
        rows = [
            {"instruction": f"q{n}", "output": text if text == "same" else f"{text} {name}", "generator": name}
            for n, text in enumerate(ours)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))

    def judge(first):
        if "unreadable" in first:
            return "I like both."
        if "only first" in first:
            return "A"
        return "A" if ("we win" in first) == ("A\n" in first) else "B"

    answer["of"] = judge
    more = ("--judge", "endpoint", "--judge_url", url, "--judge_model", "j")
    paths, folder = (tmp_path / "A.json", tmp_path / "B.json"), tmp_path / "O"
    assert win_rate(*paths, folder, *more) == 0
    said = capsys.readouterr().out
    assert "50.0% won" in said
    found = WinRate.load(folder)
    assert (found.outputs, found.baseline, found.rate.value) == ("A", "B", 0.5)
    assert found.counts == dict.fromkeys(("win", "loss", "tie", "undecided", "identical"), 1)
    assert (found.lowest, found.highest) == (0.375, 0.625)
    outcomes = [row["outcome"] for row in lines(folder / "comparisons.jsonl")]
    assert outcomes == ["win", "loss", "tie", "undecided", "identical"]
    num_asked = len(asked)
    assert num_asked == 7  # both orders of three, and one whose first answer could not be read
    # Given again, only what could not be read is asked again, and a verdict that comes now counts.
    assert win_rate(*paths, folder, *more) == 0
    assert len(asked) == num_asked + 1
    assert "unreadable A" in asked[-1]
    answer["of"] = lambda first: "A" if "A\n" in first else "B"
    assert win_rate(*paths, folder, *more) == 0
    assert len(asked) == num_asked + 3
    assert WinRate.load(folder).counts == {"win": 2, "loss": 1, "tie": 1, "undecided": 0, "identical": 1}


@pytest.mark.parametrize("always", ["Both are fine.", None, "A", "tie"])
def test_no_verdict_at_all_is_not_acceptable(chat_server, tmp_path, capsys, always):
    """Whether nothing could be read, or nothing was preferred in both orders; identical outputs decide nothing."""
    url, _, answer = chat_server
    answer["of"] = lambda _: always
    for name in "AB":
        rows = [{"instruction": "q", "output": name}, {"instruction": "r", "output": "same"}]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    more = ("--judge", "endpoint", "--judge_url", url, "--judge_model", "j")
    assert win_rate(tmp_path / "A.json", tmp_path / "B.json", tmp_path / "O", *more) == 1
    said = capsys.readouterr().out
    assert "on 2 instructions: cannot" in said
    assert "% won, 90 %" not in said
    assert json.loads((tmp_path / "O" / "win_rate.json").read_text())["rate"] is None


def test_misuse_of_win_rate(alpaca_eval, tmp_path, capsys):
    assert win_rate(alpaca_eval, tmp_path / "B.json", tmp_path / "O") == 2
    assert "win_rate needs a judge" in capsys.readouterr().err
    judge = ("--judge", "endpoint", "--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "j")
    assert win_rate(alpaca_eval, tmp_path / "B.json", tmp_path / "O", *judge) == 2
    assert "--baseline needs a file" in capsys.readouterr().err
    (tmp_path / "B.json").write_text(json.dumps(INSTRUCTIONS[:2]))
    assert win_rate(alpaca_eval, tmp_path / "B.json", tmp_path / "O", *judge) == 1
    assert "got 1 of 3" in capsys.readouterr().err
    assert not (tmp_path / "O").exists()
