"""Pairs to token ids: a prompt and its response are the ids of the whole text, whatever is cut keeps its beginning.

The reference is the tokenizer itself, asked for one text at a time: byte-level BPE, and two of SentencePiece's kind
(BPE and Unigram over `▁`, with a fallback to bytes).
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ropo.data.tokenize import encode_prompts, tokenize_pairs
from ropo.pairs import Pair

pytestmark = pytest.mark.slow

_CONTROL = ["<unk>", "<s>", "</s>", "<pad>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_PARTS = [
    "▁", "a", "B", "w", "o", "r", "d", "▁w", "or", "▁wor", "▁word", "H", "u", "m", "n", "▁a", "字", "l", "N", ":",
    "{", "▁▁",
]  # fmt: skip
_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def _bpe():
    vocabulary = {token: i for i, token in enumerate([*_CONTROL, *_BYTES, *_PARTS])}
    merges = [("o", "r"), ("▁", "w"), ("▁w", "or"), ("▁wor", "d"), ("▁", "a"), ("▁", "▁")]
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return raw


def _unigram():
    scores = [*((token, 0.0) for token in _CONTROL), *((token, -20.0) for token in _BYTES)]
    raw = Tokenizer(models.Unigram([*scores, *((token, -1.0 - len(token)) for token in _PARTS)], 0, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    return raw


def like_sentencepiece(raw, *, adds_bos):
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in _CONTROL])
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = _TEMPLATE
    return made


KINDS = {
    "byte-level BPE": lambda tokenizer: tokenizer,
    "BPE over ▁": lambda _: like_sentencepiece(_bpe(), adds_bos=True),
    "Unigram over ▁": lambda _: like_sentencepiece(_unigram(), adds_bos=False),
}


@pytest.fixture(scope="module", params=KINDS)
def one(request, tokenizer):
    return KINDS[request.param](tokenizer)


@pytest.fixture(scope="session")
def three(texts):
    return st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=8)


def pairs_of(drawn):
    return [
        Pair(prompt=prompt, chosen=chosen, rejected=rejected, row=row)
        for row, (prompt, chosen, rejected) in enumerate(drawn)
    ]


def as_conversations(drawn):
    def say(role, text):
        return [{"role": role, "content": text}]

    return [(say("user", prompt), say("assistant", one), say("assistant", other)) for prompt, one, other in drawn]


def whole(pair, response, tokenizer):
    """Ids of prompt and response as one text, as the model reads them."""
    if isinstance(pair.prompt, str):
        ids = tokenizer(pair.prompt + response)["input_ids"]
        return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
    text = tokenizer.apply_chat_template(pair.prompt + response, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_whole(pairs, tokenizer):
    made = tokenize_pairs(pairs, tokenizer, max_length=10_000)
    listed = {problem.row for problem in made.problems if problem.row is not None}
    assert {pair.row for pair in made.pairs} | listed == {pair.row for pair in pairs}
    for pair, ids in zip(made.pairs, made.tokens, strict=True):
        assert len(ids.prompt)
        assert len(ids.chosen)
        assert len(ids.rejected)
        for response, found in ((pair.chosen, ids.chosen), (pair.rejected, ids.rejected)):
            assert [*ids.prompt, *found] == whole(pair, response, tokenizer)
    return made


def test_a_text_is_the_ids_of_the_whole(one, three, fuzz):
    @fuzz(tests=12, at_once=4)
    @given(three)
    def run(drawn):
        fuzz.drive(len(drawn))
        check_whole(pairs_of(drawn), one)

    run()


def test_a_conversation_is_the_ids_of_the_whole(one, three, fuzz):
    @fuzz(tests=12, at_once=4)
    @given(three)
    def run(drawn):
        fuzz.drive(len(drawn))
        check_whole(pairs_of(as_conversations(drawn)), one)

    run()


def test_what_is_cut_keeps_its_beginning(one, three, fuzz):
    @fuzz(tests=12, at_once=4)
    @given(three, st.integers(2, 40), st.booleans())
    def run(drawn, max_length, is_chat):
        fuzz.drive(len(drawn))
        pairs = pairs_of(as_conversations(drawn) if is_chat else drawn)
        full = tokenize_pairs(pairs, one, max_length=10_000)
        cut = tokenize_pairs(pairs, one, max_length=max_length)
        before = {pair.row: ids for pair, ids in zip(full.pairs, full.tokens, strict=True)}
        listed = {problem.row for problem in cut.problems if problem.row is not None}
        assert {pair.row for pair in cut.pairs} | listed == {pair.row for pair in pairs}
        for pair, ids in zip(cut.pairs, cut.tokens, strict=True):
            assert np.array_equal(ids.prompt, before[pair.row].prompt)
            for name in ("chosen", "rejected"):
                found, all_of_it = getattr(ids, name), getattr(before[pair.row], name)
                assert 0 < len(found) <= max_length - len(ids.prompt)
                assert np.array_equal(found, all_of_it[: len(found)])
                assert len(found) == len(all_of_it) or pair.row in listed

    run()


def test_a_text_comes_back(one, three, fuzz):
    """Decoded, the ids are the text again; of SentencePiece's kind a first space and a mark of its own are not."""

    def plain(text):
        return text.replace("▁", " ").lstrip(" ")

    @fuzz(tests=12, at_once=4)
    @given(three)
    def run(drawn):
        fuzz.drive(len(drawn))
        made = tokenize_pairs(pairs_of(drawn), one, max_length=10_000)
        for pair, ids in zip(made.pairs, made.tokens, strict=True):
            text = one.decode([*ids.prompt, *ids.chosen], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert plain(text) == plain(pair.prompt + pair.chosen)

    run()


@pytest.mark.parametrize("is_chat", [False, True])
def test_no_text_becomes_a_control_token(is_chat, one, texts, fuzz):
    """`</s>` inside a text must stay a text, or its row must be reported."""
    has_control = st.tuples(texts, st.sampled_from(["</s>", "<pad>", "<s>"]), texts).map("".join)

    @fuzz(tests=12, at_once=4)
    @given(st.lists(st.tuples(texts | has_control, has_control, texts), min_size=1, max_size=4))
    def run(drawn):
        fuzz.drive(len(drawn))
        pairs = pairs_of(as_conversations(drawn) if is_chat else drawn)
        made = tokenize_pairs(pairs, one, max_length=10_000)
        told = {problem.row for problem in made.problems if problem.row is not None}
        harmless = pairs_of(as_conversations([("a", "B", "w")]) if is_chat else [("a", "B", "w")])
        usual = tokenize_pairs(harmless, one, max_length=10_000).tokens[0]

        def controls(ids):
            return sum(int(one_id) in one.all_special_ids for one_id in ids)

        for pair, ids in zip(made.pairs, made.tokens, strict=True):
            same = all(
                controls([*ids.prompt, *found]) == controls([*usual.prompt, *wanted])
                for found, wanted in ((ids.chosen, usual.chosen), (ids.rejected, usual.rejected))
            )
            assert same or pair.row in told

    run()


def test_prompts_alone_are_the_beginning_of_the_whole(one, three, fuzz):
    """What a model is asked to go on from is what it was trained on, but for tokens that merge across the border."""

    @fuzz(tests=12, at_once=4)
    @given(three, st.booleans())
    def run(drawn, is_chat):
        fuzz.drive(len(drawn))
        pairs = pairs_of(as_conversations(drawn) if is_chat else drawn)
        made = tokenize_pairs(pairs, one, max_length=10_000)
        alone = encode_prompts([pair.prompt for pair in made.pairs], one)
        for ids, prompt in zip(made.tokens, alone, strict=True):
            assert prompt[: len(ids.prompt)] == list(ids.prompt)

    run()
