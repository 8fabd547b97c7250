"""Whole stories: a cast is drawn, a plot is chosen, and its beats are told in order.

The plots themselves are in ``corpus_plots.toml``. The same cast members come back from the first sentence to
the last one, and in a chaptered story over hundreds of words.
"""

import random
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus_words as words
from corpus_grammar import (
    Cast,
    Character,
    Item,
    Place,
    Role,
    enumerate_words,
    expand,
    invent_character,
    invent_items,
    invent_places,
)


@dataclass(frozen=True)
class Plot:
    """A story shape: its beats, and the questions (with answers) that they make answerable."""

    title: str
    about: str
    beats: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]

    @property
    def needs_thing(self) -> bool:
        """Whether the thing ``o`` can be asked about, and so is always there."""
        return any("{o" in answer for _, answer in self.facts)


@dataclass(frozen=True)
class Library:
    """All templates for stories."""

    openings: tuple[str, ...]
    customs: tuple[str, ...]
    endings: tuple[str, ...]
    plots: tuple[Plot, ...]


@dataclass(frozen=True)
class Story:
    """A told story, with what is needed to talk about it. Each entry of ``sentences`` is one beat."""

    plot: Plot
    cast: Cast
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        """The story in one paragraph."""
        return " ".join(self.sentences)


def _one_line(value: Any) -> Any:
    """Undo, at any depth, the line breaks and the spaces around bars that make the files readable."""
    match value:
        case str():
            return re.sub(r"\s*\|\s*", "|", " ".join(value.split()))
        case list():
            return [_one_line(entry) for entry in value]
        case dict():
            return {key: _one_line(entry) for key, entry in value.items()}
    raise TypeError(f"a template file holds texts, lists and tables, not {value!r}")


def read_templates(file: str) -> Any:
    """Read a template file of this folder."""
    return _one_line(tomllib.loads((Path(__file__).parent / file).read_text(encoding="utf-8")))


def load_library() -> Library:
    """Read ``corpus_plots.toml``."""
    raw = read_templates("corpus_plots.toml")
    plots = tuple(
        Plot(
            title=entry["title"],
            about=entry["about"],
            beats=tuple(entry["beats"]),
            facts=tuple((question, answer) for question, answer in entry["facts"]),
        )
        for entry in raw["plot"]
    )
    return Library(tuple(raw["openings"]), tuple(raw["customs"]), tuple(raw["endings"]), plots)


LIBRARY = load_library()


def draw_cast(rng: random.Random, **given: Role) -> dict[str, Role]:
    """A full cast; whatever is ``given`` (a hero, a thing, a home) is kept as it is."""
    known = [role for role in given.values() if isinstance(role, Character)]
    cast: dict[str, Role] = dict(given)
    for key, named in (("h", 1.0), ("f", 0.8), ("g", 0.8)):
        if key not in cast:
            character = invent_character(rng, known, named)
            known.append(character)
            cast[key] = character
    for key, item in zip("oq", invent_items(rng, 2), strict=True):
        cast.setdefault(key, item)
    for key, place in zip("pst", invent_places(rng, 3), strict=True):
        cast.setdefault(key, place)
    drawn = {
        "d": words.FOODS,
        "w": words.WEATHERS,
        "fear": words.FEARS,
        "skill": words.SKILLS,
        "project": words.PROJECTS,
        "saying": words.SAYINGS,
        "feeling": words.FEELINGS,
        "sorrow": words.SORROWS,
    }
    for key, choices in drawn.items():
        cast.setdefault(key, rng.choice(choices))
    return cast


def _tell_beats(beats: tuple[str, ...], cast: Cast, rng: random.Random, detail: float) -> list[str]:
    """Expand the beats; an optional one (marked ``?``) is told with probability ``detail``."""
    told = [beat for beat in beats if not beat.startswith("?") or rng.random() < detail]
    return [expand(beat.removeprefix("?"), cast, rng) for beat in told]


def tell_opening(cast: Cast, rng: random.Random) -> str:
    """The first sentence, in which the hero and the hero's home are introduced."""
    return expand(rng.choice(LIBRARY.openings), cast, rng)


def tell_story(rng: random.Random, *, detail: float = 0.5, plot: Plot | None = None, **given: Role) -> Story:
    """One story of one chapter; with ``detail=0`` it is as short as its plot allows."""
    plot = plot or rng.choice(LIBRARY.plots)
    cast = draw_cast(rng, **given)
    sentences = [tell_opening(cast, rng)]
    sentences += _tell_beats(LIBRARY.customs, cast, rng, detail)
    sentences += _tell_beats(plot.beats, cast, rng, detail)
    sentences += _tell_beats(LIBRARY.endings, cast, rng, detail)
    return Story(plot, cast, tuple(sentences))


def tell_chapters(rng: random.Random, hero: Character, count: int) -> str:
    """A long story: one hero, a new plot in each chapter, and an ending that looks back at all of them."""
    home = invent_places(rng, 1)[0]
    items = invent_items(rng, 2 * count)
    things: list[Item] = []
    helpers: list[Character] = []
    parts: list[str] = []
    for number, plot in enumerate(rng.sample(LIBRARY.plots, count), start=1):
        helper = invent_character(rng, [hero, *helpers])
        helpers.append(helper)
        thing, other_thing = items[2 * number - 2 : 2 * number]
        if plot.needs_thing:
            things.append(thing)
        cast = draw_cast(rng, h=hero, f=helper, p=home, o=thing, q=other_thing)
        if number == 1:
            sentences = [tell_opening(cast, rng), *_tell_beats(LIBRARY.customs, cast, rng, 0.6)]
        else:
            start = (
                "[Some days later|A week later|Soon after|In the next year|One morning], [{w}, and "
                "{h.who} went outside.|{h.who} woke up early, and {w}.|{h.who} was {p.at}, and {w}.]"
            )
            sentences = [expand(start, cast, rng)]
        sentences += _tell_beats(plot.beats, cast, rng, 0.5)
        sentences += _tell_beats(LIBRARY.endings[:1], cast, rng, 0.5)
        parts.append(f"Chapter {number}: {expand(plot.title, cast, rng)}\n" + " ".join(sentences))
    parts.append(_look_back(hero, helpers, things, home, rng))
    return "\n\n".join(parts)


def _look_back(
    hero: Character, helpers: list[Character], items: list[Item], home: Place, rng: random.Random
) -> str:
    """The last paragraph of a long story names what came in each chapter, from the first to the last."""
    cast: dict[str, Role] = {"h": hero, "p": home}
    cast |= {f"f{index}": helper for index, helper in enumerate(helpers)}
    cast |= {f"o{index}": item for index, item in enumerate(items)}
    friends = [f"{{f{index}.who}}" for index in range(len(helpers))]
    things = [f"{{o{index}}}" for index in range(len(items))]
    template = (
        f"[The End|Home Again]\nThen {{h}} [sat|was back] {{p.at}} and thought of {enumerate_words(things)}. "
        f"{{h.he}} thought of {{h.his}} friends {enumerate_words(friends)}. "
        "[What a time it had been!|{h.he} was happy.|And {h.he} smiled.]"
    )
    return expand(template, cast, rng)
