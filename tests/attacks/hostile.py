"""Folders and GGUF files that no reader may take, each made from a tiny model that all take."""

import json
import os
import pickle
import socket
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eigenslice.checkpoint.weights import INDEX, SINGLE
from tests.checkpoint.files import edit_json

Attack = Callable[[Path], Any]
BOOM = "ran.txt"
"""A file that code in a checkpoint would write beside the folder."""


class Boom:
    """Writes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.place}",)


def boom(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Boom(folder.parent / BOOM)))


def config(**values: Any) -> Attack:
    """Sets fields of config.json."""
    return lambda folder: edit_json(folder / "config.json", **values)


def write(name: str, content: str | bytes) -> Attack:
    """Writes a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def pipe(name: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return attack


def link(name: str, target: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return attack


def linked_out(name: str) -> Attack:
    """A file moved out of the folder, and a link in its place."""

    def attack(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"secret-{name}")
        (folder / name).symlink_to(folder.parent / f"secret-{name}")

    return attack


def in_place(name: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return attack


def listening(name: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX)
        before = Path.cwd()
        os.chdir(folder)  # a socket's path is at most 107 characters long
        server.bind(name)
        os.chdir(before)
        server.close()

    return attack


def shard(folder: Path, single: bool = False, **index: Any) -> None:
    """Two shards instead of one file; keywords change the index's entries, None removes."""
    tensors = load_file(folder / SINGLE)
    if not single:
        (folder / SINGLE).unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in halves.items() for name in part} | index
    content = {"metadata": {}, "weight_map": {k: v for k, v in weight_map.items() if v is not None}}
    (folder / INDEX).write_text(json.dumps(content))


def pickled_shards(suffix: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / SINGLE).unlink()
        boom(folder, f"pytorch_model{suffix}")
        weight_map = {"model.norm.weight": f"pytorch_model{suffix}"}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return attack


def half_pickled(folder: Path) -> None:
    """transformers reads all files as safetensors, or all as pickles, by the first one's name."""
    index: dict[str, Any] = {"model.norm.weight": "0.bin"}
    shard(folder, **index)
    boom(folder, "0.bin")


def only_pickles(folder: Path) -> None:
    (folder / SINGLE).unlink()
    boom(folder, "pytorch_model.bin")


def outside(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").rename(folder.parent / "b.safetensors")
    text = (folder / INDEX).read_text().replace("b.safetensors", "../b.safetensors")
    (folder / INDEX).write_text(text)


def absolute(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").rename(folder.parent / "b.safetensors")
    text = (folder / INDEX).read_text().replace("b.safetensors", str(folder.parent / "b.safetensors"))
    (folder / INDEX).write_text(text)


def missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").unlink()


def twice(folder: Path) -> None:
    """One tensor in both shards: who comes last wins."""
    shard(folder)
    tensors = load_file(folder / "b.safetensors")
    first = next(iter(load_file(folder / "a.safetensors").items()))
    save_file(tensors | {first[0]: first[1] + 1}, folder / "b.safetensors", metadata={"format": "pt"})


def no_metadata(folder: Path) -> None:
    shard(folder)
    edit_json(folder / INDEX, metadata=None)


def distributed(folder: Path) -> None:
    """transformers takes such files before all others."""
    (folder / "shard-00000-model-00001-of-00001.safetensors").write_bytes((folder / SINGLE).read_bytes())


def adapter(folder: Path, **values: Any) -> None:
    """An adapter beside the weights, which changes what the model computes; keywords change its config."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's
        tuned: Any = get_peft_model(model, config)
        tuned.save_pretrained(folder)
    if values:
        edit_json(folder / "adapter_config.json", **values)


def adapter_alone(folder: Path) -> None:
    adapter(folder)
    (folder / SINGLE).unlink()
    (folder / "config.json").unlink()


def adapter_without_weights(folder: Path) -> None:
    adapter(folder)
    (folder / SINGLE).unlink()


def adapter_pickled(folder: Path) -> None:
    adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    boom(folder, "adapter_model.bin")


def odd_adapter(**values: Any) -> Attack:
    return lambda folder: adapter(folder, **values)


def header(change: Callable[[dict[str, Any]], Any]) -> Attack:
    """Changes the header of the safetensors file; the data stay."""

    def attack(folder: Path) -> None:
        content = (folder / SINGLE).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        fields = json.loads(content[8 : 8 + length])
        change(fields)
        text = json.dumps(fields).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return attack


def shifted(fields: dict[str, Any]) -> None:
    """Two tensors share bytes."""
    names = sorted((n for n in fields if n != "__metadata__"), key=lambda n: fields[n]["data_offsets"])
    first, second = names[0], names[1]
    width = fields[second]["data_offsets"][1] - fields[second]["data_offsets"][0]
    fields[second]["data_offsets"] = [fields[first]["data_offsets"][0], fields[first]["data_offsets"][0] + width]


def integers(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / SINGLE, metadata={"format": "pt"})


def unknown_tensor(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {"model.layers.0.mlp.extra.weight": torch.ones(2)}, folder / SINGLE, metadata={"format": "pt"})


HUGE = 10**9
FOLDERS: dict[str, Attack] = {
    "pipe-config": pipe("config.json"),
    "pipe-weights": pipe(SINGLE),
    "pipe-index": pipe(INDEX),
    "pipe-tokenizer": pipe("tokenizer.json"),
    "pipe-tokenizer-config": pipe("tokenizer_config.json"),
    "pipe-generation-config": pipe("generation_config.json"),
    "pipe-template": pipe("chat_template.jinja"),
    "pipe-preprocessor": pipe("preprocessor_config.json"),
    "pipe-adapter": pipe("adapter_config.json"),
    "pipe-further-template": lambda folder: (
        (folder / "additional_chat_templates").mkdir(),
        pipe("additional_chat_templates/rag.jinja")(folder),
    ),
    "socket-config": listening("config.json"),
    "zero-config": link("config.json", "/dev/zero"),
    "zero-weights": link(SINGLE, "/dev/zero"),
    "zero-tokenizer": link("tokenizer.json", "/dev/zero"),
    "zero-index": link(INDEX, "/dev/zero"),
    "loop": link("config.json", "config.json"),
    "loop-weights": link(SINGLE, SINGLE),
    "dangling-config": link("config.json", "nothing.json"),
    "dangling-weights": link(SINGLE, "nothing"),
    "folder-config": in_place("config.json"),
    "folder-weights": in_place(SINGLE),
    "linked-config": linked_out("config.json"),
    "linked-weights": linked_out(SINGLE),
    "linked-tokens-map": link("special_tokens_map.json", "/etc/passwd"),
    "linked-tokenizer": link("tokenizer.json", "/etc/passwd"),
    "no-config": lambda folder: (folder / "config.json").unlink(),
    "deep-config": write("config.json", "[" * 100_000 + "]" * 100_000),
    "deep-field": write("config.json", '{"model_type": "llama", "a": ' + "[" * 400 + "]" * 400 + "}"),
    "no-utf-8": write("config.json", b'{"model_type": "llama", "a": "\xff"}'),
    "with-bom": lambda folder: (folder / "config.json").write_bytes(
        b"\xef\xbb\xbf" + (folder / "config.json").read_bytes()
    ),
    "no-object": write("config.json", "[]"),
    "long-number": write("config.json", '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}"),
    "nan": config(rms_norm_eps=float("nan")),
    "huge-config": lambda folder: os.truncate(folder / "config.json", 2**31),
    "huge-index": lambda folder: (write(INDEX, "{}")(folder), os.truncate(folder / INDEX, 2**31)),
    "layers": config(num_hidden_layers=HUGE),
    "one-layer-more": config(num_hidden_layers=4),
    "one-layer-less": config(num_hidden_layers=2),
    "no-layers": config(num_hidden_layers=0),
    "negative-layers": config(num_hidden_layers=-3),
    "float-layers": config(num_hidden_layers=1e9),
    "text-layers": config(num_hidden_layers=str(HUGE)),
    "true-layers": config(num_hidden_layers=True),
    "vocabulary": config(vocab_size=HUGE),
    "vocabulary-less-one": config(vocab_size=95),
    "width": config(hidden_size=HUGE),
    "neurons": config(intermediate_size=HUGE),
    "heads": config(num_attention_heads=HUGE),
    "no-heads": config(num_attention_heads=0),
    "no-key-value-heads": config(num_key_value_heads=0),
    "odd-key-value-heads": config(num_key_value_heads=3),
    "no-head-dim": config(head_dim=0),
    "negative-head-dim": config(head_dim=-8),
    "positions": config(max_position_embeddings=HUGE),
    "negative-positions": config(max_position_embeddings=-1),
    "labels": config(num_labels=HUGE),
    "types": config(layer_types=["full_attention"] * 5),
    "eps": config(rms_norm_eps=-1.0),
    "rope-theta": config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
    "rope-factor": config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}),
    "rope-share": config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 9.0}),
    "rope-type": config(rope_parameters={"rope_type": "none-such", "rope_theta": 1e4}),
    "experts": config(model_type="mixtral", num_local_experts=HUGE),
    "experts-instead": config(model_type="mixtral", num_local_experts=4096, intermediate_size=2**20),
    "text-config": lambda folder: (folder / "config.json").write_text(
        json.dumps(
            {"model_type": "llava", "text_config": json.loads((folder / "config.json").read_text())}
            | {"vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": HUGE}}
        )
    ),
    "other-weights": config(transformers_weights="other.safetensors"),
    "other-config": config(configuration_files=["config.4.0.0.json"]),
    "kernel": config(attn_implementation="someone/kernel"),
    "distributed": distributed,
    "pickles": only_pickles,
    "pickles-bin": pickled_shards(".bin"),
    "pickles-pt": pickled_shards(".pt"),
    "pickles-pth": pickled_shards(".pth"),
    "pickles-no-suffix": pickled_shards(""),
    "pickles-half": half_pickled,
    "outside": outside,
    "absolute": absolute,
    "missing-shard": missing_shard,
    "tensor-twice": twice,
    "no-metadata": no_metadata,
    "index-and-single": lambda folder: shard(folder, single=True),
    "empty-index": lambda folder: (
        (folder / SINGLE).unlink(),
        write(INDEX, '{"metadata": {}, "weight_map": {}}')(folder),
    ),
    "deep-index": lambda folder: ((folder / SINGLE).unlink(), write(INDEX, "[" * 100_000)(folder)),
    "adapter-alone": adapter_alone,
    "adapter-no-weights": adapter_without_weights,
    "adapter-pickled": adapter_pickled,
    "adapter-layers": odd_adapter(layer_replication=[[0, HUGE]]),
    "adapter-imports": odd_adapter(megatron_config={"a": 1}, megatron_core="antigravity"),
    "adapter-pattern": odd_adapter(target_modules="(a+)+$"),
    "adapter-rank": odd_adapter(r=HUGE),
    "adapter-type": odd_adapter(peft_type="LOHA"),
    "header-overlap": header(shifted),
    "header-negative": header(lambda f: f["model.norm.weight"].update(data_offsets=[-4, 124])),
    "header-wraps": header(lambda f: f["model.norm.weight"].update(shape=[2**62, 4, 4])),
    "header-shape": header(lambda f: f["model.norm.weight"].update(shape=[31])),
    "header-dtype": header(lambda f: f["model.norm.weight"].update(dtype="F16")),
    "header-zero": header(lambda f: f["model.norm.weight"].update(shape=[0, 5])),
    "header-hole": header(lambda f: f.pop("model.norm.weight")),
    "integers": integers,
    "unknown-tensor": unknown_tensor,
}
"""What is done to a folder that all readers take."""


Bytes = Callable[[bytes], bytes]


def number(at: int, letter: str, value: int) -> Bytes:
    """Writes a number at a place."""
    return lambda data: data[:at] + struct.pack("<" + letter, value) + data[at + struct.calcsize(letter) :]


def field(name: str, value: int, letter: str = "I", behind: int = 4) -> Bytes:
    """Writes a number where a metadata field's value begins, or so many bytes behind its name."""

    def change(data: bytes) -> bytes:
        at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + behind
        return number(at, letter, value)(data)

    return change


def tensor(name: str, part: str, value: int) -> Bytes:
    """Writes a number into the entry of a tensor with two dimensions."""
    places = {"dimensions": (0, "I"), "columns": (4, "Q"), "rows": (12, "Q"), "type": (20, "I"), "offset": (24, "Q")}
    behind, letter = places[part]
    return field(name, value, letter, behind)


def renamed(old: str, new: str) -> Bytes:
    """Replaces a text by one of the same length."""
    assert len(old) == len(new)
    return lambda data: data.replace(old.encode(), new.encode())


UP = "blk.1.ffn_up.weight"
GGUFS: dict[str, Bytes] = {
    "big-endian": lambda data: data[:4] + data[4:8][::-1] + data[8:],
    "version-1": number(4, "I", 1),
    "tensors-2^31": number(8, "Q", 2**31),
    "tensors-2^63": number(8, "Q", 2**63),
    "one-tensor-less": lambda data: number(8, "Q", struct.unpack("<Q", data[8:16])[0] - 1)(data),
    "fields-2^31": number(16, "Q", 2**31),
    "fields-2^64": number(16, "Q", 2**64 - 1),
    "empty": lambda data: b"",
    "four-bytes": lambda data: data[:4],
    "half": lambda data: data[: len(data) // 2],
    "no-gguf": lambda data: b"PK" + data[2:],
    "key-2^31": number(24, "Q", 2**31),
    "key-0": number(24, "Q", 0),
    "string-2^31": field("tokenizer.ggml.model", 2**31, "Q"),
    "string-2^63": field("tokenizer.ggml.model", 2**63, "Q"),
    "array-2^31": field("tokenizer.ggml.tokens", 2**31, "Q", 8),
    "array-2^63": field("tokenizer.ggml.token_type", 2**63, "Q", 8),
    "array-in-array": field("tokenizer.ggml.tokens", 9, "I", 4),
    "type-of-field": field("llama.block_count", 77, "I", 0),
    "text-for-number": field("llama.block_count", 8, "I", 0),
    "field-twice": renamed("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"),
    "more-blocks-said": field("llama.block_count", 4),
    "fewer-blocks-said": field("llama.block_count", 2),
    "blocks-2^31": field("llama.block_count", 2**31 - 1),
    "no-blocks": field("llama.block_count", 0),
    "gap-in-blocks": renamed("blk.2.", "blk.7."),
    "no-heads": field("llama.attention.head_count", 0),
    "no-key-value-heads": field("llama.attention.head_count_kv", 0),
    "odd-key-value-heads": field("llama.attention.head_count_kv", 3),
    "heads-2^31": field("llama.attention.head_count", 2**31 - 1),
    "neurons-2^31": field("llama.feed_forward_length", 2**31 - 1),
    "no-neurons": field("llama.feed_forward_length", 0),
    "width": field("llama.embedding_length", 2**31 - 1),
    "no-width": field("llama.embedding_length", 0),
    "vocabulary": field("llama.vocab_size", 2**31 - 1),
    "vocabulary-less-one": field("llama.vocab_size", 95),
    "context-2^31": field("llama.context_length", 2**31 - 1),
    "no-theta": field("llama.rope.freq_base", 0),
    "nan-eps": field("llama.attention.layer_norm_rms_epsilon", 0x7FC00000),
    "dimensions-2^31": tensor(UP, "dimensions", 2**31),
    "no-dimensions": tensor(UP, "dimensions", 0),
    "no-rows": tensor(UP, "rows", 0),
    "rows-2^62": tensor(UP, "rows", 2**62),
    "rows-wrap": tensor(UP, "rows", 2**63),
    "more-rows": tensor(UP, "rows", 57),
    "rows-and-columns": lambda data: tensor(UP, "rows", 32)(tensor(UP, "columns", 56)(data)),
    "type-unknown": tensor(UP, "type", 4000),
    "type-no-float": tensor(UP, "type", 26),
    "type-of-blocks": tensor("token_embd.weight", "type", 12),
    "offset-odd": tensor(UP, "offset", 17),
    "offset-overlaps": tensor(UP, "offset", 0),
    "offset-wraps": tensor(UP, "offset", 2**64 - 32),
    "offset-behind": tensor(UP, "offset", 2**40),
    "tensor-twice": renamed("blk.1.attn_q.weight", "blk.1.attn_k.weight"),
    "tensor-unknown": renamed(UP, "blk.1.ffn_xx.weight"),
    "architecture-unknown": renamed("llama", "llamb"),
    "architecture-other": renamed("llama", "qwen2"),
    "no-utf-8": lambda data: data.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.\xff\xff\xff"),
}
"""What is done to the bytes of a tiny Llama's GGUF."""
