import csv
import multiprocessing
import os
import pickle
import random
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer, get_clean_fn

from clip_exp.config.model import Cleaning, TextTowerConfig
from clip_exp.errors import ConfigError
from clip_exp.models.families.siglip import SigLIPTextConfig
from clip_exp.text.tokenizer import (
    CLEANINGS,
    END,
    START,
    HuggingFaceTokenizer,
    Tokenizer,
    Tokenizes,
    build_tokenizer,
    lower,
    pad_tokens,
)
from tests.encoders import CAPTIONS, CHINESE, write_bert_tokenizer, write_roberta_tokenizer, write_siglip_tokenizer

NASTY = [
    "",
    " ",
    "\t\r\n",
    "a photo of a cat.",
    "don't can't we'll they'd I'm you're I've it's 'tis 'TWAS",
    "1234567890 3.14 2nd 007",
    "'",
    "''''",
    "'s",
    "O'Neill's 'ſome long s",
    "'S 'LL 'ſ",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 👍🏽 thumb",
    "一只猫坐在垫子上。日本語のテキスト 한국어 텍스트",
    "مرحبا بالعالم ‏rtl‎ שלום",
    "caf\u00e9 cafe\u0301 e\u0301\u0323\u0307",
    "&amp;amp;lt;b&amp;amp;gt; &lt;i&gt; &#39; &amp;#39; &quot; &nbsp; &amp;nbsp;",
    "&#x1F600; &#xD800; &#0; &#x1; &bogus; &amp",
    "fish & chips && more",
    "control \x00 \x01 \x07 \x1b[31mred\x1b[0m \x7f end",
    "next\u0085line\u2028separator\u2029paragraph\u00a0nbsp\u3000wide\u200bzero",
    "\ufeffmark \ufffd replacement \ufffe",
    "schÃ¶n mojibake â€œquotesâ€\x9d",
    "“curly” ‘quotes’ — dash … ellipsis ﬁ ligature ＦＵＬＬ",
    "İstanbul ẞ ǅ K Å ſ ß",
    "<start_of_text> a <end_of_text> b!<start_of_text>",
    "<START_OF_TEXT> <ſtart_of_text> <end_of_text",
    "</w> a</w> <|endoftext|>",
    "!!!???...,,,;;;###$$$%%%^^^&&&***((()))",
    "\\n \\t {} [] `code` ~tilde~ |pipe|",
    "²³¼ ⅷ ① ٣ ४",
    "\U000e0041\U000e0042 tags \U0010ffff last",
    "a" * 400,
    "ab" * 3000,
    "é" * 300,
    "🐈" * 100,
    "word " * 500,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "MiXeD CaSe 12ab34CD 'n' rock'n'roll y'all'd've",
    "line one\nline two\r\nline three\rline four",
]
ALPHABET = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789     '''&;#<>.,!?-_"
    "éüñßſİКж中文字日本한글ابשש\u0301\u200d\ufe0f😀👍🏽\u0085\u2028\u00a0\x00\x1b²½ÃƒÂ©â€™"
)


def real_captions() -> list[str]:
    folder = os.environ.get("CLIP_EXP_DATA")
    table = Path(folder) / "flickr8k" / "train.csv" if folder else None
    if table is None or not table.exists():
        return []
    with open(table, newline="", encoding="utf-8") as file:
        return [record["title"] for record in csv.DictReader(file)][:7000]


def generated_captions(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(ALPHABET, k=draw.randrange(1, 120))) for _ in range(count)]


@pytest.fixture(scope="module")
def reference() -> open_clip.tokenizer.SimpleTokenizer:
    return open_clip.tokenizer.SimpleTokenizer()


def test_ids_equal_open_clip_on_unusual_text(reference):
    expected = reference(NASTY)
    ours = Tokenizer()(NASTY, trim=False)
    for text, mine, theirs in zip(NASTY, ours, expected, strict=True):
        assert torch.equal(mine, theirs), text[:80]


def test_ids_equal_open_clip_on_ten_thousand_captions(reference):
    captions = real_captions()
    captions += generated_captions(10_000 - len(captions))
    assert torch.equal(Tokenizer()(captions, trim=False), reference(captions))


@pytest.mark.parametrize("context_length", [2, 3, 16, 33, 200])
def test_ids_equal_open_clip_at_other_context_lengths(reference, context_length):
    assert torch.equal(Tokenizer(context_length)(NASTY, trim=False), reference(NASTY, context_length))


def test_every_single_character_of_the_basic_plane_cleans_as_open_clip_does():
    reference_clean = get_clean_fn("lower")
    for code in [*range(0x3000), *range(0xE000, 0x10000)]:
        text = f"A{chr(code)}b"
        assert lower(text) == reference_clean(text), hex(code)


def test_text_that_skips_ftfy_would_not_be_changed_by_it():
    reference_clean, draw = get_clean_fn("lower"), random.Random(0)
    scripts = [
        range(0x20, 0x250),
        range(0x370, 0x530),
        range(0x600, 0x780),
        range(0x3040, 0x30FF),
        range(0x1F300, 0x1F650),
    ]
    texts = [
        "".join(chr(draw.choice(draw.choice(scripts[:2]))) for _ in range(draw.randrange(12))) for _ in range(2000)
    ]
    texts += ["".join(chr(draw.choice(draw.choice(scripts))) for _ in range(draw.randrange(30))) for _ in range(2000)]
    mistaken = ["café naïve über", "мир", "“quoted” — 5 €", "日本語", "e\u0301", "Ångström"]
    for codec in ("latin-1", "cp1252", "cp1251", "cp437", "mac-roman"):
        texts += [text.encode("utf-8").decode(codec, "ignore") for text in mistaken]
    for text in texts:
        assert lower(text) == reference_clean(text), ascii(text)


def test_truncation_retains_the_end_id_and_is_counted():
    tokenizer = Tokenizer(8)
    exact, cut = tokenizer.encode_batch(["a b c d e f", "a b c d e f g"])
    assert tokenizer.truncated == 1
    assert len(exact) == len(cut) == 8
    assert exact == cut
    assert cut[0] == START
    assert cut[-1] == END


def test_batch_is_as_long_as_its_longest_caption_rounded_up():
    tokenizer = Tokenizer()
    texts = ["a", "a b c"]
    assert tokenizer(texts).shape == (2, 5)
    assert tokenizer(texts, multiple=8).shape == (2, 8)
    assert tokenizer("word " * 90, multiple=8).shape == (1, 77)
    assert tokenizer(texts, trim=False).shape == (2, 77)
    assert tokenizer(texts)[0].tolist() == [START, 320, END, 0, 0]
    assert pad_tokens([], 77).shape == (0, 1)


def test_a_tokenizer_of_a_tower_that_attends_to_padding_does_not_trim():
    tokenizer = Tokenizer(20, trims=False)
    assert tokenizer(["a", "a b c"]).shape == (2, 20)
    assert tokenizer.pad(tokenizer.encode_batch(["a"]), 8).shape == (1, 20)
    assert torch.equal(tokenizer(["a b c"]), Tokenizer(20)(["a b c"], trim=False))


def encode_in_child(tokenizer: Tokenizes) -> list[int]:
    return tokenizer.encode("a photo of a naïve café & a dog's 3 toys 一只猫")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_tokenizer_gives_the_same_ids_after_pickling_and_in_a_forked_process():
    tokenizer = Tokenizer(20)
    expected = encode_in_child(tokenizer)
    assert encode_in_child(pickle.loads(pickle.dumps(tokenizer))) == expected
    assert len(pickle.dumps(tokenizer)) < 1000
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(encode_in_child, (tokenizer,)) == expected


TEXTS = [*CAPTIONS, *NASTY, *generated_captions(200)]
WRITERS = {"bert": write_bert_tokenizer, "roberta": write_roberta_tokenizer, "siglip": write_siglip_tokenizer}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: str(write(tmp_path_factory.mktemp(name))) for name, write in WRITERS.items()}


@pytest.mark.parametrize("cleaning", list(Cleaning))
def test_a_text_is_cleaned_as_open_clip_does(cleaning: Cleaning) -> None:
    theirs = get_clean_fn(cleaning.value)
    assert [CLEANINGS[cleaning](text) for text in TEXTS] == [theirs(text) for text in TEXTS]


@pytest.mark.parametrize("cleaning", list(Cleaning))
@pytest.mark.parametrize("context_length", [4, 16, 64])
@pytest.mark.parametrize("name", WRITERS)
def test_ids_of_a_hugging_face_tokenizer_equal_open_clip(
    folders, name: str, context_length: int, cleaning: Cleaning
) -> None:
    theirs = HFTokenizer(folders[name], context_length, clean=cleaning.value)
    ours = HuggingFaceTokenizer(folders[name], context_length, cleaning=cleaning, trims=False)
    assert torch.equal(ours(TEXTS), theirs(TEXTS))


def test_separators_are_zeros_for_clipa(folders) -> None:
    theirs = HFTokenizer(folders["bert"], 16, strip_sep_token=True)
    assert torch.equal(
        HuggingFaceTokenizer(folders["bert"], 16, trims=False, strip_sep_token=True)(TEXTS), theirs(TEXTS)
    )


def test_a_siglip_tower_gets_the_ids_of_open_clip_over_its_whole_context(folders) -> None:
    config = SigLIPTextConfig(
        **WIDTH,
        context_length=16,
        vocab_size=300,
        tokenizer=folders["siglip"],
        cleaning=Cleaning.canonicalize,
    )
    theirs = HFTokenizer(folders["siglip"], 16, clean="canonicalize")
    ours = build_tokenizer(config)
    assert torch.equal(ours(TEXTS), theirs(TEXTS))
    assert ours(["a cat"]).shape == (1, 16)


def test_a_batch_of_a_hugging_face_tokenizer_is_as_long_as_its_longest_caption_rounded_up(folders) -> None:
    tokenizer = HuggingFaceTokenizer(folders["bert"], 32)
    lists = tokenizer.encode_batch(["a cat", "two dogs run"])
    longest = max(map(len, lists))
    assert tokenizer.pad(lists).shape == (2, longest)
    assert tokenizer.pad(lists, 8).shape == (2, 8)
    assert tokenizer.pad(lists, 64).shape == (2, 32)
    assert tokenizer.pad(lists)[0, len(lists[0]) :].tolist() == [0] * (longest - len(lists[0]))


def test_truncation_of_a_hugging_face_tokenizer_retains_the_end_id_and_is_counted(folders) -> None:
    tokenizer = HuggingFaceTokenizer(folders["roberta"], 8)
    exact, cut = tokenizer.encode("1 3 7"), tokenizer.encode("1 3 7 1 3 7 1 3 7")
    assert tokenizer.truncated == 1
    assert len(exact) < len(cut) == 8
    assert (cut[0], cut[-1]) == (0, 2)
    tokenizer.encode_batch(["1", "1 3 7 1 3 7 1 3 7"])
    assert tokenizer.truncated == 2


@pytest.mark.parametrize("name", WRITERS)
def test_chinese_captions_survive(folders, name: str) -> None:
    from transformers import AutoTokenizer

    decode = AutoTokenizer.from_pretrained(folders[name]).decode
    tokenizer = HuggingFaceTokenizer(folders[name], 64)
    for caption in CHINESE:
        assert decode(tokenizer.encode(caption), skip_special_tokens=True).replace(" ", "") == caption


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_hugging_face_tokenizer_gives_the_same_ids_after_pickling_and_in_a_forked_process(folders) -> None:
    tokenizer = HuggingFaceTokenizer(folders["bert"], 20)
    expected = encode_in_child(tokenizer)
    assert encode_in_child(pickle.loads(pickle.dumps(tokenizer))) == expected
    assert len(pickle.dumps(tokenizer)) < 1000
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(encode_in_child, (tokenizer,)) == expected


WIDTH = {"width": 8, "layers": 1, "heads": 1}
REFUSED = {
    "no folder": ("nowhere/at/all", WIDTH, "nowhere/at/all could not be loaded (FileNotFoundError: folder not found)"),
    "not on the hub": ("nowhere/at-all", WIDTH, "model.text.tokenizer=nowhere/at-all could not be loaded"),
    "small vocabulary": (
        "bert",
        {"kind": "siglip", "vocab_size": 100, **WIDTH},
        "but the text tower embeds only 100 ids",
    ),
    "end id that is not the highest": ("bert", {"vocab_size": 300, **WIDTH}, "does not end texts with its highest id"),
    "other padding": (
        "bert",
        {"kind": "huggingface", "name": "bert", "architecture": {"vocab_size": 300, "pad_token_id": 1}},
        "pads with id 0, but the padding id of the encoder is 1",
    ),
}


@pytest.mark.parametrize(("name", "values", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_a_tokenizer_that_does_not_fit_is_refused(folders, name, values, expected, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        build_tokenizer(TextTowerConfig.of({**values, "tokenizer": folders.get(name, name)}))
    assert expected in str(caught.value)


def test_a_tokenizer_that_needs_custom_code_is_refused(tmp_path: Path) -> None:
    folder = write_bert_tokenizer(tmp_path)
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    path = folder / "tokenizer_config.json"
    path.write_text(
        '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [null, "evil.Evil"]}, "pad_token": "[PAD]"}'
    )
    with pytest.raises(ConfigError, match="could not be loaded"):
        build_tokenizer(SigLIPTextConfig(tokenizer=str(folder), **WIDTH))
    assert not marker.exists()
