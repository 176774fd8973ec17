"""Token ids: shared prompts, the budget, and what is reported."""

import copy
import time
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ropo.data.tokenize import SampledIds, encode_prompts, tokenize_pairs
from ropo.pairs import Pair


def kinds(tokenized, *, passed_over=("text_without_template",)):
    """What was found; the model of these tests has a chat template, and most of their pairs are plain text."""
    return [(problem.kind, problem.row) for problem in tokenized.problems if problem.kind not in passed_over]


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
    with pytest.raises(ValueError, match=r"max_length .*; got 1"):
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
    assert "not supported" in found.problems[0].message
    expected = tokenize_pairs([fine], tokenizer, max_length=64).tokens[0]
    assert found.tokens[1].prompt.tolist() == expected.prompt.tolist()


def test_a_template_that_writes_the_prompt_otherwise_once_an_answer_follows(tokenizer):
    """Mistral's shows the system message before the last message alone: the question would be learned as an answer."""
    moving = copy.deepcopy(tokenizer)
    moving.chat_template = (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last and system is defined %}{{ system + ' ' }}{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    said = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
    fine = Pair(prompt=[{"role": "user", "content": "hi"}], chosen=said[0], rejected=said[1], row=0)
    system = replace(fine, prompt=[{"role": "system", "content": "be kind"}, *fine.prompt], row=1, id="")
    found = tokenize_pairs([fine, system], moving, max_length=64)
    assert [pair.row for pair in found.pairs] == [0]
    assert kinds(found) == [("template_refuses", 1)]
    assert "once an answer follows: str 'hi'" in found.problems[0].message


@pytest.mark.parametrize(
    "of_parts", ["{% for part in m.content %}{{ part.text }}{% endfor %}", "{{ m.content[0].text }}"]
)
def test_a_template_that_wants_content_in_parts(of_parts, tokenizer):
    """As those of vision-language models do, which find nothing in a text, or fail."""
    in_parts = copy.deepcopy(tokenizer)
    in_parts.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", of_parts)
    assert in_parts.chat_template != tokenizer.chat_template
    said = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
    pair = Pair(prompt=[{"role": "user", "content": "hi"}], chosen=said[0], rejected=said[1], row=0)
    found, wanted = (tokenize_pairs([pair], one, max_length=64) for one in (in_parts, tokenizer))
    assert kinds(found) == []
    assert found.tokens[0].prompt.tolist() == wanted.tokens[0].prompt.tolist()
    assert found.tokens[0].chosen.tolist() == wanted.tokens[0].chosen.tolist()
    assert encode_prompts([pair.prompt], in_parts) == encode_prompts([pair.prompt], tokenizer)


def test_a_prompt_without_its_question_is_not_answered(tokenizer):
    blind = copy.deepcopy(tokenizer)
    blind.chat_template = "{% for m in messages %}<s>{{ m['role'] }}</s>{% endfor %}"
    with pytest.raises(ValueError, match=r"in prompt 0, the template leaves out .*'hi'"):
        encode_prompts([[{"role": "user", "content": "hi"}]], blind)


def test_conversation_needs_a_template(tokenizer):
    messages = [{"role": "user", "content": "x"}]
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ValueError, match="chat template"):
            encode_prompts([messages], tokenizer)
    finally:
        tokenizer.chat_template = template


@pytest.fixture(params=["add_eos_token", "post-processor"])
def dressing(request, tokenizer) -> PreTrainedTokenizerFast:
    """Puts a beginning and an end around every text, as SFT of some models left their tokenizers."""
    made = copy.deepcopy(tokenizer)
    if request.param == "add_eos_token":
        made.add_bos_token, made.add_eos_token = True, True
    else:
        ends = [(name, made.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
        made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    assert made.decode(made("hi")["input_ids"]) == "<s>hi</s>"
    return made


def test_a_prompt_does_not_end_where_the_answer_begins(dressing):
    """What such a tokenizer appends to a prompt would stand in the middle of a pair, and every sample be empty."""
    pair = Pair(prompt="Human: hi", chosen=" yes", rejected=" no</s>", row=0)
    tokenized = tokenize_pairs([pair], dressing, max_length=64)
    (ids,) = tokenized.tokens
    assert dressing.decode(ids.prompt) == "<s>Human: hi"
    assert dressing.decode(ids.chosen) == " yes</s>"
    assert dressing.decode(ids.rejected) == " no</s>"
    assert encode_prompts([pair.prompt], dressing) == [ids.prompt.tolist()]
    assert not kinds(tokenized)


def test_text_that_is_templated_already(dressing):
    text = Pair(prompt="<s>user\nhi</s>\n<s>assistant\n", chosen="yes</s>\n", rejected="no", row=4)
    tokenized = tokenize_pairs([text], dressing, max_length=64)
    (ids,) = tokenized.tokens
    assert dressing.decode(ids.prompt) == text.prompt
    assert dressing.decode(ids.chosen) == text.chosen  # it has its end; no second one after the line break
    assert kinds(tokenized) == [("templated_text", 4)]


def test_control_tokens_in_plain_text_are_told(tokenizer):
    pairs = [
        Pair(prompt="Human: a</s>b", chosen=" <pad>c", rejected=" d</s>", row=0),
        Pair(prompt="Human: hi", chosen=" c</s>", rejected=" d", row=1),
    ]
    tokenized = tokenize_pairs(pairs, tokenizer, max_length=64)
    assert kinds(tokenized) == [("control_tokens", 0)]
    assert "prompt holds '</s>', chosen holds '<pad>'" in tokenized.problems[0].message


def conversation(row, prompt="soup?", chosen="good", rejected="bad", **more):
    said = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return Pair(prompt=[{"role": "user", "content": prompt, **more}], chosen=said[0], rejected=said[1], row=row)


def test_control_tokens_in_messages_stay_text(tokenizer):
    """Else a user could end the turn that a model reads, and a model learn to end it in the middle of an answer."""
    tokenized = tokenize_pairs(
        [conversation(0), conversation(1, prompt="a</s><s>assistant:b", chosen="x<pad></s>")], tokenizer, max_length=128
    )
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    for ids in tokenized.tokens:
        assert [one for one in ids.prompt.tolist() if one in special] == [1, 2, 1]
        assert [one for one in ids.chosen.tolist() if one in special] == [2]
    assert tokenizer.decode(tokenized.tokens[1].prompt) == "<s>user:a</s><s>assistant:b</s><s>assistant:"
    assert tokenizer.decode(tokenized.tokens[1].chosen) == "x<pad></s></s>"
    assert kinds(tokenized) == [("control_tokens", 1)]
    assert "'</s>', '<s>', '<pad>'" in tokenized.problems[0].message
    assert "reads its letters" in tokenized.problems[0].message
    assert encode_prompts([pair.prompt for pair in tokenized.pairs], tokenizer) == [
        ids.prompt.tolist() for ids in tokenized.tokens
    ]


def test_a_vocabulary_in_which_a_control_token_is_a_word():
    """A unigram model finds the token in any text that has its name; then it is said that the model reads the token."""
    raw = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -1.0) for c in "abc</s>: ")], unk_id=0))
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    (problem,) = tokenize_pairs([conversation(3, "a</s>b", "c", "a")], made, max_length=64).problems
    assert (problem.kind, problem.row) == ("control_tokens", 3)
    assert "reads the token" in problem.message


def test_what_a_template_does_to_all_is_told_once(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
    calls = [{"function": {"name": "weather", "arguments": {}}}]
    pairs = [conversation(0), conversation(1, tool_calls=calls), Pair(prompt="a", chosen="b", rejected="c", row=2)]
    tokenized = tokenize_pairs(pairs, made, max_length=64)
    assert kinds(tokenized) == [
        ("template_leaves_out", 1), ("template_without_end", None), ("template_with_date", None)
    ]  # fmt: skip
    assert [one.message for one in tokenized.problems][1:3] == ["1 pairs", "2 of 2 conversations"]
    plain = tokenize_pairs(pairs[2:], made, max_length=64)
    assert kinds(plain, passed_over=()) == [("text_without_template", None)]
    assert plain.problems[0].message == "1 pairs"


def test_plain_text_is_not_told_of_a_template_that_is_not_there_or_was_applied(tokenizer):
    pair = Pair(prompt="a", chosen="b", rejected="c", row=2)
    templated = replace(pair, prompt="<s>user:a</s><s>assistant:")
    assert kinds(tokenize_pairs([templated], tokenizer, max_length=64), passed_over=()) == [("templated_text", 2)]
    assert kinds(tokenize_pairs([conversation(0)], tokenizer, max_length=64), passed_over=()) == []
    made = copy.deepcopy(tokenizer)
    made.chat_template = None
    assert not tokenize_pairs([pair], made, max_length=64).problems


def test_a_prompt_that_the_template_refuses(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ 1 // 0 if messages | length > 1 }}" + tokenizer.chat_template
    prompts = [[{"role": "user", "content": "a"}], "plain", [{"role": "user", "content": "a"}] * 2]
    with pytest.raises(ValueError, match=r"1 of 3 .* prompt 2, .*ZeroDivisionError"):
        encode_prompts(prompts, strict)
    assert len(encode_prompts(prompts[:2], strict)) == 2


@pytest.mark.parametrize("text", ["a", "the soup was good ", " "], ids=["one word", "words", "blanks"])
def test_texts_without_end_take_no_time(text, tokenizer):
    """Megabytes among ordinary rows: as a prompt it is left out, as a response it is cut."""
    endless = text * (8_000_000 // len(text))
    pairs = [
        Pair(prompt=endless, chosen="a", rejected="b", row=0),
        Pair(prompt="Human: hi", chosen=f" yes {endless}", rejected=" no", row=1),
        conversation(2, prompt=endless),
        conversation(3, rejected=endless),
        conversation(4),
    ]
    start = time.process_time()
    tokenized = tokenize_pairs(pairs, tokenizer, max_length=64)
    assert time.process_time() - start < 5
    assert kinds(tokenized) == [
        ("prompt_too_long", 0), ("truncated", 1), ("prompt_too_long", 2), ("truncated", 3)
    ]  # fmt: skip
    assert "prompt has more " in tokenized.problems[0].message
    whole = tokenizer(f"Human: hi yes {endless[:10_000]}")["input_ids"]
    assert [*tokenized.tokens[0].prompt, *tokenized.tokens[0].chosen] == whole[:64]


def test_text_of_few_tokens_is_read_to_its_end(tokenizer):
    """A tokenizer that drops white space makes nothing of most of it; how many characters fit cannot be said."""
    raw = copy.deepcopy(tokenizer.backend_tokenizer)
    raw.normalizer = normalizers.Replace(" ", "")
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    pair = Pair(prompt="Human:" + " " * 200_000 + "hi", chosen="yes", rejected="no", row=0)
    (ids,) = tokenize_pairs([pair], made, max_length=64).tokens
    assert made.decode(ids.prompt) == "Human:hi"


@pytest.fixture
def pieces() -> PreTrainedTokenizerFast:
    """Like SentencePiece: a space before every word, also before the first, which decoding takes away again."""
    words = ["<unk>", "</s>", "▁", "▁Human:", "▁hi", "▁yes", "▁no", "hi", "yes", *"abcdefghijklmnopqrstuvwxyz:"]
    raw = Tokenizer(models.Unigram([(word, -float(len(words) > 0)) for word in words], unk_id=0))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    return made


def test_a_tokenizer_that_writes_a_space_before_the_first_word(pieces):
    pair = Pair(prompt="hi", chosen=" yes", rejected="yes", row=0)
    (ids,) = tokenize_pairs([pair], pieces, max_length=64).tokens
    assert pieces.convert_ids_to_tokens(ids.prompt) == ["▁hi"]
    assert pieces.convert_ids_to_tokens(ids.chosen) == ["▁yes", "</s>"]
    assert pieces.convert_ids_to_tokens(ids.rejected) == ["yes", "</s>"]


def test_a_tokenizer_to_which_two_texts_are_one(pieces):
    tokenized = tokenize_pairs([Pair(prompt="hi", chosen=" yes", rejected=" YES", row=2)], pieces, max_length=64)
    assert kinds(tokenized) == [("identical", 2)]


def test_text_that_a_tokenizer_does_not_know(pieces):
    pair = Pair(prompt="hi", chosen=" yes 汉", rejected=" no", row=2)
    tokenized = tokenize_pairs([pair], pieces, max_length=64)
    assert kinds(tokenized) == [("unknown_tokens", 2)]
    assert tokenized.problems[0].message.endswith("1 of 4 in chosen.")


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_sampled_tokens_are_kept(name, pieces):
    """Of what was drawn the text may lack a space, or spell other tokens; trained on are the tokens that were drawn."""
    ids = [*pieces.convert_tokens_to_ids(["▁", "y", "e", "s"]), pieces.eos_token_id]
    texts = {"chosen": " no", "rejected": " no", name: pieces.decode(ids[:-1])}
    assert texts[name] == "yes"
    pair = Pair(prompt="hi", row=0, **texts)
    (kept,) = tokenize_pairs([pair], pieces, max_length=64, sampled=[SampledIds(name=name, ids=tuple(ids))]).tokens
    assert getattr(kept, name).tolist() == ids
    other = kept.rejected if name == "chosen" else kept.chosen
    assert pieces.convert_ids_to_tokens(other) == ["▁no", "</s>"]


def test_sampled_tokens_end_as_the_template_ends_a_turn(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = tokenizer.chat_template.replace("</s>{% endfor %}", "</s>\n{% endfor %}")
    ids = (*made("good", add_special_tokens=False)["input_ids"], made.eos_token_id)
    sampled = [SampledIds(name="chosen", ids=ids)]
    (drawn,) = tokenize_pairs([conversation(0)], made, max_length=64, sampled=sampled).tokens
    (written,) = tokenize_pairs([conversation(0)], made, max_length=64).tokens
    assert drawn.chosen.tolist() == written.chosen.tolist()
    assert made.decode(drawn.chosen) == "good</s>\n"


def test_another_token_may_end_what_is_sampled(tokenizer):
    """As chat models name several; the prompt may hold it, which says nothing about the end of an answer."""
    pair = conversation(0)
    ids = (*tokenizer("kind", add_special_tokens=False)["input_ids"], tokenizer.bos_token_id)
    sampled = [SampledIds(name="rejected", ids=ids)]
    (drawn,) = tokenize_pairs([pair], tokenizer, max_length=64, sampled=sampled).tokens
    assert drawn.rejected.tolist() == list(ids)


def test_a_tokenizer_that_takes_not_every_text():
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 1})), eos_token="</s>")
    pair = Pair(prompt="a", chosen="b", rejected="a", row=0)
    with pytest.raises(ValueError, match=r"any text; got .*'WordLevel error.*unk_token"):
        tokenize_pairs([pair], made, max_length=64)


def test_who_wants_control_tokens_in_plain_text_as_text_says_so(tokenizer):
    """With the tokenizer's own option."""
    made = copy.deepcopy(tokenizer)
    made.split_special_tokens = True
    pair = Pair(prompt="Human: a<pad>", chosen=" yes</s>", rejected=" no", row=0)
    tokenized = tokenize_pairs([pair], made, max_length=64)
    (ids,) = tokenized.tokens
    assert made.decode(ids.chosen) == " yes</s></s>"
    assert ids.chosen.tolist().count(made.eos_token_id) == 1
    assert not kinds(tokenized)
