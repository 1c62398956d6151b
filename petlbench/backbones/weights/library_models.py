"""Language models and tokenizers from transformers: random, by hub name, or from a folder in the library's layout.

The library's own environment variables decide about caches and the network (HF_HOME, HF_HUB_OFFLINE).
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

PUBLISHED = ("pretrained", "none")  # sources of weights that are no path
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
HEADS = ("final_logits_bias", "lm_head.weight")  # of the generating model: zero, and tied to the token table
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")


def library_model(kind: Any, config: Any, source: str, *, fixed: Sequence[str]) -> Any:
    """A model of transformers with our configuration; drawn for `none` and on the meta device, else from `source`.

    `fixed`: the options of the configuration that shapes do not tell, and that must be the source's. Raises UserError
    when the source is not there, cannot be read, or does not fit: a few names are told, all are counted.
    """
    if source == "none" or on_meta():
        return kind(config)
    place = model_location(source)
    with quiet(), readable(source, "a language model"):
        theirs = PretrainedConfig.get_config_dict(place)[0]
    found = theirs.get("model_type")
    if found is None:
        raise UserError(f"'{source}' does not hold a language model: give a folder with its config.json and weights")
    if found != config.model_type:
        raise UserError(f"'{source}' is a model of type '{found}', not '{config.model_type}': choose another one")
    like = type(config).from_dict(theirs)
    wrong = [f"{name} is {getattr(like, name)}, not {getattr(config, name)}" for name in fixed
             if getattr(like, name) != getattr(config, name)]  # fmt: skip
    with quiet(), readable(source, "a language model"):
        model, report = kind.from_pretrained(
            place, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    unexpected = [name for name in report["unexpected_keys"] if name not in HEADS]
    shapes = [f"{name} is {list(theirs)}, not {list(ours)}" for name, theirs, ours in report["mismatched_keys"]]
    kinds = {"missing": report["missing_keys"], "unexpected": unexpected, "of another shape": shapes, "other": wrong}
    said = [f"{len(names)} {kind} ({first_few(sorted(names))})" for kind, names in kinds.items() if names]
    if said:
        raise UserError(f"weights '{source}' do not fit this configuration: {'; '.join(said)}")
    return model.train()


def grown_table(table: nn.Embedding, rows: int, std: float) -> nn.Embedding:
    """The token table with `rows` more at its end, drawn from N(0, std^2); itself for none."""
    if not rows:
        return table
    more = nn.Embedding(table.num_embeddings + rows, table.embedding_dim)
    with torch.no_grad():
        nn.init.normal_(more.weight, std=std)
        more.weight[: table.num_embeddings] = table.weight
    return more


def library_codec(source: str, sentinels: int, rows: int, *, from_pad: bool) -> LibraryCodec:
    """A tokenizer that knows <extra_id_N> and <vis_extra_id_N>, new ones at its end, N falling to zero.

    `source`: a tokenizers file (packaged or on disk), a folder, or a hub name. `rows`: of the token table. `from_pad`:
    decoding starts from the padding token (T5), else from the end token. Raises UserError for a source that is not
    there, cannot be read, or has more ids than the table has rows.
    """
    if source.endswith(".json"):
        tokenizer = file_codec(asset(source)).tokenizer
    else:
        place = model_location(source)
        with quiet(), readable(source, "a tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(place)
    order = range(sentinels - 1, -1, -1)
    tokenizer.add_tokens([f"<{kind}_{i}>" for kind in ("extra_id", "vis_extra_id") for i in order], special_tokens=True)
    if len(tokenizer) > rows:
        raise UserError(
            f"tokenizer '{source}' has {len(tokenizer)} ids with the added ones, more than the {rows} rows of the "
            "token table: set `vocabulary` and `added_rows`, or fewer `sentinels`"
        )
    return LibraryCodec(tokenizer, start_id=tokenizer.pad_token_id if from_pad else None)


class DeferredCodec(Codec):
    """A codec that is made at its first use: counting parameters needs no tokenizer. `rows`: of the token table."""

    def __init__(self, make: Callable[[], LibraryCodec], rows: int) -> None:
        self._make, self._rows = make, rows
        self._made: LibraryCodec | None = None

    @property
    def made(self) -> LibraryCodec:
        self._made = self._made or self._make()
        return self._made

    def __getattr__(self, name: str) -> Any:
        """Of the ids that decoding needs, which the tokenizer knows."""
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
    """The weights of a model, given by hub name, folder or (no files) `none`; see `needed_files`."""
    return [] if source == "none" else needed_files(source, WEIGHTS, "a model", most=1)


def tokenizer_files(source: str) -> list[Path]:
    """The files of a tokenizer, given by hub name, folder or tokenizers file; see `needed_files`."""
    return [asset(source)] if source.endswith(".json") else needed_files(source, TOKENIZERS, "a tokenizer")


def needed_files(source: str, names: Sequence[str], what: str, most: int | None = None) -> list[Path]:
    """The first `most` of `names` that a folder or a hub's repository has, fetched where none is on this machine.

    Fetched before anything runs, so that a missing network is told at once and fingerprints see what is run. Raises
    UserError when there is none of them.
    """
    place = Path(model_location(source))
    if place.is_dir():
        found = [place / name for name in names if (place / name).is_file()][:most]
    else:
        paths = (try_to_load_from_cache(source, name) for name in names)
        found = [Path(path) for path in paths if isinstance(path, str)][:most]
        if not found:
            with quiet(), readable(source, what):
                fetched = (cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in names)
                found = list(islice((Path(path) for path in fetched if path), most))
                if not found:
                    cached_file(source, names[0])  # says why: no network, no such repository, no such file
    if not found:
        raise UserError(f"'{source}' holds none of {', '.join(names)}: give another folder or hub name")
    return found


def model_location(source: str) -> str:
    """A hub name as it is; a folder as its path. Raises UserError for what can be neither."""
    path = Path(source).expanduser()
    if path.is_file():
        raise UserError(f"'{source}' is a file: give the folder that holds it with its config.json")
    if not path.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise UserError(f"folder '{source}' does not exist: give a folder in transformers' layout, or a hub name")
    return str(path) if path.is_dir() else source


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's progress bars and reports: what is wrong is told by an error, in one line."""
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
    """Whatever the library says when `source` is not there or is broken becomes one line."""
    try:
        yield
    except Exception as error:  # the library has no class of its own: OSError, ValueError, SafetensorError and more
        said = one_line(error)[:160]
        if Path(source).expanduser().is_dir():
            raise UserError(f"folder '{source}' does not hold {what} that can be read ({said}): fetch it") from error
        hint = "" if source in KNOWN else did_you_mean(source, KNOWN).replace(":", ";", 1)
        raise UserError(
            f"'{source}' is not on this machine and was not fetched{hint} ({said}): connect once, point HF_HOME to a "
            f"cache that has it, or give a folder that holds {what} in transformers' layout"
        ) from error
