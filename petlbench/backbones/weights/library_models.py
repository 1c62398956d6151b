"""Language models and tokenizers of transformers: random, by hub name, or from a folder in the library's layout.

The library's own environment variables control caches and the network (HF_HOME, HF_HUB_OFFLINE).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig
from transformers.utils import cached_file, logging

from petlbench.api.codec import Codec
from petlbench.backbones.weights.library_codec import LibraryCodec, file_codec
from petlbench.backbones.weights.tensors import asset, first_few, on_meta
from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean, one_line

PUBLISHED = ("pretrained", "none")  # sources of weights that are not paths
KNOWN = (
    "facebook/bart-base",
    "facebook/bart-large",
    "google-t5/t5-small",
    "google-t5/t5-base",
    "google-t5/t5-large",
    "google-bert/bert-base-uncased",
    "facebook/detr-resnet-50",
    "facebook/detr-resnet-101",
)
HEADS = (
    "final_logits_bias",
    "lm_head.weight",
)  # extra tensors of the generating model: zero, and tied to the token table
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")


def library_model(cls: Any, config: Any, source: str, *, fixed: Sequence[str]) -> Any:
    """Return a `cls` of transformers with our configuration, random for `none` or on the meta device, else of `source`.

    `fixed`: options that shapes do not show, and that must equal the source's. Raise UserError if the source does not
    exist, cannot be read, or does not fit; the message names a few tensors and counts all.
    """
    if source == "none" or on_meta():
        return cls(config)
    place = model_location(source)
    with quiet(), readable(source, "a language model"):
        theirs = PretrainedConfig.get_config_dict(place)[0]
    model_type = theirs.get("model_type")
    if model_type is None:
        raise UserError(f"'{source}' does not hold a language model: give a folder with its config.json and weights")
    if model_type != config.model_type:
        raise UserError(f"'{source}' is a model of type '{model_type}', not '{config.model_type}': choose another one")
    published = type(config).from_dict(theirs)
    wrong = [f"{name} is {getattr(published, name)}, not {getattr(config, name)}" for name in fixed
             if getattr(published, name) != getattr(config, name)]  # fmt: skip
    with quiet(), readable(source, "a language model"):
        model, report = cls.from_pretrained(
            place, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    unexpected = [name for name in report["unexpected_keys"] if name not in HEADS]
    shapes = [f"{name} is {list(theirs)}, not {list(ours)}" for name, theirs, ours in report["mismatched_keys"]]
    problems = {"missing": report["missing_keys"], "unexpected": unexpected, "of another shape": shapes, "other": wrong}
    counts = [f"{len(names)} {problem} ({first_few(sorted(names))})" for problem, names in problems.items() if names]
    if counts:
        raise UserError(f"weights '{source}' do not fit this configuration: {'; '.join(counts)}")
    return model.train()


def grown_table(table: nn.Embedding, rows: int, std: float) -> nn.Embedding:
    """Return the token table with `rows` more at its end, drawn from N(0, std^2); the same table if `rows` is 0."""
    if not rows:
        return table
    grown = nn.Embedding(table.num_embeddings + rows, table.embedding_dim)
    with torch.no_grad():
        nn.init.normal_(grown.weight, std=std)
        grown.weight[: table.num_embeddings] = table.weight
    return grown


def library_codec(source: str, sentinels: int, rows: int, *, from_pad: bool) -> LibraryCodec:
    """Return a tokenizer with <extra_id_N> and <vis_extra_id_N>; new ones follow at its end, N falling to zero.

    `source`: a tokenizers file (packaged or on disk), a folder, or a hub name. `rows`: of the token table. `from_pad`:
    decoding starts from the padding token (T5), else from the end token. Raise UserError if the source does not exist,
    cannot be read, or has more ids than the table has rows.
    """
    if source.endswith(".json"):
        tokenizer = file_codec(asset(source)).tokenizer
    else:
        place = model_location(source)
        with quiet(), readable(source, "a tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(place)
    order = range(sentinels - 1, -1, -1)
    tokenizer.add_tokens([f"<{name}_{i}>" for name in ("extra_id", "vis_extra_id") for i in order], special_tokens=True)
    if len(tokenizer) > rows:
        raise UserError(
            f"tokenizer '{source}' has {len(tokenizer)} ids with the added ones, more than the {rows} rows of the "
            "token table: set `vocabulary` and `added_rows`, or fewer `sentinels`"
        )
    return LibraryCodec(tokenizer, start_id=tokenizer.pad_token_id if from_pad else None)


class DeferredCodec(Codec):
    """Build a codec at its first use, since counting parameters needs no tokenizer. `rows`: of the token table."""

    def __init__(self, make: Callable[[], LibraryCodec], rows: int) -> None:
        self._make, self._rows = make, rows
        self._made: LibraryCodec | None = None

    @property
    def made(self) -> LibraryCodec:
        self._made = self._made or self._make()
        return self._made

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the codec, such as the ids that decoding needs."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.made, name)

    def __len__(self) -> int:
        return self._rows

    def encode(self, texts: Sequence[str], max_length: int) -> Any:
        return self.made.encode(texts, max_length)

    def decode(self, ids: Sequence[int]) -> str:
        return self.made.decode(ids)


def model_files(source: str) -> list[Path]:
    """Return the weight files of a model by hub name or folder, no files for `none`; see `needed_files`."""
    return [] if source == "none" else needed_files(source, WEIGHTS, "a model", most=1)


def tokenizer_files(source: str) -> list[Path]:
    """Return the files of a tokenizer by hub name, folder or tokenizers file; see `needed_files`."""
    return [asset(source)] if source.endswith(".json") else needed_files(source, TOKENIZERS, "a tokenizer")


def needed_files(source: str, names: Sequence[str], what: str, most: int | None = None) -> list[Path]:
    """Return the first `most` of `names` in a folder or hub repository; fetch them if this machine has none.

    They are fetched before anything runs, so that a missing network is reported at once and fingerprints cover the
    files that run. Raise UserError if none of them exists.
    """
    place = Path(model_location(source))
    if place.is_dir():
        files = [place / name for name in names if (place / name).is_file()][:most]
    else:
        paths = (try_to_load_from_cache(source, name) for name in names)
        files = [Path(path) for path in paths if isinstance(path, str)][:most]
        if not files:
            with quiet(), readable(source, what):
                fetched = (cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in names)
                files = list(islice((Path(path) for path in fetched if path), most))
                if not files:
                    cached_file(source, names[0])  # raises the reason: no network, no such repository, no such file
    if not files:
        raise UserError(f"'{source}' holds none of {', '.join(names)}: give another folder or hub name")
    return files


def model_location(source: str) -> str:
    """Return a hub name unchanged, a folder as its path. Raise UserError if `source` can be neither."""
    path = Path(source).expanduser()
    if path.is_file():
        raise UserError(f"'{source}' is a file: give the folder that holds it with its config.json")
    if not path.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise UserError(f"folder '{source}' does not exist: give a folder in transformers' layout, or a hub name")
    return str(path) if path.is_dir() else source


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off the library's progress bars and reports: an error says in one line what is wrong."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def readable(source: str, what: str) -> Iterator[None]:
    """Turn any error of the library about a missing or damaged `source` into a UserError of one line."""
    try:
        yield
    except Exception as error:  # the library has no class of its own: OSError, ValueError, SafetensorError and more
        message = one_line(error)[:160]
        if Path(source).expanduser().is_dir():
            raise UserError(f"folder '{source}' does not hold {what} that can be read ({message}): fetch it") from error
        hint = "" if source in KNOWN else did_you_mean(source, KNOWN).replace(":", ";", 1)
        raise UserError(
            f"'{source}' is not on this machine and was not fetched{hint} ({message}): connect once, point HF_HOME to "
            f"a cache that has it, or give a folder that holds {what} in transformers' layout"
        ) from error
