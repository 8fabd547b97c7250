"""Calls of Ray's actors: their results as coroutines, and what their errors say, in words for a person."""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayActorError, RayTaskError


async def result(reference: Any) -> Any:
    """Of a call. Ray's references are awaitable, but not coroutines."""
    return await reference


def cause(error: BaseException) -> BaseException:
    """What was raised in the actor, without Ray's remote traceback around it."""
    return error.cause if isinstance(error, RayTaskError) else error


def first_line(error: BaseException) -> str:
    """What there is to read before Ray's explanations."""
    return str(error).strip().partition("\n")[0]


def why_it_ended(error: RayActorError) -> str:
    """What Ray knows about the end of a process, without its guesses at the cause."""
    _, found, detail = str(error).partition("Worker exit detail: ")
    return (detail if found else str(error)).partition("\n")[0].partition(" Some common causes")[0]
