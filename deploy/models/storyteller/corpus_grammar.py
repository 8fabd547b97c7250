"""How a sentence template becomes text: alternatives, and references to the cast of a story.

A template holds alternatives ``[a|b|c]`` (nested as deep as one likes) and references ``{h.he}``: the part of
speech ``he`` of the cast member ``h``. This module knows nothing about plots or chats.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import corpus_words as words

_INNERMOST_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
_REFERENCE = re.compile(r"\{(\w+)(?:\.(\w+))?\}")
_SENTENCE_START = re.compile(r"((?:^|[.!?] |[.!?]\n+|\.\" )\"?)([a-z])")


def with_article(noun_phrase: str) -> str:
    """Put ``a`` or ``an`` in front, by the first sound and not by the first letter."""
    vowel = noun_phrase[0].lower() in "aeiou" and not noun_phrase.startswith("uni")
    return f"an {noun_phrase}" if vowel or noun_phrase.startswith("honest") else f"a {noun_phrase}"


def enumerate_words(entries: Sequence[str]) -> str:
    """Join as in "one, two and three"."""
    return " and ".join(part for part in (", ".join(entries[:-1]), entries[-1]) if part)


@dataclass(frozen=True)
class Character:
    """Somebody in a story. Without a name, every reference is by kind ("the bear")."""

    kind: str
    trait: str
    name: str | None
    is_she: bool

    def speak(self, form: str, rng: random.Random) -> str:
        """The words for this character in the given part of speech; ``""`` is a free choice of reference."""
        match form:
            case "":
                return self.name if self.name and rng.random() < 0.65 else f"the {self.kind}"
            case "who":
                return self.name or f"the {self.kind}"
            case "the":
                return f"the {self.kind}"
            case "kind":
                return self.kind
            case "akind":
                return with_article(self.kind)
            case "trait":
                return self.trait
            case "a":
                return with_article(f"{self.trait} {self.kind}")
            case "intro":
                plain = with_article(f"{self.trait} {self.kind}")
                return f"{plain} named {self.name}" if self.name else plain
            case "he":
                return "she" if self.is_she else "he"
            case "him":
                return "her" if self.is_she else "him"
            case "his":
                return "her" if self.is_she else "his"
            case "self":
                return "herself" if self.is_she else "himself"
        raise KeyError(f"a character has no form {form!r}")


@dataclass(frozen=True)
class Item:
    """A thing, introduced with its look ("a silver bell") and then called "the bell"."""

    noun: str
    look: str

    def speak(self, form: str, rng: random.Random) -> str:
        """The words for this thing; ``""`` chooses between its short and its full name."""
        match form:
            case "":
                return f"the {self.noun}" if rng.random() < 0.7 else f"the {self.look} {self.noun}"
            case "a":
                return with_article(f"{self.look} {self.noun}")
            case "full":
                return f"{self.look} {self.noun}"
            case "noun":
                return self.noun
            case "anoun":
                return with_article(self.noun)
            case "look":
                return self.look
            case "title":
                return self.noun.title()
        raise KeyError(f"a thing has no form {form!r}")


@dataclass(frozen=True)
class Place:
    """A place with the preposition that goes with it: ``at`` is "by the river", ``the`` is "the river"."""

    at: str

    def speak(self, form: str, rng: random.Random) -> str:
        """The words for this place, alone or with a preposition."""
        noun_phrase = self.at[self.at.index("the ") :]
        match form:
            case "":
                return noun_phrase
            case "at":
                return self.at
            case "to":
                return f"to {noun_phrase}"
        raise KeyError(f"a place has no form {form!r}")


Role = Character | Item | Place | str
Cast = Mapping[str, Role]


def expand(template: str, cast: Cast, rng: random.Random) -> str:
    """Choose every alternative, speak every reference, and start each sentence with a capital."""
    while (found := _INNERMOST_ALTERNATIVES.search(template)) is not None:
        choice = rng.choice(found.group(1).split("|"))
        template = template[: found.start()] + choice + template[found.end() :]

    def speak(found: re.Match[str]) -> str:
        role, form = cast[found.group(1)], found.group(2) or ""
        return role if isinstance(role, str) else role.speak(form, rng)

    text = _REFERENCE.sub(speak, template)
    return _SENTENCE_START.sub(lambda found: found.group(1) + found.group(2).upper(), text)


def invent_name(is_she: bool, rng: random.Random) -> str:
    """A name from the list or, one time in three, a new one, so that names have to be copied, not known."""
    if rng.random() < 0.67:
        return rng.choice(words.SHE_NAMES if is_she else words.HE_NAMES)
    middle = rng.choice(words.NAME_MIDDLES)
    ending = rng.choice(words.SHE_ENDINGS if is_she else words.HE_ENDINGS)
    return rng.choice(words.NAME_STARTS) + middle + ending


def invent_character(rng: random.Random, others: Sequence[Character] = (), named: float = 1.0) -> Character:
    """Somebody whose kind and name differ from everybody's in ``others``."""
    kinds, names = {other.kind for other in others}, {other.name for other in others}
    while True:
        is_she = rng.random() < 0.5
        people = (words.SHE_PEOPLE if is_she else words.HE_PEOPLE) + words.EITHER_PEOPLE
        kind = rng.choice(words.ANIMALS if rng.random() < 0.75 else people)
        name = invent_name(is_she, rng) if rng.random() < named else None
        if kind not in kinds and (name is None or name not in names):
            return Character(kind, rng.choice(words.TRAITS), name, is_she)


def invent_items(rng: random.Random, count: int) -> list[Item]:
    """Things of different kinds and, where that is possible, different looks."""
    nouns, looks = rng.sample(words.OBJECTS, count), rng.sample(words.COLOURS, count)
    return [Item(noun, look) for noun, look in zip(nouns, looks, strict=True)]


def invent_places(rng: random.Random, count: int) -> list[Place]:
    """Different places."""
    return [Place(at) for at in rng.sample(words.PLACES, count)]
