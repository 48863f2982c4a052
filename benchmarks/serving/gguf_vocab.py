"""Add the vocabulary of a model folder to a GGUF file without one, so that llama-server loads it.

    python benchmarks/serving/gguf_vocab.py SOURCE.gguf MODEL TARGET.gguf

Servers decode every token to text. Requests contain token ids only, so each id needs its bytes, but
no merges.
"""

import argparse
import os
import sys
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter, TokenType

from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

CONTROL = int(TokenType.CONTROL)
NORMAL = int(TokenType.NORMAL)
BYTE = int(TokenType.BYTE)


def vocabulary(tokenizer: Tokenizer, count: int) -> tuple[list[bytes], list[int]]:
    """Texts and types of `count` tokens in SentencePiece format. Tokens that are not valid UTF-8
    get a name, because random weights generate invalid sequences, at which llama.cpp's server
    ends an answer.
    """
    special = {tokenizer.bos_id, *tokenizer.eos_ids}
    texts, types, seen = [], [], set()
    for token in range(count):
        raw = tokenizer.id_to_bytes(token)
        if token in special:
            text, kind = f"<|special {token}|>".encode(), CONTROL
        elif not is_text(raw):
            text, kind = f"<|bytes {raw.hex()}|>".encode(), NORMAL
        elif len(raw) == 1:
            text, kind = f"<0x{raw[0]:02X}>".encode(), BYTE
        else:
            text, kind = raw.replace(b" ", "▁".encode()), NORMAL
        if text in seen or not text:
            text = f"<|unused {token}|>".encode()
        seen.add(text)
        texts.append(text)
        types.append(kind)
    return texts, types


def is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def write(source: Path, model: Path, target: Path) -> None:
    """Copy `source` as `target` with the vocabulary of the folder `model`."""
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    tokenizer = Tokenizer.from_folder(model)
    count = int(reader.fields[f"{architecture}.vocab_size"].contents())
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    writer = GGUFWriter(partial, architecture)
    copy_fields(reader, writer)
    texts, types = vocabulary(tokenizer, count)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([0.0] * count)
    writer.add_token_types(types)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    for token in sorted(tokenizer.eos_ids)[:1]:
        writer.add_eos_token_id(token)
    try:
        copy_tensors(reader, writer)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def copy_fields(reader: GGUFReader, writer: GGUFWriter) -> None:
    """Copy all metadata, except the vocabulary and the fields that the writer adds."""
    for field in reader.fields.values():
        ours = (
            field.name.startswith(("GGUF.", "tokenizer.")) or field.name == "general.architecture"
        )
        if not ours:
            kind = field.types[0]
            part = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, part)


def copy_tensors(reader: GGUFReader, writer: GGUFWriter) -> None:
    for tensor in reader.tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.data.shape,
            tensor.data.dtype,
            tensor.data.nbytes,
            tensor.tensor_type,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("model", type=Path, help="checkpoint folder with a tokenizer")
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    try:
        write(given.source, given.model, given.target)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
