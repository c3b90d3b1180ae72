"""The files of an output other than its weights: configuration, index, tokenizer, report and model card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from dgemma_convert import convert
from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.shards import shard_files
from tests.convert.checkpoints import SMALL_FILES, digests, make_source, names_in, read, some_tensors, stored
from tests.model.checkpoint import flat_config, layered_config

INDEX = "model.safetensors.index.json"


def test_both_config_layouts_are_written_with_the_published_keys(tmp_path: Path) -> None:
    written = {}
    for name, config in (("flat", flat_config()), ("layered", layered_config())):
        output = convert(str(make_source(tmp_path / name, config))).output
        written[name] = read(output / "config.json")
        assert ModelConfig.load(output).text == ModelConfig.load(tmp_path / name).text
        text = written[name]["text_config"]
        assert (text["head_dim"], text["global_head_dim"]) == (32, 64)
        assert (text["num_key_value_heads"], text["num_global_key_value_heads"]) == (2, 1)
        assert text["final_logit_softcapping"] == 30.0
        assert text["layer_types"] == flat_config()["text_config"]["layer_types"]
    assert written["flat"]["quantization"] == written["layered"]["quantization"]
    assert written["flat"]["quantization"] == written["flat"]["quantization_config"]
    rest = {key: value for key, value in written["flat"].items() if not key.startswith("quantization")}
    assert rest == {**flat_config(), "dtype": "bfloat16"}


def test_index_names_every_tensor_and_its_shard(tmp_path: Path, source: Path) -> None:
    report = convert(str(source))
    index = read(report.output / INDEX)
    assert set(index["weight_map"].values()) == {path.name for path in report.output.glob("*.safetensors")}
    assert index["weight_map"].keys() == stored(report.output).keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(report.output).values())
    assert index["metadata"]["total_parameters"] == sum(tensor.size for tensor in some_tensors().values())


def test_only_the_known_small_files_are_copied(tmp_path: Path, talking: Path) -> None:
    source = shutil.copytree(talking, tmp_path / "source")
    copied = {"LICENSE": "free", "tokenizer.model": "x", "processor_config.json": "{}", "chat_template.json": "{}"}
    for name, text in {**copied, "README.md": "theirs", "optimizer.bin": "x", "training.json": "{}"}.items():
        (source / name).write_text(text)
    (source / "tokenizer_extra").mkdir()
    output = convert(str(source)).output
    own = {"config.json", "model.safetensors", INDEX, "conversion_report.json", "README.md"}
    assert names_in(output) == {*SMALL_FILES, *copied, *own}
    for name in (*SMALL_FILES, *copied):
        assert (output / name).read_bytes() == (source / name).read_bytes()


def test_report_describes_the_output(source: Path) -> None:
    report = convert(str(source), None, "q3")
    data = read(report.output / "conversion_report.json")
    assert data == json.loads(json.dumps(report.data))
    assert data["shards"] == {path.name: digests(report.output)[path.name] for path in shard_files(report.output)}
    assert (data["source"], data["recipe"], data["verification"], data["mixed"]) == ("source", "q3", None, None)
    assert data["bytes_out"] == sum(tensor.nbytes for tensor in stored(report.output).values())


def test_card_shows_sizes_and_the_comparison(talking: Path, tmp_path: Path) -> None:
    plain = convert(str(talking), tmp_path / "plain")
    compared = convert(str(talking), tmp_path / "compared", check=True)
    card, other = ((report.output / "README.md").read_text() for report in (compared, plain))
    assert "`q4`" in card and "--verify" in other and "--verify" not in card
    assert f"{compared.plan.bits_per_weight:.2f}" in card and "experts | 6 | 4-bit g64" in card
    assert compared.verification is not None
    assert f"{compared.verification.kl_divergence:.5f}" in card
    assert compared.data["verification"] == compared.verification.as_dict()
    assert "base_model" not in card  # a folder has no Hub id


def test_output_does_not_depend_on_time_or_place(
    tmp_path: Path, talking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    first = convert(str(talking), tmp_path / "one" / "out", check=True).output
    monkeypatch.chdir(talking.parent.parent)
    second = convert(f"{talking.parent.name}/source", tmp_path / "other" / "out", check=True).output
    assert digests(first) == digests(second)
    text = "".join((first / name).read_text() for name in ("README.md", "conversion_report.json", "config.json", INDEX))
    assert str(tmp_path) not in text and "/tmp" not in text and talking.parent.name not in text
    assert not re.search(r"\b20\d\d\b", text)
