"""Texts as numbers: a tokenizer made from captions, and the pair of encoders that CLIP trains."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ConfigError
from ..texts import one_line
from .conditions import Nothing

START, END = "<|startoftext|>", "<|endoftext|>"  # CLIP's own
WORD_END = "</w>"
Pair = tuple[str, str]


class Clip(nn.Module):
    """transformers CLIPModel (Radford et al. 2021, arXiv:2103.00020) with its tokenizer: pictures and texts as points
    on one sphere."""

    classes = codec = None
    conditions = Nothing()

    def __init__(self, model: nn.Module, tokenizer: Any):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        vision = model.config.vision_config
        self.shape = self.picture_shape = (vision.num_channels, vision.image_size, vision.image_size)

    def forward(self, x: Tensor, texts: Sequence[str]) -> Tensor:
        """Logits (B, T): how well texts fit pictures x (B, C, H, W) in [-1, 1]."""
        return self.model.logit_scale.exp() * self.pictures(x) @ self.texts(texts).T

    def pictures(self, x: Tensor) -> Tensor:
        """Directions (B, D), of length one, of pictures."""
        return F.normalize(self.model.get_image_features(pixel_values=x).pooler_output, dim=1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Directions (T, D), of length one, of texts."""
        tokens = self.tokens(texts).to(self.model.device)
        return F.normalize(self.model.get_text_features(input_ids=tokens).pooler_output, dim=1)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token numbers (T, L), int64; texts are padded to the longest there may be, and longer ones are cut."""
        return self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids

    def zeros(self, count: int) -> tuple[Tensor, list[str]]:
        """Inputs of `forward` of any content, to measure shapes with."""
        return torch.zeros(count, *self.shape), [""] * count

    def __deepcopy__(self, memo: dict[int, Any]) -> Clip:
        return Clip(deepcopy(self.model, memo), self.tokenizer)


def new_clip(config: Mapping[str, Any], captions: Iterable[str], weights: bool = True) -> Clip:
    """A pair of encoders with random weights, from torch's global generator; without `weights` on the meta device.

    config: fields of transformers' CLIPConfig. vocab_size and max_position_embeddings of its text_config are the
    tokenizer's, which is made from the captions. Raises ConfigError where it cannot be built.
    """
    from transformers import CLIPConfig, CLIPModel

    try:
        text = dict(config["text_config"])
        tokenizer = new_tokenizer(captions, text["vocab_size"], text["max_position_embeddings"])
        ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
        described = CLIPConfig(**{**config, "text_config": text | ends})
        with torch.device("cpu" if weights else "meta"):
            return Clip(CLIPModel(described), tokenizer)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"network.config: CLIPModel: {one_line(error)}") from None


def open_clip(folder: Path) -> Clip:
    """A pair of encoders from a folder of transformers with its tokenizer, float32 and frozen. Safetensors and JSON are
    read, and no code that the folder brings is run. Raises ValueError naming the folder."""
    from transformers import CLIPModel, CLIPTokenizer

    opened = {"use_safetensors": True, "local_files_only": True, "dtype": torch.float32}
    try:
        model = CLIPModel.from_pretrained(folder, **opened).eval().requires_grad_(False)
        return Clip(model, CLIPTokenizer.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{str(folder)!r}: no pair of encoders of transformers: {one_line(error)}") from None


def new_tokenizer(captions: Iterable[str], size: int, length: int) -> Any:
    """A CLIPTokenizer whose byte pairs are those of captions; other texts it spells by bytes.

    size: of the vocabulary. length: most tokens of a text, with its start and its end. Raises ValueError for a size
    that has no room for the bytes.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    spelling = CLIPTokenizer().backend_tokenizer
    words: Counter[str] = Counter()
    for caption in captions:
        text = spelling.normalizer.normalize_str(caption)
        words.update(word for word, _ in spelling.pre_tokenizer.pre_tokenize_str(text))
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + WORD_END for letter in letters)]
    if size < len(tokens) + 2:
        raise ValueError(f"vocab_size: {size}, and bytes with the ends of a text are {len(tokens) + 2} tokens")
    merges = byte_pairs(words, size - len(tokens) - 2)
    tokens += ["".join(pair) for pair in merges]
    vocabulary = {token: i for i, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(vocabulary, merges, model_max_length=length)


def byte_pairs(words: Mapping[str, int], count: int) -> list[Pair]:
    """The pairs of tokens to merge, most frequent first (byte-pair encoding, Sennrich et al. 2016, arXiv:1508.07909).

    words: how often each occurs. Returns `count` pairs, or fewer once every word is one token. Of equally frequent
    pairs the last in the alphabet goes first, so that the answer is the same everywhere.
    """
    spelt = {word: [*word[:-1], word[-1] + WORD_END] for word in words}
    counts: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[str]] = defaultdict(set)

    def account(word: str, sign: int) -> None:
        for pair in pairwise(spelt[word]):
            counts[pair] += sign * words[word]
            where[pair].add(word)

    for word in words:
        account(word, 1)
    merges: list[Pair] = []
    while len(merges) < count:
        best = max(counts, key=lambda pair: (counts[pair], pair), default=None)
        if best is None or counts[best] == 0:
            break
        merges.append(best)
        for word in sorted(where.pop(best)):
            account(word, -1)
            spelt[word] = _merged(spelt[word], best)
            account(word, 1)
        counts = +counts
    return merges


def _merged(tokens: list[str], pair: Pair) -> list[str]:
    """A word's tokens with each occurrence of a pair made one."""
    out: list[str] = []
    for token in tokens:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return out
