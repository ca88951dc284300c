"""Schemas of the commands predict, rank, search, embed, export, convert, models, check-data and make-shards."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from clip_exp.config.base import (
    NOT_EMPTY,
    Config,
    Count,
    Fraction,
    Index,
    Name,
    Paths,
    PathText,
    Target,
    Texts,
    TypedTexts,
    Unused,
)
from clip_exp.config.data import CustomDataConfig, Data
from clip_exp.config.evaluation import EvalOnBadImage, EvaluateConfig, InferenceConfig, ModelChoice, TableConfig
from clip_exp.config.model import ModelConfig
from clip_exp.config.training import TrainConfig

# Names that no further column may have, since the output has them itself
OF_FEATURES = ("key", "image_path", "caption", "text", "similarity", "image_embedding", "text_embedding")
OF_SHARDS = ("image", "caption", "captions", "txt", "json")


class OutputFormat(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


class CheckFormat(StrEnum):
    table = "table"
    json = "json"


class EmbedFormat(StrEnum):
    """Layouts of features on disk, named by the tools that read them."""

    clip_retrieval = "clip_retrieval"
    datacomp = "datacomp"
    parquet = "parquet"


class FeatureType(StrEnum):
    float16 = "float16"
    float32 = "float32"


class ShardFormat(StrEnum):
    webdataset = "webdataset"
    parquet = "parquet"


class ExportFormat(StrEnum):
    """Formats of exported models, named by the library that loads them."""

    open_clip = "open_clip"
    huggingface = "huggingface"
    safetensors = "safetensors"
    onnx = "onnx"


class OutputConfig(Config):
    """Format and destination of a result."""

    format: OutputFormat | None = Field(
        None, description="output format: table, json or csv; null: from the extension of output, else table"
    )
    output: PathText | None = Field(
        None,
        description="output file, which ends with .csv, .json or .txt (table) and is overwritten if it exists; null: print to the terminal",
    )


class UseConfig(InferenceConfig, OutputConfig):
    """Base class of predict, rank and search. Videos are accepted as images: the features of evenly spaced frames are averaged."""

    frames: Count | None = Field(
        8, description="number of evenly spaced frames of a video, whose features are averaged"
    )


class PredictConfig(UseConfig):
    """Configuration of `clip-exp predict`: probabilities of texts for images."""

    usage: ClassVar = """\
clip-exp predict images=DIR 'texts=[a diagram,a dog,a cat]' run=DIR [key=value …]

Prints the probability of each text for each image: softmax over the texts of logit scale times cosine similarity.
Class names with templates: labels=names.txt templates=simple. Machine-readable output: output=result.csv or format=json."""

    images: Paths | None = Field(
        None, description="images or videos: a file, a folder (with its subfolders), a glob, or a list of those"
    )
    texts: TypedTexts | None = Field(
        None, description="complete texts: [a diagram,a dog]; set exactly one of texts and labels"
    )
    labels: TypedTexts | None = Field(
        None, description="class names: a list, a file (text, YAML or JSON), or imagenet (OpenAI's 1,000 names)"
    )
    templates: Texts | None = Field(
        None,
        description="prompt templates for labels, with {} for the class name: openai (80 templates), simple (7), a list, or a file; null: "
        "labels are complete texts",
    )
    top_k: Count | None = Field(5, description="number of most probable texts to print for each image; null: all")


class RankConfig(UseConfig):
    """Configuration of `clip-exp rank`: the images that match a text best."""

    usage: ClassVar = """\
clip-exp rank 'text=an armchair in the shape of an avocado' images=DIR run=DIR [key=value …]

Ranks images by their cosine similarity with the text, best first, as DALL-E selected 32 of 512 samples.
copy_to=best copies them to a new folder; 'text=[a dog,a cat]' makes two rankings."""

    text: TypedTexts | None = Field(None, description="text, or a list of texts with a separate ranking for each")
    images: Paths | None = Field(
        None, description="images or videos: a file, a folder (with its subfolders), a glob, or a list of those"
    )
    top_k: Count | None = Field(32, description="number of images in a ranking, best first; null: all")
    copy_to: PathText | None = Field(
        None, description="new folder for copies of the ranked images, with file names in order of rank; null: none"
    )


class SearchConfig(UseConfig):
    """Configuration of `clip-exp search`: build, update and query an index of images."""

    usage: ClassVar = """\
clip-exp search index=photos.index images=DIR run=DIR      builds the index
clip-exp search index=photos.index images=DIR              updates it: only new and changed images are read
clip-exp search index=photos.index 'text=two dogs'         queries it
clip-exp search index=photos.index image=query.jpg top_k=20"""

    index: PathText | None = Field(
        None, description="file of the index, which stores its model: give the model only when the index is built"
    )
    images: Paths | None = Field(
        None,
        description="images to add to the index: a file, a folder (with its subfolders), a glob, or a list of those",
    )
    table: Paths | None = Field(
        None, description="table with a column of paths of images to add, or a list of tables; instead of images"
    )
    image_root: PathText | None = Field(
        None, description="folder that relative image paths in table refer to; null: the folder of the table"
    )
    allow_outside_root: bool = Field(
        False, description="allow relative image paths in table that lead out of image_root through .."
    )
    image_key: str = Field("filepath", description="name of the column with image paths")
    separator: str = Field(
        "auto", description="separator of columns in text files: one character, \\t for a tab; auto: detected"
    )
    encoding: str = Field("auto", description="encoding of text files, by Python's name; auto: detected")
    text: TypedTexts | None = Field(None, description="query text, or a list of texts with a separate search for each")
    image: Paths | None = Field(None, description="query image or video, or a list with a separate search for each")
    top_k: Count = Field(10, description="number of images per query, best first")
    frames: Count | None = Field(
        None,
        description="number of evenly spaced frames of a video, whose features are averaged; null: as stored in the index, 8 for a new one",
    )
    on_bad_image: EvalOnBadImage = Field(
        EvalOnBadImage.skip, description="skip: leave unreadable images out and count them; or error"
    )


class EmbedConfig(InferenceConfig, TableConfig):
    """Configuration of `clip-exp embed`: write the features of images and captions to files."""

    usage: ClassVar = """\
clip-exp embed table=pairs.csv run=DIR output=DIR [key=value …]       features of images and captions
clip-exp embed images=photos run=DIR output=DIR                       features of images only

Writes features of unit norm, preprocessed as in evaluation, in numbered files of rows_per_file rows. Formats:
  clip_retrieval  img_emb/img_emb_0.npy, text_emb/text_emb_0.npy, metadata/metadata_0.parquet
  datacomp        00000000.npz and 00000000.parquet, for the filters of DataComp
  parquet         00000.parquet with the columns key, image_path, caption, image_embedding and text_embedding
The same command continues after an interruption."""

    images: Paths | None = Field(
        None,
        description="images without captions: a file, a folder (with its subfolders), a glob, or a list of those; set exactly one of images "
        "and table",
    )
    table: Paths | None = Field(
        None, description="table with the columns image_key and caption_key, or shards; a glob, or a list of them"
    )
    caption_key: str = Field("title", description="name of the column with captions")
    columns: list[Annotated[Name, NOT_EMPTY]] = Field(
        [], description="further columns of table to copy next to the features, by name: texts or numbers"
    )
    output: PathText | None = Field(
        None,
        description="output folder: a new one, or that of an earlier start of the same command, which is continued",
    )
    format: EmbedFormat = Field(
        EmbedFormat.clip_retrieval, description="layout of the files: clip_retrieval, datacomp or parquet"
    )
    dtype: FeatureType = Field(FeatureType.float16, description="type of the stored features: float16 or float32")
    similarity: bool = Field(
        False, description="also store the CLIP score of each pair: the cosine similarity of image and caption"
    )
    rows_per_file: Count = Field(10_000, description="rows in each file; what a killed process loses at most")
    datacomp_name: Literal["b32", "l14"] = Field(
        "l14", description="name of the model in format=datacomp; its filters know only b32 and l14"
    )

    unused: ClassVar[tuple[Unused, ...]] = (
        *InferenceConfig.unused,
        Unused(
            f"{' '.join(TableConfig.model_fields)} caption_key columns similarity",
            lambda c: c.table is None,
            "without table",
            "set that, or leave this out",
        ),
        Unused(
            "datacomp_name",
            lambda c: c.format is not EmbedFormat.datacomp,
            "without format=datacomp",
            "set that, or leave this out",
            typed_only=True,
        ),
    )

    def rules(self, at: str) -> Iterator[str]:
        if self.format is EmbedFormat.datacomp and self.images is not None:
            yield "format=datacomp is for pairs of images and captions: give table instead of images, or another format."
        for name in (name for name in self.columns if name in OF_FEATURES):
            yield f"columns names {name!r}, which the output has itself: rename this column, or leave it out."


class ExportConfig(ModelChoice):
    """Configuration of `clip-exp export`: write a model in the format of another library."""

    usage: ClassVar = """\
clip-exp export run=DIR format=open_clip output=DIR [key=value …]

Writes a folder with weights, preprocessing, tokenizer and model card, to load with:
  open_clip    open_clip.create_model_and_transforms("local-dir:DIR")
  huggingface  CLIPModel.from_pretrained("DIR"), CLIPProcessor.from_pretrained("DIR")
  safetensors  clip_exp.load("DIR")
  onnx         image.onnx and text.onnx, for onnxruntime"""

    format: ExportFormat = Field(
        ExportFormat.open_clip, description="format of the export: open_clip, huggingface, safetensors or onnx"
    )
    output: PathText | None = Field(None, description="output folder; it must be new or empty unless overwrite=true")
    overwrite: bool = Field(False, description="replace the existing output folder")


class ConvertConfig(Config):
    """Configuration of `clip-exp convert`: rewrite a torch file as safetensors."""

    usage: ClassVar = """\
clip-exp convert FILE output=NAME.safetensors [trust_pickle=true]

Writes the tensors of a torch file (.pt, .pth, .bin, .ckpt) to a safetensors file under the same names, for pretrained=NAME.safetensors.
Keys of nested dictionaries are joined by dots; values other than tensors are left out and listed."""

    file: PathText | None = Field(None, description="torch file; `clip-exp convert FILE` is short for file=FILE")
    output: PathText | None = Field(None, description="safetensors file to write; it must not exist")
    trust_pickle: bool = Field(
        False,
        description="load pickles with objects other than tensors; this executes code in the file, so use it for trusted files only",
    )


class ModelsConfig(OutputConfig):
    """Configuration of `clip-exp models`: list models and their published weights."""

    usage: ClassVar = """\
clip-exp models [name=vit_b32] [all=true] [key=value …]

Lists models, their sizes, and the tags of published weights, for pretrained=TAG or load("vit_b32", pretrained="TAG").
The tags are those in the registry of the installed open_clip_torch."""

    name: str | None = Field(
        None, description="model to show in detail, with all its published weights: name=vit_b32; null: list all models"
    )
    all: bool = Field(False, description="also list open_clip's other architectures, for model=open_clip model.name=…")


class CheckDataConfig(Config):
    """Configuration of `clip-exp check-data`: check a data set, read in the same way as in training."""

    usage: ClassVar = """\
clip-exp check-data data=csv data.train=pairs.csv data.val=held_out.csv model=vit_b32
clip-exp check-data data=csv 'data.train=shards/{000..099}.tar' max_images=100000      checks a sample of a large data set

Prints problems and how to fix them, and writes report.html, report.json, bad_samples.csv, bad_rows.csv, duplicates.csv
and leakage.csv to a new folder. Exit code 3: more than data.max_bad_fraction of the images or rows are bad, more than
data.max_empty_caption_fraction of the captions are empty, or the leakage is above max_leakage."""

    data: Data = Field(description="training and validation data, as in a training")
    model: ModelConfig
    name: str = Field(description="name of the check; its folder is <output_dir>/check_data/<name>/<time>")
    output_dir: str = Field("outputs", description="folder for reports and indexes")
    global_batch_size: Annotated[Count, Field(ge=2)] = Field(
        1024,
        description="batch size of the planned training, in pairs, for which the number of equal captions in a batch is estimated",
    )
    decode: bool = Field(True, description="decode the pixels of all images; false: check files and headers only")
    max_images: Count | None = Field(
        None,
        description="number of images to check in each of data.train and data.val, a reproducible random sample; null: all",
    )
    max_leakage: Fraction | None = Field(
        None,
        description="maximum fraction of validation images that are also in the training data; the exit code is 3 above it; null: no limit",
    )
    num_workers: Annotated[Index, Field(le=4096)] | None = Field(
        None, description="processes that scan the data; null: one per CPU core; data.num_workers has no effect here"
    )
    format: CheckFormat = Field(CheckFormat.table, description="format of the printed result: table or json")

    def rules(self, at: str) -> Iterator[str]:
        key = (
            "_target_"
            if isinstance(self.data, CustomDataConfig)
            else "val"
            if isinstance(self.data.val, Target)
            else None
        )
        if key is not None:
            yield (
                f"data.{key} names a Dataset, but check-data reads tables: check the table that the Dataset reads (data=csv "
                "data.train=pairs.csv). Training itself checks the first items of a Dataset before it starts."
            )


class MakeShardsConfig(Config):
    """Configuration of `clip-exp make-shards`: write a data set as shards, read in the same way as in training."""

    usage: ClassVar = """\
clip-exp make-shards data=csv data.train=pairs.csv output=DIR [key=value …]
clip-exp make-shards data=csv data.train=pairs.csv output=DIR format=parquet

Writes WebDataset shards (DIR/00000.tar, …) or Parquet files with the images, whose bytes are copied unchanged. Every file
is read back before it gets its name. An image with several captions is one sample; data.captions=all makes each pair a
sample. The same command continues after an interruption."""

    data: Data = Field(description="data to write, data.train, as in a training")
    output: PathText | None = Field(
        None,
        description="output folder: a new one, or that of an earlier start of the same command, which is continued",
    )
    format: ShardFormat = Field(ShardFormat.webdataset, description="format of the files: webdataset (.tar) or parquet")
    shard_size: Count = Field(10_000, description="samples in each file")
    num_workers: Annotated[Count, Field(le=4096)] | None = Field(
        None, description="processes that write files; null: one per CPU core"
    )
    output_dir: str = Field("outputs", description="folder for the index of the table and for generated data")

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            "data.val",
            lambda c: c.data.generate is None,
            "on shards, which are made of data.train",
            "write it by a second command (data.train=…) to another folder",
        ),
        Unused(
            "data.shuffle data.shuffle_block data.shuffle_window data.num_workers data.transform",
            lambda c: True,
            "on shards, which have the rows of the table in its order",
            typed_only=True,
        ),
    )

    def rules(self, at: str) -> Iterator[str]:
        if isinstance(self.data, CustomDataConfig):
            yield (
                "data._target_ names a Dataset, but make-shards reads tables: use the table that the Dataset reads (data=csv "
                "data.train=pairs.csv)."
            )
        if any(source.weight is not None for source in self.data.sources):
            yield (
                "data.train has weights, which shards cannot store: write each source to a folder of its own, and give the weights when you "
                "train on these."
            )
        for name in (name for name in self.data.columns if name in OF_SHARDS):
            yield f"data.columns names {name!r}, which shards use themselves: rename this column."


# Schemas by name of the command
SCHEMAS: dict[str, type[Config]] = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "rank": RankConfig,
    "search": SearchConfig,
    "embed": EmbedConfig,
    "export": ExportConfig,
    "convert": ConvertConfig,
    "models": ModelsConfig,
    "check-data": CheckDataConfig,
    "make-shards": MakeShardsConfig,
}
