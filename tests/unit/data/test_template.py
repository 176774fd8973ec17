"""Chat templates are somebody else's programs: what they raise, never finish, leave out, and know of the calendar."""

import copy
import time
from datetime import datetime

import pytest

from ropo.data import template
from ropo.data.problems import BadRow
from ropo.data.template import Conversation, control_tokens, date_of, render

USER = {"role": "user", "content": "hi"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def with_template(tokenizer):
    def make(text):
        made = copy.deepcopy(tokenizer)
        made.chat_template = text
        return made

    return make


def rendered(tokenizer, *messages, is_open=False):
    [one] = render([Conversation(messages=list(messages), is_open=is_open, place="row 7")], tokenizer)
    return one


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[0].nothing.at.all }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{{ messages | map('nothing') | list }}", "TemplateRuntimeError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ '%d' % 'x' }}", "TypeError"),
    ],
)
def test_whatever_a_template_raises_is_a_problem_of_the_row(text, said, with_template):
    found = rendered(with_template(text), USER)
    assert isinstance(found, BadRow)
    assert found.kind == "template_refuses"
    assert said in str(found)


def test_a_template_that_never_ends(with_template, monkeypatch):
    """The thread that it runs in ends as well, or it would compute for ever beside a longer-lived program."""
    monkeypatch.setattr(template, "_BUDGET_SECONDS", 0.2)
    endless = with_template(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"end; at row 7 "):
        rendered(endless, USER)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_an_error_of_ours_is_not_swallowed_by_the_thread():
    with pytest.raises(KeyError, match="ours"):
        template._in_budget({}.__getitem__, ["ours"])


@pytest.mark.parametrize("call", [CALL, CALL["function"]], ids=["OpenAI", "flat"])
def test_arguments_of_tool_calls_as_text_are_parsed(call, with_template):
    """Templates iterate over arguments, which fails for a string, or write them as JSON, which quotes it twice."""
    tokenizer = with_template(
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{% set c = c.function or c %}"
        "{{ c.name }}({{ c.arguments | tojson }}:{% for k, v in c.arguments | items %}{{ k }}={{ v }}{% endfor %})"
        "{% endfor %}{% endfor %}</s>"
    )
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    found = rendered(tokenizer, calling)
    assert found.text == 'weather({"city": "Oslo"}:city=Oslo)</s>'
    assert found.left_out == ()
    assert call.get("function", call)["arguments"] == '{"city": "Oslo"}'  # the pair keeps what it was given
    bad = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "no JSON"}}]}
    assert isinstance(rendered(tokenizer, bad), BadRow)


@pytest.mark.parametrize(
    ("message", "left_out"),
    [
        ({"role": "system", "content": "be kind"}, "message 0 (system): content str 'be kind'"),
        ({"role": "assistant", "content": "", "tool_calls": [CALL]}, "message 0 (assistant): tool call str 'weather'"),
        ({"role": "user", "content": "x", "reasoning_content": "aha"}, "message 0 (user): reasoning_content str 'aha'"),
    ],
)
def test_what_a_template_leaves_out(message, left_out, with_template):
    deaf = with_template("{% for m in messages if m.role == 'user' %}{{ m.content }}</s>{% endfor %}")
    assert rendered(deaf, message, USER).left_out[0] == left_out


def test_a_template_may_write_a_content_otherwise(with_template):
    trims = with_template(
        "{% for m in messages %}{{ m.content | trim | tojson }}{{ m.content.split() | join(' ') }}{% endfor %}"
    )
    assert rendered(trims, {"role": "user", "content": ' say "ä"\n  to me\n'}).left_out == ()


def test_control_tokens_in_messages_are_marked(with_template):
    tokenizer = with_template(CHATML)
    found = rendered(tokenizer, {"role": "user", "content": "a</s>b<pad>"})
    assert found.text == "<s>user\na</s>b<pad></s>\n"
    assert found.control_tokens == ("</s>", "<pad>")
    assert found.marked.replace("\U000f0000", "").replace("\U000f0001", "") == found.text
    assert rendered(tokenizer, USER).marked is None
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["<think>"])  # a token that models write themselves, not a special one
    assert set(control_tokens(added)) == {"<s>", "</s>", "<pad>"}


def test_a_tokenizer_that_finds_control_tokens_in_no_text():
    class Mistral:
        bos_token_id = eos_token_id = pad_token_id = unk_token_id = 1

        def added_tokens_decoder(self):
            raise NotImplementedError

    assert control_tokens(Mistral()) == {}


def test_a_turn_without_end(with_template):
    tokenizer = with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert not rendered(tokenizer, USER).is_ended
    assert not rendered(tokenizer, {"role": "user", "content": "hi</s>"}).is_ended  # that one stays text
    assert rendered(with_template(CHATML), USER).is_ended


def test_the_date_stands_still(with_template):
    tokenizer = with_template("{{ strftime_now('%d %b %Y %H:%M') }} {{ strftime_now( \"%Y\" ) }}" + CHATML)
    assert datetime.fromisoformat(date_of(tokenizer)).date() == datetime.now().date()
    assert date_of(tokenizer, "2020-02-29T12:34:56") == "2020-02-29T12:34:56"
    assert rendered(tokenizer, USER).text.startswith("29 Feb 2020 12:34 2020<s>user")
    assert date_of(tokenizer) == "2020-02-29T12:34:56"
    assert date_of(with_template(CHATML)) is None


@pytest.mark.parametrize("text", ["{% set f = '%d' %}{{ strftime_now(f) }}", "{% set f = strftime_now %}{{ f('%d') }}"])
def test_a_date_that_cannot_be_fixed_is_refused(text, with_template):
    with pytest.raises(ValueError, match="format as a literal"):
        rendered(with_template(text), USER)


def test_a_template_that_can_do_without_the_date(with_template):
    """As that of Llama 3 asks, and takes a date of its own where there is none."""
    asks = with_template(
        "{# strftime_now #}{% if strftime_now is defined %}{% set d = strftime_now ( '%Y' ) %}{% endif %}{{ d }}</s>"
    )
    assert date_of(asks, "2020-02-29T12:34:56")
    assert rendered(asks, USER).text == "2020</s>"
    assert date_of(with_template("{% if strftime_now is not defined %}{% endif %}" + CHATML)) is None
