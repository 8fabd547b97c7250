"""The storyteller's corpus, and the checkpoint that was trained on it."""

import itertools
import json
import random
import re
import sys
from pathlib import Path

import jinja2
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "models" / "storyteller"))

from corpus import BOS, EOS, Document, documents
from corpus_grammar import Item, Place, expand, with_article
from corpus_readings import reading
from corpus_stories import LIBRARY, tell_story
from examine import reading_accuracy
from network import Architecture, Llama
from packing import IGNORED, batches

FOLDER = Path(__file__).parents[2] / "deploy" / "models" / "storyteller"
FUNCTION_WORDS = {"The", "Yes", "No", "It", "There", "They"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizer_config() -> dict[str, str]:
    config: dict[str, str] = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    return config


@pytest.fixture(scope="module")
def sample() -> list[Document]:
    return list(itertools.islice(documents(seed=11), 1500))


def test_the_corpus_is_the_same_under_the_same_seed(sample: list[Document]) -> None:
    assert sample[:300] == list(itertools.islice(documents(seed=11), 300))
    assert sample[:300] != list(itertools.islice(documents(seed=12), 300))


def test_two_thousand_stories_are_all_different() -> None:
    rng = random.Random(3)
    stories = {tell_story(rng, detail=0.0).text for _ in range(2000)}
    assert len(stories) == 2000


def test_every_plot_is_told_and_every_fact_of_it_can_be_asked() -> None:
    rng = random.Random(4)
    for plot in LIBRARY.plots:
        story = tell_story(rng, plot=plot)
        for question, answer in plot.facts:
            assert expand(question, story.cast, rng).endswith("?")
            assert len({expand(answer, story.cast, rng) for _ in range(9)}) == 1


def test_documents_fit_the_context_and_reach_its_end(sample: list[Document], tokenizer: Tokenizer) -> None:
    lengths = [len(tokenizer.encode(document.render(), add_special_tokens=False)) for document in sample]
    context_length = Architecture().max_position_embeddings
    assert max(lengths) <= context_length
    assert max(lengths) > 0.85 * context_length


def test_no_mark_of_a_template_is_left_in_the_text(sample: list[Document]) -> None:
    for document in sample:
        for text in (document.text, *(message.content for message in document.messages)):
            assert not re.search(r"[{}\[\]|<>]|  |\b[Aa] [aeo][a-z]", text), text
            assert text == text.strip()


def test_an_answer_names_only_who_was_named_in_the_question() -> None:
    rng = random.Random(5)
    for _ in range(500):
        question, answer = reading(rng)
        names = set(re.findall(r"\b[A-Z]\w+", answer)) - FUNCTION_WORDS
        assert names <= set(re.findall(r"\w+", question)), (question, answer)


def test_chats_follow_the_chat_template(
    sample: list[Document], tokenizer_config: dict[str, str], tokenizer: Tokenizer
) -> None:
    template = jinja2.Environment().from_string(tokenizer_config["chat_template"])
    chats = [document for document in sample if document.messages]
    assert len(chats) > 500
    for document in chats:
        messages = [{"role": message.role, "content": message.content} for message in document.messages]
        rendered = template.render(messages=messages, bos_token=BOS, eos_token=EOS)
        assert rendered == document.render()
        prompt = template.render(
            messages=messages[:-1], bos_token=BOS, eos_token=EOS, add_generation_prompt=True
        )
        assert rendered == prompt + messages[-1]["content"] + EOS
        ids = tokenizer.encode(rendered, add_special_tokens=False).ids
        assert ids.count(tokenizer.token_to_id(BOS)) == 1
        assert ids[0] == tokenizer.token_to_id(BOS)
        assert ids[-1] == tokenizer.token_to_id(EOS)


def test_plain_text_gets_its_bos_from_the_tokenizer(tokenizer: Tokenizer) -> None:
    text = 'Once upon a time, Zorblax the 12th said: "Ünïcödé!"'
    encoded = tokenizer.encode(text)
    assert encoded.ids[0] == tokenizer.token_to_id(BOS)
    assert encoded.ids.count(tokenizer.token_to_id(BOS)) == 1
    assert tokenizer.decode(encoded.ids) == text


def test_the_checkpoint_is_the_network_that_the_script_trains(tokenizer: Tokenizer) -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    arch = Architecture()
    assert config == arch.config_json(bos, eos)
    assert tokenizer.get_vocab_size() == arch.vocab_size
    with safe_open(FOLDER / "model.safetensors", framework="pt") as checkpoint:
        saved = {name: tuple(checkpoint.get_slice(name).get_shape()) for name in checkpoint.keys()}  # noqa: SIM118
    expected = {name: tuple(tensor.shape) for name, tensor in Llama(arch).state_dict().items()}
    assert saved == expected
    report = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    num_parameters = sum(parameter.numel() for parameter in Llama(arch).parameters())
    assert report["num_parameters"] == num_parameters
    assert 3_000_000 <= num_parameters <= 6_000_000


def test_the_model_card_quotes_the_training_report() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    report = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    for key in ("num_parameters", "num_tokens", "steps"):
        assert f"{report[key]:,}" in card, key
    for key in ("train_loss", "held_out_loss", "reading_accuracy", "training_seconds"):
        assert str(report[key]) in card, key


def test_the_folder_is_small_enough_to_be_committed() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) < 15_000_000


def test_a_row_holds_whole_documents_and_predicts_each_next_token() -> None:
    rng = random.Random(6)
    texts = [[0, *(rng.randrange(2, 50) for _ in range(rng.randrange(3, 30))), 1] for _ in range(400)]
    packed: list[list[int]] = []
    for batch in batches(texts, row_lengths=(16, 32), tokens_per_batch=64, padding_id=1):
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            length = sum(target != IGNORED for target in targets)
            row = inputs[:length] + targets[length - 1 : length]
            assert targets[:length] == row[1:]
            starts = [index for index, token in enumerate(row) if token == 0] + [len(row)]
            packed += [row[start:end] for start, end in itertools.pairwise(starts)]
    assert len(packed) > 250
    remaining = list(texts)
    for document in packed:
        remaining.remove(document)


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("owl", "an owl"), ("bear", "a bear"), ("unicorn", "a unicorn"), ("honest fox", "an honest fox")],
)
def test_the_article_follows_the_sound(noun: str, expected: str) -> None:
    assert with_article(noun) == expected


def test_a_template_chooses_refers_and_starts_sentences_with_capitals() -> None:
    cast = {"o": Item("bell", "old"), "p": Place("by the river")}
    text = expand(
        '[{p.at}|{p.at}], there was {o.a}. {p} was wide. "{o.anoun}!" said he.', cast, random.Random(0)
    )
    assert text == 'By the river, there was an old bell. The river was wide. "A bell!" said he.'


class Oracle:
    """Stands in for a model: it finds each next token likeliest, and EOS after the last one."""

    def __init__(self, eos: int, wrong_last: bool) -> None:
        self.last = eos + 1 if wrong_last else eos

    def __call__(self, token_ids: Tensor) -> Tensor:
        following = torch.cat((token_ids[:, 1:], torch.tensor([[self.last]])), dim=1)
        return functional.one_hot(following, Architecture().vocab_size)


@pytest.mark.parametrize(("wrong_last", "expected"), [(False, 1.0), (True, 0.0)])
def test_an_answer_counts_as_right_only_up_to_its_end(
    tokenizer: Tokenizer, wrong_last: bool, expected: float
) -> None:
    oracle = Oracle(tokenizer.token_to_id(EOS), wrong_last)
    assert reading_accuracy(oracle, tokenizer, seed=7, count=40) == expected
