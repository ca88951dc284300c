"""The tokenizer that belongs to a model, as files of the `tokenizers` library and of Hugging Face's `CLIPTokenizer`."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from clip_exp.config.model import TextTowerConfig
from clip_exp.text import tokenizer as ours
from clip_exp.text.tokenizer import load_huggingface, save_huggingface

START, END = "<|startoftext|>", "<|endoftext|>"  # Hugging Face's names for our ids START and END
# As `clip_exp.text.tokenizer` splits a text; the tokenizers library has its own dialect of patterns.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def openai_tokenizer() -> Tokenizer:
    """OpenAI's tokenizer for the `tokenizers` library: start, words, end; neither cut nor padded.

    Ids are ours for every text that `clip_exp.text.tokenizer.lower` leaves as it is, but for case and spaces: the
    library repairs no broken characters, and reads no HTML entities.
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
    """Write what `CLIPTokenizer.from_pretrained` reads: one file for today's transformers, three for older ones."""
    tokenizer = openai_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.context_length, **special}
    for name, values in (("tokenizer_config.json", about), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_ready(folder: Path, text: TextTowerConfig, trims: bool) -> None:
    """Write a `tokenizer.json` that gives the tower's input as it is: cut to the context and padded.

    `Tokenizer.from_file("tokenizer.json").encode_batch(texts)` has lists of ids of one length.

    Args:
        trims: a batch is as long as its longest text; else as the context.
    """
    path = folder / "tokenizer.json"
    if text.uses_openai_tokenizer:
        tokenizer, pad_id = openai_tokenizer(), 0
    else:
        write_own(folder, text)
        tokenizer, pad_id = Tokenizer.from_file(str(path)), load_huggingface(str(folder)).pad_token_id
    tokenizer.enable_truncation(text.context_length)
    length = None if trims else text.context_length
    tokenizer.enable_padding(pad_id=pad_id, pad_token=tokenizer.id_to_token(pad_id), length=length)
    tokenizer.save(str(path))


def write_own(folder: Path, text: TextTowerConfig) -> None:
    """Write the files of a tokenizer from the hub or from a folder, without a trace of where it lay."""
    source = text.tokenizer_source
    assert source is not None
    save_huggingface(source, folder)
    path = folder / "tokenizer_config.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    about.pop("name_or_path", None)
    about["model_max_length"] = text.context_length
    path.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
