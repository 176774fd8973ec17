import time

import pytest

from ropo.report.texts import MAX_CHARACTERS, clean, compare, excerpt, plain, show_prompt


def text_of(shown):
    return "".join(text for turn in shown["turns"] for text, _ in turn["parts"])


def marked(shown):
    return [text for turn in shown["turns"] for text, is_marked in turn["parts"] if is_marked]


def test_only_the_words_that_differ_are_marked():
    shown = compare("The soup was warm, and the waiter kind.", "The soup was cold, and the waiter kind.")
    assert marked(shown["chosen"]) == ["warm"]
    assert marked(shown["rejected"]) == ["cold"]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("a b c", "a c"),
        ("", "x"),
        ("one  two\n\nthree", "one two four"),
        ("你好世界", "你好朋友"),
        ("a b " * 300, "b a c " * 300),
    ],
)
def test_parts_give_the_text_back(chosen, rejected):
    shown = compare(chosen, rejected)
    assert text_of(shown["chosen"]) == chosen.strip()
    assert text_of(shown["rejected"]) == rejected.strip()


def test_white_space_is_never_marked_at_the_edge():
    shown = compare("It is very good indeed, sir.", "It is good, sir.")
    assert marked(shown["chosen"]) == ["very", "indeed"]


def test_scripts_without_spaces_are_compared_sign_by_sign():
    assert marked(compare("今天天气很好", "今天天气不好")["rejected"]) == ["不"]


def test_equal_responses_are_unmarked():
    shown = compare("same words", "same  words")
    assert (shown["share_differing"], shown["is_marked"]) == (0, False)
    assert marked(shown["chosen"]) == []


def test_texts_with_little_in_common_are_unmarked_but_counted():
    chosen = "A sourdough starter needs warmth, flour and a good deal of patience before it begins to rise at all."
    rejected = "Nobody knows; ask your baker whether he would sell you one, or buy bread like everybody else does now."
    shown = compare(chosen, rejected)
    assert not shown["is_marked"]
    assert shown["share_differing"] > 0.85
    assert marked(shown["chosen"]) == []


def test_a_repeated_text_is_compared_whole():
    """A differ that ignores frequent words would mark everything behind the one word that differs."""
    same = "the same thing again. "
    shown = compare(same * 30 + "Fine. " + same * 45, same * 30 + "Bad. " + same * 40 + "End.")
    assert marked(shown["chosen"])[0] == "Fine"
    assert shown["share_differing"] < 0.2


def test_degenerate_texts_take_no_time():
    start = time.perf_counter()
    compare("the " * 1200, "the a " * 800)
    compare("! " * 2500, ". ! ! " * 800)
    assert time.perf_counter() - start < 2


def test_conversations_keep_their_turns():
    prompt = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": ""},
    ]
    shown = show_prompt(prompt)
    assert [turn["role"] for turn in shown["turns"]] == ["user", "assistant", "user"]
    assert plain(prompt).split("\n\n") == ["user: Hi", "assistant: Yes?", "user: "]
    assert plain([{"role": "assistant", "content": "Yes."}]) == "Yes."


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "Hi"}]}, "Hi"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, '{"content": [{"type": "image", "url": "x"}]}'),
        ({"role": "assistant", "content": None, "tool_calls": [1]}, '{"content": null, "tool_calls": [1]}'),
    ],
)
def test_content_that_is_not_text_is_shown(message, text):
    assert plain([message]) == text


def test_marks_find_the_turn_that_differs():
    chosen = [{"role": "assistant", "content": "Right."}, {"role": "tool", "content": "four"}]
    rejected = [{"role": "assistant", "content": "Right."}, {"role": "tool", "content": "five"}]
    turns = compare(chosen, rejected)["rejected"]["turns"]
    assert turns[0]["parts"] == [["Right.", False]]
    assert turns[1]["parts"] == [["five", True]]


def test_long_texts_lose_the_end_and_long_prompts_the_beginning():
    long = "".join(f"{i} " for i in range(3000))
    shown = compare(long, long + "more")
    assert len(text_of(shown["chosen"])) <= MAX_CHARACTERS
    assert text_of(shown["chosen"]).startswith("0 1 2")
    assert shown["chosen"]["num_hidden"] == len(long) - MAX_CHARACTERS
    prompt = show_prompt([{"role": "user", "content": long}, {"role": "user", "content": "the question"}])
    assert [turn["parts"][0][0][-12:] for turn in prompt["turns"]] == ["2997 2998 2999"[-12:], "the question"]
    assert prompt["num_hidden"] == len(long) + len("the question") - MAX_CHARACTERS


def test_invisible_and_broken_characters_become_visible():
    assert clean("a\x00b\x1b[31m\ud800\r\nc\td") == "a␀b␛[31m?\nc\td"
    clean("\ud83d\ude00 \udc00").encode("utf-8")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("is \u202eton\u202c good", "is ⟨U+202E⟩ton⟨U+202C⟩ good"),
        ("\u2066a\u2069", "⟨U+2066⟩a⟨U+2069⟩"),
        ("a\u200bb\u200ec\u00add\ufeff\u3164", "a⟨U+200B⟩b⟨U+200E⟩c⟨U+00AD⟩d⟨U+FEFF⟩⟨U+3164⟩"),
        ("\U000e0041\x9b1m", "⟨U+E0041⟩⟨U+009B⟩1m"),
        ("yes\u200d", "yes⟨U+200D⟩"),
    ],
)
def test_what_hides_or_turns_letters_round_is_written_out(text, shown):
    assert clean(text) == shown
    assert plain([{"role": "user", "content": text}]) == shown
    assert text_of(compare("so", text)["rejected"]) == shown


@pytest.mark.parametrize("text", ["👩\u200d🔬", "می\u200cخواهم", "क्\u200dष", "עברית and العربية", "❤️ é 한국어"])
def test_what_scripts_and_emoji_need_stays(text):
    assert clean(text) == text


def test_an_excerpt_is_the_end_in_one_line():
    assert excerpt("short\n\ntext") == "short text"
    assert excerpt("word " * 100 + "question?").endswith("question?")
    assert len(excerpt("x" * 1000)) == 91
