"""The tokenizer against transformers, and streaming against decoding at once, for every kind of token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models
from transformers import AutoTokenizer

from engine.errors import CheckpointError, TokenizerError
from engine.tokenizer import Tokenizer

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "  Tell me a story about naïve 猫 🐈. "},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Please?"},
]


# How byte-level tokenizers write bytes: printable ones as themselves, the others from U+0100 on, in order.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_LEVEL = [chr(b) if b in PRINTABLE else chr(256 + OTHERS.index(b)) for b in range(256)]


def byte_level() -> Tokenizer:
    """Like GPT-2: tokens 0 to 255 are the bytes; then a word, broken characters, and two added tokens."""
    pieces = [*BYTE_LEVEL, "Ġthe", "æĹ", "¥æ", "ĠðŁ", "¿½"]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<s>"])
    bpe.add_tokens(["<think>"])
    return Tokenizer(bpe, None, {})


def byte_fallback() -> Tokenizer:
    """Like Llama 2: tokens 0 to 255 are the bytes; then pieces of text with marked spaces."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "▁▁", "cat", "é", "猫", "<unk>"]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens(["<s>"])
    return Tokenizer(bpe, None, {})


@pytest.fixture(scope="session")
def storyteller_tokenizer(storyteller: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(storyteller)


def stream(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.push(token) for token in token_ids), detokenizer.flush()]


@pytest.mark.parametrize("text", ["", "Once upon a time", "naïve 猫 🐈\n\n  <s> x", "\x00 " * 20])
def test_encode_and_decode_are_those_of_transformers(storyteller: Path, text: str) -> None:
    tokenizer = Tokenizer.from_pretrained(storyteller)
    reference = AutoTokenizer.from_pretrained(storyteller)
    assert tokenizer.encode(text) == reference(text).input_ids
    assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(
        reference(text).input_ids, skip_special_tokens=True
    )
    assert tokenizer.vocab_size == len(reference)


def test_chats_are_those_of_transformers(storyteller: Path) -> None:
    expected = AutoTokenizer.from_pretrained(storyteller).apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=False
    )
    assert Tokenizer.from_pretrained(storyteller).encode_chat(CHAT) == expected


@pytest.fixture(scope="session", params=["storyteller", "byte_level", "byte_fallback"])
def any_tokenizer(request: pytest.FixtureRequest, storyteller_tokenizer: Tokenizer) -> Tokenizer:
    match request.param:
        case "storyteller":
            return storyteller_tokenizer
        case "byte_level":
            return byte_level()
        case _:
            return byte_fallback()


@given(data=st.data())
def test_streaming_any_tokens_gives_what_decoding_them_gives(
    any_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    # Two more than there are: a model's vocabulary may be padded beyond its tokenizer's.
    token_ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size + 1), max_size=40))
    assert "".join(stream(any_tokenizer, token_ids)) == any_tokenizer.decode(token_ids)


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["byte_level", "byte_fallback"])
@given(text=st.text(max_size=30))
def test_streaming_the_bytes_of_any_text_gives_the_text(tokenizer: Tokenizer, text: str) -> None:
    the = tokenizer.decode([256])
    assert "".join(stream(tokenizer, [256, *text.encode()])) == the + text


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()])
@given(text=st.text().filter(lambda text: "▁" not in text))
def test_the_bytes_of_the_tokens_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    token_ids = [*text.encode(), 256]
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == f"{text} the".encode()


def test_what_single_tokens_stand_for(storyteller_tokenizer: Tokenizer) -> None:
    assert byte_level().token_text(0xE7) == "\N{REPLACEMENT CHARACTER}"
    spelled = [byte_level().token_text(token) for token in (256, 261, 262, 263)]
    assert spelled == [" the", "<s>", "<think>", ""]
    assert [byte_fallback().token_text(token) for token in (256, 257, 259, 261)] == [" the", " ", "cat", "猫"]
    text = "Once upon a time, naïve 猫 🐈\n"
    token_ids = storyteller_tokenizer.encode(text)
    assert b"".join(map(storyteller_tokenizer.token_bytes, token_ids)).endswith(text.encode())


def test_text_comes_as_soon_as_it_is_certain(storyteller_tokenizer: Tokenizer) -> None:
    ids = storyteller_tokenizer.encode("The cat 🐈 sat.")
    pieces = stream(storyteller_tokenizer, ids)
    assert "".join(pieces) == "The cat 🐈 sat."
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert pieces[-1] == ""
    for count in range(1, len(ids) + 1):
        whole = storyteller_tokenizer.decode(ids[:count])
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):
            assert "".join(pieces[:count]) == whole


def test_an_unfinished_character_comes_with_the_flush() -> None:
    pieces = stream(byte_level(), [*"é".encode(), "é".encode()[0]])
    assert pieces == ["", "é", "", "\N{REPLACEMENT CHARACTER}"]


def write(path: Path, storyteller: Path, **config: object) -> Path:
    shutil.copy(storyteller / "tokenizer.json", path)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_templates_see_special_tokens_and_plain_json(tmp_path: Path, storyteller: Path) -> None:
    template = (
        "{{ bos_token }}{{ eos_token }}{% for m in messages %}{{ m.content | tojson }}{% break %}{% endfor %}"
    )
    path = write(
        tmp_path, storyteller, bos_token="<s>", eos_token={"content": "</s>"}, chat_template=template
    )
    tokenizer = Tokenizer.from_pretrained(path)
    plain = tokenizer.encode('<s></s>"é <b>"')
    assert tokenizer.encode_chat([{"role": "user", "content": "é <b>"}] * 2) == plain[-len(plain) + 1 :]


def test_a_template_in_a_file_of_its_own_is_preferred(tmp_path: Path, storyteller: Path) -> None:
    path = write(tmp_path, storyteller, chat_template="one")
    (path / "chat_template.jinja").write_text("two")
    tokenizer = Tokenizer.from_pretrained(path)
    assert tokenizer.decode(tokenizer.encode_chat(CHAT)) == "two"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template: send a plain prompt"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "refuses these messages: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses these messages"),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        ("{% for i in range(1000000) %}{% endfor %}", "refuses these messages"),
    ],
)
def test_conversations_that_cannot_be_encoded_are_refused(
    tmp_path: Path, storyteller: Path, template: str | None, message: str
) -> None:
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, storyteller, chat_template=template))
    with pytest.raises(TokenizerError, match=message):
        tokenizer.encode_chat(CHAT)


def test_text_that_is_not_unicode_is_refused(storyteller_tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        storyteller_tokenizer.encode("a lone \ud800")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, r"tokenizer\.json is missing"),
        ("tokenizer.json", "{", r"tokenizer\.json cannot be read"),
        ("tokenizer.json", "{}", r"tokenizer\.json is not a tokenizer that can be read"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json holds a JSON list"),
        ("tokenizer_config.json", '{"chat_template": 1}', "chat_template is int; it must be a text"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "chat template is not valid"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja cannot be read"),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, storyteller: Path, name: str, content: str | bytes | None, message: str
) -> None:
    path = write(tmp_path, storyteller)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_pretrained(path)


@given(text=st.text(max_size=200))
def test_no_token_stands_for_more_bytes_than_the_longest(storyteller_tokenizer: Tokenizer, text: str):
    longest = storyteller_tokenizer.longest_token_bytes
    assert longest is not None
    assert len(text.encode()) <= longest * len(storyteller_tokenizer.encode(text))


def test_there_is_no_longest_token_where_text_may_be_dropped():
    assert byte_level().longest_token_bytes is not None
    assert byte_fallback().longest_token_bytes is None
    swallowing = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    swallowing.decoder = decoders.ByteLevel()
    swallowing.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    assert Tokenizer(swallowing, None, {}).longest_token_bytes is None
