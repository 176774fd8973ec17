import math
import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ropo_bench.grammar import REVIEWS, SUPPORT, sample_prompt, sample_response
from ropo_bench.toy import gold_reward, make_model, make_pairs, make_tokenizer, pretrain, save_toy

PROMPT = "Review the soup at the Blue Door ."


def draw(grammar, number=500) -> list[tuple[str, str]]:
    rng = random.Random(0)
    prompts = [sample_prompt(rng, grammar=grammar) for _ in range(number)]
    return [(prompt, sample_response(prompt, rng, grammar=grammar)) for prompt in prompts]


@pytest.fixture(scope="module")
def drawn() -> list[tuple[str, str]]:
    return draw(REVIEWS)


@pytest.fixture(scope="module")
def words():
    return make_tokenizer()


def praise(sentiment: float) -> float:
    return 2.5 * math.tanh(sentiment / 4)


def sentences(text: str) -> list[list[str]]:
    return [part.split() for part in re.findall(r"[^.]+\.?|\.", text) if part.strip()]


class TestGrammar:
    @pytest.mark.parametrize(("grammar", "num_nouns"), [(REVIEWS, 36), (SUPPORT, 20)], ids=["reviews", "support"])
    def test_word_lists_do_not_collide(self, grammar, num_nouns):
        """A noun names one topic; a word with a value is no subject, so each word of a response counts in one term."""
        nouns = [noun for group in grammar.groups for noun in group.nouns]
        assert len(nouns) == len(set(nouns)) == num_nouns
        assert not set(nouns) & {aspect for group in grammar.groups for aspect in group.aspects}
        valued, degrees = set(grammar.values), set(grammar.degrees)
        assert not valued & grammar.subjects
        assert not (valued | grammar.subjects) & (degrees | grammar.negations)
        assert valued | degrees | grammar.negations | grammar.subjects <= set(grammar.words)

    @pytest.mark.parametrize("grammar", [REVIEWS, SUPPORT], ids=["reviews", "support"])
    def test_vocabulary_is_closed_and_of_the_promised_size(self, grammar):
        assert {word for texts in draw(grammar) for text in texts for word in text.split()} <= set(grammar.words)
        assert 150 <= len(grammar.words) <= 300
        assert not any(word.isupper() for word in grammar.words), "a symbol without a rule"

    @pytest.mark.parametrize("grammar", [REVIEWS, SUPPORT], ids=["reviews", "support"])
    def test_it_can_read_what_it_writes(self, grammar):
        for _, response in draw(grammar):
            kinds = [grammar.parse(sentence) for sentence in sentences(response)]
            assert None not in kinds
            assert tuple(kinds) in grammar.beginnings
            assert grammar.num_repeated(response.split()) == 0

    @pytest.mark.parametrize("grammar", [REVIEWS, SUPPORT], ids=["reviews", "support"])
    def test_text_of_the_grammar_is_worth_nothing_on_average(self, grammar):
        """Standard error 0.02: the mean of 3,000 rewards is near 0 and their spread near 1."""
        rewards = [gold_reward(prompt, response, grammar=grammar) for prompt, response in draw(grammar, 3000)]
        assert abs(sum(rewards) / len(rewards)) < 0.15
        assert 0.9 < math.sqrt(sum(r * r for r in rewards) / len(rewards)) < 1.3

    @pytest.mark.parametrize(
        ("sentence", "kind"),
        [
            ("the taste was good .", "OPINION"),
            ("the taste was not very good .", "OPINION"),
            ("we loved the soup but the waiter seemed slightly rather .", None),
            ("it was my first time .", "FILLER"),
            ("five stars .", "CLOSING"),
            ("the taste was good", None),
            ("the taste good was .", None),
            ("the the taste was good .", None),
            ("the taste was goodness .", None),
            ("five stars . five stars .", None),
            ("fivestars .", None),
            (".", None),
        ],
    )
    def test_parse(self, sentence, kind):
        assert REVIEWS.parse(sentence.split()) == kind

    def test_it_rejects_shuffled_sentences(self, drawn):
        rng = random.Random(1)
        shuffled = []
        for _, response in drawn:
            for sentence in sentences(response):
                words = rng.sample(sentence, len(sentence))
                if words != sentence:
                    shuffled.append(REVIEWS.parse(words))
        accepted = sum(kind is not None for kind in shuffled) / len(shuffled)
        assert accepted < 0.01, "a few, such as two swapped aspects, are sentences again"

    def test_responses_stay_on_topic(self, drawn):
        for prompt, response in drawn:
            noun = REVIEWS.topic(prompt)
            assert set(response.split()) & REVIEWS.subjects <= {noun, *REVIEWS.topics[noun].aspects}

    @pytest.mark.parametrize(
        ("opinion", "is_happy"),
        [
            (r"\b(liked|loved|adored)", True),
            ("disliked|hated|loathed", False),
            ("was (superb|brilliant|perfect|good|nice|solid)", True),
            ("was (awful|horrible|useless|bad|dull|weak)", False),
        ],
    )
    def test_sentences_of_a_response_agree(self, opinion, is_happy):
        """Two in three closings fit the opinion. Without moods half would; 0.58 of 180 draws then has p = 0.02."""
        rng = random.Random(0)
        responses = [sample_response(PROMPT, rng) for _ in range(10_000)]
        said = [text for text in responses if re.search(opinion, text)]
        happy = sum(bool(re.search(r"would (try|choose)|recommend|four|five", text)) for text in said)
        unhappy = sum(bool(re.search(r"never|refund|avoid|two|one star", text)) for text in said)
        assert happy + unhappy > 180
        assert (happy if is_happy else unhappy) / (happy + unhappy) > 0.58

    def test_draws_differ(self, drawn):
        assert len({response for _, response in drawn}) > 490
        assert len({REVIEWS.topic(prompt) for prompt, _ in drawn}) == 36

    def test_prompt_without_topic_is_refused(self):
        with pytest.raises(ValueError, match=r"topic .*'soup'; got 'Hello \."):
            sample_response("Hello .", random.Random(0))


class TestGoldReward:
    @pytest.mark.parametrize(
        ("response", "expected"),
        [
            ("the taste was excellent .", praise(2)),
            ("the taste was good .", praise(1)),
            ("the taste was ordinary .", 0.0),
            ("the taste was bad .", praise(-1)),
            ("the taste was awful .", praise(-2)),
            ("the taste was very good .", praise(1.25)),
            ("the taste was slightly good .", praise(0.5)),
            ("the taste was not good .", praise(-0.5)),
            ("the taste was not bad .", praise(0.5)),
            ("the taste was not very good .", praise(-0.625)),
            ("nothing about the taste was bad .", praise(0.5)),
            ("the taste was not ordinary and the smell was good .", praise(1)),
            ("the taste was good and the smell was excellent .", praise(3)),
            ("the taste was bad but the smell was excellent .", praise(-0.5 + 3)),
            ("the smell was excellent but the taste was bad .", praise(1 - 1.5)),
            ("we loved the soup . i would never choose it again .", praise(2 - 0.5)),
            ("the taste was good . it was my first time . the smell was nice .", praise(2)),
            ("the taste was good.i recommend it.", praise(2)),
        ],
    )
    def test_hand_computed_sentiment(self, response, expected):
        assert gold_reward(PROMPT, response) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("response", "expected"),
        [
            ("", -4),
            ("   ", -4),
            ("the room was excellent .", praise(2) - 0.75),
            ("the pizza was excellent .", praise(2) - 0.75),
            ("the taste was excellent and the smell was excellent .", praise(4) - 0.4),
            ("the taste was excellent . the taste was superb .", praise(4) - 0.4),
            ("the taste excellent was .", -1),
            ("the taste awful was .", praise(-2) - 1),
            ("the taste was not bad awful .", praise(0.5 - 2) - 7 / 6),
            ("the taste was excellent", -1),
            ("the taste was excellent . we loved the", praise(2) - 1),
            ("the the the the the the the the the .", -10 / 6),
            ("five stars . the taste was good .", praise(3) - 2 * 0.75),
            ("the taste was good . i recommend it . the smell was nice .", praise(3) - 0.75),
            ("excellent " * 200, -4),
            ("the taste was excellent . " * 200, -4),
        ],
    )
    def test_hand_computed_penalties(self, response, expected):
        assert gold_reward(PROMPT, response) == pytest.approx(expected)

    @pytest.mark.parametrize(
        "response", ["<unk> <pad>", "the <unk> was excellent .", "The taste was Excellent .", "é 漢 .", "."]
    )
    def test_foreign_text_earns_nothing(self, response):
        assert -4 <= gold_reward(PROMPT, response) <= -1

    def test_about_zero_mean_and_unit_spread_with_room_above(self, drawn):
        """The standard error of the mean of 500 is 0.05."""
        rewards = torch.tensor([gold_reward(*texts) for texts in drawn], dtype=torch.float64)
        assert abs(rewards.mean()) < 0.3
        assert 0.8 < rewards.std() < 1.4
        best_of_16 = rewards[:496].reshape(-1, 16).amax(1).mean()
        assert best_of_16 > rewards.mean() + 1.5

    def test_damage_of_any_kind_costs(self, drawn):
        """On average over good responses: cut, doubled, run on and off-topic text is worse than the text itself."""
        good = [texts for texts in drawn if gold_reward(*texts) > 0.5]
        assert len(good) > 100
        other = "How was the hotel near North Beach ?"
        mean = sum(gold_reward(*texts) for texts in good) / len(good)
        for harmed in (
            [gold_reward(prompt, response.removesuffix(" .")) for prompt, response in good],
            [gold_reward(prompt, f"{response} {response}") for prompt, response in good],
            [gold_reward(prompt, response.replace(" .", "")) for prompt, response in good],
            [gold_reward(other, response) for prompt, response in good if REVIEWS.topic(prompt) not in other],
        ):
            assert sum(harmed) / len(harmed) < mean - 0.5


class TestPairs:
    def test_the_seed_decides_and_a_longer_list_begins_alike(self):
        assert make_pairs(40, seed=0) == make_pairs(60, seed=0)[:40]
        assert make_pairs(40, seed=0) != make_pairs(40, seed=1)

    def test_labels_are_right_and_never_a_matter_of_taste(self):
        pairs = make_pairs(400, seed=0, min_gap=0.3)
        gaps = [gold_reward(p.prompt, p.chosen) - gold_reward(p.prompt, p.rejected) for p in pairs]
        assert min(gaps) >= 0.3
        assert [pair.row for pair in pairs] == list(range(400))
        assert len({pair.id for pair in pairs}) == 400
        assert {pair.origin for pair in pairs} == {"data"}

    def test_length_does_not_give_the_label_away(self):
        """Share of pairs whose chosen response is longer; standard error 0.02."""
        pairs = [pair for pair in make_pairs(600, seed=0) if len(pair.chosen) != len(pair.rejected)]
        longer = sum(len(pair.chosen) > len(pair.rejected) for pair in pairs) / len(pairs)
        assert 0.35 < longer < 0.65


class TestTokenizer:
    def test_round_trip_without_unknown_words(self, drawn, words):
        for text in (text for texts in drawn for text in texts):
            ids = words(text)["input_ids"]
            assert words.decode(ids) == text
            assert len(ids) == len(text.split())
            assert min(ids) > words.unk_token_id

    @pytest.mark.parametrize("join", ["", " ", "\n"])
    def test_prompt_and_response_tokenise_independently(self, join, words):
        prompt, response = "How was the soup at Cafe Roma ?", ". the taste was good ."
        ids = [words(text)["input_ids"] for text in (prompt, response, prompt + join + response)]
        assert ids[2] == ids[0] + ids[1]

    def test_special_tokens(self, words):
        assert (words.pad_token_id, words.bos_token_id, words.eos_token_id, words.unk_token_id) == (0, 1, 2, 3)
        assert words("zebra <eos>")["input_ids"] == [3, 2]
        assert words.decode([5, 2, 0, 0], skip_special_tokens=True) == REVIEWS.words[1]
        assert words.model_max_length == 128

    def test_longest_text_fits(self, words):
        rng = random.Random(0)
        lengths = [len(sample_response(PROMPT, rng).split()) for _ in range(2000)]
        assert max(lengths) < make_model(words).generation_config.max_new_tokens


class TestModel:
    def test_the_seed_decides_and_the_global_state_is_left_alone(self, words):
        before = torch.get_rng_state()
        first, same, other = (make_model(words, seed=seed).state_dict() for seed in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(first[name], same[name]) for name in first)
        assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])

    def test_pretraining_learns_and_repeats(self, words):
        def train(seed: int = 0):
            model = make_model(words)
            steps = []
            nats = pretrain(model, words, num_texts=320, seed=seed, on_step=lambda *step: steps.append(step))
            return model, nats, steps

        model, nats, steps = train()
        assert [step[:2] for step in steps] == [(number, 10) for number in range(1, 11)]
        assert nats < 4.6 < math.log(len(words)) < steps[0][2]
        assert not model.training
        assert train()[1] == nats != train(seed=1)[1]

    def test_held_out_loss_is_of_response_tokens(self, words):
        """Counted again one text at a time, on the first 256 texts of the seed; training is switched off."""
        model = make_model(words)
        nats = pretrain(model, words, num_texts=32, learning_rate=1e-12)
        rng, total, num_tokens = random.Random(0), 0.0, 0
        for _ in range(256):
            prompt = sample_prompt(rng)
            response = [*words(sample_response(prompt, rng))["input_ids"], words.eos_token_id]
            ids = torch.tensor([words(prompt)["input_ids"] + response])
            with torch.no_grad():
                logps_TV = model(ids).logits[0, -len(response) - 1 : -1].log_softmax(-1)
            total -= logps_TV[range(len(response)), response].sum().item()
            num_tokens += len(response)
        assert nats == pytest.approx(total / num_tokens, rel=1e-4)

    def test_save_toy_writes_a_model_folder(self, tmp_path):
        nats = save_toy(tmp_path, num_texts=64, seed=3)
        assert 1 < nats < 10
        model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        assert len(tokenizer) == model.config.vocab_size == len(REVIEWS.words) + 4
        assert tokenizer.decode(tokenizer("the soup .")["input_ids"]) == "the soup ."
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
        out = model.generate(**tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False), max_new_tokens=4)
        assert out.shape[1] <= 8 + 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pretrained_model_writes_like_the_grammar(words, drawn):
    """A slip costs a whole penalty, so the samples are a little worse; the standard error of the difference is 0.07."""
    model = make_model(words)
    assert pretrain(model, words) < 1.45
    rewards, is_sentence = [], []
    torch.manual_seed(0)
    for prompt, _ in drawn:
        ids = torch.tensor([words(prompt)["input_ids"]])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :]
        response = words.decode(out, skip_special_tokens=True)
        rewards.append(gold_reward(prompt, response))
        is_sentence += [REVIEWS.parse(sentence) is not None for sentence in sentences(response)]
    assert abs(sum(rewards) - sum(gold_reward(*texts) for texts in drawn)) / len(drawn) < 0.45
    assert sum(is_sentence) / len(is_sentence) > 0.95
