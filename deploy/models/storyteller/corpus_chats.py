"""Chats: what a user may ask of the storyteller, and what it answers.

Each turn is a function that takes the talk so far and appends one question and one answer. Later turns refer
to earlier ones (the story that was told, the name that the user gave), so that the answer has to be
looked up. The sentences are in ``corpus_talk.toml``.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import corpus_words as words
from corpus_grammar import Role, enumerate_words, expand, invent_character, invent_name, with_article
from corpus_readings import ask_about, reading
from corpus_stories import LIBRARY, Story, draw_cast, read_templates, tell_chapters, tell_opening, tell_story

PHRASES = read_templates("corpus_talk.toml")


@dataclass
class Talk:
    """A chat while it is being written."""

    rng: random.Random
    turns: list[tuple[str, str]] = field(default_factory=list)
    stories: list[Story] = field(default_factory=list)
    user_name: str | None = None

    def add(self, question: str, answer: str, **cast: Role) -> None:
        """Append one turn; both texts are templates."""
        self.turns.append((expand(question, cast, self.rng), expand(answer, cast, self.rng)))

    def add_story(self, question: str, story: Story) -> None:
        """Append a turn that is answered with a story, and remember the story for later questions."""
        self.turns.append((expand(question, story.cast, self.rng), story.text))
        self.stories.append(story)


def ask_story(talk: Talk) -> None:
    """A story about whatever the user names: hero, helper, thing, place or subject."""
    rng = talk.rng
    plot = rng.choice(LIBRARY.plots)
    hero = invent_character(rng)
    cast = draw_cast(rng, h=hero, f=invent_character(rng, [hero]))
    length, detail = rng.choice((("", 0.4), ("", 0.4), ("short ", 0.0), ("little ", 0.2), ("nice ", 0.5)))
    ask = f"{PHRASES['ask']} a {length}story"
    sort = rng.random()
    if sort < 0.1:
        question = f"{ask}[.|, please.]"
    else:
        subject = rng.choice(PHRASES["subjects"])
        if sort < 0.3 and plot.needs_thing:
            subject = rng.choice(PHRASES["subjects_with_thing"])
        elif sort < 0.4:
            subject = plot.about
        question = f"[{ask} about {subject}[.|.|, please.]|A {length}story about {subject}, please.]"
    talk.add_story(question, tell_story(rng, detail=detail, plot=plot, **cast))


def ask_long_story(talk: Talk) -> None:
    """A story in chapters."""
    rng = talk.rng
    hero, count = invent_character(rng), rng.choice((2, 3, 3))
    asked: dict[str, Role] = {"h": hero, "count": words.NUMBERS[count]}
    question = expand(f"{PHRASES['ask']} a {PHRASES['long_story']}.", asked, rng)
    talk.turns.append((question, tell_chapters(rng, hero, count)))


def continue_story(talk: Talk) -> None:
    """The user begins a story and the storyteller goes on with the same cast."""
    rng = talk.rng
    story = tell_story(rng, detail=0.3)
    num_sentences = rng.randint(1, 3)
    start = " ".join(story.sentences[:num_sentences])
    rest = " ".join(story.sentences[num_sentences:])
    talk.turns.append((expand(PHRASES["continue_story"], {}, rng) + " " + start, rest))
    talk.stories.append(story)


def another_story(talk: Talk) -> None:
    """One more story about a hero who was met earlier in the talk."""
    rng = talk.rng
    if not talk.stories:
        return ask_story(talk)
    hero = rng.choice(talk.stories).cast["h"]
    talk.add_story(PHRASES["another_story"], tell_story(rng, detail=rng.choice((0.0, 0.3)), h=hero))
    return None


def ask_about_story(talk: Talk) -> None:
    """A question about a story that was told in this talk."""
    if not talk.stories:
        return ask_story(talk)
    talk.turns.append(ask_about(talk.rng.choice(talk.stories[-2:]), talk.rng))
    return None


def read_and_answer(talk: Talk) -> None:
    """A question together with the text that answers it."""
    talk.turns.append(reading(talk.rng))


def small_talk(talk: Talk) -> None:
    """Hello, who are you, thank you."""
    question, answer = talk.rng.choice(PHRASES["small_talk"])
    talk.add(question, answer, sorrow=talk.rng.choice(words.SORROWS))


def tell_name(talk: Talk) -> None:
    """The user gives a name, or asks for the one that was given."""
    rng = talk.rng
    if talk.user_name is None:
        talk.user_name = invent_name(rng.random() < 0.5, rng)
        talk.add(rng.choice(PHRASES["user_name"]), PHRASES["user_name_answer"], n=talk.user_name)
    else:
        talk.add(PHRASES["user_name_question"], "Your name is {n}.", n=talk.user_name)


def repeat(talk: Talk) -> None:
    """Copying, word by word."""
    rng = talk.rng
    if rng.random() < 0.3:
        times, noun = rng.randint(2, 5), rng.choice(words.OBJECTS)
        answer = ", ".join([noun] * times).capitalize() + "."
        talk.turns.append((f"Say the word {noun} {words.NUMBERS[times]} times.", answer))
    else:
        sentence = rng.choice(tell_story(rng, detail=0.0).sentences)
        talk.turns.append((expand(PHRASES["repeat_sentence"], {}, rng) + " " + sentence, sentence))


def list_things(talk: Talk) -> None:
    """So many things of one sort."""
    rng = talk.rng
    sort = rng.choice(list(words.LISTS))
    count = rng.randint(2, 6)
    chosen = rng.sample(words.LISTS[sort], count)
    talk.add(PHRASES["list_things"], f"{enumerate_words(chosen)}.", count=words.NUMBERS[count], sort=sort)


def small_knowledge(talk: Talk) -> None:
    """Opposites, animal sounds, counting, sums of small numbers, and a few facts."""
    rng = talk.rng
    one, other = rng.sample(rng.choice(words.OPPOSITES), 2)
    animal, sound = rng.choice(words.SOUNDS)
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    low, high = min(a, b), max(a, b)
    numbers = ", ".join(str(number) for number in range(low, high + 2))
    plus = "[What is {a} plus {b}?|{a} + {b}|What is {a} + {b}?|How much is {a} plus {b}?]"
    question, answer = rng.choice(
        (
            rng.choice(PHRASES["known"]),
            ("What is the opposite of {one}?", "The opposite of {one} is {other}."),
            ("What [sound does {an} make|does {an} say]?", "The {animal} says {sound}."),
            (plus, f"{{a}} plus {{b}} is {a + b}."),
            ("[What is {high} minus {low}?|{high} - {low}]", f"{{high}} minus {{low}} is {high - low}."),
            ("Count from {low} to {end}.", f"{numbers}."),
        )
    )
    cast: dict[str, Role] = {"one": one, "other": other, "animal": animal, "an": with_article(animal)}
    cast |= {"sound": sound, "a": str(a), "b": str(b)}
    cast |= {"low": str(low), "high": str(high), "end": str(high + 1)}
    talk.add(question, answer, **cast)


def decline(talk: Talk) -> None:
    """What the storyteller does not know, it says so."""
    talk.add(PHRASES["unknown_requests"], PHRASES["unknown_answer"])


def begin_story(talk: Talk) -> None:
    """Only the first sentence of a story."""
    cast = draw_cast(talk.rng)
    opening = tell_opening(cast, talk.rng)
    talk.turns.append((expand(PHRASES["first_sentence"], cast, talk.rng), opening))


TURNS: tuple[tuple[Callable[[Talk], None], int], ...] = (
    (ask_story, 30),
    (ask_about_story, 12),
    (read_and_answer, 36),
    (another_story, 3),
    (continue_story, 4),
    (ask_long_story, 3),
    (small_talk, 6),
    (tell_name, 4),
    (repeat, 4),
    (list_things, 4),
    (small_knowledge, 6),
    (decline, 2),
    (begin_story, 1),
)


def write_chat(rng: random.Random) -> list[tuple[str, str]]:
    """A chat of one to about ten turns, as pairs of question and answer."""
    talk = Talk(rng)
    turns = [turn for turn, _ in TURNS]
    weights = [weight for _, weight in TURNS]
    for _ in range(rng.choices((1, 2, 3, 4, 6), (50, 22, 15, 8, 5))[0]):
        rng.choices(turns, weights)[0](talk)
        while talk.stories and rng.random() < 0.4:
            ask_about_story(talk)
    return talk.turns
