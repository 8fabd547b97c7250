"""How well the storyteller answers questions about texts that it has never seen.

A greedy answer is right if it equals the expected one, word by word and up to its end. One forward pass over
prompt and expected answer tells: greedy decoding writes that answer exactly if, at each of its positions, the
expected token is the likeliest one.
"""

import random

import torch
from corpus import Document, Message
from corpus_readings import reading
from network import Llama
from tokenizers import Tokenizer


@torch.no_grad()
def reading_accuracy(model: Llama, tokenizer: Tokenizer, *, seed: int, count: int) -> float:
    """The share of questions that the model would answer exactly as expected."""
    rng = random.Random(seed)
    return sum(_answers(model, tokenizer, *reading(rng)) for _ in range(count)) / count


def _answers(model: Llama, tokenizer: Tokenizer, question: str, answer: str) -> bool:
    """Whether greedy decoding answers this question with this answer."""
    asked = Document(messages=(Message("user", question), Message("assistant", "")))
    answered = Document(messages=(Message("user", question), Message("assistant", answer)))
    # The empty answer is followed by EOS, which is no part of the prompt.
    prompt_length = len(tokenizer.encode(asked.render(), add_special_tokens=False)) - 1
    ids = torch.tensor(tokenizer.encode(answered.render(), add_special_tokens=False).ids)
    likeliest = model(ids[None, :-1])[0].argmax(dim=-1)
    return bool((likeliest[prompt_length - 1 :] == ids[prompt_length:]).all())
