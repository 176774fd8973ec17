"""Both decoders draw the same tokens, when cold those of `model.generate`; which one a model gets is found out."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerBase,
)

from ropo.logps.shared_prefix import enable_response_logps
from ropo.sampling import call as calls
from ropo.sampling import shared_prompt
from ropo.sampling.call import Caller, Job
from ropo.sampling.engine import Sampling, seeded
from ropo.sampling.shared_prompt import DECODERS, choose_decoder

VOCABULARY, PAD, EOS = 60, 0, 1
PROMPTS = [
    [5, 9, 33, 21, 7],
    [41],
    [8, 19, 2, 14, 3, 50, 26, 11, 30],
    [12, 12, 40],
    [6, 17, 55, 4, 48, 22, 9],
    [44, 10],
]
COMMON = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 2,
    "initializer_range": 0.3,
}
SMALL = {**COMMON, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT = {**COMMON, "n_layer": 2, "n_head": 4}
MODELS = {
    "grouped queries": LlamaConfig(**SMALL, num_key_value_heads=2),
    "tied head": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "sliding window": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4),
    "windows and soft caps": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4),
    "learned positions": GPT2Config(**GPT, n_embd=32, n_positions=40),
    "no positions": BloomConfig(**GPT, hidden_size=32),
}


class Padding(PreTrainedTokenizerBase):
    """As much of a tokenizer as a decoder needs."""

    pad_token_id = PAD
    eos_token_id = EOS

    def __init__(self):
        """Without a vocabulary."""


@pytest.fixture(params=[*MODELS, "adapter", "eager"])
def model(request):
    torch.manual_seed(0)
    config = MODELS.get(request.param, MODELS["grouped queries"])
    implementation = "eager" if request.param in ("eager", "windows and soft caps", "no positions") else "sdpa"
    made = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    if request.param == "adapter":
        made = get_peft_model(made, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS["grouped queries"]).eval()


def draw(decoder, model, *, prompts=PROMPTS, num_candidates=3, max_new_tokens=12, num_rows=6, most=None, **options):
    """Tokens of every response, with the one that ended it, by place and candidate."""
    options = {"seed": 0, "stop_ids": (EOS,), **options}
    sampling = Sampling(
        num_candidates=num_candidates,
        max_new_tokens=max_new_tokens,
        **{name: value for name, value in options.items() if name in ("temperature", "top_p")},
    )
    most = most or [max_new_tokens] * len(prompts)
    job = Job(
        call=Caller(model, Padding()),
        prompts=seeded(prompts, options["seed"]),
        places=sorted(range(len(prompts)), key=lambda i: -len(prompts[i])),
        most=most,
        sampling=sampling,
        stop_ids=options["stop_ids"],
        num_rows=num_rows,
    )
    found = {}
    with torch.no_grad():
        for place, candidate, ids in DECODERS[decoder](job):
            assert (place, candidate) not in found
            kept = ids[: most[place]]
            ends = [i for i, token in enumerate(kept) if token in options["stop_ids"]]
            found[place, candidate] = kept[: ends[0] + 1] if ends else kept
    assert sorted(found) == [(i, k) for i in range(len(prompts)) for k in range(num_candidates)]
    return found


def greedy(model, prompts, max_new_tokens):
    """What `generate` itself takes for the likeliest continuation, one prompt at a time, without any padding."""
    found = []
    options = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=PAD, eos_token_id=EOS)
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=options)
        found.append(output[0, len(prompt) :].tolist())
    return found


def test_cold_is_greedy(model):
    """Token by token what `generate` takes for the likeliest; rows are padded, leave and enter at odd times."""
    expected = greedy(model, PROMPTS, 12)
    found = draw("share_prompts", model, temperature=1e-5)
    assert found == {(i, k): ids for i, ids in enumerate(expected) for k in range(3)}
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)


def test_all_decoders_draw_the_same(model):
    """At an ordinary temperature, with noise of their own for every row."""
    shared, *others = (draw(decoder, model, top_p=0.95) for decoder in DECODERS)
    assert others == [shared] * 3
    assert len({tuple(ids) for ids in shared.values()}) > 9


@pytest.mark.parametrize("num_rows", [3, 9, 18, 300])
def test_neighbours_do_not_matter(llama, num_rows):
    """However many rows go together, whoever else is there, and however often the cache is copied."""
    expected = draw("share_prompts", llama, max_new_tokens=20)
    assert draw("share_prompts", llama, max_new_tokens=20, num_rows=num_rows) == expected
    alone = draw("share_prompts", llama, max_new_tokens=20, prompts=PROMPTS[2:3], num_rows=num_rows)
    assert {k: ids for (_, k), ids in alone.items()} == {k: ids for (i, k), ids in expected.items() if i == 2}


def test_small_rooms(llama, monkeypatch):
    """The cache is copied every three steps, and prompts are read one by one."""
    expected = draw("share_prompts", llama)
    monkeypatch.setattr(shared_prompt, "_SPARE_COLUMNS", 3)
    monkeypatch.setattr(calls, "_READ_TOKENS", {"cpu": 1})
    assert draw("share_prompts", llama) == expected


def test_a_prompt_is_read_once(llama):
    """As many positions are read as the prompts have, not once per candidate; the rest are single columns."""
    shapes = []

    def note(_, __, arguments):
        shapes.append(tuple(arguments["input_ids"].shape))

    llama.register_forward_pre_hook(note, with_kwargs=True)
    draw("share_prompts", llama, num_candidates=4, num_rows=24, max_new_tokens=40, stop_ids=range(1, 12))
    assert shapes[0] == (len(PROMPTS), 9)
    assert {width for _, width in shapes[1:]} == {1}
    assert 16 < shapes[1][0] <= 24
    assert shapes[-1][0] < 6  # rows that have ended are no longer computed


def test_logits_of_the_last_position_alone(llama):
    seen = []
    llama.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    draw("share_prompts", llama)
    assert set(seen) == {1}


@pytest.mark.parametrize("decoder", DECODERS)
def test_ends(llama, decoder):
    """Any of several tokens ends a response, and none of them stands inside one."""
    stop = (EOS, 7, 23)
    found = draw(decoder, llama, stop_ids=stop, num_candidates=6, max_new_tokens=30)
    ended = [ids for ids in found.values() if ids[-1] in stop]
    assert ended
    assert {ids[-1] for ids in ended} & {7, 23}
    assert all(token not in stop for ids in found.values() for token in ids[:-1])
    assert all(len(ids) == 30 for ids in found.values() if ids[-1] not in stop)


@pytest.mark.parametrize("decoder", DECODERS)
def test_one_token(llama, decoder):
    assert {len(ids) for ids in draw(decoder, llama, max_new_tokens=1).values()} == {1}


def test_most_tokens_of_each_prompt(llama):
    found = draw("share_prompts", llama, stop_ids=(), most=[1, 12, 5, 3, 12, 7])
    assert {(i, len(ids)) for (i, _), ids in found.items()} == set(enumerate([1, 12, 5, 3, 12, 7]))


@pytest.mark.parametrize("decoder", DECODERS)
def test_published_options_are_not_used(llama, decoder):
    """Penalties and cut-offs of a generation_config.json would change what is sampled; they are left in place."""
    expected = draw(decoder, llama)
    llama.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=5.0, temperature=0.1, no_repeat_ngram_size=1, suppress_tokens=[9]
    )
    assert draw(decoder, llama) == expected
    assert llama.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_random_state_is_left_alone(llama, decoder):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = draw(decoder, llama)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(100)
    assert draw(decoder, llama) == first
    assert draw(decoder, llama, seed=1) != first


@pytest.mark.parametrize("decoder", DECODERS)
def test_diverged_model_is_refused(llama, decoder):
    with torch.no_grad():
        llama.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"logits .*in \d+ of \d+ rows\."):
        draw(decoder, llama)


def test_a_model_that_has_scored_pairs_samples_as_before(llama):
    expected = draw("share_prompts", llama)
    enable_response_logps(llama)
    assert choice(llama)[0] == "share_prompts"
    assert draw("share_prompts", llama) == expected


def test_prompts_beyond_the_positions_are_refused():
    model = AutoModelForCausalLM.from_config(MODELS["learned positions"])
    call = Caller(model, Padding())
    assert call.max_response_tokens(range(33)) == 7
    with pytest.raises(ValueError, match=r"40 positions; got .* 40 tokens"):
        call.max_response_tokens(range(40))


def choice(model, longest=64):
    with torch.no_grad():
        return choose_decoder(Caller(model, Padding()), PROMPTS[2], longest=longest)


def test_every_ordinary_model_shares_prompts(model):
    name, why, num_bytes = choice(model)
    assert (name, why[:9]) == ("share_prompts", "it agrees")
    assert num_bytes >= 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, their size, float32


def test_state_space_models_do_not():
    torch.manual_seed(0)
    config = MambaConfig(**COMMON, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    name, why, _ = choice(model)
    assert name == "generate"
    assert "keys and values" in why
    assert len(draw("generate", model, max_new_tokens=3)) == 18


def test_positions_that_depend_on_the_batch_do_not():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, rope_parameters=rope))
    name, why, _ = choice(model)
    assert name == "generate"
    assert "positions depend" in why


def test_a_model_that_counts_positions_itself_is_found_out(llama, monkeypatch):
    """One that ignores the positions it is given sees padding as text."""
    original = type(llama).forward

    def forward(self, position_ids=None, **others):
        return original(self, **others)

    monkeypatch.setattr(type(llama), "forward", forward)
    name, why, _ = choice(llama)
    assert name == "generate"
    assert why.startswith("our cache changes ")


def test_a_model_that_refuses_the_cache_is_found_out(llama, monkeypatch):
    def forward(self, input_ids, attention_mask, use_cache, past_key_values=None):
        raise TypeError("legacy cache wanted")

    monkeypatch.setattr(type(llama), "forward", forward)
    name, why, _ = choice(llama)
    assert name == "generate"
    assert why.endswith("(TypeError: legacy cache wanted)")
