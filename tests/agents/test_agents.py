"""Each agent answers a question, and reads a file by a call. The settings are those that docs/server.md tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.agents.conftest import Run

QUESTION = "Sort 7 3 5"
TASK = "Look into note.txt and tell me the word."

# An agent's command without the question, and its variables.
Start = tuple[list[str], dict[str, str]]

# Writes an agent's settings into a home, for the server with an address.
Agent = Callable[[Path, str], Start]


def claude_code(home: Path, address: str) -> Start:
    return ["claude", "--allowedTools", "Bash(cat:*)", "-p"], {
        "ANTHROPIC_BASE_URL": address, "ANTHROPIC_AUTH_TOKEN": "none", "ANTHROPIC_MODEL": "demo",
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": "262144", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }  # fmt: skip


def codex(home: Path, address: str) -> Start:
    settings = f"""\
model = "demo"
model_provider = "dgemma-mlx"
model_context_window = 262144

[model_providers.dgemma-mlx]
name = "dgemma-mlx"
base_url = "{address}/v1"
wire_api = "responses"
"""
    _write(home / ".codex" / "config.toml", settings)
    return ["codex", "exec", "--skip-git-repo-check", "--sandbox", "danger-full-access"], {}


def opencode(home: Path, address: str) -> Start:
    provider = {
        "npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{address}/v1"},
        "models": {"demo": {"limit": {"context": 262144, "output": 8192}}},
    }  # fmt: skip
    settings = {"provider": {"dgemma-mlx": provider}, "model": "dgemma-mlx/demo", "small_model": "dgemma-mlx/demo"}
    _write(home / ".config" / "opencode" / "opencode.json", json.dumps({**settings, "autoupdate": False}))
    return ["opencode", "run"], {"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_LSP_DOWNLOAD": "1"}


def continue_cn(home: Path, address: str) -> Start:
    settings = f"""\
name: local
version: 1.0.0
schema: v1
models:
  - name: demo
    provider: openai
    model: demo
    apiBase: {address}/v1
    apiKey: none
    roles: [chat]
    capabilities: [tool_use]
    defaultCompletionOptions:
      contextLength: 262144
"""
    path = _write(home / "config.yaml", settings)
    return ["cn", "--config", str(path), "--auto", "-p"], {"CONTINUE_TELEMETRY_ENABLED": "0"}


def pi(home: Path, address: str, api: str = "openai-completions", base: str = "/v1") -> Start:
    model = {"id": "demo", "reasoning": True, "contextWindow": 262144, "maxTokens": 8192}
    provider = {"baseUrl": address + base, "api": api, "apiKey": "none", "models": [model]}
    _write(home / ".pi" / "agent" / "models.json", json.dumps({"providers": {"dgemma-mlx": provider}}))
    return ["pi", "--provider", "dgemma-mlx", "--model", "demo", "--no-session", "-p"], {"PI_OFFLINE": "1"}


def pi_messages(home: Path, address: str) -> Start:
    return pi(home, address, "anthropic-messages", "")


def pi_responses(home: Path, address: str) -> Start:
    return pi(home, address, "openai-responses")


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("agent", [claude_code, codex, opencode, continue_cn, pi, pi_messages, pi_responses])
def test_an_agent_answers_and_reads_a_file(agent: Agent, server: str, run: Run, tmp_path: Path) -> None:
    command, variables = agent(tmp_path / "home", server)
    assert "3 5 7" in run([*command, QUESTION], variables)
    assert "The word is zebra." in run([*command, TASK], variables)


def test_aider_answers_and_edits_a_file(server: str, run: Run, tmp_path: Path) -> None:
    variables = {"OPENAI_API_BASE": f"{server}/v1", "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [
        "aider", "--model", "openai/demo", "--no-show-model-warnings", "--no-git", "--yes-always", "--no-pretty",
        "--no-check-update", "--analytics-disable", "--message",
    ]  # fmt: skip
    assert "3 5 7" in run([*command, QUESTION], variables)
    run([*command, "Write an animal into animal.txt", "animal.txt"], variables)
    assert (tmp_path / "work" / "animal.txt").read_text() == "zebra\n"
