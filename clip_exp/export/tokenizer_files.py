"""Tokenizer of an export, as files of the `tokenizers` library and of Hugging Face's `CLIPTokenizer`."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from clip_exp.config.model import TextTowerConfig
from clip_exp.text import tokenizer as ours
from clip_exp.text.tokenizer import load_huggingface, save_huggingface

# Hugging Face's tokens for our ids START and END
START, END = "<|startoftext|>", "<|endoftext|>"
# Pattern of words in `clip_exp.text.tokenizer`, in the syntax of the tokenizers library
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def openai_tokenizer() -> Tokenizer:
    """Return OpenAI's tokenizer for the `tokenizers` library: start, words, end, without truncation and padding.

    The ids are the same as ours, except for texts with broken characters or HTML entities, which the library does not
    repair or decode as `clip_exp.text.tokenizer.lower` does.
    """
    vocabulary, merges = ours.vocabulary()
    tokenizer = Tokenizer(
        BPE({**vocabulary, START: ours.START, END: ours.END}, merges, end_of_word_suffix="</w>", unk_token=END)
    )
    tokenizer.add_special_tokens([START, END])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing((END, ours.END), (START, ours.START), False, False)
    return tokenizer


def write_for_clip(folder: Path, text: TextTowerConfig) -> None:
    """Write the files for `CLIPTokenizer.from_pretrained`, also for older versions of transformers, which read other files."""
    tokenizer = openai_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    # vocab.json and merges.txt
    tokenizer.model.save(str(folder))
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.context_length, **special}
    for name, values in (("tokenizer_config.json", about), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_ready(folder: Path, text: TextTowerConfig, trims: bool) -> None:
    """Write a `tokenizer.json` with truncation and padding, whose output is the input of the text tower.

    `Tokenizer.from_file("tokenizer.json").encode_batch(texts)` returns lists of ids of the same length.

    Args:
        folder: folder to write to.
        text: configuration of the text tower.
        trims: pad a batch to its longest text; False: to the context length.
    """
    path = folder / "tokenizer.json"
    if text.uses_openai_tokenizer:
        tokenizer, pad_id = openai_tokenizer(), 0
    else:
        write_custom(folder, text)
        tokenizer, pad_id = Tokenizer.from_file(str(path)), load_huggingface(str(folder)).pad_token_id
    tokenizer.enable_truncation(text.context_length)
    length = None if trims else text.context_length
    tokenizer.enable_padding(pad_id=pad_id, pad_token=tokenizer.id_to_token(pad_id), length=length)
    tokenizer.save(str(path))


def write_custom(folder: Path, text: TextTowerConfig) -> None:
    """Write the files of a tokenizer from the hub or from a folder, without its path."""
    source = text.tokenizer_source
    assert source is not None
    save_huggingface(source, folder)
    path = folder / "tokenizer_config.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    about.pop("name_or_path", None)
    about["model_max_length"] = text.context_length
    path.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
