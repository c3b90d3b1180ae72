"""Settings of the server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dgemma_mlx.diffusion.speed import DEFAULT_SPEED
from dgemma_mlx.server.image_fetch import PUBLIC, FetchRules


@dataclass(frozen=True)
class ServerSettings:
    """What the server's owner has chosen. ``dgemma-mlx serve`` makes it from its options.

    Attributes:
        model_name: The name under which the model is listed.
        host: The address that is listened on.
        port: The port that is listened on; 0 takes a free one.
        api_key: What clients must send as ``Authorization: Bearer`` or ``x-api-key``; None asks for nothing.
        allowed_origins: Origins of web pages that may use the server, beside its own page. One that ends in ``://``
            stands for all of its scheme.
        allowed_hosts: Names in the Host header that are accepted, beside the loopback names and ``host``.
        speed: What it takes to commit a canvas, where a request does not say so.
        memory_limit: Bytes that the work may take; None is the device's own limit.
        max_tokens: Largest number of tokens of an answer, where a request does not say so; None is the rest of the
            context.
        max_queue: Number of requests that may wait or run at a time; further ones are answered with 503.
        max_body: Largest number of bytes of a request's body.
        body_seconds: Seconds within which the body of a request must arrive.
        keep_alive: Seconds without a request after which the model is unloaded; None keeps it for ever.
        prompt_caches: Number of conversations whose encoded prompts are kept.
        prompt_cache_dir: A folder that keeps the prompt caches across restarts; None keeps them in memory only.
        strict_model: Whether a request for another model's name is answered with 404.
        remote_images: Whether images are fetched from the addresses that requests name.
        fetch_rules: What may be fetched then.
        ping_seconds: Seconds of silence in a stream after which the client gets a sign of life.
        log_prompts: Whether prompts are part of the log.
        log: Called with each line of the log.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    speed: str = DEFAULT_SPEED
    memory_limit: int | None = None
    max_tokens: int | None = None
    max_queue: int = 64
    max_body: int = 32 << 20
    body_seconds: float = 60.0
    keep_alive: float | None = None
    prompt_caches: int = 4
    prompt_cache_dir: Path | None = None
    strict_model: bool = False
    remote_images: bool = False
    fetch_rules: FetchRules = PUBLIC
    ping_seconds: float = 10.0
    log_prompts: bool = False
    log: Callable[[str], None] = lambda line: None
