"""Tokenizers and encoders of Hugging Face's kinds, small enough for tests, as folders that transformers reads."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    BertConfig,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    MT5Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

CAPTIONS = [
    "a photo of a cat sitting on a mat", "two dogs run along the beach", "the number seven, handwritten", "the digit 3.",
    "an old man with a hat and a dog", "A Red Bus in the STREET", "children play football in the rain & mud",
    "一只猫坐在垫子上", "两只狗在沙滩上跑", "雨中的红色公共汽车", "数字七",
]  # fmt: skip
CHINESE = ["一只猫坐在垫子上", "两只狗在沙滩上跑", "雨中的红色公共汽车"]
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}


def write_bert_tokenizer(folder: Path) -> Path:
    """Word pieces between [CLS] and [SEP], a Chinese character per word, padded with 0."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=list(special.values()), show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return _save(folder, tokenizer, special)


def write_roberta_tokenizer(folder: Path) -> Path:
    """Pairs of bytes between <s> and </s>, padded with 1; for RoBERTa and XLM-RoBERTa."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(special.values()),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return _save(folder, tokenizer, {**special, "cls_token": "<s>", "sep_token": "</s>"})


def write_siglip_tokenizer(folder: Path) -> Path:
    """Sentence pieces and </s>, which also pads, as T5's tokenizer of SigLIP."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return _save(folder, tokenizer, {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"})


def _save(folder: Path, tokenizer: Tokenizer, special: dict[str, str]) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def small_encoder(kind: str) -> PretrainedConfig:
    match kind:
        case "bert":
            return BertConfig(vocab_size=300, max_position_embeddings=40, **SMALL)
        case "roberta":
            return RobertaConfig(vocab_size=500, max_position_embeddings=40, **SMALL)
        case "xlm-roberta":
            return XLMRobertaConfig(vocab_size=500, max_position_embeddings=40, **SMALL)
        case "mt5":
            return MT5Config(vocab_size=300, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=48)
    raise ValueError(kind)


def write_encoder(folder: Path, kind: str, seed: int = 0) -> Path:
    """A folder with `config.json`, `model.safetensors` and a tokenizer."""
    torch.manual_seed(seed)
    AutoModel.from_config(small_encoder(kind)).save_pretrained(folder)
    write_bert_tokenizer(folder) if kind in ("bert", "mt5") else write_roberta_tokenizer(folder)
    return folder


CHINESE_CLIP: dict[str, Any] = {
    "model_type": "chinese_clip",
    "projection_dim": 40,
    "vision_config": {
        "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
    },
    "text_config": {**SMALL, "vocab_size": 300, "max_position_embeddings": 64},
}  # fmt: skip


def small_chinese_clip() -> ChineseCLIPModel:
    """transformers' model, every weight of it drawn at random."""
    torch.manual_seed(0)
    model = ChineseCLIPModel(ChineseCLIPConfig.from_dict(CHINESE_CLIP)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def write_chinese_clip(folder: Path) -> Path:
    """A folder as transformers' classes save it: model, image processor and tokenizer."""
    small_chinese_clip().save_pretrained(folder)
    size = CHINESE_CLIP["vision_config"]["image_size"]
    ChineseCLIPImageProcessor(size={"height": size, "width": size}, do_center_crop=False).save_pretrained(folder)
    return write_bert_tokenizer(folder)
