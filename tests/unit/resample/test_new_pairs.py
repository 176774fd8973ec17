"""From dropped pairs to new ones: the margins of new pairs are those a plain scoring would give."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from ropo.data.tokenize import encode_prompts, tokenize_pairs
from ropo.logps.batch import Batching
from ropo.logps.score import score_pairs
from ropo.pairs import Pair, margin
from ropo.resample.new_pairs import Scored, Scoring, resample_pairs
from ropo.resample.select import Criteria, Guards, Refusal
from ropo.sampling.engine import Sampling
from ropo.sampling.generate import Sample, sample_responses

BATCHING = Batching(pad_token_id=0)
GUARDS = Guards()
NOTHING_BELIEVED = Guards(max_abs_margin=1e-9)


def sample(prompt, text, *, is_finished=True):
    return Sample(prompt=prompt, text=text, num_tokens=3, is_finished=is_finished)


@pytest.fixture
def reference(model):
    torch.manual_seed(1)
    other = type(model)(model.config)
    other.load_state_dict({name: value + 0.05 * torch.randn_like(value) for name, value in model.state_dict().items()})
    return other.eval()


@pytest.fixture
def parents(pairs):
    """Pairs of which the second response also stands in the first's place."""
    return pairs[:4]


def run(
    model, reference, tokenizer, parents, samples, *,
    earlier=None, rule="min_loss", guards=GUARDS, max_length=128, **options,
):  # fmt: skip
    """`earlier` is what the earlier model says of tokenized pairs."""
    tokens = tokenize_pairs(parents, tokenizer, max_length=max_length).tokens

    def scored(each):
        score = (
            each if callable(each) and not hasattr(each, "config") else partial(score_pairs, each, batching=BATCHING)
        )
        return Scored(parents=score(tokens), score=score)

    scoring = Scoring(
        policy=scored(model),
        reference=scored(reference),
        earlier=None if earlier is None else scored(earlier),
        margins_of=lambda policy, base: margin(policy, base, beta=0.1).double().numpy(),
    )
    criteria = Criteria(
        rule=rule, loss_of=lambda margins: np.log1p(np.exp(-margins)), kept_losses=np.array([9.0]), guards=guards
    )
    return resample_pairs(
        parents, samples, scoring=scoring, criteria=criteria, tokenizer=tokenizer, max_length=max_length, **options
    )


def test_margins_are_those_of_the_new_pairs(model, reference, tokenizer, parents):
    """Whatever original response it was paired with, in whatever orientation: scoring the new pair gives its margin."""
    samples = [sample(i, text) for i in range(4) for text in (" very kind", " cold soup and loud", " not good")]
    made = run(model, reference, tokenizer, parents, samples)
    assert [pair.row for pair in made.pairs] == [0, 1, 2, 3]
    assert [pair.parent_id for pair in made.pairs] == [pair.id for pair in parents]
    tokens = tokenize_pairs(made.pairs, tokenizer, max_length=128).tokens
    scored = [score_pairs(each, tokens, BATCHING) for each in (model, reference)]
    np.testing.assert_allclose(margin(*scored, beta=0.1).numpy(), made.margins, atol=1e-4)
    assert (made.margins > 0).all()
    originals = {(pair.chosen, pair.rejected) for pair in parents}
    used = {response for pair in made.pairs for response in (pair.chosen, pair.rejected)}
    assert used & {text for pair in originals for text in pair}


def test_unfinished_and_repeated_samples_are_counted(model, reference, tokenizer, parents):
    samples = [sample(0, " cut", is_finished=False), sample(1, parents[1].chosen), sample(1, parents[1].rejected)]
    made = run(model, reference, tokenizer, parents, samples)
    assert made.pairs == []
    assert made.refused[Refusal.UNFINISHED] == 1
    assert made.refused[Refusal.NOT_NEW] == 1
    assert made.refused[Refusal.SAME_TEXT] == 2


def test_nothing_sampled(model, reference, tokenizer, parents):
    assert run(model, reference, tokenizer, parents, []).pairs == []


def test_conversations_get_messages(model, reference, tokenizer):
    def said(text):
        return [{"role": "assistant", "content": text}]

    parent = Pair(prompt=[{"role": "user", "content": "soup?"}], chosen=said("good"), rejected=said("bad"), row=0)
    (made,) = run(model, reference, tokenizer, [parent], [sample(0, "very kind")]).pairs
    assert said("very kind") in (made.chosen, made.rejected)


SAMPLES = [(i, text) for i in range(4) for text in (" very kind", " cold soup and loud", " not good")]


def test_uncertainty_aware_follows_the_earlier_model(model, reference, tokenizer, parents):
    """With the policy itself as the earlier model nothing is refused; with one that thinks the opposite all is."""
    samples = [sample(*each) for each in SAMPLES]
    rule = "uncertainty_aware"

    def opposite(tokens):
        ours, base = (score_pairs(each, tokens, BATCHING) for each in (model, reference))
        return replace(ours, chosen=2 * base.chosen - ours.chosen, rejected=2 * base.rejected - ours.rejected)

    same = run(model, reference, tokenizer, parents, samples, earlier=model, rule=rule)
    assert same.pairs == run(model, reference, tokenizer, parents, samples).pairs
    found = run(model, reference, tokenizer, parents, samples, earlier=opposite, rule=rule)
    assert found.pairs == []
    assert found.refused[Refusal.DISAGREEMENT] == 2 * len(samples)


class Spy:
    """A judge that remembers what it was asked."""

    def __init__(self, *said):
        self.said, self.asked = said, []

    def __call__(self, pairs):
        self.asked += pairs
        return [self.said[i % len(self.said)] for i in range(len(pairs))]


def test_a_judge_is_asked_only_what_the_rule_cannot_settle(model, reference, tokenizer, parents):
    samples = [sample(*each) for each in SAMPLES]
    judge = Spy(0.9)
    assert run(model, reference, tokenizer, parents, samples, judge=judge).num_judged == 0
    assert judge.asked == []
    made = run(model, reference, tokenizer, parents, samples, judge=judge, weight=0.5, guards=NOTHING_BELIEVED)
    assert (made.num_judged, len(made.pairs), len(judge.asked)) == (4, 4, 4)
    assert made.pairs == judge.asked
    assert {pair.weight for pair in made.pairs} == {0.5}
    assert (made.margins > 0).all()


def test_a_judge_turns_pairs_round_or_leaves_them(model, reference, tokenizer, parents):
    samples = [sample(*each) for each in SAMPLES]
    judge = Spy(0.1, None, 0.5, 0.9)
    made = run(model, reference, tokenizer, parents, samples, judge=judge, guards=NOTHING_BELIEVED)
    turned, stays = made.pairs
    assert (turned.chosen, turned.rejected) == (judge.asked[0].rejected, judge.asked[0].chosen)
    assert stays == judge.asked[3]
    assert made.margins[0] < 0 < made.margins[1]
    assert made.refused[Refusal.PROMPT_UNSETTLED] == 2
    tokens = tokenize_pairs(made.pairs, tokenizer, max_length=128).tokens
    scored = [score_pairs(each, tokens, BATCHING) for each in (model, reference)]
    np.testing.assert_allclose(margin(*scored, beta=0.1).numpy(), made.margins, atol=1e-4)


def test_a_judge_is_asked_about_no_more_than_there_is_room_for(model, reference, tokenizer, parents):
    """What it settles counts among the new pairs, and every question may cost money."""
    samples = [sample(*each) for each in SAMPLES]
    judge = Spy(0.9)
    made = run(
        model, reference, tokenizer, parents, samples, judge=judge, guards=Guards(max_abs_margin=1e-9, max_share=2)
    )
    assert (len(made.pairs), len(judge.asked)) == (2, 2)
    assert made.refused[Refusal.OVER_LIMIT] == 2
    assert Refusal.PROMPT_UNSETTLED not in made.refused
    judge = Spy(0.9)
    made = run(model, reference, tokenizer, parents, samples, judge=judge, guards=Guards(max_share=2))
    assert (len(made.pairs), judge.asked) == (2, [])


def test_a_response_that_is_cut_is_refused(model, reference, tokenizer, parents):
    """Training would never read its end; a parent that is cut says nothing of its sample."""
    longest = max(len(tokenizer(pair.prompt)["input_ids"]) for pair in parents)
    samples = [sample(0, " very kind" * 40), sample(1, " kind")]
    made = run(model, reference, tokenizer, parents, samples, max_length=longest + 8)
    assert [pair.row for pair in made.pairs] == [1]
    assert made.refused[Refusal.CUT] == 1


def test_sampling_is_repeatable_and_in_order(model, tokenizer, pairs):
    prompts = encode_prompts([pair.prompt for pair in pairs], tokenizer)
    options = {"sampling": Sampling(num_candidates=3, max_new_tokens=8), "seed": 5}
    first = sample_responses(model, tokenizer, prompts, **options)
    again = sample_responses(model, tokenizer, prompts, **options)
    other = sample_responses(model, tokenizer, prompts, **{**options, "seed": 6})
    assert first == again
    assert first != other
    assert [each.prompt for each in first] == [i for i in range(20) for _ in range(3)]
    assert all(each.num_tokens <= 8 for each in first)
    assert len({each.text for each in first[:3]}) > 1


def test_padding_does_not_reach_the_text(model, tokenizer, pairs):
    """A prompt gets the same greedy-like answer alone as in a batch with a much longer one."""
    prompts = encode_prompts([pairs[0].prompt, pairs[1].prompt * 3], tokenizer)
    options = {"sampling": Sampling(num_candidates=1, max_new_tokens=6, temperature=1e-4)}
    alone = [sample_responses(model, tokenizer, [prompt], **options)[0].text for prompt in prompts]
    together = [each.text for each in sample_responses(model, tokenizer, prompts, **options)]
    assert together == alone


def test_drawn_tokens_are_what_is_scored(model, reference, tokenizer, parents):
    """Letter by letter instead of in the tokens that the text would give; on whichever side the response ends up."""
    letters = tokenizer.convert_tokens_to_ids(["Ġ", *"verykind"])
    assert tokenizer.decode(letters) == " verykind"
    assert tokenizer(" verykind", add_special_tokens=False)["input_ids"] != letters
    samples = [replace(sample(i, " verykind"), ids=(*letters, tokenizer.eos_token_id)) for i in range(4)]
    for judge, guards in ((None, GUARDS), (Spy(0.1, 0.9), NOTHING_BELIEVED)):
        made = run(model, reference, tokenizer, parents, samples, judge=judge, guards=guards)
        assert len(made.pairs) == len(made.sampled) == 4
        for pair, drawn in zip(made.pairs, made.sampled, strict=True):
            assert getattr(pair, drawn.name) == " verykind"
            assert drawn.ids == samples[0].ids
        tokens = tokenize_pairs(made.pairs, tokenizer, max_length=128, sampled=made.sampled).tokens
        scored = [score_pairs(each, tokens, BATCHING) for each in (model, reference)]
        np.testing.assert_allclose(margin(*scored, beta=0.1).numpy(), made.margins, atol=1e-4)


def test_a_response_with_a_control_token_is_refused(model, reference, tokenizer, parents):
    """The text that a judge or a reader sees would not show it."""
    ids = (*tokenizer(" kind")["input_ids"], tokenizer.pad_token_id, tokenizer.eos_token_id)
    made = run(model, reference, tokenizer, parents, [replace(sample(0, " kind"), ids=ids)])
    assert made.pairs == []
    assert made.refused[Refusal.CONTROL_TOKEN] == 1
    said = run(model, reference, tokenizer, parents, [sample(0, f" kind{tokenizer.eos_token} and more")])  # of a server
    assert said.pairs == []
    assert said.refused[Refusal.CONTROL_TOKEN] == 1


def test_white_space_makes_no_new_response(model, reference, tokenizer, parents):
    samples = [sample(1, parents[1].rejected.strip())]
    assert run(model, reference, tokenizer, parents, samples).refused[Refusal.SAME_TEXT] == 2
