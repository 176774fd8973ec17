"""Grammars of the embedded task: weighted rules that write short texts, read them, and say what their words are worth.

In: a source of randomness. Out: prompts and responses of a closed vocabulary.

The one idea: a `Grammar` is a value, a table of weighted rules. The same table writes text (draw an alternative for
each symbol), reads text (compiled to one regular expression, so a sentence either can or cannot be written by it) and
gives the vocabulary.

Add a grammar: write its `rules`, `groups` and word values beside `REVIEWS`; `ropo_bench.toy` takes it as `grammar`.
"""

import functools
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["REVIEWS", "SUPPORT", "Grammar", "Group", "Rules", "sample_prompt", "sample_response"]

Rules = Mapping[str, Mapping[str, float]]  # symbol -> {expansion: weight}; a word that is no symbol stands for itself


@dataclass(frozen=True, kw_only=True)
class Group:
    """Topics that have the same aspects, such as all dishes.

    Attributes:
        nouns: The topics; a noun belongs to one group only.
        places: Where a topic of the group can be.
        link: The word between noun and place in a prompt.
        aspects: What can be said something about; groups may share an aspect.
    """

    nouns: tuple[str, ...]
    places: tuple[str, ...]
    link: str
    aspects: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """A weighted grammar of prompts and responses, and the value of its words.

    Attributes:
        rules: All rules that do not depend on the topic. PROMPT becomes a prompt; SENTENCE lists the kinds of sentence,
            RESPONSE the orders in which they can follow each other. Rules may use TOPIC, ASPECT, LINK and PLACE, which
            come from the group of the topic. No rule may lead back to itself.
        moods: For each mood of a response, all equally likely: the rules it replaces. Moods make the sentences of a
            response agree with each other.
        groups: The topics.
        values: What a word says about the topic, from −2 to +2; other words say nothing.
        degrees: Factor of an adverb on the value that follows it.
        negations: Words that turn the value that follows them.
    """

    rules: Rules
    moods: tuple[Rules, ...]
    groups: tuple[Group, ...]
    values: Mapping[str, float]
    degrees: Mapping[str, float]
    negations: frozenset[str]

    @functools.cached_property
    def topics(self) -> dict[str, Group]:
        """The group of each topic noun."""
        return {noun: group for group in self.groups for noun in group.nouns}

    @functools.cached_property
    def subjects(self) -> frozenset[str]:
        """All nouns and aspects: the words that belong to one topic and not to another."""
        return frozenset(word for group in self.groups for word in group.nouns + group.aspects)

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """The closed vocabulary, sorted."""
        everything = [self.bind(noun, mood) for noun in self.topics for mood in self.moods]
        expansions = {text for rules in everything for options in rules.values() for text in options}
        return tuple(sorted({word for text in expansions for word in text.split()} - {*everything[0]}))

    @functools.cached_property
    def beginnings(self) -> frozenset[tuple[str, ...]]:
        """All orders of kinds of sentence in which a response can begin."""
        orders = [tuple(expansion.split()) for expansion in self.rules["RESPONSE"]]
        return frozenset(order[:length] for order in orders for length in range(len(order) + 1))

    @functools.cached_property
    def _sentence(self) -> re.Pattern[str]:
        aspects = {aspect for group in self.groups for aspect in group.aspects}
        rules = {**self.rules, "TOPIC": _equally(*self.topics), "ASPECT": _equally(*aspects)}
        return re.compile("|".join(f"(?P<{kind}>{_pattern(rules, kind)})" for kind in self.rules["SENTENCE"]))

    def parse(self, sentence: list[str]) -> str | None:
        """Say which kind of sentence this is, about whatever topic, or None if the grammar cannot write it.

        Args:
            sentence: Its words, the full stop included.
        """
        match = self._sentence.fullmatch("".join(f"{word} " for word in sentence))
        return match.lastgroup if match else None

    def num_repeated(self, words: list[str]) -> int:
        """Count the uses of a word after its first, over the words that matter: nouns, aspects, words with a value."""
        uses = Counter(word for word in words if word in self.values or word in self.subjects)
        return uses.total() - len(uses)

    def topic(self, prompt: str) -> str:
        """Find the noun that a prompt asks about.

        Raises:
            ValueError: If the prompt names no topic of this grammar.
        """
        for word in prompt.split():
            if word in self.topics:
                return word
        raise ValueError(
            f"A toy prompt needs a topic of the grammar, such as {self.groups[0].nouns[0]!r}; got {prompt!r}. "
            "Draw prompts with sample_prompt."
        )

    def bind(self, noun: str, mood: Rules) -> Rules:
        """Give all rules for one topic and one mood; the result has a rule for every symbol."""
        group = self.topics[noun]
        bound = {
            "TOPIC": _equally(noun),
            "ASPECT": _equally(*group.aspects),
            "LINK": _equally(group.link),
            "PLACE": _equally(*group.places),
        }
        return {**self.rules, **mood, **bound}


def _equally(*expansions: str) -> dict[str, float]:
    return dict.fromkeys(expansions, 1.0)


def _pattern(rules: Rules, symbol: str) -> str:
    """Write all that a symbol can become as a regular expression over words that each end in a space."""
    alternatives = (
        "".join(_pattern(rules, part) if part in rules else re.escape(part) + " " for part in expansion.split())
        for expansion in rules[symbol]
    )
    return f"(?:{'|'.join(alternatives)})"


def _expand(rules: Rules, symbol: str, rng: random.Random) -> str:
    options = rules[symbol]
    (expansion,) = rng.choices(list(options), list(options.values()))
    parts = (_expand(rules, part, rng) if part in rules else part for part in expansion.split())
    return " ".join(part for part in parts if part)


_GREAT = ("excellent", "wonderful", "superb", "perfect", "fantastic", "brilliant")
_GOOD = ("good", "nice", "pleasant", "decent", "solid", "lovely")
_BAD = ("bad", "poor", "dull", "weak", "boring", "mediocre")
_AWFUL = ("awful", "terrible", "horrible", "dreadful", "miserable", "useless")

REVIEWS = Grammar(
    rules={
        "PROMPT": _equally(
            "Review the TOPIC LINK PLACE .",
            "Describe the TOPIC LINK PLACE .",
            "Tell me about the TOPIC LINK PLACE .",
            "Write a short review of the TOPIC LINK PLACE .",
            "How was the TOPIC LINK PLACE ?",
            "What do you think of the TOPIC LINK PLACE ?",
        ),
        "RESPONSE": {
            "OPINION": 2,
            "OPINION OPINION": 3,
            "OPINION CLOSING": 3,
            "FILLER OPINION": 2,
            "FILLER OPINION CLOSING": 2,
            "OPINION OPINION CLOSING": 2,
            "OPINION FILLER OPINION": 2,
            "OPINION OPINION OPINION": 1,
        },
        "SENTENCE": _equally("OPINION", "FILLER", "CLOSING"),
        "OPINION": {"CLAIM .": 5, "FRAME , CLAIM .": 2, "CLAIM and CLAIM .": 2, "CONTRAST .": 1},
        "CONTRAST": {"FOR but AGAINST": 2, "AGAINST but FOR": 2, "CLAIM but CLAIM": 1},
        "FOR": {"the SUBJECT VERB DEGREE PRAISE": 2, "WHO LIKED the SUBJECT": 1},
        "AGAINST": {"the SUBJECT VERB DEGREE BLAME": 2, "WHO DISLIKED the SUBJECT": 1},
        "CLAIM": {
            "the SUBJECT VERB DEGREE ADJECTIVE": 16,
            "the SUBJECT was not ADJECTIVE": 1,
            "the SUBJECT was not very ADJECTIVE": 1,
            "nothing about the SUBJECT was ADJECTIVE": 1,
            "everything about the TOPIC was DEGREE ADJECTIVE": 2,
            "WHO found the SUBJECT DEGREE ADJECTIVE": 4,
            "WHO FELT the SUBJECT": 6,
        },
        "SUBJECT": {"TOPIC": 2, "ASPECT": 5},
        "VERB": {"was": 6, "seemed": 2, "felt": 1, "looked": 1, "turned out": 1},
        "DEGREE": {"": 4, "ADVERB": 5},
        "ADVERB": {"very": 2, "really": 1, "extremely": 1, "quite": 1, "rather": 1, "slightly": 1, "somewhat": 1},
        "ADJECTIVE": {"PRAISE": 6, "PLAIN": 2, "BLAME": 5},
        "PRAISE": {"GREAT": 1, "GOOD": 1},
        "BLAME": {"BAD": 1, "AWFUL": 1},
        "GREAT": _equally(*_GREAT),
        "GOOD": _equally(*_GOOD),
        "PLAIN": _equally("ordinary", "average", "usual", "plain", "simple"),
        "BAD": _equally(*_BAD),
        "AWFUL": _equally(*_AWFUL),
        "FELT": {"LIKED": 1, "DISLIKED": 1},
        "LIKED": _equally("loved", "adored", "liked", "enjoyed"),
        "DISLIKED": _equally("hated", "loathed", "disliked", "regretted"),
        "FRAME": _equally("honestly", "overall", "this time", "in my opinion", "to be fair"),
        "WHO": {"i": 2, "we": 1},
        "FILLER": _equally(
            "WHO tried it on DAY .",
            "WHO tried it in the TIME .",
            "WHO had read about it before .",
            "WHO waited for NUMBER minutes .",
            "WHO paid by card .",
            "my FRIEND told me about it .",
            "my FRIEND was with me .",
            "it was my NTH time .",
        ),
        "DAY": _equally("monday", "tuesday", "friday", "saturday", "sunday"),
        "TIME": _equally("morning", "evening", "spring", "summer", "winter"),
        "NUMBER": _equally("ten", "twenty", "thirty"),
        "FRIEND": _equally("sister", "brother", "friend", "neighbor", "boss", "mother"),
        "NTH": _equally("first", "second", "last"),
        "CLOSING": {"HAPPY": 1, "CALM": 1, "UNHAPPY": 1},
        "HAPPY": _equally(
            "WHO would try it again .",
            "WHO would choose it again .",
            "WHO recommend it .",
            "four stars .",
            "five stars .",
        ),
        "CALM": _equally("three stars .", "see for yourself .", "that is all ."),
        "UNHAPPY": _equally(
            "WHO would never choose it again .", "WHO asked for a refund .", "avoid it .", "two stars .", "one star ."
        ),
    },
    moods=(
        {
            "ADJECTIVE": {"PRAISE": 9, "PLAIN": 2, "BLAME": 1},
            "FELT": {"LIKED": 5, "DISLIKED": 1},
            "CLOSING": {"HAPPY": 5, "CALM": 1, "UNHAPPY": 0.5},
        },
        {},
        {
            "ADJECTIVE": {"PRAISE": 1, "PLAIN": 2, "BLAME": 9},
            "FELT": {"LIKED": 1, "DISLIKED": 5},
            "CLOSING": {"HAPPY": 0.5, "CALM": 1, "UNHAPPY": 5},
        },
    ),
    groups=(
        Group(
            nouns=("soup", "pizza", "curry", "coffee", "bread", "cake"),
            places=("the Blue Door", "the Old Mill", "the Golden Spoon", "Cafe Roma"),
            link="at",
            aspects=("taste", "smell", "portion", "table", "waiter", "price"),
        ),
        Group(
            nouns=("train", "bus", "ferry", "flight", "tram", "taxi"),
            places=("Lisbon", "Oslo", "Vienna", "Dublin"),
            link="to",
            aspects=("seat", "ride", "crew", "view", "ticket", "price"),
        ),
        Group(
            nouns=("hotel", "hostel", "cabin", "apartment", "campsite", "inn"),
            places=("the Harbor", "the Old Town", "North Beach", "Green Valley"),
            link="near",
            aspects=("room", "bed", "shower", "breakfast", "garden", "host"),
        ),
        Group(
            nouns=("film", "play", "concert", "opera", "musical", "circus"),
            places=("the Grand Theater", "City Hall", "the Festival", "Green Park"),
            link="at",
            aspects=("story", "music", "ending", "cast", "stage", "sound"),
        ),
        Group(
            nouns=("phone", "laptop", "camera", "bike", "lamp", "chair"),
            places=("Novatek", "Brightline", "Kasawa", "Orbit"),
            link="from",
            aspects=("design", "color", "weight", "manual", "box", "finish"),
        ),
        Group(
            nouns=("dentist", "barber", "doctor", "tailor", "mechanic", "gym"),
            places=("Park Street", "Mill Lane", "Station Road", "Market Square"),
            link="on",
            aspects=("advice", "service", "office", "booking", "result", "price"),
        ),
    ),
    values={
        **dict.fromkeys((*_GREAT, "loved", "adored", "five"), 2.0),
        **dict.fromkeys((*_GOOD, "liked", "enjoyed", "four", "again", "recommend"), 1.0),
        **dict.fromkeys((*_BAD, "disliked", "regretted", "two", "avoid"), -1.0),
        **dict.fromkeys((*_AWFUL, "hated", "loathed", "one", "refund"), -2.0),
    },
    degrees={
        "extremely": 1.5, "very": 1.25, "really": 1.25, "quite": 0.75, "rather": 0.75, "slightly": 0.5, "somewhat": 0.5,
    },
    negations=frozenset({"not", "never", "nothing"}),
)  # fmt: skip


_WARM = ("gladly", "kindly", "happily", "warmly", "cheerfully")
_CAREFUL = ("carefully", "patiently", "calmly", "properly", "promptly")
_COLD = ("hastily", "coldly", "lazily", "vaguely", "grudgingly")
_RUDE = ("rudely", "angrily", "carelessly", "spitefully", "scornfully")

SUPPORT = Grammar(
    rules={
        "PROMPT": _equally(
            "My TOPIC LINK PLACE does not work .",
            "Please help me with the TOPIC LINK PLACE .",
            "There is a question about the TOPIC LINK PLACE .",
            "The TOPIC LINK PLACE is broken .",
            "Who looks after the TOPIC LINK PLACE ?",
        ),
        "RESPONSE": {
            "GREETING STEP": 3,
            "STEP": 1,
            "STEP STEP": 3,
            "GREETING STEP STEP": 3,
            "STEP OFFER": 2,
            "GREETING STEP OFFER": 3,
            "STEP STEP OFFER": 2,
        },
        "SENTENCE": _equally("GREETING", "STEP", "OFFER"),
        "GREETING": {"KIND_GREETING .": 1, "FLAT_GREETING .": 1, "SHARP_GREETING .": 1},
        "KIND_GREETING": _equally("thank you for writing", "welcome back", "we are sorry to hear that"),
        "FLAT_GREETING": _equally("dear customer", "hello", "your message arrived"),
        "SHARP_GREETING": _equally("you again", "what a silly question", "read the rules first"),
        "STEP": {"ACTION .": 5, "ACTION , then ACTION .": 2, "ACTION but ACTION .": 1, "WHEN ACTION .": 2},
        "WHEN": _equally("today", "within HOURS hours", "this week", "next month", "on DAY"),
        "ACTION": {
            "PERSON will DEGREE MANNER VERB the SUBJECT": 8,
            "PERSON will not MANNER VERB the SUBJECT": 2,
            "nobody will MANNER VERB the SUBJECT": 1,
            "the SUBJECT will be DEGREE MANNER DONE": 4,
            "you can VERB the SUBJECT yourself": 2,
        },
        "SUBJECT": {"TOPIC": 3, "ASPECT": 4},
        "PERSON": _equally("i", "we", "our team", "an expert", "my colleague"),
        "VERB": _equally("repair", "check", "replace", "clean", "test", "return"),
        "DONE": _equally("repaired", "checked", "replaced", "cleaned", "tested", "returned"),
        "DEGREE": {"": 4, "ADVERB": 3},
        "ADVERB": {"very": 2, "most": 1, "quite": 1, "rather": 1, "slightly": 1},
        "MANNER": {"NICE": 5, "NEUTRAL": 3, "NASTY": 5},
        "NICE": {"WARM": 1, "CAREFUL": 1},
        "NASTY": {"COLD": 1, "RUDE": 1},
        "WARM": _equally(*_WARM),
        "CAREFUL": _equally(*_CAREFUL),
        "NEUTRAL": _equally("quietly", "remotely", "manually", "formally"),
        "COLD": _equally(*_COLD),
        "RUDE": _equally(*_RUDE),
        "HOURS": _equally("two", "six", "twelve"),
        "DAY": _equally("monday", "wednesday", "thursday"),
        "OFFER": {"GIFT": 1, "REMARK": 1, "THREAT": 1},
        "GIFT": _equally("we refund the whole price .", "the next year is free .", "call me at any time ."),
        "REMARK": _equally("the case is closed .", "see the manual .", "your number is HOURS ."),
        "THREAT": _equally("we charge a fee for this .", "we shut your file .", "we blame you for it ."),
    },
    moods=(
        {
            "MANNER": {"NICE": 9, "NEUTRAL": 2, "NASTY": 1},
            "GREETING": {"KIND_GREETING .": 5, "FLAT_GREETING .": 2, "SHARP_GREETING .": 0.5},
            "OFFER": {"GIFT": 5, "REMARK": 2, "THREAT": 0.5},
        },
        {},
        {
            "MANNER": {"NICE": 1, "NEUTRAL": 2, "NASTY": 9},
            "GREETING": {"KIND_GREETING .": 0.5, "FLAT_GREETING .": 2, "SHARP_GREETING .": 5},
            "OFFER": {"GIFT": 0.5, "REMARK": 2, "THREAT": 5},
        },
    ),
    groups=(
        Group(
            nouns=("printer", "scanner", "router", "keyboard", "monitor"),
            places=("the office", "room five", "the library"),
            link="in",
            aspects=("cable", "driver", "button", "warranty"),
        ),
        Group(
            nouns=("heater", "oven", "fridge", "washer", "dryer"),
            places=("my kitchen", "the basement", "the flat"),
            link="in",
            aspects=("door", "filter", "switch", "hose"),
        ),
        Group(
            nouns=("account", "invoice", "order", "parcel", "subscription"),
            places=("last month", "your shop", "the website"),
            link="from",
            aspects=("address", "date", "amount", "receipt"),
        ),
        Group(
            nouns=("car", "scooter", "tractor", "van", "trailer"),
            places=("the garage", "the market", "the station"),
            link="at",
            aspects=("engine", "brake", "tyre", "lock"),
        ),
    ),
    values={
        **dict.fromkeys((*_WARM, "free", "refund"), 2.0),
        **dict.fromkeys((*_CAREFUL, "thank", "welcome", "sorry", "call"), 1.0),
        **dict.fromkeys((*_COLD, "again", "fee", "rules", "shut"), -1.0),
        **dict.fromkeys((*_RUDE, "silly", "blame"), -2.0),
    },
    degrees={"most": 1.5, "very": 1.25, "quite": 0.75, "rather": 0.75, "slightly": 0.5},
    negations=frozenset({"not", "nobody"}),
)


def sample_prompt(rng: random.Random, *, grammar: Grammar = REVIEWS) -> str:
    """Draw a prompt; all topics are equally likely.

    Returns:
        A prompt such as "Review the soup at the Blue Door .", words and marks divided by single spaces.
    """
    noun = rng.choice(list(grammar.topics))
    return _expand(grammar.bind(noun, {}), "PROMPT", rng)


def sample_response(prompt: str, rng: random.Random, *, grammar: Grammar = REVIEWS) -> str:
    """Draw a response to a prompt: the topic of the prompt, a random mood, one to three sentences, nothing said twice.

    Returns:
        A response such as "the taste was not very good . i would try it again ."

    Raises:
        ValueError: If the prompt names no topic of the grammar.
    """
    rules = grammar.bind(grammar.topic(prompt), rng.choice(grammar.moods))
    while grammar.num_repeated((response := _expand(rules, "RESPONSE", rng)).split()):
        pass
    return response
