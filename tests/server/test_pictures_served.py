"""Images in requests: all protocols show the model the same picture, and nothing else is read or fetched for them."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx import Model, choose, fill, generate, load
from dgemma_mlx.server.anthropic_request import MessagesRequest
from dgemma_mlx.server.anthropic_request import conversation as of_messages
from dgemma_mlx.server.body import converted
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.image_fetch import FetchRules
from dgemma_mlx.server.images import ImageReader, ImageReference, decoded
from dgemma_mlx.server.messages import chat_messages
from dgemma_mlx.server.responses_request import ResponsesRequest
from dgemma_mlx.server.responses_request import conversation as of_responses
from dgemma_mlx.server.settings import ServerSettings
from tests.server.live import http, serving
from tests.vision.seeing import png, write_blind, write_seeing
from tests.waiting import wait_until

SEED, MOST, QUESTION = 3, 8, "Reverse"


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


URL = data_url(png())


class Pictures(BaseHTTPRequestHandler):
    """Answers everything with a picture."""

    def do_GET(self) -> None:
        asked.append(self.path)
        self.send_response(200)
        self.send_header("content-type", "image/png")
        self.end_headers()
        self.wfile.write(png())

    def log_message(self, *_: object) -> None:
        """Write nothing."""


asked: list[str] = []


@pytest.fixture(scope="module")
def pictures() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/a.png"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = load(write_seeing(tmp_path_factory.mktemp("seeing")))
    return replace(model, generation=model.generation.override(max_denoising_steps=3))


log: list[str] = []


@pytest.fixture(scope="module")
def address(model: Model) -> Iterator[str]:
    rules = FetchRules(networks=(ip_network("127.0.0.0/8"),))
    with serving(lambda: model, remote_images=True, fetch_rules=rules, log=log.append, log_prompts=True) as address:
        yield address


@pytest.fixture(scope="module")
def closed(model: Model) -> Iterator[str]:
    """A server that fetches nothing."""
    with serving(lambda: model) as address:
        yield address


def chat(url: Any = URL, *, more: Any = QUESTION, **image: Any) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url, **image}}, {"type": "text", "text": more}]
    return {"messages": [{"role": "user", "content": content}], "seed": SEED, "max_tokens": MOST}


def response(**image: Any) -> dict[str, Any]:
    content = [{"type": "input_image", **image}, {"type": "input_text", "text": QUESTION}]
    return {"input": [{"role": "user", "content": content}], "seed": SEED, "max_output_tokens": MOST}


def message(**source: Any) -> dict[str, Any]:
    content = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": content}], "seed": SEED, "max_tokens": MOST}


BASE64 = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png()).decode()}


def answered(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    found = http.post(address + path, json=body)
    assert found.status_code == 200, found.text
    answer: dict[str, Any] = found.json()
    return answer


def refused(address: str, path: str, body: dict[str, Any]) -> str:
    found = http.post(address + path, json=body)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    assert path.startswith("/v1/messages") == (found.json().get("type") == "error")
    return str(error["message"])


def test_every_protocol_gives_the_answer_of_python(model: Model, address: str, pictures: str) -> None:
    text = generate(model, QUESTION, images=[png()], seed=SEED, max_tokens=MOST).text
    assert text and text != generate(model, QUESTION, images=[png(1)], seed=SEED, max_tokens=MOST).text
    for body in (chat(), chat(detail="auto"), chat(pictures), chat(data_url(png(), "IMAGE/PNG;x=y"))):
        assert answered(address, "/v1/chat/completions", body)["choices"][0]["message"]["content"] == text
    for body in (response(image_url=URL, detail="auto"), response(image_url=pictures)):
        assert answered(address, "/v1/responses", body)["output"][-1]["content"][0]["text"] == text
    for body in (message(**BASE64), message(type="url", url=URL), message(type="url", url=pictures)):
        assert answered(address, "/v1/messages", body)["content"][0]["text"] == text


def test_the_own_endpoints_show_images(model: Model, address: str) -> None:
    body = {"question": QUESTION, "choices": ["yes", "no"], "images": [URL], "seed": SEED}
    found = answered(address, "/v1/choose", body)["choices"]
    expected = choose(model, QUESTION, ["yes", "no"], images=[png()], seed=SEED)
    assert [each["probability"] for each in found] == pytest.approx([each.probability for each in expected], abs=1e-5)
    gap: dict[str, Any] = {"text": "It is ___:2___.", "images": [URL], "seed": SEED}
    filled = fill(model, gap["text"], images=[png()], seed=SEED)
    assert answered(address, "/v1/fill", gap)["text"] == filled.text
    edit = {"text": "a b", "instruction": "Swap.", "images": [URL], "seed": SEED}
    assert answered(address, "/v1/edit", edit)["model"] == "demo"
    assert "images[1]" in refused(address, "/v1/choose", {**body, "images": [URL, "data:,"]})


@pytest.mark.parametrize(("detail", "budget"), [("low", 70), ("auto", None), ("high", 1120), (None, None)])
def test_details_choose_the_number_of_soft_tokens(model: Model, detail: str | None, budget: int | None) -> None:
    part = {"type": "image_url", "image_url": {"url": URL, "detail": detail}}
    messages = chat_messages([{"role": "user", "content": [part]}])
    reader = ImageReader(ServerSettings("demo"))
    [found] = asyncio.run(reader.messages(model.without_network(), messages))
    reader.close()
    expected = {"type": "image", "bytes": png(), **({} if budget is None else {"budget": budget})}
    assert found["content"] == [expected]


def test_tokens_are_counted_with_the_picture(address: str) -> None:
    count = answered(address, "/v1/messages/count_tokens", message(**BASE64))["input_tokens"]
    usage = answered(address, "/v1/messages", message(**BASE64))["usage"]
    assert count == usage["input_tokens"] + usage["cache_read_input_tokens"] > 60


def test_a_picture_is_encoded_once_for_a_conversation(model: Model) -> None:
    with serving(lambda: model) as address:

        def cached(body: dict[str, Any]) -> int:
            usage = answered(address, "/v1/chat/completions", body)["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        first = chat()
        assert cached(first) == 0
        later = [{"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Why?"}]
        assert cached({**first, "messages": [*first["messages"], *later]}) > 64
        assert cached(chat(data_url(png(1)))) < 10  # another picture of the same size


def test_the_log_has_no_bytes_of_pictures(address: str) -> None:
    log.clear()
    answered(address, "/v1/chat/completions", chat())
    wait_until(lambda: any("chat" in line for line in log))  # the line comes after the answer
    [line] = [line for line in log if "chat" in line]
    assert f'"bytes": "{len(png()):,} bytes"' in line and QUESTION in line and len(line) < 400


def test_a_tower_that_is_not_supported_is_not_offered(tmp_path: Path) -> None:
    model = load(write_seeing(tmp_path / "odd", hidden_activation="relu"))
    with serving(lambda: model) as address:
        assert "unsupported hidden_activation 'relu'" in refused(address, "/v1/chat/completions", chat())
        assert http.get(f"{address}/props").json()["modalities"]["vision"] is False
        [entry] = http.get(f"{address}/v1/models").json()["data"]
        assert entry["architecture"]["input_modalities"] == ["text"]


def test_a_stream_of_a_picture_is_answered(address: str) -> None:
    found = http.post(f"{address}/v1/chat/completions", json={**chat(), "stream": True, "drafts": True})
    assert found.status_code == 200 and found.text.rstrip().endswith("data: [DONE]") and '"dgemma"' in found.text


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("/v1/chat/completions", chat(1), "messages[0].content[0]"),
        ("/v1/chat/completions", chat(detail="huge"), "messages[0].content[0]"),
        ("/v1/chat/completions", chat(detail=["low"]), "messages[0].content[0]"),
        ("/v1/chat/completions", chat("data:image/png;base64,a"), "malformed"),
        ("/v1/chat/completions", chat("data:image/png;base64"), "messages[0].content[0]"),
        ("/v1/chat/completions", chat("data:text/html;base64,aaaa"), "'text/html' is not an image"),
        ("/v1/chat/completions", chat("data:image/png;base64,aaaa"), "image 1"),
        ("/v1/chat/completions", chat("file:///etc/hostname"), "only http and https"),
        ("/v1/chat/completions", chat("/etc/hostname"), "only http and https"),
        ("/v1/chat/completions", chat("http://10.0.0.1/a.png"), "is not a public address"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": chat()["messages"][0]["content"] * 65}]},
         "65 images"),
        ("/v1/chat/completions", {"messages": [{**chat()["messages"][0], "role": "assistant"}]}, "message of the user"),
        ("/v1/responses", response(file_id="file-1"), "no files are kept"),
        ("/v1/responses", response(), "input[0]"),
        ("/v1/responses", response(image_url="data:image/png;base64,aaaa"), "image 1"),
        ("/v1/messages", message(type="file", file_id="file_1"), "no files are kept"),
        ("/v1/messages", message(**{**BASE64, "media_type": "application/pdf"}), "'application/pdf' is not an image"),
        ("/v1/messages", message(**{**BASE64, "data": "a"}), "messages.0"),
        ("/v1/messages", message(**{**BASE64, "data": "aaaa"}), "image 1"),
        ("/v1/messages/count_tokens", message(**{**BASE64, "data": "aaaa"}), "image 1"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused_with_its_place(
    address: str, path: str, body: dict[str, Any], place: str
) -> None:
    assert place in refused(address, path, body)


def test_nothing_is_fetched_unless_the_owner_wants_it(closed: str, pictures: str) -> None:
    before = len(asked)
    for path, body in (
        ("/v1/chat/completions", chat(pictures)), ("/v1/responses", response(image_url=pictures)),
        ("/v1/messages", message(type="url", url=pictures)),
    ):  # fmt: skip
        assert "--allow-remote-images" in refused(closed, path, body)
    assert len(asked) == before
    assert answered(closed, "/v1/chat/completions", chat())["object"] == "chat.completion"


def test_an_address_is_fetched_once_for_a_request(address: str, pictures: str) -> None:
    before = len(asked)
    parts = chat(f"{pictures}?once")["messages"][0]["content"]
    answered(address, "/v1/messages/count_tokens", message(type="url", url=f"{pictures}?count"))
    answered(address, "/v1/chat/completions",
             {"messages": [{"role": "user", "content": parts * 2}], "n": 2, "max_tokens": 1})  # fmt: skip
    assert len(asked) == before + 2


def test_what_a_model_reads_is_told(closed: str) -> None:
    assert http.get(f"{closed}/props").json()["modalities"] == {"vision": True, "audio": False}
    [entry] = http.get(f"{closed}/v1/models").json()["data"]
    assert entry["architecture"]["input_modalities"] == ["text", "image"]


def test_a_model_without_a_tower_reads_no_images(tmp_path: Path) -> None:
    blind = write_blind(tmp_path / "blind")
    with serving(lambda: load(blind)) as address:
        for path, body in (
            ("/v1/chat/completions", chat()), ("/v1/responses", response(image_url=URL)),
            ("/v1/messages", message(**BASE64)),
        ):  # fmt: skip
            assert "demo reads no images" in refused(address, path, body)
        assert http.get(f"{address}/props").json()["modalities"] == {"vision": False, "audio": False}
        [entry] = http.get(f"{address}/v1/models").json()["data"]
        assert entry["architecture"]["input_modalities"] == ["text"]


def test_a_memory_limit_counts_the_tower(model: Model) -> None:
    size = model.weight_bytes() + (24 << 20)
    with serving(lambda: model, memory_limit=size) as address:
        assert "memory limit" in refused(address, "/v1/chat/completions", chat(detail="high"))
        assert answered(address, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}],
                                                          "max_tokens": 1})["object"]  # fmt: skip


def test_texts_around_images_stay_in_order() -> None:
    image = {"type": "image_url", "image_url": URL}
    texts = [{"type": "text", "text": text} for text in "abc"]
    [found] = chat_messages([{"role": "user", "content": [*texts[:2], image, "d", image, image, texts[2]]}])
    kept = [part["text"] if isinstance(part, dict) else part.place for part in found["content"]]
    places = [f"messages[0].content[{number}]" for number in (2, 4, 5)]
    assert kept == ["a\nb", places[0], "d", *places[1:], "c"]


def test_the_results_of_tools_may_hold_images() -> None:
    call = {"type": "tool_use", "id": "c", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "c",
              "content": [{"type": "text", "text": "see"}, {"type": "image", "source": BASE64}]}  # fmt: skip
    turns = [{"role": "user", "content": "look"}, {"role": "assistant", "content": [call]}]
    body = {"messages": [*turns, {"role": "user", "content": [result]}]}
    found = of_messages(converted(body, MessagesRequest))[-1]
    assert found == {"role": "tool", "tool_call_id": "c",
                     "content": [{"type": "text", "text": "see"}, ImageReference(URL, "messages.2")]}  # fmt: skip
    with pytest.raises(ApiError, match="message of the user"):
        of_messages(converted({"messages": [*turns, {"role": "user", "content": [{**result, "is_error": True}]}]},
                              MessagesRequest))  # fmt: skip
    output = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": URL}]}
    items = [{"role": "user", "content": "look"},
             {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}, output]  # fmt: skip
    found = of_responses(converted({"input": items}, ResponsesRequest))[-1]
    assert found["content"] == [ImageReference(URL, "input[2]")]


def test_data_urls_may_be_percent_encoded_or_broken_into_lines() -> None:
    text = base64.b64encode(b"\xff\xfe\xfd~~").decode()
    assert decoded(f"data:image/png;base64,{text[:3]}\n {text[3:]}", "") == b"\xff\xfe\xfd~~"
    assert decoded(f"data:image/png;base64,{text.replace('=', '%3D').replace('/', '%2F')}", "") == b"\xff\xfe\xfd~~"
    assert decoded("DATA:image/x-portable,%00a", "") == b"\x00a"


def test_no_path_of_this_machine_is_read(address: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    part = {"type": "image", "path": str(path)}
    body = {"messages": [{"role": "user", "content": [part]}]}
    assert "messages[0].content[0]" in http.post(f"{address}/v1/chat/completions", json=body).json()["error"]["param"]
    for url in (str(path), path.as_uri()):
        assert "only http" in refused(address, "/v1/chat/completions", chat(url))
