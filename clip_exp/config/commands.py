"""The schema of the commands that put a model or a data set to work: predict, rank, search, export, convert, models, check-data."""

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field

from clip_exp.config.base import Config, Count, Fraction, Index, Paths, PathText, Texts, TypedTexts
from clip_exp.config.data import DataConfig
from clip_exp.config.evaluation import EvalOnBadImage, EvaluateConfig, InferenceConfig, ModelChoice
from clip_exp.config.model import ModelConfig
from clip_exp.config.training import TrainConfig


class OutputFormat(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


class CheckFormat(StrEnum):
    table = "table"
    json = "json"


class ExportFormat(StrEnum):
    """Libraries whose files an export writes."""

    open_clip = "open_clip"
    huggingface = "huggingface"
    safetensors = "safetensors"
    onnx = "onnx"


class OutputConfig(Config):
    """Where a result goes."""

    format: OutputFormat | None = Field(
        None, description="table, json or csv; null: by the ending of output, else table"
    )
    output: PathText | None = Field(None, description="file, replaced if it exists; null: the terminal")


class UseConfig(InferenceConfig, OutputConfig):
    """What predict, rank and search share; an image is a file, or a video by frames spread evenly over it."""

    frames: Count | None = Field(8, description="frames of a video, whose features are averaged")


class PredictConfig(UseConfig):
    """Probabilities of texts for images."""

    usage: ClassVar = """\
clip-exp predict images=DIR 'texts=[a diagram,a dog,a cat]' run=DIR [key=value …]

How probable each text is for each image: softmax over the texts of logit scale times cosine.
Class names with templates: labels=names.txt templates=simple. For programs: output=result.csv or format=json."""

    images: Paths | None = Field(None, description="file, folder (with the folders in it), glob, or a list of those")
    texts: TypedTexts | None = Field(
        None, description="whole texts: [a diagram,a dog]; exactly one of texts and labels"
    )
    labels: TypedTexts | None = Field(
        None, description="class names: a list, a file (text, YAML, JSON), or imagenet (OpenAI's 1,000)"
    )
    templates: Texts | None = Field(
        None,
        description="of labels: openai (80), simple (7), a list, or a file, {} for the name; null: a label is the whole text",
    )
    top_k: Count | None = Field(5, description="number of texts per image, most probable first; null: all")


class RankConfig(UseConfig):
    """The images that fit a text best."""

    usage: ClassVar = """\
clip-exp rank 'text=an armchair in the shape of an avocado' images=DIR run=DIR [key=value …]

The images with the highest cosine with the text, best first: DALL-E kept 32 of 512 this way.
copy_to=best copies them into a new folder; 'text=[a dog,a cat]' makes two rankings."""

    text: TypedTexts | None = Field(None, description="one text, or a list: each is a ranking of its own")
    images: Paths | None = Field(None, description="file, folder (with the folders in it), glob, or a list of those")
    top_k: Count | None = Field(32, description="number of images per text, best first; null: all")
    copy_to: PathText | None = Field(None, description="new folder for copies of them, named in their order")


class SearchConfig(UseConfig):
    """An index of images that is made once, extended, and queried by text or by image."""

    usage: ClassVar = """\
clip-exp search index=photos.index images=DIR run=DIR      makes the index
clip-exp search index=photos.index images=DIR              brings it up to date: only new and changed images are read
clip-exp search index=photos.index 'text=two dogs'         asks it
clip-exp search index=photos.index image=query.jpg top_k=20"""

    index: PathText | None = Field(
        None, description="file of the index; it remembers its model, which is named only the first time"
    )
    images: Paths | None = Field(None, description="images to put into it: file, folder, glob, or a list of those")
    table: Paths | None = Field(None, description="or a CSV with a column of paths, or a list of them")
    image_root: PathText | None = Field(
        None, description="folder that relative paths of the table start from; null: its own folder"
    )
    allow_outside_root: bool = Field(
        False, description="index images of the table whose relative path leaves `image_root` by `..`"
    )
    image_key: str = Field("filepath", description="column of image paths")
    separator: str = Field("auto", description="auto, or one character; tab may be written \\t")
    encoding: str = Field("auto", description="auto, or Python's name of an encoding")
    text: TypedTexts | None = Field(None, description="text to look for, or a list: each is a search of its own")
    image: Paths | None = Field(None, description="image or video to look for, or a list")
    top_k: Count = Field(10, description="number of images per query, best first")
    frames: Count | None = Field(None, description="frames of a video; null: as the index has it, 8 for a new one")
    on_bad_image: EvalOnBadImage = Field(
        EvalOnBadImage.skip, description="skip: leave unreadable images out and count them; or error"
    )


class ExportConfig(ModelChoice):
    """A folder that another library loads the model from."""

    usage: ClassVar = """\
clip-exp export run=DIR format=open_clip output=DIR [key=value …]

A folder with weights, preprocessing, tokenizer and model card:
  open_clip    open_clip.create_model_and_transforms("local-dir:DIR")
  huggingface  CLIPModel.from_pretrained("DIR"), CLIPProcessor.from_pretrained("DIR")
  safetensors  clip_exp.load("DIR")
  onnx         image.onnx and text.onnx, for onnxruntime"""

    format: ExportFormat = Field(ExportFormat.open_clip, description="open_clip, huggingface, safetensors or onnx")
    output: PathText | None = Field(None, description="the folder; a new or empty one")
    overwrite: bool = Field(False, description="replace what is there")


class ConvertConfig(Config):
    """A torch file, rewritten as safetensors."""

    usage: ClassVar = """\
clip-exp convert FILE output=NAME.safetensors [trust_pickle=true]

The tensors of a torch file (.pt, .pth, .bin, .ckpt) as safetensors, whose names stay: pretrained=NAME.safetensors reads them.
Nested dictionaries become names with dots; what is not a tensor is left out and listed."""

    file: PathText | None = Field(None, description="the torch file; `clip-exp convert FILE` is file=FILE")
    output: PathText | None = Field(None, description="the safetensors file; a new one")
    trust_pickle: bool = Field(
        False,
        description="load a pickle that asks for more than weights, which runs the code in it: only a file of someone you trust",
    )


class ModelsConfig(OutputConfig):
    """The models that there are, and the weights that are published for them."""

    usage: ClassVar = """\
clip-exp models [name=vit_b32] [all=true] [key=value …]

Models, their size, and the tags of published weights: pretrained=TAG, or load("vit_b32", pretrained="TAG").
What is published comes from the registry of the installed open_clip_torch."""

    name: str | None = Field(
        None, description="one of them, with all that is known of its weights: name=vit_b32; null: all of clip_exp's"
    )
    all: bool = Field(False, description="open_clip's other configurations too, for model=open_clip model.name=…")


class CheckDataConfig(Config):
    """A data set, read as training would read it."""

    usage: ClassVar = """\
clip-exp check-data data=csv data.train=pairs.csv data.val=held_out.csv model=vit_b32
clip-exp check-data data=csv 'data.train=shards/{000..099}.tar' max_images=100000      a sample of a huge set

Prints what is wrong and how to repair it; the folder it names holds report.html, report.json, bad_samples.csv,
bad_rows.csv, duplicates.csv and leakage.csv. Exit code 3: more than data.max_bad_fraction of the images or rows
are bad, more than data.max_empty_caption_fraction of the captions are empty, or leakage is above max_leakage."""

    data: DataConfig
    model: ModelConfig
    name: str = Field(description="name of the folder: <output_dir>/check_data/<name>/<time>")
    output_dir: str = Field("outputs", description="folder for reports and indexes")
    global_batch_size: Annotated[Count, Field(ge=2)] = Field(
        1024, description="of the training that is planned: how many equal captions meet in a batch"
    )
    decode: bool = Field(True, description="false: images are read and their headers looked at, no pixel is decoded")
    max_images: Count | None = Field(
        None,
        description="of data.train and of data.val: check a random sample of that many, the same each time; null: all",
    )
    max_leakage: Fraction | None = Field(
        None,
        description="fraction of data.val's images that training may have seen, above which the exit code is 3; null: any",
    )
    num_workers: Annotated[Index, Field(le=4096)] | None = Field(
        None, description="processes that scan; null: all cores. data.num_workers is training's."
    )
    format: CheckFormat = Field(CheckFormat.table, description="table or json, of what is printed")


SCHEMAS: dict[str, type[Config]] = {  # by command
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "rank": RankConfig,
    "search": SearchConfig,
    "export": ExportConfig,
    "convert": ConvertConfig,
    "models": ModelsConfig,
    "check-data": CheckDataConfig,
}
