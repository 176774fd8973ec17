"""An upload that is asked for, against a stand-in of the hub: what goes up, what does not, and what the card says."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard, constants
from peft import LoraConfig

from ropo.config import ROPOConfig
from ropo.data.mixture import Mixture, names_on_hub
from ropo.data.read import HubDataset
from ropo.report.model_card import model_card
from ropo.run.align import run_audit, run_rounds
from ropo.run.hub import UploadError

SECRET = "hf_secret"


def config(folder, **options):
    common = {
        "output_dir": str(folder), "learning_rate": 3e-3, "per_device_train_batch_size": 10, "max_length": 64,
        "use_cpu": True, "disable_tqdm": True, "num_folds": 0, "rho": "0", "loss": "dpo", "save_strategy": "epoch",
    }  # fmt: skip
    return ROPOConfig(**{**common, **options})


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload needs; files come in the commit itself. It keeps what it was sent."""

    requests: list
    refused: str = ""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.requests.append((self.path, self.headers["Authorization"], body))
        if self.refused and self.refused in self.path:
            return self._answer(403, {"error": "no right to write"})
        if self.path == "/api/repos/create":
            return self._answer(200, {"url": f"{constants.ENDPOINT}/someone/{json.loads(body)['name']}"})
        if "/preupload/" in self.path:
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            return self._answer(200, {"files": [{**one, "shouldIgnore": False} for one in files]})
        if "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            return self._answer(200, {"commitUrl": f"{constants.ENDPOINT}/{name}/commit/1", "commitOid": "1"})
        return self._answer(200, {"errors": [], "warnings": []})

    def do_GET(self):
        self._answer(404, {})

    def _answer(self, code, found):
        data = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("OneHub", (Hub,), {"requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler
    server.shutdown()
    server.server_close()


def committed(hub):
    """Files of the commit by name."""
    (body,) = [body for path, _, body in hub.requests if "/commit/" in path]
    files = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
    return {one["path"]: base64.b64decode(one["content"]) for one in files}


def test_the_model_and_its_card_go_up_and_nothing_else(hub, model_folder, pairs, tmp_path):
    """Once, when all is done; a finished run takes the wish, too. No pair is in what is sent, nor the token."""
    (model_folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    run_rounds(model_folder, pairs, config(tmp_path / "O"))
    assert not hub.requests
    args = config(
        tmp_path / "O", push_to_hub=True, hub_model_id="someone/tiny", hub_private_repo=True, hub_token=SECRET
    )
    run_rounds(model_folder, pairs, args)
    path, token, body = hub.requests[0]
    assert (path, token) == ("/api/repos/create", f"Bearer {SECRET}")
    assert '"private"' in body
    found = committed(hub)
    model = {path.name for path in (tmp_path / "O" / "rounds" / "00" / "model").iterdir()}
    assert set(found) == {*model, "README.md"}
    assert {"model.safetensors", "config.json", "tokenizer.json"} < set(found)
    for name, content in found.items():
        assert content == (tmp_path / "O" / name).read_bytes()
    sent = b"".join(found.values())
    assert not any(text.encode() in sent for pair in pairs for text in (pair.prompt, pair.chosen))
    assert SECRET.encode() not in sent
    assert str(tmp_path).encode() not in found["README.md"].split(b"## Configuration")[1]
    card = ModelCard(found["README.md"].decode())
    card.validate()  # asks the stand-in, and refuses what is no card before
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # a folder is no id


def test_an_adapter(hub, model_folder, pairs, tmp_path):
    args = config(tmp_path / "tiny-lora", push_to_hub=True)
    run_rounds(model_folder, pairs, args, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    assert [path for path, *_ in hub.requests if "/commit/" in path] == ["/api/models/someone/tiny-lora/commit/main"]
    found = committed(hub)
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(found)
    assert "model.safetensors" not in found
    assert ModelCard(found["README.md"].decode()).data.library_name == "peft"


@pytest.mark.parametrize("where", ["create", "commit"])
def test_refused_by_the_hub(where, hub, model_folder, pairs, tmp_path):
    """Before anything is trained if the repository is, and with the command that sends a finished model if that is."""
    hub.refused = where
    args = config(tmp_path / "O", push_to_hub=True, hub_model_id="someone/tiny")
    with pytest.raises(UploadError, match="no right to write") as caught:
        run_rounds(model_folder, pairs, args)
    is_finished = (tmp_path / "O" / "summary.json").exists()
    assert is_finished == (where == "commit") == ("hf upload someone/tiny" in str(caught.value))


def test_refused_before_anything_is_read(hub, model_folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="hub_model_id needs push_to_hub"):
        run_rounds(model_folder, "no.jsonl", config(tmp_path / "O", hub_model_id="someone/tiny"))
    with pytest.raises(ValueError, match="an audit, which makes none"):
        run_audit(model_folder, "no.jsonl", config(tmp_path / "O", push_to_hub=True, num_folds=4))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE=1"):
        run_rounds(model_folder, "no.jsonl", config(tmp_path / "O", push_to_hub=True))
    assert not hub.requests


def test_what_the_card_says_of_hub_models_and_datasets():
    summary = {
        "config": {"loss": "dpo", "output_dir": "/secret/O", "beta": 0.1, "judge_url": "http://secret"},
        "model": "owner/base", "num_pairs": 3,
        "flip_rate": {"estimate": 0.1, "low": 0.0, "high": 0.2}, "is_informative": True, "num_kept": 3,
        "num_dropped": 0, "num_flipped": 0, "num_resampled": 0, "rounds": [{}], "data_sha256": "00",
        "datasets": names_on_hub(Mixture(parts=(HubDataset(name="owner/a"), "owner/b", __file__, []))),
    }  # fmt: skip
    for is_adapter, relation in ((True, "adapter"), (False, "finetune")):
        data = ModelCard(model_card(summary, is_adapter=is_adapter)).data
        assert (data.base_model, data.base_model_relation) == ("owner/base", relation)
        assert data.datasets == ["owner/a", "owner/b"]
    assert "secret" not in model_card(summary, is_adapter=False)
