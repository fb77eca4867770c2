"""Models as people write them themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.registry import VOCABULARY, architecture, images, tokens

WIDTH, HEADS = 32, 4


class CausalAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        heads = [
            part.view(batch, length, HEADS, width // HEADS).transpose(1, 2) for part in self.c_attn(x).split(width, 2)
        ]
        y = F.scaled_dot_product_attention(*heads, dropout_p=0.1 if self.training else 0.0, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class GPTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), CausalAttention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """Layers in a ModuleDict, embedding and head tied, logits beside the loss."""

    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        parts = {
            "wte": nn.Embedding(VOCABULARY, WIDTH),
            "wpe": nn.Embedding(64, WIDTH),
            "drop": nn.Dropout(0.1),
            "h": nn.ModuleList(GPTBlock() for _ in range(layers)),
            "ln_f": nn.LayerNorm(WIDTH),
        }
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(idx.shape[1])
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(places))
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1), ignore_index=-1), logits


@architecture(0.13, fast=True)
def nanogpt():
    return NanoGPT(), {"idx": tokens(), "targets": tokens(seed=6)}


class LSTMModel(nn.Module):
    """A language model of LSTMs: one of many layers, or many of one layer, with dropout between."""

    def __init__(self, stacked: bool, layers: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.dropout = nn.Dropout(0.1)
        if stacked:
            self.rnns = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(layers))
        else:
            self.rnns = nn.ModuleList([nn.LSTM(WIDTH, WIDTH, layers, batch_first=True, dropout=0.1)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for rnn in self.rnns:
            h, _ = rnn(h)
            h = self.dropout(h)
        return F.cross_entropy(self.head(h)[:, :-1].flatten(0, 1), x[:, 1:].flatten())


@architecture(0.29, fast=True)
def lstm_stack():
    return LSTMModel(stacked=True), {"x": tokens(2, 16)}


@architecture(0.95)
def lstm_multilayer():
    return LSTMModel(stacked=False), {"x": tokens(2, 16)}


class GraphLayer(nn.Module):
    """Messages along edges, summed at their targets (Graph Isomorphism Network, with a residual)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(inplace=True), nn.Linear(2 * width, width))
        self.eps = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        summed = torch.zeros_like(x).index_add(0, target, x[source])
        return x + F.dropout(self.mlp(self.norm((1 + self.eps) * x + summed)), 0.1, self.training)


class GNN(nn.Module):
    """Nodes of several graphs in one batch; each graph's mean is classified."""

    def __init__(self, layers: int = 5, width: int = 16) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 4)
        self.layers = nn.ModuleList(GraphLayer(width) for _ in range(layers))

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, y: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, edge_index)
        pooled = torch.zeros(len(y), x.shape[1]).index_add(0, batch, x) / batch.bincount().unsqueeze(1)
        return F.cross_entropy(self.head(pooled), y)


@architecture(0.24, fast=True)
def gnn():
    draw = torch.Generator().manual_seed(5)
    edges = torch.randint(0, 60, (2, 240), generator=draw)
    graphs = torch.arange(60) // 20
    return GNN(), {
        "x": torch.randn(60, 8, generator=draw),
        "edge_index": edges,
        "batch": graphs,
        "y": torch.arange(3),
    }


class DiTBlock(nn.Module):
    """A transformer block whose norms are shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH))
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(c).unsqueeze(1).chunk(6, -1)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn(h, h, h, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """A diffusion transformer; its loss is the error of the predicted noise."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.patch, self.place = nn.Conv2d(4, WIDTH, 2, 2), nn.Parameter(torch.randn(1, 64, WIDTH) * 0.02)
        self.time = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, image: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> Tensor:
        noisy = image * (1 - t).view(-1, 1, 1, 1) + noise * t.view(-1, 1, 1, 1)
        x = self.patch(noisy).flatten(2).transpose(1, 2) + self.place
        dropped = torch.where(torch.rand(len(y)) < 0.1, 10, y)  # classifier-free guidance
        c = self.time(_sinusoids(t)) + self.label(dropped)
        for block in self.blocks:
            x = block(x, c)
        found = self.head(self.norm(x)).transpose(1, 2).reshape(len(y), 16, 8, 8)
        return F.mse_loss(F.pixel_shuffle(found, 2), noise - image)


def _sinusoids(t: Tensor) -> Tensor:
    angles = t.unsqueeze(1) * torch.exp(torch.linspace(0, -6, 8))
    return torch.cat([angles.sin(), angles.cos()], 1)


def _diffusion() -> dict[str, Tensor]:
    return {
        "image": images(size=16, channels=4),
        "noise": images(size=16, channels=4, seed=6),
        "t": torch.tensor([0.3, 0.7]),
    }


@architecture(0.18, fast=True)
def dit():
    return DiT(), _diffusion() | {"y": torch.tensor([1, 2])}


class ResnetBlock(nn.Module):
    """The residual block of diffusion U-Nets: two convolutions, the time added between them."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, channels_in), nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time = nn.Linear(WIDTH, channels)
        self.norm2, self.conv2 = nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.dropout(F.silu(self.norm2(h)), 0.1, self.training))


class CrossAttention(nn.Module):
    """Pixels look at the text."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.attn = nn.MultiheadAttention(channels, 2, kdim=WIDTH, vdim=WIDTH, batch_first=True)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        found, _ = self.attn(pixels, condition, condition)
        return x + found.transpose(1, 2).reshape(x.shape)


class Level(nn.Module):
    """One resolution of the U-Net: resnets, each followed by cross attention; on the way up each is given a skip."""

    def __init__(self, channels_in: list[int], channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(given, channels) for given in channels_in)
        self.attentions = nn.ModuleList(CrossAttention(channels) for _ in channels_in)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor, skips: list[Tensor] | None = None) -> list[Tensor]:
        made = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            if skips is not None:
                x = torch.cat([x, skips.pop()], 1)
            x = attention(resnet(x, time), condition)
            made.append(x)
        return made


class ConditionalUNet(nn.Module):
    """As in diffusers: every output on the way down is a skip; levels take and return lists."""

    def __init__(self, channels: tuple[int, ...] = (16, 24)) -> None:
        super().__init__()
        first, second = channels
        self.enter, self.leave = nn.Conv2d(4, first, 3, padding=1), nn.Conv2d(first, 4, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.down_blocks = nn.ModuleList([Level([first, first], first), Level([first, second], second)])
        self.mid = nn.ModuleList([ResnetBlock(second, second), CrossAttention(second), ResnetBlock(second, second)])
        self.up_blocks = nn.ModuleList([Level([2 * second] * 2, second), Level([second + first, 2 * first], first)])

    def forward(self, image: Tensor, noise: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        time = self.time(_sinusoids(t))
        x, skips = self.enter(image + noise * t.view(-1, 1, 1, 1)), []
        for level in self.down_blocks:
            skips += level(x, time, condition)
            x = F.avg_pool2d(skips[-1], 2)
        first, attention, second = self.mid
        x = second(attention(first(x, time), condition), time)
        for level in self.up_blocks:
            x = level(F.interpolate(x, scale_factor=2.0), time, condition, skips)[-1]
        return F.mse_loss(self.leave(x), noise)


@architecture(0.23, fast=True)
def conditional_unet():
    condition = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(7))
    return ConditionalUNet(), _diffusion() | {"condition": condition}
