import pyarrow as pa
import pytest

from ropo.audit import features
from ropo.audit.features import BLOCKS
from ropo.audit.run import SCORERS
from ropo.audit.weights import Why
from ropo.report.clauses import CLAUSES
from ropo.report.from_summary import MEANINGS, SURFACE
from ropo.report.sentences import why_hard, write_sentences
from ropo.report.tables import build_tables
from ropo.report.wording import NB_SPACE, percent, percent_range

RATE = {"estimate": 0.29, "low": 0.26, "high": 0.32}


def said(make_run, **summary):
    run = make_run(summary=summary)
    tables = build_tables(**run)
    return tables, write_sentences(tables)


def plain(text):
    return text.replace(NB_SPACE, " ")


def test_the_headline_states_rate_and_interval(make_run):
    _, sentences = said(make_run, flip_rate=RATE)
    assert plain(sentences["title"]) == "About 29 % of the labels look flipped"
    assert plain(sentences["interval"]) == "90 % interval 26–32 %, from 20 pairs."


def test_without_signal_the_headline_says_so_with_the_reason(make_run):
    tables, sentences = said(make_run, is_informative=False, reason="The margins spread over 0.01 nats only.")
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


def test_a_wide_interval_that_reaches_zero_is_not_called_clean(make_run):
    _, sentences = said(make_run, flip_rate={"estimate": 0.06, "low": 0.0, "high": 0.196}, rho=0.0)
    assert plain(sentences["title"]) == "Anything from none to 20 % of the labels may be flipped"


def test_the_first_screen_counts_what_to_read_and_what_was_done(make_run):
    _, sentences = said(make_run, flip_rate=RATE)
    assert "P(flipped) add up to about 3 wrong labels, those of all pairs to 5." in plain(sentences["look"])
    assert plain(sentences["done"]).startswith(
        "Of 20 pairs, 16 kept, 2 dropped, 1 flipped and 1 dropped and replaced by a new pair."
    )
    assert sentences["budget"] == "ρ = 0.20, the share to filter out."  # a summary of before, without a reason


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


def test_rules_keep_silent_when_they_do_not_apply(make_audit):
    quiet = {"estimate": 0.2, "low": 0.18, "high": 0.22}
    silent = {"problems": {"truncated": 3}, "annotators": [], "token_lengths": None, "num_trusted": 50}
    tables, _ = said(make_audit, flip_rate=quiet, rho=0.2, task="train", **silent)
    assert [text[:14] for text in write_sentences(tables)["next"]] == ["Read the first"]


def test_trust_tells_what_became_of_labels_turned_on_purpose(make_audit):
    _, sentences = said(make_audit)
    assert plain(sentences["trust"][0]) == (
        "We flipped each of 100 labels once after the margins were made, 10 at a time: 85 % of them "
        "(interval 78–90 %) were called flipped, and 20 % of the others."
    )
    assert plain(sentences["trust"][1]) == (
        "So about 90 % of the truly wrong labels are found, and about 70 % of the called ones are truly wrong. Both "
        "depend on the flip rate: across its interval the first is 80–95 %, the second 55–90 %."
    )


@pytest.mark.parametrize(
    ("recall", "words"),
    [(0.65, "65 % of wrong labels would be called flipped"), (0.0, "hardly any wrong label would be called flipped")],
)
def test_trust_without_a_precision_claims_none(make_audit, recall, words):
    _, sentences = said(make_audit, calibration=calibration() | {"recall": recall, "precision": None})
    assert words in plain(sentences["trust"][1])
    assert "truly wrong" not in sentences["trust"][1]


def calibration():
    ranges = {"recall_range": [0.6, 0.7], "precision_range": [0.0, 0.5]}
    return {"num_injected": 4, "num_turned": 40, "share_found": 0.5, "share_others": 0.1, "bins": [], **ranges}


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        ({"is_informative": False}, "with so little signal there is none to test"),
        ({"flip_rate": {"estimate": 0.0, "low": 0.0, "high": 0.03}}, "it says that none is flipped"),
        ({}, "there are too few pairs for it"),
    ],
)
def test_trust_says_why_there_was_no_test(make_audit, summary, words):
    _, sentences = said(make_audit, calibration=None, **summary)
    assert words in sentences["trust"][0]
    assert "We flipped" not in " ".join(sentences["trust"])


def test_margins_of_the_trained_model_are_no_test_of_labels(make_run):
    _, sentences = said(make_run)
    assert "--num_folds 5" in sentences["trust"][0]
    assert any("`ropo audit`, asks models that have not seen the pairs" in advice for advice in sentences["next"])


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        ({}, "Training would use α = 5.4, the weight of the noise-tolerant part of the loss, since it was given."),
        ({"task": "train"}, "α = 5.4, the weight"),
        ({"alpha": 0.0}, "Training would use α = 0: plain DPO, since it was given."),
        ({"alpha": 0.0, "alpha_why": "", "task": "train"}, "α = 0: plain DPO."),
        ({"alpha": 0.0, "alpha_why": Why.AFTER_FILTER}, "Training would use α = 0: plain DPO, since what looks wrong"),
    ],
)
def test_alpha_is_stated_with_its_reason(make_audit, summary, words):
    _, sentences = said(make_audit, **summary)
    assert sentences["alpha"].startswith(words)
    assert "exactly DPO" not in sentences["alpha"]  # some pairs are dropped


def test_alpha_is_not_stated_for_losses_without_one(make_audit, make_run):
    assert said(make_audit, config={"loss": "simpo"}, alpha=0.0)[1]["alpha"] == ""
    assert said(make_run)[1]["alpha"] == ""  # a summary of before


def test_clean_labels_mean_exactly_dpo(make_audit):
    clean = {"flip_rate": {"estimate": 0.0, "low": 0.0, "high": 0.03}, "rho": 0.0, "alpha": 0.0}
    run = make_audit(summary=clean | {"rho_why": Why.MAY_BE_CLEAN, "alpha_why": Why.AFTER_FILTER})
    run["ledger"] = run["ledger"].set_column(7, "decision", [["keep"] * 20])
    sentences = write_sentences(build_tables(**run))
    assert sentences["budget"] == "ρ = 0, so nothing is filtered out, since the labels may all be right."
    assert sentences["alpha"].endswith("With every pair kept, training is exactly DPO.")
    assert any("nothing has to be done about the labels: training is exactly DPO" in text for text in sentences["next"])
    assert any("every pair is kept" in text for text in sentences["next"])


def test_an_audit_says_what_training_would_do_and_what_a_person_can_do(make_audit):
    _, sentences = said(make_audit)
    assert plain(sentences["done"]).startswith("Training would keep 16 of 20 pairs, drop 3 and flip 1. ρ = 0.20")
    advice = [plain(text) for text in sentences["next"]]
    assert any("`verdict`: right, wrong or drop. Then `ropo train --decisions review.csv`" in text for text in advice)
    assert any("`cleaned.jsonl`, with any trainer: it holds the 17 pairs" in text for text in advice)
    assert any("`--trusted`" in text for text in advice)
    assert not any("--rounds" in text for text in advice)


def test_noise_that_is_left_is_told(make_audit):
    done = "About 10 % of the labels that are left should still be wrong."
    assert done in plain(said(make_audit)[1]["done"])
    assert "should still be wrong" not in said(make_audit, noise_left=0.0001)[1]["done"]


@pytest.mark.parametrize("why", Why)
def test_every_reason_has_a_clause(make_audit, why):
    _, sentences = said(make_audit, rho_why=str(why), alpha_why=str(why))
    assert f", since {CLAUSES[why]}." in sentences["budget"]
    assert f", since {CLAUSES[why]}." in sentences["alpha"]


def scorer(name, agreement, **more):
    return {"name": name, "agreement": agreement, "low": agreement - 0.02, "high": agreement + 0.02} | more


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([], "What judges the labels agrees with 71 % of those it has not seen."),
        ([scorer("n-grams", 0.6), scorer("length", 0.65)], "the surface of the texts, length, with 65 %."),
        ([scorer("length", 0.70)], "length, with 70 %. So it may know no more than that"),
        ([scorer("hidden states", 0.70), scorer("n-grams", 0.6)], "the texts, n-grams, with 60 %."),
    ],
)
def test_the_audit_says_whether_it_knows_more_than_the_surface(make_audit, others, words):
    taken = scorer("gradients", 0.71, is_taken=True)
    tables, sentences = said(make_audit, scorers=[*others, taken], filter=None)
    assert words in plain(sentences["knowledge"])
    assert ("no more than that" in sentences["knowledge"]) == ("no more" in words)
    assert [row["name"] for row in tables["scorers"]][:1] == ["gradients"]


def test_every_name_in_the_table_has_a_meaning():
    assert MEANINGS.keys() == {*BLOCKS, features.LENGTH, features.NGRAMS, *SCORERS} - {"features"}
    assert SURFACE.keys() == {features.LENGTH, features.NGRAMS}


@pytest.mark.parametrize(("helps", "words"), [(True, "so they judge here"), (False, "models of all pairs judge here")])
def test_the_audit_says_whether_a_filter_helps(make_audit, helps, words):
    _, sentences = said(make_audit, filter={"gain": 0.0213, "error": 0.004, "helps": helps})
    assert "agree with 2.1 points more of them (standard error 0.4), " in sentences["knowledge"]
    assert words in sentences["knowledge"]


def test_both_readings_of_the_flip_rate_are_told(make_audit):
    _, sentences = said(make_audit)
    assert "which makes the flip rate 21 % (8–36 %). Were lengths evidence, it would be 15 % (5–25 %); if" in plain(
        sentences["readings"]
    )
    other = {"estimate": None, "low": 0.0, "high": 0.3}
    assert "it would be 0–30 %; if" in plain(said(make_audit, flip_rate_with_length=other)[1]["readings"])
    assert said(make_audit, flip_rate_with_length=None)[1]["readings"] == ""


@pytest.mark.parametrize("is_informative", [True, False])
def test_a_filter_that_follows_length_is_warned_of_at_once(make_audit, is_informative):
    tables, _ = said(make_audit, is_informative=is_informative)
    length = feature("length in characters", 0.4, kept=(0.24, 0.2, 0.28), rest=(0.88, 0.84, 0.91))
    for entry, is_told in ((length, True), (length | {"kept": length["all"] | {"high": 0.9}}, False)):
        biases = {"num_pairs": 100, "min_differing": 20, "features": [entry]}
        trust = plain(" ".join(write_sentences(tables | {"biases": biases})["trust"]))
        assert ("chosen is the longer one in 24 % of the kept pairs and in 88 % of the others" in trust) == is_told
        assert ("differ in length" in trust) == is_told
    assert "differ in length" not in " ".join(said(make_audit)[1]["trust"])


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
    _, sentences = said(make_audit, **summary)
    assert any("--trusted" in advice for advice in sentences["next"]) == is_asked


def test_without_signal_the_judging_models_are_to_be_trained_longer(make_audit):
    trained = [scorer("models", 0.71, is_taken=True)]
    _, sentences = said(make_audit, is_informative=False, rho=0.0, scorers=trained)
    advice = " ".join(sentences["next"])
    assert "(`--num_train_epochs`, `--learning_rate`), or a larger model" in advice
    advice = " ".join(said(make_audit, is_informative=False, rho=0.0)[1]["next"])
    assert "What brings a signal: more pairs, or a larger model." in advice
    assert "--rho 0" not in advice


NO_SIGNAL = {"is_informative": False, "flip_rate": {"estimate": None, "low": 0.0, "high": 0.5}, "reason": "too weak"}


@pytest.mark.parametrize("flip_rate", [NO_SIGNAL["flip_rate"], {"estimate": 0.0, "low": 0.0, "high": 0.191}])
def test_contradicted_labels_are_to_be_read_where_nobody_can_tell_what_they_are(make_audit, flip_rate):
    """The margins may rank the flips perfectly; then "there is nothing to read" is the worst advice."""
    run = make_audit(summary=NO_SIGNAL | {"flip_rate": flip_rate, "is_informative": flip_rate["estimate"] is not None})
    run["ledger"] = run["ledger"].set_column(6, "p_flip", pa.array([0.0] * 20))
    tables = build_tables(**run)
    sentences = tables["sentences"]
    num = sum(margin < 0 for margin in run["ledger"]["held_out_margin"].to_pylist())
    assert f"{num} labels ({100 * num / 20:.0f} %) are contradicted by models that have not seen them. " in plain(
        sentences["look"]
    )
    assert sentences["look"].endswith(
        "Whether these are flips or honest doubt cannot be told; they stand first in `review.csv`: read the first ones."
    )
    assert sentences["to_read"] == f"the first {num}"
    assert [pair["margin"] for pair in tables["suspects"]] == sorted(pair["margin"] for pair in tables["suspects"])
    assert len(tables["suspects"]) == min(num, 10)
    assert {pair["p_flip"] for pair in tables["suspects"]} == {None}
    assert not {pair["row"] for pair in tables["suspects"]} & {pair["row"] for pair in tables["hard"]}
    assert "do not tell how many labels are flipped" in sentences["margins"]
    assert sentences["next"][0].startswith("Make a file of 50 to 200 further pairs whose labels you know to be right")
    assert any("Read the first" in advice and "honest doubt: keep them" in advice for advice in sentences["next"])
    assert any("fill in the column `verdict`" in advice for advice in sentences["next"])
    said_all = str(sentences)
    for wrong in ("no list to read", "none needs to be read", "look the same", "nothing has to be done"):
        assert wrong not in said_all


def test_nothing_needs_to_be_read_only_where_the_interval_ends_low(make_audit):
    run = make_audit(summary={"flip_rate": {"estimate": 0.0, "low": 0.0, "high": 0.02}})
    run["ledger"] = run["ledger"].set_column(6, "p_flip", pa.array([0.0] * 20))
    sentences = build_tables(**run)["sentences"]
    assert "2 % of the labels are wrong at most, so none needs to be read." in plain(sentences["look"])
    assert sentences["to_read"] == "none"


def test_without_held_out_margins_nothing_is_said_about_contradicted_labels(make_run):
    tables, sentences = said(make_run, **NO_SIGNAL)
    assert tables["contradicted"] is None
    assert tables["suspects"] == []
    assert "contradict" not in str({name: text for name, text in sentences.items() if name != "hard"})
    assert "agrees with them, too" in " ".join(sentences["trust"])


def test_a_wide_interval_says_so_beside_what_is_likely(make_audit):
    tables, _ = said(make_audit, flip_rate={"estimate": 0.21, "low": 0.08, "high": 0.36})
    sentences = write_sentences(tables | {"contradicted": {"num": 9, "share": 0.45}})
    assert "9 labels (45 %) are contradicted" in plain(sentences["look"])
    assert "tell the number of flips only roughly" in sentences["margins"]
    assert "Whether the others among these are flips or honest doubt cannot be told." in sentences["look"]
    assert "honest doubt" not in write_sentences(tables)["look"]  # all that are contradicted are called
    assert "honest doubt" not in said(make_audit, flip_rate=RATE)[1]["look"]


def test_two_sums_of_flips_are_told_apart(make_audit):
    """P(flipped) of the last models adds up to 5, the rate of the first ones makes it 8: a reader must not wonder."""
    _, sentences = said(make_audit, flip_rate={"estimate": 0.4, "low": 0.38, "high": 0.42})
    assert "those of all pairs to 5. The flip rate makes it 8: it is estimated" in plain(sentences["look"])
    _, sentences = said(make_audit, flip_rate={"estimate": 0.25, "low": 0.24, "high": 0.26})
    assert "The flip rate makes it" not in sentences["look"]


def test_bad_annotators_are_named_and_opposite_ones_apart(make_audit):
    advice = [plain(text) for text in said(make_audit)[1]["next"]]
    (worse,) = [text for text in advice if text.startswith("Look at the labels of")]
    assert worse.startswith("Look at the labels of “a2” (37–50 % of 12 labels) first")
    assert "overall (8–36 %)" in worse
    assert "a3" not in worse
    (opposite,) = [text for text in advice if "they mean the opposite" in text]
    assert "labels of “a3” look flipped" in opposite


def test_half_wrong_labels_are_not_called_the_opposite(make_audit):
    rates = [{"name": "b", "num_pairs": 30, "rate": 0.52, "low": 0.4, "high": 0.6}]
    advice = " ".join(said(make_audit, annotators=rates)[1]["next"])
    assert "Half of the labels of “b”, or more, look flipped: they say nothing, or the opposite" in advice
    assert "they mean the opposite" not in advice


def test_a_name_cannot_pass_for_a_command(make_audit):
    one = {"name": "`rm\n-rf` " + 50 * "x", "num_pairs": 9, "rate": 0.4, "low": 0.38, "high": 0.45}
    advice = " ".join(said(make_audit, annotators=[one])[1]["next"])
    assert "“'rm -rf' " + 31 * "x" + "…”" in advice


def test_a_bad_part_of_the_file_is_named(make_run):
    tables, _ = said(make_run)
    part = {
        "first_row": 0,
        "last_row": 99,
        "num_pairs": 100,
        "p_flip_mean": 0.1,
        "p_flip_others": 0.2,
        "is_high": False,
    }
    bad = {
        "first_row": 1200,
        "last_row": 1399,
        "num_pairs": 100,
        "p_flip_mean": 0.6,
        "p_flip_others": 0.1,
        "is_high": True,
    }
    (advice,) = [text for text in write_sentences(tables | {"file_parts": [part, bad]})["next"] if "as a batch" in text]
    assert advice.startswith(
        "Look at rows 1,200 to 1,399 as a batch: their mean P(flipped) is up to 0.60, against 0.10"
    )


def feature(name, share, *, kept=(0.5, 0.4, 0.6), rest=(0.5, 0.4, 0.6), is_clear=True):
    groups = {
        key: {"num_pairs": 100, "share": values[0], "low": values[1], "high": values[2]}
        for key, values in (("all", (share, share - 0.1, share + 0.1)), ("kept", kept), ("not_kept", rest))
    }
    return {"name": name, "is_clear": is_clear, **groups}


def advice_on(make_run, *features):
    tables, _ = said(make_run)
    biases = {"num_pairs": 100, "min_differing": 20, "features": list(features)}
    return [plain(text) for text in write_sentences(tables | {"biases": biases})["next"]]


def test_clear_biases_are_told_the_strongest_first(make_run):
    advice = advice_on(
        make_run, feature("links", 0.7), feature("digits", 0.2), feature("headings", 0.9, is_clear=False)
    )
    (text,) = [text for text in advice if "Where the two responses differ" in text]
    assert "less of “digits” (80 %) and more of “links” (70 %)" in text
    assert "headings" not in text


def test_a_filter_that_learned_a_feature_is_told_from_labels_that_prefer_it(make_run):
    same = feature("digits", 0.8, kept=(0.8, 0.7, 0.9), rest=(0.75, 0.6, 0.9))
    some = feature("lists", 0.6, kept=(0.7, 0.6, 0.75), rest=(0.5, 0.4, 0.59))
    most = feature("links", 0.5, kept=(0.8, 0.75, 0.85), rest=(0.3, 0.2, 0.4), is_clear=False)
    (text,) = [text for text in advice_on(make_run, same, some, most) if "the filter has learned it" in text]
    assert "differ in “links”, chosen has more of it in 80 % of the kept ones and in 30 % of the others" in text
    assert not any("the filter has learned it" in text for text in advice_on(make_run, same))


@pytest.mark.parametrize(
    ("lengths", "told", "is_advised"),
    [
        ({}, "3 pairs (15 %) are cut at `--max_length 1024`. 99 % of the pairs fit in `--max_length 1500`.", True),
        ({"num_truncated": 0, "suggested": 600}, "No pair is cut at `--max_length 1024`.", False),
        ({"num_truncated": 1}, "1 pair (5 %) is cut at", True),
    ],
)
def test_lengths_are_told_and_a_longer_maximum_advised(make_audit, lengths, told, is_advised):
    known = make_audit()["summary"]["token_lengths"] | lengths
    _, sentences = said(make_audit, token_lengths=known)
    assert plain(sentences["tokens"]).startswith(told)
    assert any("lets 99 % of the pairs fit" in plain(text) for text in sentences["next"]) == is_advised


@pytest.mark.parametrize(
    ("checks", "are_moments", "is_late", "words"),
    [
        ([-1.5, -0.5, 0.2], True, True, "contradicted the label at first, but learned to agree with it"),
        ([0.3, -1.2, 0.4], True, False, "is of two minds"),
        ([0.3, 0.2, 0.4], True, False, "agreed with the label at every check"),
        ([0.3, -1.2, 0.4], False, False, "some features agree with the label, and on others they contradict it"),
        ([0.3, 0.2, 0.4], False, False, "linear models on all features agree with the label"),
    ],
)
def test_why_a_pair_is_hard(checks, are_moments, is_late, words):
    text = why_hard({"checks": checks, "are_moments": are_moments, "is_learned_late": is_late})
    assert text.startswith("Not a suspect: ")
    assert words in text
    assert f"0.{checks[2] * 10:.0f} nats)" in text


def test_verdicts_are_left_out_of_what_to_read(make_audit):
    tables, _ = said(make_audit)
    tables["counts"]["num_judged"] = 2
    assert plain(write_sentences(tables)["look"]).endswith("2 pairs with a review decision are not counted.")


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
