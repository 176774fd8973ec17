"""The server engine against a server on this machine: what is sent, and everything that can go wrong on the way."""

import json
import threading
import time

import pytest

from ropo.endpoint.address import Endpoint
from ropo.endpoint.client import EndpointError
from ropo.sampling.engine import Prompt, Response, Sampling
from ropo.sampling.generate import sample_responses
from ropo.sampling.server_engine import ServerEngine

SAMPLING = Sampling(num_candidates=2, max_new_tokens=5, temperature=0.7, top_p=0.9)
SECRET = "sk-this-is-the-key-of-the-test"


def answer(body):
    """Says the seed and the number of the candidate; the first candidate ends. Choices may come in any order."""
    choices = [
        {"index": k, "text": f" soup {body['seed']} {k}", "finish_reason": "length" if k else "stop"}
        for k in reversed(range(body["n"]))
    ]
    return 200, json.dumps({"choices": choices})


@pytest.fixture
def server(serve, monkeypatch):
    """Answers by a list of functions, the last one for ever after."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = serve(lambda request: (made.answers.pop(0) if len(made.answers) > 1 else made.answers[0])(request.body))
    made.answers = [answer]
    return made


@pytest.fixture
def waits():
    return []


@pytest.fixture
def engine(server, tokenizer, waits):
    def make(**options):
        usual = {"url": server.url, "model": "policy", "max_retries": 2, "timeout_seconds": 5, "max_total_seconds": 60}
        options = {**usual, "sleep": waits.append, **options}
        where = {name: options.pop(name) for name in Endpoint.__dataclass_fields__ if name in options}
        return ServerEngine(Endpoint(**where), tokenizer, **options)

    return make


def prompts(tokenizer, num=1):
    texts = [f"the waiter number {i} was kind" for i in range(num)]
    return [Prompt(ids, 2**40 + i) for i, ids in enumerate(tokenizer(texts)["input_ids"])]


def sample(engine, tokenizer, num=1):
    return engine.sample(prompts(tokenizer, num), SAMPLING, lambda *_: None)


def test_what_is_sent(server, engine, tokenizer):
    """Everything that a server would otherwise take from the options a model was published with."""
    assert sample(engine(), tokenizer) == [
        [
            Response(text=f" soup 0 {k}", num_tokens=len(tokenizer(f" soup 0 {k}")["input_ids"]), is_finished=k == 0)
            for k in range(2)
        ]
    ]
    assert [request.path for request in server.requests] == ["/v1/completions"]
    assert [request.body for request in server.requests] == [
        {
            "model": "policy",
            "prompt": tokenizer("the waiter number 0 was kind")["input_ids"],
            "n": 2,
            "max_tokens": 5,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": 0,  # 2^40 is beyond what all servers take
            "stop_token_ids": [2],
            "return_token_ids": True,
        }
    ]
    assert "Authorization" not in server.requests[0].headers


def test_tokens_that_a_server_tells_are_kept(server, engine, tokenizer):
    """vLLM does; of others, and of an answer whose tokens do not end as it says, only the text is known."""
    ids = tokenizer(" soup")["input_ids"]
    for told, kept in (([*ids, 2], (*ids, 2)), (ids, None), (None, None), ([-1], None), ("x", None)):
        choices = [{"index": k, "text": " soup", "finish_reason": "stop", "token_ids": told} for k in range(2)]
        server.answers = [lambda _, choices=choices: (200, json.dumps({"choices": choices}))]
        [[one, _]] = sample(engine(), tokenizer)
        assert one == Response(text=" soup", num_tokens=len(ids), is_finished=True, ids=kept)


def test_many_at_a_time_in_the_order_of_the_prompts(server, engine, tokenizer):
    together, most = [0], [0]
    lock = threading.Lock()

    def slow(body):
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        time.sleep(0.02 * (body["seed"] % 3))
        with lock:
            together[0] -= 1
        return answer(body)

    server.answers = [slow]
    found = sample(engine(num_threads=4), tokenizer, 12)
    assert [responses[0].text for responses in found] == [f" soup {i} 0" for i in range(12)]
    assert 1 < most[0] <= 4


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    server, engine, tokenizer, monkeypatch, caplog, tmp_path
):
    monkeypatch.setenv("MY_KEY", SECRET)
    made = engine(api_key_env="MY_KEY")
    options = {"sampling": Sampling(num_candidates=2, max_new_tokens=5), "folder": tmp_path, "model_digest": "m"}
    ids = [list(prompt.ids) for prompt in prompts(tokenizer, 3)]
    sample_responses(made, tokenizer, ids, **options)
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {f"Bearer {SECRET}"}
    server.answers = [lambda _: (401, f"bad key {SECRET}")]
    with pytest.raises(EndpointError) as error:
        sample(made, tokenizer)
    written = "".join(path.name + path.read_text() for path in tmp_path.iterdir())
    kept = repr(vars(made)) + repr(made.identity)
    for place in (
        caplog.text,
        str(error.value),
        written,
        kept,
        json.dumps([request.body for request in server.requests]),
    ):
        assert SECRET not in place


def test_what_may_pass_is_tried_again(server, engine, tokenizer, waits):
    """Too many requests, an error of the server, half an answer; longer waits are granted if asked for."""
    server.answers = [
        lambda _: (429, "slow down", {"Retry-After": "7"}),
        lambda _: (503, "starting"),
        lambda _: (200, '{"choices": [{"te'),
        answer,
    ]
    found = sample(engine(max_retries=3), tokenizer)
    assert found[0][0].text == " soup 0 0"
    assert waits[0] == 7
    assert 0.4 < waits[1] <= 1.0 < waits[2] <= 2.0
    bodies = [request.body for request in server.requests]
    assert bodies == bodies[:1] * 4  # the same seed, so the same answer


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda _: (500, "out of memory"), "within 3 attempts .* status 500: 'out of memory'"),
        (lambda _: (200, "<html>hello</html>"), "something else than a JSON object: '<html>hello</html>'"),
        (lambda _: (429, "later"), "status 429: 'later'"),
        (lambda _: (404, "no such model"), "status 404: .* Check the address and the name of the model"),
        (lambda _: (200, '{"object": "list"}'), "needs choices with text; got .*'list'.* Check that the address is"),
        (lambda _: (200, '{"choices": [{"message": {"content": "hi"}}]}'), "needs choices with text; got"),
        (lambda _: (200, '{"choices": [7, 8]}'), "needs choices with text; got"),
        (
            lambda body: answer({**body, "n": 1}),
            "as many choices as it asks for; got 1, not 2. Use a server that obeys",
        ),
        (lambda body: answer({**body, "n": 3}), "as many choices as it asks for; got 3, not 2"),
    ],
    ids=["broken", "garbage", "too many", "unknown model", "no choices", "chat", "no objects", "too few", "surplus"],
)
def test_what_does_not_pass_is_told(how, words, server, engine, tokenizer):
    """With the address, the prompt and what to do."""
    server.answers = [how]
    with pytest.raises(EndpointError, match=words) as error:
        sample(engine(), tokenizer)
    assert f"asked of {server.url}/v1/completions." in str(error.value)
    assert "number 0 was kind'" in str(error.value)
    assert "2 responses of policy" in str(error.value)


def test_nobody_there(server, engine, tokenizer, waits):
    server.close()
    with pytest.raises(EndpointError, match=r"Connection refused.*Check"):
        sample(engine(), tokenizer)
    assert len(waits) == 2
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1.0


def test_silent_server(server, engine, tokenizer):
    server.answers = [lambda body: time.sleep(0.4) or answer(body)]
    with pytest.raises(EndpointError, match=r"none within 0\.1 seconds"):
        sample(engine(timeout_seconds=0.1, max_retries=1), tokenizer)


def test_one_failure_ends_the_waiting_of_others(server, tokenizer):
    """Requests that wait to be repeated give up; those not yet sent are never sent."""
    server.answers = [lambda body: (time.sleep(0.2) or (404, "gone")) if body["seed"] == 1 else (503, "busy")]
    made = ServerEngine(Endpoint(url=server.url, model="policy", max_retries=50), tokenizer, num_threads=2)
    start = time.monotonic()
    with pytest.raises(EndpointError, match="status 404"):
        sample(made, tokenizer, 30)
    assert time.monotonic() - start < 1.5
    assert {request.body["seed"] for request in server.requests} <= {
        0,
        1,
        2,
    }  # one may be sent while the others are told


def test_broken_off_and_taken_up_again(server, engine, tokenizer, tmp_path, monkeypatch):
    """What the server answered before it broke down is not asked again."""
    monkeypatch.setattr("ropo.sampling.server_engine._TOKENS_PER_SHARD", 60)
    ids = [list(prompt.ids) for prompt in prompts(tokenizer, 6)]
    options = {"sampling": Sampling(num_candidates=2, max_new_tokens=5), "folder": tmp_path, "model_digest": "m"}
    expected = sample_responses(engine(), tokenizer, ids, options["sampling"])
    server.requests.clear()
    server.answers = [answer, answer, answer, lambda _: (400, "broken")]
    with pytest.raises(EndpointError, match="status 400"):
        sample_responses(engine(num_threads=1), tokenizer, ids, **options)
    num_kept = len(list(tmp_path.glob("*.jsonl")))
    assert num_kept > 0
    server.requests.clear()
    server.answers = [answer]
    assert sample_responses(engine(), tokenizer, ids, **options) == expected
    assert 0 < len(server.requests) < 6


def test_half_a_character(server, engine, tokenizer):
    """A lone surrogate is legal JSON and illegal in a file."""
    choice = {"index": 0, "text": "a\ud83d", "finish_reason": "stop"}
    server.answers = [lambda _: (200, json.dumps({"choices": [choice, choice]}))]
    assert sample(engine(), tokenizer)[0][0].text == "a?"
