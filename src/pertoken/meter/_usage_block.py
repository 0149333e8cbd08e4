"""Usage blocks as APIs return them, turned into computed input, cached input and output tokens.

NAME_MAP (the field names of `UsageBlock`): OpenAI chat (`prompt_tokens` holds cached ones,
`completion_tokens` holds reasoning), OpenAI responses (the same as `input_tokens`, `output_tokens` with
details), Anthropic (`input_tokens` holds neither cache reads nor writes), Gemini (`candidatesTokenCount`
does not hold thoughts). Sources: the providers' API references, checked 2026-11-24.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec

from pertoken.errors import InputError

Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]


class _Details(msgspec.Struct, gc=False):
    cached_tokens: Count | None = None
    cache_read_tokens: Count | None = None
    """OpenTelemetry-flavoured gateways."""


class UsageBlock(msgspec.Struct, gc=False, kw_only=True):
    """The fields we read; others are ignored (details of what is already inside these)."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    input_tokens_details: _Details | None = None
    cached_input_tokens: Count | None = None
    """Ours: then `input_tokens` holds computed ones alone."""
    cache_read_input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None
    prompt_token_count: Count | None = msgspec.field(name="promptTokenCount", default=None)
    candidates_token_count: Count | None = msgspec.field(name="candidatesTokenCount", default=None)
    thoughts_token_count: Count | None = msgspec.field(name="thoughtsTokenCount", default=None)
    cached_content_token_count: Count | None = msgspec.field(name="cachedContentTokenCount", default=None)


class Tokens(NamedTuple):
    """What one request used: input tokens computed, input tokens from a cache, output tokens (reasoning
    inside)."""

    input_tokens: int
    cached_input_tokens: int
    output_tokens: int


def tokens(block: UsageBlock) -> Tokens:
    """Tokens of a usage block, nothing counted twice.

    Raises InputError where more tokens were cached than sent, or the block holds no count at all.

    >>> tokens(UsageBlock(prompt_tokens=100, completion_tokens=40, cache_read_input_tokens=64))
    Tokens(input_tokens=36, cached_input_tokens=64, output_tokens=40)
    >>> tokens(UsageBlock(input_tokens=36, cache_read_input_tokens=64, output_tokens=40))
    Tokens(input_tokens=36, cached_input_tokens=64, output_tokens=40)
    """
    if block.prompt_token_count is not None:
        output = (block.candidates_token_count or 0) + (block.thoughts_token_count or 0)
        return _inclusive(block.prompt_token_count, block.cached_content_token_count or 0, output)
    details = block.prompt_tokens_details or block.input_tokens_details
    read, written = block.cache_read_input_tokens, block.cache_creation_input_tokens
    output = block.completion_tokens if block.completion_tokens is not None else (block.output_tokens or 0)
    if block.prompt_tokens is None and block.input_tokens is None and not output:
        raise InputError("a usage block holds no token counts")
    cached = read
    if details is not None:
        cached = details.cached_tokens if details.cached_tokens is not None else details.cache_read_tokens
        cached = read if cached is None else cached
    if block.prompt_tokens is not None:
        return _inclusive(block.prompt_tokens, cached or 0, output)
    if block.cached_input_tokens is not None:
        return Tokens(block.input_tokens or 0, block.cached_input_tokens, output)
    if block.input_tokens_details is None and (read is not None or written is not None):
        return Tokens((block.input_tokens or 0) + (written or 0), read or 0, output)
    return _inclusive(block.input_tokens or 0, cached or 0, output)


def _inclusive(prompt: int, cached: int, output: int) -> Tokens:
    if cached > prompt:
        raise InputError(f"{cached} cached tokens are more than the prompt's {prompt}")
    return Tokens(prompt - cached, cached, output)
