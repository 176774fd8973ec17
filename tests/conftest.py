"""What every test shares: shapes checked as they run, fixed seeds, and a tiny model built in code."""

import gc
import http.server
import json
import os
import shutil
import ssl
import threading

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is marked so and turns this off
# Sums in one order, since some tests compare exactly; also in fixtures of a module and in commands that a test starts.
# Threads that wait for each other cost many times what these models do where the cores are shared.
os.environ["OMP_NUM_THREADS"] = "1"

from inspect import signature

from beartype import beartype
from jaxtyping import install_import_hook

_CHECKS = {}


def checked(function):
    """What beartype makes of it, made once: a function that is defined inside of another is defined at every call.

    Jaxtyping gives a function with the same signature, for which names and annotations alone count.
    """
    key = (function.__module__, function.__qualname__, str(signature(function)))
    if key not in _CHECKS:
        _CHECKS[key] = beartype(function)
    return _CHECKS[key]


# The pure rooms, where shapes are written down; dataclasses of other libraries have annotations of their own.
# Not `noise.likelihood`: optimisers call its functions thousands of times for one estimate, which is checked itself.
NOISE = [f"ropo.noise.{name}" for name in ("calibrate", "decide", "estimate", "linear", "review_order", "shares")]
install_import_hook(
    ["ropo.pairs", "ropo.provenance", "ropo.logps", "ropo.losses", *NOISE, "ropo.evaluate.measures"],
    f"sys.modules[{__name__!r}].checked",  # a string that is evaluated where `sys` is imported
)

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ropo.pairs import Pair

_TEXT = [
    "the soup was good and the waiter was kind .",
    "it was cold , slow and far too loud !",
    "Human: hi Assistant: yes",
]


def pytest_addoption(parser):
    """Let `make golden` keep what a report says now."""
    parser.addoption("--regenerate", action="store_true", help="write tests/data/golden_report anew")


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """Every load of a model collects garbage; what the imports have made lives to the end and need not be searched.

    At each module anew, since much is imported only where it is first used.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _no_fsync():
    """Tests end processes, not machines: what was written is there without waiting for a disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def _seeds():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template, so that any text works and tokens merge as in real ones."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_TEXT * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    return made


def tiny_model(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def model(tokenizer) -> LlamaForCausalLM:
    """Two layers, grouped-query attention, random weights that are not too flat."""
    return tiny_model(tokenizer)


@pytest.fixture(scope="session")
def saved_model(tokenizer, tmp_path_factory) -> Path:
    """The tiny model on disk, for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("saved") / "tiny_model"
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(saved_model, tmp_path) -> Path:
    """The tiny model on disk, as a user's local model folder."""
    return Path(shutil.copytree(saved_model, tmp_path / "tiny_model"))


class Request(NamedTuple):
    """What a server was sent."""

    path: str
    headers: dict[str, str]
    body: Any


class Server:
    """A server on this machine that notes what it is posted and answers by `answer(request)`.

    An answer is (status, content) or (status, content, headers), with content of bytes or text or a value that becomes
    JSON, or a function that writes to the open connection.
    """

    def __init__(self, answer, certificate):
        self.answer, self.requests = answer, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(Request(self.path, dict(self.headers), body))
                answer = outer.answer(outer.requests[-1])
                if callable(answer):
                    answer(self)
                    return
                status, content, headers = (*answer, {})[:3]
                if not isinstance(content, bytes):
                    content = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.url = self.url.replace("http://127.0.0.1", "https://localhost")
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve():
    """Starts servers that end with the test."""
    servers = []

    def start(answer, certificate=None):
        servers.append(Server(answer, certificate))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def pairs() -> list[Pair]:
    """Twenty different pairs of uneven length."""
    rng = np.random.default_rng(0)
    words = ["the", "soup", "waiter", "was", "good", "bad", "slow", "kind", "very", "not", "and", "it", "loud", "cold"]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words, size=int(rng.integers(low, high))))

    return [
        Pair(prompt=f"Human: {text(2, 12)} Assistant:", chosen=f" {text(1, 9)}", rejected=f" {text(9, 14)}", row=row)
        for row in range(20)
    ]
