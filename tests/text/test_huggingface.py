import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import HFTokenizer, get_clean_fn

from clip_exp.config.model_schema import Cleaning, ModelConfig, TextTower, TextTowerConfig
from clip_exp.errors import ConfigError
from clip_exp.text.build import build_tokenizer
from clip_exp.text.cleaning import CLEANINGS
from clip_exp.text.huggingface import HuggingFaceTokenizer
from clip_exp.text.saved import save_tokenizer, with_saved_tokenizer
from tests.encoders import CAPTIONS, CHINESE, write_bert_tokenizer, write_roberta_tokenizer, write_siglip_tokenizer
from tests.text.test_tokenizer import NASTY, generated_captions

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
def test_ids_equal_open_clip(folders, name: str, context_length: int, cleaning: Cleaning) -> None:
    theirs = HFTokenizer(folders[name], context_length, clean=cleaning.value)
    ours = HuggingFaceTokenizer(folders[name], context_length, cleaning=cleaning, trims=False)
    assert torch.equal(ours(TEXTS), theirs(TEXTS))


def test_separators_are_zeros_where_clipa_wants_them(folders) -> None:
    theirs = HFTokenizer(folders["bert"], 16, strip_sep_token=True)
    assert torch.equal(
        HuggingFaceTokenizer(folders["bert"], 16, trims=False, strip_sep_token=True)(TEXTS), theirs(TEXTS)
    )


def test_a_siglip_tower_gets_the_ids_of_open_clip_over_its_whole_context(folders) -> None:
    config = TextTowerConfig(
        kind=TextTower.siglip,
        context_length=16,
        vocab_size=300,
        tokenizer=folders["siglip"],
        cleaning=Cleaning.canonicalize,
    )
    theirs = HFTokenizer(folders["siglip"], 16, clean="canonicalize")
    ours = build_tokenizer(config)
    assert torch.equal(ours(TEXTS), theirs(TEXTS))
    assert ours(["a cat"]).shape == (1, 16)


def test_a_batch_is_as_long_as_its_longest_caption_rounded_up(folders) -> None:
    tokenizer = HuggingFaceTokenizer(folders["bert"], 32)
    lists = tokenizer.encode_batch(["a cat", "two dogs run"])
    longest = max(map(len, lists))
    assert tokenizer.pad(lists).shape == (2, longest)
    assert tokenizer.pad(lists, 8).shape == (2, 8)
    assert tokenizer.pad(lists, 64).shape == (2, 32)
    assert tokenizer.pad(lists)[0, len(lists[0]) :].tolist() == [0] * (longest - len(lists[0]))


def test_truncation_keeps_the_end_and_is_counted(folders) -> None:
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


def encode_in_child(tokenizer: HuggingFaceTokenizer) -> list[int]:
    return tokenizer.encode("a photo of a naïve café & a dog's 3 toys 一只猫")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_ids_are_the_same_after_pickling_and_in_a_forked_process(folders) -> None:
    tokenizer = HuggingFaceTokenizer(folders["bert"], 20)
    expected = encode_in_child(tokenizer)
    assert encode_in_child(pickle.loads(pickle.dumps(tokenizer))) == expected
    assert len(pickle.dumps(tokenizer)) < 1000
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(encode_in_child, (tokenizer,)) == expected


def test_a_run_keeps_its_tokenizer_when_the_original_is_gone(tmp_path: Path) -> None:
    folder = write_siglip_tokenizer(tmp_path / "original")
    text = TextTowerConfig(kind=TextTower.siglip, context_length=16, vocab_size=300, tokenizer=str(folder))
    model = ModelConfig(name="small", embed_dim=8, text=text)
    expected = build_tokenizer(text)(TEXTS)
    run_dir = tmp_path / "run"
    save_tokenizer(model, run_dir)
    folder.rename(tmp_path / "elsewhere")
    moved = run_dir.rename(tmp_path / "moved")
    assert torch.equal(build_tokenizer(with_saved_tokenizer(model, moved).text)(TEXTS), expected)
    assert with_saved_tokenizer(model, tmp_path / "another") is model


REFUSED = {
    "no folder": ("nowhere/at/all", {}, "nowhere/at/all cannot be had (FileNotFoundError: there is no such folder)"),
    "not on the hub": ("nowhere/at-all", {}, "model.text.tokenizer=nowhere/at-all cannot be had"),
    "small vocabulary": ("bert", {"kind": TextTower.siglip, "vocab_size": 100}, "and the text tower embeds 100"),
    "end id that is not the highest": ("bert", {"vocab_size": 300}, "does not end a text with its highest id"),
    "other padding": (
        "bert",
        {"kind": TextTower.huggingface, "architecture": {"vocab_size": 300, "pad_token_id": 1}},
        "pads with 0, and the encoder takes 1",
    ),
}


@pytest.mark.parametrize(("name", "values", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_a_tokenizer_that_does_not_fit_is_refused(folders, name, values, expected, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        build_tokenizer(TextTowerConfig(**{"kind": TextTower.clip, **values}, tokenizer=folders.get(name, name)))
    assert expected in str(caught.value)


def test_a_tokenizer_that_needs_code_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = write_bert_tokenizer(tmp_path)
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    path = folder / "tokenizer_config.json"
    path.write_text(
        '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [null, "evil.Evil"]}, "pad_token": "[PAD]"}'
    )
    with pytest.raises(ConfigError, match="cannot be had"):
        build_tokenizer(TextTowerConfig(kind=TextTower.siglip, tokenizer=str(folder)))
    assert not marker.exists()
