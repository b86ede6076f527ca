"""The U-Nets of EDM: DDPM++, NCSN++ and ADM as Karras et al. 2022 (arXiv:2206.00364, table 7) have them.

diffusers has no class with their layout. This file needs diffusers and torch only, as an export has a copy of it beside
the weights.
"""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Layout:
    """The differences between the architectures.

    Song et al. 2021 (arXiv:2011.13456) shift each residual block by the time and scale sums by 1/sqrt(2); NCSN++
    embeds the time in random Fourier features and feeds the image to every level of the encoder. Dhariwal & Nichol 2021
    (arXiv:2105.05233) shift and scale, have attention heads of 64 channels, and resample without a projection.
    """

    filter: tuple[int, ...] = (1, 1)
    fourier: bool = False
    image: bool = False
    adm: bool = False

    @property
    def sum_scale(self) -> float:
        """Factor on the sum of a residual branch and what it was made of."""
        return 1.0 if self.adm else 0.5**0.5

    def norm(self, channels: int) -> nn.GroupNorm:
        """Groups of 4 channels, and 32 groups at most."""
        return nn.GroupNorm(max(min(32, channels // 4), 1), channels, eps=1e-5 if self.adm else 1e-6)

    def heads(self, channels: int) -> int:
        """Attention heads; below 64 channels ADM has none."""
        return channels // 64 if self.adm else 1


LAYOUTS = {
    "ddpm++": Layout(),
    "ncsn++": Layout((1, 3, 3, 1), fourier=True, image=True),
    "adm": Layout(adm=True),
}


class Resample(nn.Module):
    """Half or twice the resolution by a separable filter: a box (1, 1) or a triangle (1, 3, 3, 1)."""

    def __init__(self, weights: tuple[int, ...], up: bool):
        super().__init__()
        row = torch.tensor(weights, dtype=torch.float32) / sum(weights)
        self.up, self.padding = up, len(weights) // 2 - 1
        self.kernel = nn.Buffer(torch.outer(row, row)[None, None], persistent=False)

    def forward(self, x: Tensor, padding: int | None = None) -> Tensor:
        groups = x.shape[1]
        kernel = self.kernel.to(x).expand(groups, -1, -1, -1)
        if self.up:
            return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=self.padding, groups=groups)
        return F.conv2d(x, kernel, stride=2, padding=self.padding if padding is None else padding, groups=groups)


class Block(nn.Module):
    """A residual block, (B, inputs, h, w) -> (B, outputs, h', w'), with attention if it has heads.

    resample: "down" or "up" changes the resolution. embedding: channels of the time embedding.
    """

    def __init__(
        self, layout: Layout, inputs: int, outputs: int, embedding: int, heads: int = 0, resample: str | None = None
    ):
        super().__init__()
        self.layout, self.heads = layout, heads
        self.norm0, self.norm1 = layout.norm(inputs), layout.norm(outputs)
        self.resample = Resample(layout.filter, resample == "up") if resample else nn.Identity()
        self.conv0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * outputs if layout.adm else outputs)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        projected = inputs != outputs or (resample and not layout.adm)
        self.skip = nn.Conv2d(inputs, outputs, 1) if projected else nn.Identity()
        if heads:
            self.norm2 = layout.norm(outputs)
            self.qkv, self.proj = nn.Conv2d(outputs, 3 * outputs, 1), nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(self.resample(F.silu(self.norm0(x))))
        time = self.affine(embedding)[..., None, None]
        if self.layout.adm:
            scale, shift = time.chunk(2, 1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + time)
        h = self.conv1(F.silu(h))
        x = (self.skip(self.resample(x)) + h) * self.layout.sum_scale
        return (x + self._attention(self.norm2(x))) * self.layout.sum_scale if self.heads else x

    def _attention(self, x: Tensor) -> Tensor:
        """Channels of qkv are (head, channel, which of the three)."""
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).view(b, self.heads, c // self.heads, 3, h * w).transpose(-1, 2).unbind(3)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(-1, -2).reshape(b, c, h, w))


class ImageInput(nn.Module):
    """The encoder's second input: the image at half the resolution of the last time, (B, inputs, h, w) -> (B, outputs,
    h / 2, w / 2). The filter runs behind the convolution, and both see zeros around the image."""

    def __init__(self, layout: Layout, inputs: int, outputs: int):
        super().__init__()
        self.filter = Resample(layout.filter, up=False)
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1 + self.filter.padding)

    def forward(self, image: Tensor) -> Tensor:
        return self.filter(self.conv(image), padding=0)


class Down(nn.Module):
    """A level of the encoder. Returns its output, the outputs of all its blocks, and the image for the next level."""

    def __init__(self, first: Block | None, blocks: list[Block], image: ImageInput | None):
        super().__init__()
        self.first, self.blocks, self.image = first, nn.ModuleList(blocks), image

    def forward(self, x: Tensor, embedding: Tensor, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        outs = []
        if self.first is not None:
            x = self.first(x, embedding)
            if self.image is not None:
                x = image = (x + self.image(image)) * 0.5**0.5
            outs.append(x)
        for block in self.blocks:
            x = block(x, embedding)
            outs.append(x)
        return x, tuple(outs), image


class Up(nn.Module):
    """A level of the decoder, or the middle, whose blocks take no outputs of the encoder."""

    def __init__(self, first: Block | None, blocks: list[Block]):
        super().__init__()
        self.first, self.blocks = first, nn.ModuleList(blocks)

    def forward(self, x: Tensor, embedding: Tensor, outs: tuple[Tensor, ...] = ()) -> Tensor:
        x = x if self.first is None else self.first(x, embedding)
        for i, block in enumerate(self.blocks):
            x = block(torch.cat([x, outs[-1 - i]], 1) if outs else x, embedding)
        return x


class TimeEmbedding(nn.Module):
    """Noise conditioning (B,) and one-hot labels (B, K) -> (B, 4 channels), before the last SiLU."""

    def __init__(self, layout: Layout, channels: int, classes: int | None):
        super().__init__()
        self.adm, width, waves = layout.adm, 4 * channels, 2 * channels if layout.fourier else channels
        if classes:
            self.label = nn.Linear(classes, width, bias=False) if layout.adm else nn.Linear(classes, waves)
        self.layer0, self.layer1 = nn.Linear(waves, width), nn.Linear(width, width)
        if layout.fourier:
            self.freqs = nn.Buffer(16 * torch.randn(waves // 2))
        else:
            count = waves // 2 - (0 if layout.adm else 1)
            self.freqs = nn.Buffer(1e-4 ** (torch.arange(waves // 2) / count), persistent=False)
        self.turns = 2 * torch.pi if layout.fourier else 1.0

    def forward(self, time: Tensor, labels: Tensor | None) -> Tensor:
        angle = time[:, None] * (self.turns * self.freqs.to(time))
        if self.adm:
            x = self.layer1(F.silu(self.layer0(torch.cat([angle.cos(), angle.sin()], 1))))
            return x if labels is None else x + self.label(labels)
        x = torch.cat([angle.sin(), angle.cos()], 1)
        x = x if labels is None else x + self.label(labels * labels.shape[1] ** 0.5)
        return self.layer1(F.silu(self.layer0(x)))


class EDMUNetModel(ModelMixin, ConfigMixin):
    """A U-Net of EDM without its preconditioning. It has no dropout.

    layout: "ddpm++", "ncsn++" or "adm". channels, channel_mult: a level has channels times its channel_mult.
    layers_per_block: residual blocks of a level of the encoder; the decoder has one more. attention_sizes: sides of the
    maps with attention. num_class_embeds: labels, the null class not counted; None for none. null_class: the label of
    that number stands for none. Raises ValueError for another layout.
    """

    @register_to_config
    def __init__(
        self,
        layout: str = "ddpm++",
        sample_size: int = 32,
        in_channels: int = 3,
        channels: int = 128,
        channel_mult: tuple[int, ...] = (2, 2, 2),
        layers_per_block: int = 4,
        attention_sizes: tuple[int, ...] = (16,),
        num_class_embeds: int | None = None,
        null_class: bool = False,
    ):
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout: {layout!r} is not one of {', '.join(LAYOUTS)}")
        kind, embedding = LAYOUTS[layout], 4 * channels
        sides = [sample_size >> level for level in range(len(channel_mult))]
        widths = [mult * channels for mult in channel_mult]

        def block(inputs: int, outputs: int, attention: bool = False, resample: str | None = None) -> Block:
            heads = kind.heads(outputs) if attention else 0
            return Block(kind, inputs, outputs, embedding, heads, resample)

        self.time_embedding = TimeEmbedding(kind, channels, num_class_embeds)
        width = widths[0] if kind.adm else channels
        self.conv_in, image = nn.Conv2d(in_channels, width, 3, padding=1), in_channels
        self.down_blocks, self.up_blocks, outs = nn.ModuleList(), nn.ModuleList(), []
        for level, out in enumerate(widths):
            first = block(width, width, resample="down") if level else None
            fed = ImageInput(kind, image, width) if level and kind.image else None
            image, outs = width if fed else image, [*outs, width]
            blocks = []
            for _ in range(layers_per_block):
                blocks.append(block(width, out, sides[level] in attention_sizes))
                width = out
                outs.append(width)
            self.down_blocks.append(Down(first, blocks, fed))
        self.mid_block = Up(None, [block(width, width, True), block(width, width)])
        for level, out in reversed(list(enumerate(widths))):
            first = block(width, width, resample="up") if level < len(widths) - 1 else None
            blocks = []
            for i in range(layers_per_block + 1):
                attention = sides[level] in attention_sizes and (kind.adm or i == layers_per_block)
                blocks.append(block(width + outs.pop(), out, attention))
                width = out
            self.up_blocks.append(Up(first, blocks))
        self.conv_norm_out, self.conv_out = kind.norm(width), nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = False):
        """A tuple with the network's output (B, C, H, W). timestep: EDM's c_noise (B,), ln(sigma) / 4. class_labels:
        (B,) whole numbers; None where the network has no classes."""
        classes, labels = self.config.num_class_embeds, None
        if classes:  # the null class is a row of zeros
            labels = (class_labels[:, None] == torch.arange(classes, device=sample.device)).to(sample.dtype)
        embedding = F.silu(self.time_embedding(timestep, labels))
        x, image, levels = self.conv_in(sample), sample, []
        before: tuple[Tensor, ...] = (x,)
        for level in self.down_blocks:
            x, outs, image = level(x, embedding, image)
            levels.append((*before, *outs))
            before = ()
        x = self.mid_block(x, embedding)
        for level, outs in zip(self.up_blocks, reversed(levels), strict=True):
            x = level(x, embedding, outs)
        return (self.conv_out(F.silu(self.conv_norm_out(x))),)
