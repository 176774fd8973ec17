"""Which sentences a report holds, by their rule or by the enum behind them; their words stand in the golden report."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from ropo.audit import features
from ropo.audit.run import SCORERS
from ropo.audit.weights import Why
from ropo.noise.estimate import Obstacle, estimate_flips
from ropo.report.advice import advice, is_open, num_open_flips
from ropo.report.clauses import CLAUSES, reason
from ropo.report.from_summary import MEANINGS, SURFACE
from ropo.report.sentences import _untested, doubt, write_sentences
from ropo.report.tables import build_tables
from ropo.report.wording import NB_SPACE, percent, percent_range
from ropo.run.summary import _flip_rate

RATE = {"estimate": 0.29, "low": 0.26, "high": 0.32}


def said(make_run, **summary):
    tables = build_tables(**make_run(summary=summary))
    return tables, tables["sentences"]


def advised(make_run, **summary):
    """Names of the rules that apply."""
    return set(advice(said(make_run, **summary)[0]))


def plain(text):
    return text.replace(NB_SPACE, " ")


def test_advice_is_what_the_report_says_to_do_next(make_audit):
    tables, sentences = said(make_audit)
    assert sentences["next"] == list(advice(tables).values())


def test_without_signal_the_reason_is_given_and_no_rate(make_run):
    tables, sentences = said(make_run, is_informative=False, reason="The margins spread.")
    assert sentences["interval"] == "The margins spread."
    assert "21" not in sentences["title"]
    assert {"signal", "folds"} <= set(advice(tables))
    assert "clean" not in advice(tables)
    assert tables["suspects"] == []


@pytest.mark.parametrize(
    ("flip_rate", "may_be_clean", "is_vague"),
    [
        (RATE, False, False),
        ({"estimate": 0.01, "low": 0.0, "high": 0.032}, True, False),
        ({"estimate": 0.06, "low": 0.0, "high": 0.196}, True, True),
    ],
)
def test_an_interval_that_reaches_zero_may_be_clean(make_run, flip_rate, may_be_clean, is_vague):
    tables, _ = said(make_run, flip_rate=flip_rate)
    assert (tables["estimate"]["may_be_clean"], tables["estimate"]["is_vague"]) == (may_be_clean, is_vague)
    assert ("clean" in advice(tables)) == may_be_clean


def test_the_first_screen_counts_what_to_read_and_what_was_done(make_run):
    tables, _ = said(make_run, flip_rate=RATE)
    assert (round(tables["review"]["found_likely"]), round(tables["review"]["found_all"])) == (3, 5)
    assert [tables["counts"][key] for key in ("num_pairs", "keep", "drop", "flip", "resample")] == [20, 16, 2, 1, 1]


@pytest.mark.parametrize(
    ("summary", "rule"),
    [
        ({"rho": 0.45, "rho_why": Why.GIVEN, "flip_rate": RATE}, "rho"),
        ({"rho": 0.05, "rho_why": Why.GIVEN, "flip_rate": RATE}, "rho"),
        ({"flip_rate": {"estimate": 0.2, "low": 0.1, "high": 0.3}}, "width"),
        ({"flip_rate": RATE}, "information"),
        ({"problems": {"identical": 5, "truncated": 9}}, "problems"),
        ({"flip_rate": RATE}, "review"),
    ],
)
def test_each_rule_speaks_when_it_applies(make_run, summary, rule):
    assert rule in advised(make_run, **summary)


def test_rules_keep_silent_when_they_do_not_apply(make_audit):
    quiet = {"estimate": 0.2, "low": 0.18, "high": 0.22}
    silent = {"problems": {"truncated": 3}, "annotators": [], "token_lengths": None, "num_trusted": 50}
    assert advised(make_audit, flip_rate=quiet, rho=0.2, task="train", **silent) == {"review"}


@pytest.mark.parametrize("why", [Why.ESTIMATED, Why.FILTER_HELPS])
def test_no_advice_against_what_the_estimate_chose(make_audit, why):
    assert "rho" not in advised(make_audit, rho=0.45, rho_why=why, flip_rate=RATE)
    tables, _ = said(make_audit, rho=0.45, rho_why=why, is_informative=False)
    assert ("--rho 0" in advice(tables)["signal"]) == (why != Why.FILTER_HELPS)


def reviewed(make_audit, verdicts, **summary):
    """The tables after the first pairs, from the most suspect downwards, have been judged so."""
    run = make_audit()
    pairs, margins = run["pairs"], run["ledger"]["held_out_margin"].to_numpy()
    for i, verdict in zip(np.argsort(margins), verdicts, strict=False):
        pairs[i] = replace(pairs[i], verdict=verdict)
    return build_tables(**make_audit(pairs, summary))


def test_wrong_labels_that_a_review_has_found_are_not_sought_again(make_audit):
    """0.3 of 20 labels are 6; of these a review has found 4, and a pair that was left out is no label."""
    tables = reviewed(make_audit, [*4 * ["wrong"], "right", "drop"], flip_rate={**RATE, "estimate": 0.3})
    assert num_open_flips(tables, 0.3) == pytest.approx(0.3 * 19 - 4)
    assert num_open_flips(tables, 0.1) == 0


def test_a_given_rho_is_a_share_of_what_was_not_reviewed(make_audit):
    given = {"rho_why": Why.GIVEN, "flip_rate": RATE}
    for verdicts, rho, is_right in (([], 0.29, True), (5 * ["wrong"], 0.29, False), (5 * ["wrong"], 0.05, True)):
        tables = reviewed(make_audit, verdicts, rho=rho, **given)
        assert ("rho" not in advice(tables)) == is_right


def test_why_no_labels_were_flipped_on_purpose(make_audit):
    """A review leaves no sample of all labels, and where nothing is called there is nothing to test."""
    untested = {"calibration": None, "flip_rate": {"estimate": 0.002, "low": 0.0, "high": 0.02}}
    run = make_audit(summary=untested)
    run["ledger"] = run["ledger"].set_column(run["ledger"].column_names.index("decision"), "decision", [20 * ["keep"]])
    texts = [
        _untested(build_tables(**make_audit(summary=untested))), _untested(build_tables(**run)),
        _untested(reviewed(make_audit, ["right"], **untested)),
    ]  # fmt: skip
    assert len({text for [text] in texts}) == len(texts)
    assert ["few" in text for [text] in texts] == [True, False, False]


def test_margins_of_the_trained_model_are_no_test_of_labels(make_run, make_audit):
    assert "folds" in advised(make_run)
    assert "folds" not in advised(make_audit)


def test_alpha_is_not_stated_for_losses_without_one(make_audit, make_run):
    assert said(make_audit, config={"loss": "simpo"}, alpha=0.0)[1]["alpha"] == ""


def test_weights_and_further_terms_are_no_plain_dpo(make_audit):
    """Where every pair is kept, but not with its full weight, or the loss has another term."""
    told = []
    for weight, more in ((1.0, {}), (0.8, {}), (1.0, {"sft_weight": 1.0})):
        run = make_audit(summary={"alpha": 0.0, "config": {"loss": "ropo", **more}})
        for name, value in (("decision", "keep"), ("weight", weight)):
            run["ledger"] = run["ledger"].set_column(run["ledger"].column_names.index(name), name, [20 * [value]])
        tables = build_tables(**run)
        told.append(("exactly" in tables["sentences"]["alpha"], "the same as" in advice(tables)["cleaned"]))
    assert told == [(True, True), (False, False), (False, True)]


def test_labels_that_look_reversed_have_no_bound(make_audit):
    """A half is the end of the scale there, and no finding."""
    estimate = estimate_flips(-np.abs(np.random.default_rng(0).normal(2.0, 1.0, 500)))
    assert estimate.obstacle is Obstacle.REVERSED
    rate = _flip_rate(estimate)
    assert rate["high"] is None
    found = make_audit(summary={"is_informative": False, "reason": reason(estimate), "flip_rate": rate})
    assert "50" not in build_tables(**found)["sentences"]["interval"]


def test_without_a_rate_no_pair_has_a_probability(make_audit):
    """Nor do those that a given rho drops."""
    tables, _ = said(make_audit, is_informative=False)
    assert {row["p_flip"] for row in tables["dropped"]["rows"]} == {None}
    assert {row["p_flip_mean"] for row in tables["decisions"]} == {None}


def test_clean_labels_mean_that_every_pair_is_kept(make_audit):
    clean = {"flip_rate": {"estimate": 0.0, "low": 0.0, "high": 0.03}, "rho": 0.0, "alpha": 0.0}
    run = make_audit(summary=clean | {"rho_why": Why.MAY_BE_CLEAN, "alpha_why": Why.AFTER_FILTER})
    run["ledger"] = run["ledger"].set_column(7, "decision", [["keep"] * 20])
    tables = build_tables(**run)
    assert CLAUSES[Why.MAY_BE_CLEAN] in tables["sentences"]["budget"]
    assert {"clean", "cleaned"} <= set(advice(tables))
    assert "`--loss dpo" not in advice(tables)["clean"], "it is DPO already"
    assert "`cleaned.jsonl`" in advice(tables)["cleaned"]


def test_an_audit_says_what_training_would_do_and_what_a_person_can_do(make_audit):
    tables, _ = said(make_audit)
    assert [tables["counts"][key] for key in ("num_pairs", "keep", "drop", "flip")] == [20, 16, 3, 1]
    assert {"verdicts", "cleaned", "trusted"} <= set(advice(tables))
    assert "17" in advice(tables)["cleaned"]
    for option in ("--decisions review.csv", "--audit_from"):
        assert option in advice(tables)["verdicts"]
    assert not any("--rounds" in text for text in advice(tables).values())


@pytest.mark.parametrize("why", Why)
def test_every_reason_has_a_clause(make_audit, why):
    _, sentences = said(make_audit, rho_why=str(why), alpha_why=str(why))
    assert f", since {CLAUSES[why]}." in sentences["budget"]
    assert f", since {CLAUSES[why]}." in sentences["alpha"]


def test_a_beta_that_follows_the_filter_is_stated_with_its_factor(make_audit):
    assert "β = 0.75, 2.5 times 0.3," in said(make_audit, beta=0.75, beta_why=Why.SAME_DISTANCE)[1]["beta"]
    assert said(make_audit, beta=0.3, beta_why=Why.GIVEN)[1]["beta"] == ""


def test_the_scorer_that_judges_stands_first(make_audit):
    others = [{"name": "length", "agreement": 0.9, "low": 0.88, "high": 0.92}]
    tables, _ = said(make_audit, scorers=[*others, {"name": "gradients", "agreement": 0.71, "is_taken": True}])
    assert [(row["name"], row["is_surface"]) for row in tables["scorers"]] == [("gradients", False), ("length", True)]


def test_every_name_in_the_table_has_a_meaning():
    assert MEANINGS.keys() == {features.TOGETHER, *features.KINDS, features.LENGTH, *SCORERS} - {"features"}
    assert SURFACE.keys() == {features.LENGTH, features.NGRAMS}


def test_both_readings_of_the_flip_rate_are_told(make_audit):
    tables, sentences = said(make_audit)
    assert tables["with_length"] == {"rate": 0.15, "low": 0.05, "high": 0.25}
    for rate in (tables["estimate"], tables["with_length"]):
        assert f"{percent(rate['rate'])} ({percent_range(rate['low'], rate['high'])})" in sentences["readings"]
    assert said(make_audit, flip_rate_with_length=None)[1]["readings"] == ""


@pytest.mark.parametrize("is_informative", [True, False])
def test_a_filter_that_follows_length_is_warned_of_at_once(make_audit, is_informative):
    tables, sentences = said(make_audit, is_informative=is_informative)
    length = feature("length in characters", 0.4, kept=(0.24, 0.2, 0.28), rest=(0.88, 0.84, 0.91))
    biases = {"num_pairs": 100, "min_differing": 20}
    warned = write_sentences(tables | {"biases": biases | {"features": [length]}})["trust"]
    (warning,) = set(warned) - set(sentences["trust"])
    assert percent(0.24) in warning
    assert percent(0.88) in warning
    overlaps = length | {"kept": length["all"] | {"high": 0.9}}
    assert write_sentences(tables | {"biases": biases | {"features": [overlaps]}})["trust"] == sentences["trust"]


def test_without_an_audit_nothing_is_said_about_scorers(make_run):
    tables, sentences = said(make_run)
    assert (tables["scorers"], sentences["knowledge"]) == ([], "")


@pytest.mark.parametrize(
    ("summary", "is_asked"),
    [
        ({"num_trusted": 0}, True),
        ({"num_trusted": 60}, False),
        ({"num_trusted": None}, False),
        ({"num_trusted": 0, "flip_rate": {"estimate": 0.2, "low": 0.18, "high": 0.22}}, False),
    ],
)
def test_trusted_pairs_are_asked_for_where_they_help(make_audit, summary, is_asked):
    assert ("trusted" in advised(make_audit, **summary)) == is_asked
    assert "trusted_first" not in advised(make_audit, **summary)


def test_without_signal_the_judging_models_are_to_be_trained_longer(make_audit):
    trained = [{"name": "models", "agreement": 0.71, "low": 0.69, "high": 0.73, "is_taken": True}]
    for scorers, has_models in ((trained, True), ([], False)):
        tables, _ = said(make_audit, is_informative=False, rho=0.0, scorers=scorers)
        assert ("--num_train_epochs" in advice(tables)["signal"]) == has_models
        assert not any("--rho 0" in text for text in advice(tables).values())
    tables, _ = said(make_audit, is_informative=False, rho=0.2)
    assert "--rho 0" in advice(tables)["signal"]


NO_SIGNAL = {"is_informative": False, "flip_rate": {"estimate": None, "low": 0.0, "high": 0.5}, "reason": "too weak"}


@pytest.mark.parametrize("flip_rate", [NO_SIGNAL["flip_rate"], {"estimate": 0.0, "low": 0.0, "high": 0.191}])
def test_contradicted_labels_are_to_be_read_where_nobody_can_tell_what_they_are(make_audit, flip_rate):
    """The margins may rank the flips perfectly; then that there is nothing to read is the worst advice."""
    run = make_audit(summary=NO_SIGNAL | {"flip_rate": flip_rate, "is_informative": flip_rate["estimate"] is not None})
    run["ledger"] = run["ledger"].set_column(6, "p_flip", pa.array([0.0] * 20))
    tables = build_tables(**run)
    num = sum(margin < 0 for margin in run["ledger"]["held_out_margin"].to_pylist())
    assert tables["contradicted"] == {"num": num, "share": num / 20}
    assert is_open(tables)
    assert doubt(tables) in tables["sentences"]["look"]
    assert tables["sentences"]["to_read"].endswith(f" {num}")
    assert [pair["margin"] for pair in tables["suspects"]] == sorted(pair["margin"] for pair in tables["suspects"])
    assert len(tables["suspects"]) == min(num, 10)
    assert {pair["p_flip"] for pair in tables["suspects"]} == {None}
    assert not {pair["row"] for pair in tables["suspects"]} & {pair["row"] for pair in tables["hard"]}
    assert {"reading", "verdicts"} <= set(advice(tables))
    assert next(iter(advice(tables))) == "trusted_first"


def test_nothing_needs_to_be_read_only_where_the_interval_ends_low(make_audit):
    run = make_audit(summary={"flip_rate": {"estimate": 0.0, "low": 0.0, "high": 0.02}})
    run["ledger"] = run["ledger"].set_column(6, "p_flip", pa.array([0.0] * 20))
    tables = build_tables(**run)
    assert not is_open(tables)
    assert tables["review"]["num_likely"] == 0
    assert doubt(tables) not in tables["sentences"]["look"]
    assert not {"reading", "review", "verdicts"} & set(advice(tables))


def test_without_held_out_margins_nothing_is_said_about_contradicted_labels(make_run):
    tables, sentences = said(make_run, **NO_SIGNAL)
    assert (tables["contradicted"], doubt(tables), sentences["margins"]) == (None, "", "")
    assert tables["suspects"] == []
    assert not {"trusted_first", "reading"} & set(advice(tables))


def test_a_wide_interval_says_so_beside_what_is_likely(make_audit):
    tables, sentences = said(make_audit, flip_rate={"estimate": 0.21, "low": 0.08, "high": 0.36})
    more = tables | {"contradicted": {"num": 9, "share": 0.45}}
    assert doubt(more) in write_sentences(more)["look"]
    assert "9" in doubt(more)
    assert percent(0.45) in doubt(more)
    assert doubt(tables) not in sentences["look"], "all that are contradicted are called"
    narrow, _ = said(make_audit, flip_rate=RATE)
    narrow |= {"contradicted": more["contradicted"]}
    assert doubt(narrow) not in write_sentences(narrow)["look"]


def test_two_sums_of_flips_are_told_apart(make_audit):
    """P(flipped) of the last models adds up to 5, the rate of the first ones makes it 8: a reader must not wonder."""
    _, sentences = said(make_audit, flip_rate={"estimate": 0.4, "low": 0.38, "high": 0.42})
    assert {"5.", "8:"} <= set(plain(sentences["look"]).split())
    _, same = said(make_audit, flip_rate={"estimate": 0.25, "low": 0.24, "high": 0.26})
    assert sentences["look"].startswith(same["look"])
    assert sentences["look"] != same["look"]


def test_bad_annotators_are_named_and_opposite_ones_apart(make_audit):
    tables, _ = said(make_audit)
    assert ("“a2”" in advice(tables)["annotators"], "“a3”" in advice(tables)["annotators"]) == (True, False)
    assert ("“a2”" in advice(tables)["opposite"], "“a3”" in advice(tables)["opposite"]) == (False, True)


def test_half_wrong_labels_are_not_called_the_opposite(make_audit):
    rates = [{"name": "b", "num_pairs": 30, "rate": 0.52, "low": low, "high": 0.6} for low in (0.4, 0.51)]
    half, opposite = (advice(said(make_audit, annotators=[rate])[0])["opposite"] for rate in rates)
    assert "“b”" in half
    assert half != opposite


def test_a_name_cannot_pass_for_a_command(make_audit):
    one = {"name": "`rm\n-rf` " + 50 * "x", "num_pairs": 9, "rate": 0.4, "low": 0.38, "high": 0.45}
    assert "“'rm -rf' " + 31 * "x" + "…”" in advice(said(make_audit, annotators=[one])[0])["annotators"]


def test_a_bad_part_of_the_file_is_named(make_run):
    tables, _ = said(make_run)
    common = {"num_pairs": 100, "first_row": 0, "last_row": 99}
    part = common | {"p_flip_mean": 0.1, "p_flip_others": 0.2, "is_high": False}
    bad = common | {"first_row": 1200, "last_row": 1399, "p_flip_mean": 0.6, "p_flip_others": 0.1, "is_high": True}
    text = advice(tables | {"file_parts": [part, bad]})["parts"]
    assert all(number in text for number in ("1,200", "1,399", "0.60", "0.10"))
    assert "0.20" not in text
    assert "parts" not in advice(tables | {"file_parts": [part]})


def feature(name, share, *, kept=(0.5, 0.4, 0.6), rest=(0.5, 0.4, 0.6), is_clear=True):
    groups = {
        key: {"num_pairs": 100, "share": values[0], "low": values[1], "high": values[2]}
        for key, values in (("all", (share, share - 0.1, share + 0.1)), ("kept", kept), ("not_kept", rest))
    }
    return {"name": name, "is_clear": is_clear, **groups}


def advice_on(make_run, *features):
    biases = {"num_pairs": 100, "min_differing": 20, "features": list(features)}
    return {name: plain(text) for name, text in advice(said(make_run)[0] | {"biases": biases}).items()}


def test_clear_biases_are_told_the_strongest_first(make_run):
    features = (feature("links", 0.7), feature("digits", 0.2), feature("headings", 0.9, is_clear=False))
    text = advice_on(make_run, *features)["biases"]
    assert text.index("less of “digits” (80 %)") < text.index("more of “links” (70 %)")
    assert "headings" not in text


def test_a_filter_that_learned_a_feature_is_told_from_labels_that_prefer_it(make_run):
    same = feature("digits", 0.8, kept=(0.8, 0.7, 0.9), rest=(0.75, 0.6, 0.9))
    some = feature("lists", 0.6, kept=(0.7, 0.6, 0.75), rest=(0.5, 0.4, 0.59))
    most = feature("links", 0.5, kept=(0.8, 0.75, 0.85), rest=(0.3, 0.2, 0.4), is_clear=False)
    text = advice_on(make_run, same, some, most)["filter"]
    assert text.index("“links”") < text.index("80 %") < text.index("30 %")
    assert "filter" not in advice_on(make_run, same)


@pytest.mark.parametrize(
    ("lengths", "num_truncated", "is_advised"),
    [({}, 3, True), ({"num_truncated": 0, "suggested": 600}, 0, False), ({"num_truncated": 1}, 1, True)],
)
def test_lengths_are_told_and_a_longer_maximum_advised(make_audit, lengths, num_truncated, is_advised):
    known = make_audit()["summary"]["token_lengths"] | lengths
    tables, sentences = said(make_audit, token_lengths=known)
    assert tables["token_lengths"]["num_truncated"] == num_truncated
    assert "`--max_length 1024`" in sentences["tokens"]
    assert f"`--max_length {known['suggested']}`" in sentences["tokens"]
    assert ("tokens" in advice(tables)) == is_advised


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (0.004, "0.4 %"), (0.0996, "10 %"), (0.123, "12 %"), (0.95, "95 %"), (0.996, "99.6 %")],
)
def test_percents_are_rounded_as_people_do(share, text):
    assert plain(percent(share)) == text


def test_an_unknown_interval_is_a_dash():
    assert percent_range(None, 0.2) == "–"
