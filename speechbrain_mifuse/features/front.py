"""Where a classifier's frames come from: the feature store, or an encoder trained along with it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from speechbrain_mifuse.features.encoder import FAMILIES, load_wrapper
from speechbrain_mifuse.features.speakers import SpeakerOffsets
from speechbrain_mifuse.utils.audio import load_audio, trim_silence

# Bytes of frames that stay in memory once read: all of a small corpus, and a fixed amount of a large one.
KEPT_BYTES = 64 * 2**20


class StoredFrames(nn.Module):
    """Frames from a store: read them, subtract the speaker's offset if there are any, hand them on.

    Mapping an utterance's part of the file costs more than copying its frames, so the first `KEPT_BYTES` that are read
    stay in memory. None is ever replaced: epochs go through all of a corpus, and the oldest would be needed first.

    Parameters
    ----------
    store : FeatureStore
        The store.
    layer : int, optional
        Which of its layers; all of them, for a learned weighting, by default.
    offsets : SpeakerOffsets, optional
        Speaker normalisation; none by default.

    Attributes
    ----------
    dim, n_layers, frame_average : int
        Dimension of a frame; layers per frame; encoder frames averaged to one.
    fingerprint : dict
        What the frames are: the store's, and what is subtracted.

    Example
    -------
    >>> import tempfile, numpy
    >>> from speechbrain_mifuse.features.store import FeatureStore
    >>> store = FeatureStore(tempfile.mkdtemp(), {"layers": [2, 3], "dim": 8})
    >>> with store.writer() as add:
    ...     add("t-a", numpy.zeros((2, 5, 8)), audio="ab", file=(1, 1))
    >>> StoredFrames(store, layer=2).read("t-a", "").shape, StoredFrames(store).read("t-a", "").shape
    (torch.Size([5, 8]), torch.Size([5, 2, 8]))
    """

    def __init__(self, store, layer: int | None = None, offsets: SpeakerOffsets | None = None):
        super().__init__()
        self.store, self.layer, self.dim, self.offsets = store, layer, store.dim, offsets
        self.fingerprint = store.fingerprint if offsets is None else {**store.fingerprint, **offsets.fingerprint()}
        self.n_layers = len(store.layers) if layer is None else 1
        self.frame_average = store.fingerprint.get("frame_average", 1)
        self.kept: dict[str, torch.Tensor] = {}
        self.room = KEPT_BYTES
        self.place = slice(None) if layer is None else store.position(layer)

    def read(self, utt_id: str, wav: str) -> torch.Tensor:
        """Read one utterance: `[frames, dim]` or `[frames, layers, dim]`, fp16. Copy it before you change it."""
        if utt_id in self.kept:
            return self.kept[utt_id]
        frames = torch.from_numpy(self.store.frames(utt_id, self.layer))
        frames = frames if self.layer is not None else frames.transpose(0, 1)
        if self.offsets is not None:
            frames = self.offsets.subtract(utt_id, frames, self.place)
        if frames.nbytes <= self.room:
            self.room -= frames.nbytes
            frames = self.kept[utt_id] = frames.clone()
        return frames

    def forward(self, batch: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand a padded batch on; see `FinetunedEncoder.forward`."""
        return batch, lengths


class StoredStatistics(nn.Module):
    """Stored frames as one "frame" for each utterance: their mean and standard deviation over time.

    Example
    -------
    >>> import tempfile, numpy
    >>> from speechbrain_mifuse.features.store import FeatureStore
    >>> store = FeatureStore(tempfile.mkdtemp(), {"layers": [2], "dim": 1})
    >>> with store.writer() as add:
    ...     add("t-a", numpy.array([[[1.0], [3.0]]]), audio="ab", file=(1, 1))
    >>> StoredStatistics(StoredFrames(store, layer=2)).read("t-a", "").tolist()
    [[2.0, 1.0]]
    """

    def __init__(self, frames: StoredFrames):
        super().__init__()
        self.frames, self.store, self.layer, self.n_layers = frames, frames.store, frames.layer, 1
        self.dim = 2 * frames.dim
        self.fingerprint = {**frames.fingerprint, "statistics": "mean and deviation"}
        self.kept: dict[str, torch.Tensor] = {}

    def read(self, utt_id: str, wav: str) -> torch.Tensor:
        """Read one utterance for the loader."""
        if utt_id not in self.kept:
            frames = self.frames.read(utt_id, wav).float()
            self.kept[utt_id] = torch.cat([frames.mean(0), frames.std(0, correction=0)]).unsqueeze(0)
        return self.kept[utt_id]

    def forward(self, batch: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand a batch on; see `FinetunedEncoder.forward`."""
        return batch, lengths


class FinetunedEncoder(nn.Module):
    """An encoder that is trained with the classifier, in place of stored frames. Meant for a GPU.

    Parameters
    ----------
    source : str
        Hub id or local folder, as for `FrozenEncoder`.
    trim_db : float or None
        Silence threshold of `trim_silence`.

    Attributes
    ----------
    dim, n_layers : int
        Dimension of a frame; 1, the last layer.

    Example
    -------
    >>> from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor
    >>> import tempfile
    >>> sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    >>> folder = tempfile.mkdtemp()
    >>> HubertModel(HubertConfig(**sizes, num_conv_pos_embedding_groups=2)).save_pretrained(folder)
    >>> _ = Wav2Vec2FeatureExtractor().save_pretrained(folder)
    >>> front = FinetunedEncoder(folder)
    >>> frames, lengths = front(torch.randn(2, 16000), torch.ones(2))
    >>> frames.shape, any(p.requires_grad for p in front.parameters())
    (torch.Size([2, 49, 16]), True)
    """

    sample_rate = 16000
    store = None

    def __init__(self, source: str, trim_db: float | None = 40.0):
        super().__init__()
        self.wrapper = load_wrapper(source, freeze=False)
        config = self.wrapper.model.config
        self.reader = FAMILIES[config.model_type].reader(self.wrapper)
        # The wrapper would normalise a waveform together with its padding; an exported encoder hears none.
        self.wrapper.normalize_wav = False
        self.dim, self.n_layers, self.trim_db = config.hidden_size, 1, trim_db

    def read(self, utt_id: str, wav: str) -> torch.Tensor:
        """Read one recording: `[samples]`, of mean 0 and deviation 1 where the encoder was trained on such."""
        return self.reader.normalised(trim_silence(load_audio(wav, self.sample_rate), self.trim_db))

    def forward(self, batch: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a padded batch `[batch, samples]` to `[batch, frames, dim]`; relative lengths in and out."""
        frames = self.wrapper(batch, lengths)
        # Counted, not scaled: a clip's frames must not depend on how long its neighbours are.
        samples = (lengths * batch.shape[1]).round().long().tolist()
        counts = torch.tensor([self.reader.frame_count(count) for count in samples], device=frames.device)
        return frames, (counts.clamp(min=1) / frames.shape[1]).clamp(max=1.0)

    def export(self, folder: str | Path) -> None:
        """Write the encoder as a Hugging Face folder, which `--encoder` of any recipe takes."""
        self.wrapper.model.save_pretrained(folder)
        self.wrapper.feature_extractor.save_pretrained(folder)
