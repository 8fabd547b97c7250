"""The storyteller's training text, generated from a grammar: an endless stream of documents under one seed.

A document is a plain story, a story in chapters, or a chat. Run as a script, it prints a few of them.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from corpus_chats import PHRASES, write_chat
from corpus_grammar import invent_character
from corpus_stories import tell_chapters, tell_story

BOS = "<s>"
EOS = "</s>"
ROLE_MARKERS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = (BOS, EOS, *ROLE_MARKERS.values())
MAX_WORDS = 660
"""Longer documents are written anew: with up to 1.5 tokens per word they would not fit the context."""


@dataclass(frozen=True)
class Message:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """One training example: a plain text, or a chat."""

    text: str = ""
    messages: tuple[Message, ...] = ()

    def render(self) -> str:
        """The whole example with its special tokens, from BOS to EOS.

        Must stay equal to what the chat template in ``tokenizer_config.json`` makes of the same messages.
        """
        if not self.messages:
            return BOS + self.text + EOS
        return BOS + "".join(_render_message(message) for message in self.messages)


def _render_message(message: Message) -> str:
    """EOS ends the answers only: a question is ended by the marker of its answer."""
    end = EOS if message.role == "assistant" else ""
    return ROLE_MARKERS[message.role] + message.content + end


def _chat(turns: Sequence[tuple[str, str]], rng: random.Random) -> Document:
    messages: list[Message] = []
    if rng.random() < 0.12:
        messages.append(Message("system", rng.choice(PHRASES["system_prompts"])))
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    return Document(messages=tuple(messages))


def write_document(rng: random.Random) -> Document:
    """One document of a random sort that fits the context."""
    while True:
        sort = rng.random()
        if sort < 0.62:
            document = _chat(write_chat(rng), rng)
        elif sort < 0.92:
            document = Document(text=tell_story(rng, detail=rng.choice((0.2, 0.5, 0.8))).text)
        else:
            document = Document(text=tell_chapters(rng, invent_character(rng), rng.choice((3, 4, 5))))
        if len(document.render().split()) <= MAX_WORDS:
            return document


def documents(seed: int) -> Iterator[Document]:
    """Documents without end; the same ones for the same seed."""
    rng = random.Random(seed)
    while True:
        yield write_document(rng)


def main() -> None:
    """Print a few documents."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    options = parser.parse_args()
    for _, document in zip(range(options.count), documents(options.seed), strict=False):
        print(document.render(), end="\n\n")


if __name__ == "__main__":
    main()
