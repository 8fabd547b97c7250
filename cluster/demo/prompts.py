"""The demo's 24 prompts: stories to go on with and chats, of the kinds that the demo model was trained on.

Half of them go through each front end; about half are greedy, the others sampled with a seed of their own.
The questions about a text are there because their answers need the prompt's KV to be right to the last
block.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class FrontEnd(Enum):
    """How a prompt is sent."""

    GRPC = "gRPC"
    HTTP = "HTTP"


@dataclass(frozen=True, slots=True)
class DemoPrompt:
    """text: a plain prompt, or what the user says in a chat. seed: None is greedy."""

    number: int
    front_end: FrontEnd
    chat: bool
    text: str
    seed: int | None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    max_tokens: int = 256


_STORIES = (
    "Once upon a time, there was a little fox named Anna who lived by the river.",
    "Long ago, a lucky dolphin named Greta lived by the stone bridge. She had a warm bed and a small window.",
    "This is the story of a tiny panda named Max who lived in the apple orchard. He liked to count the "
    "clouds.",
    "Not far from here, a sleepy horse named Boris lived in the barn. One day, his wooden hat was gone.",
    "Once upon a time, a lonely kitten named Mila lived in the jungle. Most of all, she loved berries.",
    "There was once a brave mouse named Victor. More than anything, Victor wanted to learn to whistle.",
    "In the deep forest, there lived a curious owl named Hana. One day, she found an old map.",
    "Once upon a time, a king named Peter had a golden crown, a gift from his father.",
    "A race was to be held in the green meadow. A clever goose named Rufus wanted to win.",
    "It was winter, and snow covered the ground. A gentle bear named Lola woke up early.",
    "This is the story of a wise pirate named Monty who lived on the little island.",
    "Once there was a shy rabbit named Petra. Everybody knew Petra and her shy ways.",
)

_CHATS = (
    "Tell me a story about a little dragon named Ana.",
    "Please tell me a story about a kind cow and a playful crow.",
    "Story: An owl went to the waterfall and drew a new doll. Anna the crab gave a black necklace to "
    "Mila on the roof. Boris was a gentle knight. He gave a striped glove to Mila in the barn. A "
    "dinosaur named Max stole a round boot at the market. Then it was time to go home. Who stole the "
    "round boot?",
    "Write a story about a brave doctor named Rollo.",
    "What color was the candle? Story: It was morning, and snow covered the ground. A clever dolphin "
    "named Max baked a green muffin in the valley. An honest fox went to the quiet pond. She wanted a "
    "glass coin. After that, she kept a black umbrella. A funny puppy held a pink candle by the river. "
    "The lazy bee came to the well and dropped a pretty letter.",
    "Can you tell me a story about a lazy bee?",
    "What happens next? Once upon a time, a hungry wolf named Victor lived at the crossroads. He loved "
    "honey cake.",
    "Story: A patient doctor named Rollo came to the quiet pond. He mended a shiny trumpet there. A "
    "donkey found a golden pie at the harbour. A king named Peter walked to the green meadow. He "
    "washed a round bag there. Question: Who washed the round bag?",
    "Make up a story about a teacher who lives in the castle.",
    "How could a story about a cat named Lola begin?",
    "I want to hear a story about a horse and a golden key.",
    "Tell me a story about a strong squirrel named Maria.",
)


def demo_prompts() -> list[DemoPrompt]:
    """All 24, stories and chats in turn."""
    prompts = []
    for index, texts in enumerate(zip(_STORIES, _CHATS, strict=True)):
        for chat, text in enumerate(texts):
            number = 2 * index + chat + 1
            front_end = FrontEnd.HTTP if (index + chat) % 2 else FrontEnd.GRPC
            seed = 1000 + number if index % 2 else None
            prompts.append(DemoPrompt(number, front_end, bool(chat), text, seed))
    return prompts
