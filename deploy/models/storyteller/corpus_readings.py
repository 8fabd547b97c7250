"""Questions about a text: about a told story, and about a short text that comes with the question.

The short texts set several characters next to each other who do similar things, so that neither the character
nor the verb alone is enough to find the answer.
"""

import random
from collections.abc import Sequence

import corpus_words as words
from corpus_grammar import (
    Character,
    Item,
    Place,
    Role,
    expand,
    invent_character,
    invent_items,
    invent_places,
)
from corpus_stories import Story, tell_story

Fact = tuple[str, str]
"""A question and its answer."""

DEEDS = (
    ("found", "find"), ("saw", "see"), ("lost", "lose"), ("hid", "hide"),
    ("bought", "buy"), ("made", "make"), ("drew", "draw"), ("dropped", "drop"),
    ("took", "take"), ("painted", "paint"), ("broke", "break"), ("sold", "sell"),
    ("carried", "carry"), ("stole", "steal"), ("washed", "wash"), ("left", "leave"),
    ("wanted", "want"), ("borrowed", "borrow"), ("opened", "open"), ("brought", "bring"),
    ("kept", "keep"), ("mended", "mend"), ("threw", "throw"), ("held", "hold"),
    ("got", "get"),
)  # fmt: skip
MEALS = (("ate", "eat"), ("baked", "bake"), ("bought", "buy"), ("shared", "share"), ("found", "find"))
WENT = "[went|walked|ran|came]"
ABOUT_HERO: tuple[Fact, ...] = (
    ("[What kind of animal is {h.who}|What is {h.who}|Who is {h.who}]?", "{h.who} is {h.a}."),
    ("Where [does|did] {h} live?", "{h.who} lived {p.at}."),
    ("What is the name of the {h.kind}?", "The {h.kind} is named {h.who}."),
    ("[What is the story about|Who is the hero of the story]?", "The story is about {h.intro}."),
)
BEFORE = "[One day, {w}.|It was morning, and {w}.|{w}.|The day was long.|Nobody spoke.]"
AFTER = (
    "[Then it was time to go home.|In the end, they all went home.|That was a good day.|Then the sun set.]"
)


def ask_about(story: Story, rng: random.Random) -> Fact:
    """One of the questions of the plot, or one about the hero."""
    facts = story.plot.facts if rng.random() < 0.75 else ABOUT_HERO
    question, answer = rng.choice(facts)
    return expand(question, story.cast, rng), expand(answer, story.cast, rng)


def reading(rng: random.Random) -> Fact:
    """A message that holds a text and a question, and the answer."""
    if rng.random() < 0.3:
        story = tell_story(rng, detail=rng.choice((0.0, 0.3)))
        question, answer = ask_about(story, rng)
        return _pose(story.text, question, rng), answer
    text, facts = _scene(rng)
    question, answer = rng.choice(facts)
    return _pose(text, question, rng), answer


def _pose(text: str, question: str, rng: random.Random) -> str:
    """Put text and question into one message, in the ways that people do."""
    start = rng.choice(("Story: ", "Story: ", "Text: ", "Read this: ", "Here is a story. ", ""))
    if rng.random() < 0.45:
        return f"{question} {start or 'Story: '}{text}"
    return f"{start}{text} {rng.choice(('Question: ', '', ''))}{question}"


def _scene(rng: random.Random) -> tuple[str, list[Fact]]:
    """One to four deeds by different characters, and every question that the text answers."""
    count = rng.choice((1, 2, 2, 3, 4))
    characters: list[Character] = []
    for _ in range(count + 1):
        characters.append(invent_character(rng, characters, named=rng.choice((0.0, 1.0))))
    things, places = invent_items(rng, 2 * count), invent_places(rng, count)
    dishes = [Item(noun, rng.choice(words.DISH_LOOKS)) for noun in rng.sample(words.DISHES, count)]
    weather = {"w": rng.choice(words.WEATHERS)}
    sentences: list[str] = []
    facts: list[Fact] = []
    if rng.random() < 0.3:
        sentences.append(expand(BEFORE, weather, rng))
    for index in range(count):
        is_meal = rng.random() < 0.2
        first = rng.choice(MEALS if is_meal else DEEDS)
        told, asked = _deed(
            characters[index],
            (dishes if is_meal else things)[index],
            things[count + index],
            places[index],
            characters[-1],
            (first, rng.choice([deed for deed in DEEDS if deed != first])),
            rng,
        )
        sentences.append(told)
        facts += asked
    if rng.random() < 0.3:
        sentences.append(expand(AFTER, weather, rng))
    return " ".join(sentences), facts


def _deed(
    actor: Character,
    item: Item,
    second_item: Item,
    place: Place,
    other: Character,
    deeds: Sequence[tuple[str, str]],
    rng: random.Random,
) -> tuple[str, list[Fact]]:
    """Somebody does something with a thing at a place, and perhaps something else with another thing."""
    (past, base), (then_past, then_base) = deeds
    cast: dict[str, Role] = {"x": actor, "y": item, "v": second_item, "z": place, "e": other}
    cast |= {"past": past, "base": base, "then_past": then_past, "then_base": then_base}
    if actor.name is None:
        start = rng.choice(("{x.the} ", "{x.akind} ", "the {x.trait} {x.kind} ", "{x.a} "))
    else:
        start = rng.choice(
            (
                "{x.who} the {x.kind} ",
                "{x.intro} ",
                "{x.akind} named {x.who} ",
                "{x.who} was {x.a}. {x.he} ",
                "{x.who} ",
            )
        )
    is_kind_told = start != "{x.who} "
    asked_as = "{x}" if is_kind_told else "{x.who}"
    facts: list[Fact]
    if rng.random() < 0.2:
        told = start + "gave {y.a} to {e.who} {z.at}."
        facts = [
            (f"What did {asked_as} give to {{e.who}}?", "{x.who} gave {y.a} to {e.who}."),
            ("Who gave {y} to {e.who}?", "{x.who} gave the {y.noun} to {e.who}."),
            (f"To whom did {asked_as} give {{y}}?", "{x.who} gave the {y.noun} to {e.who}."),
            ("Who got {y}?", "{e.who} got the {y.noun}."),
        ]
    else:
        told = start + rng.choice(
            (
                "{past} {y.a} {z.at}.",
                WENT + " {z.to} and {past} {y.a}.",
                WENT + " {z.to}. {x.he} {past} {y.a}[.| there.]",
                "was {z.at}. {x.he} {past} {y.a}[.| there.]",
            )
        )
        facts = [
            *[(f"What did {asked_as} {{base}}?", "{x.who} {past} {y.a}.")] * 3,
            *[("Who {past} {y}?", "{x.who} {past} the {y.noun}.")] * 3,
            (f"Where did {asked_as} {{base}} {{y}}?", "{x.who} {past} the {y.noun} {z.at}."),
            (f"Where was {asked_as}?", "{x.who} was {z.at}."),
            (f"Did {asked_as} {{base}} {{y.anoun}}?", "Yes, {x.who} {past} {y.anoun}."),
            (f"Did {asked_as} {{base}} {{v.anoun}}?", "No, {x.who} {past} {y.anoun}."),
        ]
        if item.look in words.PLAIN_COLOURS:
            facts += [("What [colour|color] was the {y.noun}?", "The {y.noun} was {y.look}.")] * 2
        if rng.random() < 0.3:
            told += " [Then|Later|After that,] {x.he} {then_past} {v.a}."
            # "Did the bear find a key?" would now have two answers.
            facts = [fact for fact in facts if "{v.anoun}" not in fact[0]]
            facts += [(f"What did {asked_as} {{then_base}}?", "{x.who} {then_past} {v.a}.")] * 2
            facts += [("Who {then_past} {v}?", "{x.who} {then_past} the {v.noun}.")] * 2
    if actor.name and is_kind_told:
        facts.append(("What is the name of the {x.kind}?", "The {x.kind} is named {x.who}."))
        facts.append(("[What|What kind of animal] is {x.who}?", "{x.who} is {x.akind}."))
    return expand(told, cast, rng), [(expand(ask, cast, rng), expand(say, cast, rng)) for ask, say in facts]
