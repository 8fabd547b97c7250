"""What a prompt becomes before it is a request."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, cast

import pytest

from engine.tokenizer import Tokenizer
from router.errors import InvalidRequestError, PromptTooLongError
from router.intake import Intake, ServedModel
from router.sampling import MAX_PROMPT_LOGPROBS, SamplingWish
from router.slo import Slo, SloLimits

BOS = 1


class BosTokenizer:
    """Begins every text with a token of its own, as most models' tokenizers do."""

    longest_token_bytes = 2

    def encode(self, text: str) -> list[int]:
        return [BOS, *text.encode()]


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


@pytest.fixture
def intake(executor: Executor) -> Intake:
    model = ServedModel("m", 64, 256, (2,), cast(Tokenizer, cast(Any, BosTokenizer())))
    return Intake(model, executor, lambda: 0.0, lambda: 0, 1.0, lambda: None)


async def test_a_prompt_without_text_is_refused_although_the_tokenizer_adds_a_token(intake: Intake):
    with pytest.raises(InvalidRequestError, match="empty"):
        await intake.tokenize_prompt("")
    assert await intake.tokenize_prompt("a") == [BOS, ord("a")]


async def test_the_tokenize_endpoint_may_ask_for_the_tokens_of_nothing(intake: Intake):
    assert await intake.tokenize("") == [BOS]


async def test_a_text_that_cannot_fit_is_refused_without_tokenising_it(intake: Intake):
    assert len(await intake.tokenize_prompt("x" * 128)) == 129
    for asking in (
        intake.tokenize_prompt("x" * 129),
        intake.tokenize_chat([{"role": "user", "content": "x" * 64}, {"role": "user", "content": "y" * 65}]),
    ):
        with pytest.raises(PromptTooLongError, match="129 characters"):
            await asking


@pytest.mark.parametrize("num_top", [0, 20])
async def test_a_prompt_with_more_log_probabilities_than_one_message_holds_is_refused(
    executor: Executor, num_top: int
):
    model = ServedModel("m", 100_000, 256, (2,), cast(Tokenizer, cast(Any, BosTokenizer())))
    intake = Intake(model, executor, lambda: 0.0, lambda: 0, 1.0, lambda: None)
    longest = MAX_PROMPT_LOGPROBS // (1 + num_top)

    def ask(num_tokens: int) -> None:
        wish = SamplingWish(max_tokens=1, prompt_logprobs=num_top)
        slo = Slo("default", SloLimits(1.0, 1.0))
        intake.request([7] * num_tokens, wish, slo, request_id="", tenant="", arrived_at=0.0)

    ask(longest)
    with pytest.raises(InvalidRequestError, match="at most 65536 are reported") as refused:
        ask(longest + 1)
    assert refused.value.param == "prompt_logprobs"
