"""WAP-Transformer: a light Transformer on frozen encoder frames, read out as a learned average of its layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from speechbrain_mifuse.nnet.statistical_attentive_pooling import frame_mask


class WAPTransformer(nn.Module):
    """Transformer layers whose outputs are averaged with learned weights (arXiv 2509.23795).

    `Z = sum_{l=1..L} w_l X_l`, `w = softmax(v)`, `X_l = layer_l(X_{l-1})`; `X_0`, the input, takes no part. Ours:
    pre-norm layers without positional encoding (the encoder's frames carry their place), `v` starting at zero, each
    input dimension standardised by `standardise_by`.

    Parameters
    ----------
    input_size : int
        Dimension D of an encoder frame.
    d_model : int, optional
        Dimension d of the layers; D by default. Where they differ, a linear map comes first.
    n_layers : int
        L.
    n_heads : int
        Attention heads.
    d_ffn : int, optional
        Width of the feed-forward blocks; 2 d by default.
    dropout : float
        Inside the layers.

    Attributes
    ----------
    output_size : int
        d.
    sizes : dict
        What it was built with, for a file that builds it again.

    Example
    -------
    >>> adapter = WAPTransformer(8, n_heads=2).eval()
    >>> adapter(torch.randn(2, 5, 8), torch.tensor([0.4, 1.0])).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        input_size: int,
        d_model: int | None = None,
        n_layers: int = 3,
        n_heads: int = 8,
        d_ffn: int | None = None,
        dropout: float = 0.1,
    ):
        super().__init__()
        d_model = d_model or input_size
        d_ffn = d_ffn or 2 * d_model
        self.sizes = {"input_size": input_size, "d_model": d_model, "n_layers": n_layers}
        self.sizes |= {"n_heads": n_heads, "d_ffn": d_ffn, "dropout": dropout}
        self.output_size = d_model
        self.register_buffer("centre", torch.zeros(input_size))
        self.register_buffer("spread", torch.ones(input_size))
        self.project = nn.Identity() if d_model == input_size else nn.Linear(input_size, d_model)
        options = {"activation": F.gelu, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d_model, n_heads, d_ffn, dropout, **options) for _ in range(n_layers)
        )
        self.layer_logits = nn.Parameter(torch.zeros(n_layers))

    @property
    def layer_weights(self) -> torch.Tensor:
        """`[L]`, w."""
        return self.layer_logits.softmax(0)

    def set_dropout(self, dropout: float) -> None:
        """Change the dropout for the time being; `sizes` keeps what the adapter was built with."""
        for module in self.layers.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = dropout

    def standardise_by(self, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        """Set the mean and deviation `[D]` by which input frames are standardized."""
        self.centre.copy_(mean)
        self.spread.copy_(deviation.clamp(min=1e-4))

    def standardise(self, frames: torch.Tensor) -> torch.Tensor:
        """Centre and scale encoder frames: `X_0`."""
        return (frames - self.centre) / self.spread

    def layer_outputs(self, standardised: torch.Tensor, lengths: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Run the layers on standardized frames, some of which may be masked: `X_1 ... X_L`."""
        padding = None if lengths is None else ~frame_mask(lengths, standardised.shape[1])
        hidden, outputs = self.project(standardised), []
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=padding)
            outputs.append(hidden)
        return outputs

    def encode(self, standardised: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Run the layers on standardized frames and average them: Z."""
        outputs = self.layer_outputs(standardised, lengths)
        return sum(weight * output for weight, output in zip(self.layer_weights, outputs, strict=True))

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Adapt encoder frames.

        Parameters
        ----------
        frames : torch.Tensor
            `[batch, frames, D]`.
        lengths : torch.Tensor, optional
            `[batch]`, relative.

        Returns
        -------
        torch.Tensor
            `[batch, frames, d]`: Z.
        """
        return self.encode(self.standardise(frames), lengths)
