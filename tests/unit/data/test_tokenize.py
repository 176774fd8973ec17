"""Token ids: shared prompts, the budget, and what is reported."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from ropo.data.tokenize import encode_prompts, tokenize_pairs
from ropo.pairs import Pair


def kinds(tokenized):
    return [(problem.kind, problem.row) for problem in tokenized.problems]


def test_text_is_whole_and_ends(tokenizer):
    pair = Pair(prompt="Human: soup? Assistant:", chosen=" very good", rejected=" bad", row=0)
    (ids,) = tokenize_pairs([pair], tokenizer, max_length=64).tokens
    assert tokenizer.decode(ids.prompt) + tokenizer.decode(ids.chosen) == pair.prompt + pair.chosen + "</s>"
    assert tokenizer.decode(ids.prompt) + tokenizer.decode(ids.rejected) == pair.prompt + pair.rejected + "</s>"
    assert list(ids.prompt) == encode_prompts([pair.prompt], tokenizer)[0]
    assert len(ids) == len(ids.prompt) + len(ids.chosen) + len(ids.rejected)


def test_merge_across_the_border(tokenizer):
    """A token that swallows the end of the prompt belongs to the response, and the prompt stays shared."""
    whole = tokenizer("the waiter")["input_ids"]
    assert tokenizer("the wai")["input_ids"] != whole[: len(tokenizer("the wai")["input_ids"])]
    pair = Pair(prompt="the wai", chosen="ter", rejected="zz", row=0)
    (ids,) = tokenize_pairs([pair], tokenizer, max_length=64).tokens
    assert tokenizer.decode(ids.prompt) + tokenizer.decode(ids.chosen) == "the waiter</s>"
    assert tokenizer.decode(ids.prompt) + tokenizer.decode(ids.rejected) == "the waizz</s>"


def test_conversation_follows_the_template(tokenizer):
    prompt = [{"role": "user", "content": "soup?"}]
    pair = Pair(
        prompt=prompt,
        chosen=[{"role": "assistant", "content": "good"}],
        rejected=[{"role": "assistant", "content": "bad"}],
        row=0,
    )
    (ids,) = tokenize_pairs([pair], tokenizer, max_length=64).tokens
    assert tokenizer.decode(ids.prompt) == "<s>user:soup?</s><s>assistant:"
    assert tokenizer.decode(ids.chosen) == "good</s>"
    assert list(ids.prompt) == encode_prompts([prompt], tokenizer)[0]


def test_budget_is_the_same_for_both_responses(tokenizer):
    pair = Pair(prompt="Human: hi", chosen=" good" * 30, rejected=" bad" * 40, row=3)
    tokenized = tokenize_pairs([pair], tokenizer, max_length=20)
    (ids,) = tokenized.tokens
    assert len(ids.prompt) + len(ids.chosen) == len(ids.prompt) + len(ids.rejected) == 20
    assert tokenizer.eos_token_id not in ids.chosen  # a cut response does not teach where to end
    assert kinds(tokenized) == [("truncated", 3), ("truncated", 3)]


@pytest.mark.parametrize(
    ("pair", "kind"),
    [
        (Pair(prompt="good " * 40, chosen="a", rejected="b", row=5), "prompt_too_long"),
        (Pair(prompt="", chosen="a", rejected="b", row=5), "empty_prompt"),
        (Pair(prompt="x", chosen="good " * 30 + "a", rejected="good " * 30 + "b", row=5), "identical"),
    ],
)
def test_left_out_and_counted(pair, kind, tokenizer):
    fine = Pair(prompt="Human: hi", chosen=" a", rejected=" b", row=0)
    tokenized = tokenize_pairs([fine, pair], tokenizer, max_length=20)
    assert tokenized.pairs == [fine]
    assert kinds(tokenized) == [(kind, 5)]


def test_order_survives_several_calls(tokenizer, monkeypatch, pairs):
    monkeypatch.setattr("ropo.data.tokenize._PAIRS_PER_CALL", 3)
    in_parts = tokenize_pairs(pairs, tokenizer, max_length=200)
    monkeypatch.setattr("ropo.data.tokenize._PAIRS_PER_CALL", 1000)
    at_once = tokenize_pairs(pairs, tokenizer, max_length=200)
    assert in_parts.pairs == at_once.pairs == pairs
    for one, other in zip(in_parts.tokens, at_once.tokens, strict=True):
        assert np.array_equal(one.prompt, other.prompt)
        assert np.array_equal(one.chosen, other.chosen)


def test_errors_say_what_to_do(tokenizer):
    pair = Pair(prompt="a", chosen="b", rejected="c", row=0)
    with pytest.raises(ValueError, match="max_length of 2 or more; got 1"):
        tokenize_pairs([pair], tokenizer, max_length=1)
    mixed = Pair(prompt="a", chosen=[{"role": "assistant", "content": "b"}], rejected="c", row=0)
    with pytest.raises(ValueError, match="of one kind"):
        tokenize_pairs([mixed], tokenizer, max_length=20)


def test_a_template_that_refuses_a_conversation(tokenizer):
    """Some templates know no system message; the others of the pairs go on, and the row and the reason are told."""
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    said = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
    fine = Pair(prompt=[{"role": "user", "content": "hi"}], chosen=said[0], rejected=said[1], row=0)
    system = Pair(
        prompt=[{"role": "system", "content": "be kind"}, *fine.prompt], chosen=said[0], rejected=said[1], row=1
    )
    last = replace(fine, row=2)
    found = tokenize_pairs([fine, system, last], strict, max_length=64)
    assert [pair.row for pair in found.pairs] == [0, 2]
    assert [(problem.kind, problem.row) for problem in found.problems] == [("template_refuses", 1)]
    assert "System role not supported" in found.problems[0].message
    expected = tokenize_pairs([fine], tokenizer, max_length=64).tokens[0]
    assert found.tokens[1].prompt.tolist() == expected.prompt.tolist()


def test_conversation_needs_a_template(tokenizer):
    messages = [{"role": "user", "content": "x"}]
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ValueError, match="chat template"):
            encode_prompts([messages], tokenizer)
    finally:
        tokenizer.chat_template = template
