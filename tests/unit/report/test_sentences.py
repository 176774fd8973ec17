import pytest

from ropo.report.sentences import NB_SPACE, percent, percent_range, write_sentences
from ropo.report.tables import build_tables

RATE = {"estimate": 0.29, "low": 0.26, "high": 0.32}


def said(make_run, **summary):
    run = make_run(summary=summary)
    tables = build_tables(run["ledger"], run["summary"], run["pairs"], run["training_log"])
    return tables, write_sentences(tables)


def plain(text):
    return text.replace(NB_SPACE, " ")


def test_the_headline_states_rate_and_interval(make_run):
    _, sentences = said(make_run, flip_rate=RATE)
    assert plain(sentences["title"]) == "About 29 % of the labels look flipped"
    assert plain(sentences["interval"]) == "90 % interval 26–32 %, from 20 pairs."


def test_without_signal_the_headline_says_so_with_the_reason(make_run):
    tables, sentences = said(make_run, is_informative=False, reason="the margins spread over 0.01 nats only")
    assert "too little signal" in sentences["title"]
    assert sentences["interval"] == "The margins spread over 0.01 nats only."
    assert "29" not in sentences["title"]
    assert any("--rho 0" in advice for advice in sentences["next"])
    assert tables["suspects"] == []


def test_an_interval_that_reaches_zero_is_called_clean(make_run):
    _, sentences = said(make_run, flip_rate={"estimate": 0.01, "low": 0.0, "high": 0.032}, rho=0.01)
    assert plain(sentences["title"]) == "The labels may well be clean: 3.2 % flipped at most"
    assert "best guess 1 %" in plain(sentences["interval"])
    assert any("--loss dpo --rho 0" in advice for advice in sentences["next"])


def test_the_first_screen_counts_what_to_read_and_what_was_done(make_run):
    _, sentences = said(make_run, flip_rate=RATE)
    assert "About 3 should be wrong" in sentences["look"]
    assert plain(sentences["done"]).startswith(
        "Of 20 pairs, 16 kept, 2 dropped, 1 flipped and 1 dropped and won back by a new pair."
    )
    assert "follows the estimate" in sentences["budget"]


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        ({"rho": 0.45, "flip_rate": RATE}, "filters out more than the interval allows"),
        ({"rho": 0.05, "flip_rate": RATE}, "filters out less than the interval suggests"),
        ({"flip_rate": {"estimate": 0.2, "low": 0.1, "high": 0.3}}, "interval is wide"),
        ({"flip_rate": RATE}, "teach about as much as 4 clean ones"),
        ({"problems": {"identical": 5, "truncated": 9}}, "5 rows did not reach training (identical)"),
        ({"flip_rate": RATE}, "Read the first 4 suspects"),
    ],
)
def test_each_rule_speaks_when_it_applies(make_run, summary, words):
    _, sentences = said(make_run, **summary)
    assert any(words in plain(advice) for advice in sentences["next"])


def test_rules_keep_silent_when_they_do_not_apply(make_run):
    quiet = {"estimate": 0.2, "low": 0.18, "high": 0.22}
    tables, _ = said(make_run, flip_rate=quiet, rho=0.2, problems={"truncated": 3}, rounds=[])
    advice = write_sentences(tables | {"lengths": []})["next"]
    assert [text[:14] for text in advice] == ["Read the first"]


def test_an_estimate_that_still_moves_asks_for_a_round(make_run):
    rounds = [{"round": 0, "flip_rate": {"estimate": 0.4, "low": 0.38, "high": 0.42}}, {"round": 1, "flip_rate": RATE}]
    _, sentences = said(make_run, rounds=rounds)
    assert any("from 40 % to 29 %" in plain(advice) for advice in sentences["next"])


def length_entry(group, share, low, high):
    return {"group": group, "share_chosen_longer": share, "low": low, "high": high}


@pytest.mark.parametrize(
    ("kept", "dropped", "words"),
    [
        ((0.8, 0.75, 0.85), (0.3, 0.2, 0.4), "80 % of the kept pairs and in 30 % of the dropped"),
        ((0.7, 0.65, 0.75), (0.68, 0.6, 0.76), "In 70 % of the kept pairs the longer response"),
        ((0.55, 0.5, 0.6), (0.5, 0.4, 0.6), None),
    ],
)
def test_length_bias_is_told_apart_from_a_filter_for_length(make_run, kept, dropped, words):
    tables, _ = said(make_run)
    lengths = [length_entry("kept", *kept), length_entry("dropped", *dropped)]
    advice = [plain(text) for text in write_sentences(tables | {"lengths": lengths})["next"] if "longer" in text]
    assert (words is None and advice == []) or any(words in text for text in advice)


def test_soft_weights_are_mentioned(make_run):
    tables, _ = said(make_run)
    tables["counts"]["weight_kept_mean"] = 0.83
    assert "counts 0.83 on average" in write_sentences(tables)["done"]


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (0.004, "0.4 %"), (0.0996, "10 %"), (0.123, "12 %"), (0.95, "95 %"), (0.996, "99.6 %")],
)
def test_percents_are_rounded_as_people_do(share, text):
    assert plain(percent(share)) == text


def test_an_unknown_interval_is_a_dash():
    assert percent_range(None, 0.2) == "–"
