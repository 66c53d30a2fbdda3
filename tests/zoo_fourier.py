"""Blocks of the zoo that mix in the frequency domain, each written from its paper, as small as its equations allow.

They carry the traits that exporters stumble on: complex parameters, views between complex and real, spectra of which
only some modes are kept, assignments to slices, filters that the weights alone determine. Weights are drawn so that
every term matters in the output.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AFNO(nn.Module):
    """Adaptive Fourier neural operator (arXiv 2111.13587, section 4): F⁻¹[softshrink(MLP(F[x]))], block-diagonal.

    Only the share `kept` of the frequencies passes. Shapes: (B, H, W, C) to the same.
    """

    def __init__(self, channels: int, blocks: int, kept: float):
        super().__init__()
        self.blocks, self.size, self.kept = blocks, channels // blocks, kept
        self.w1 = nn.Parameter(0.2 * torch.randn(2, blocks, self.size, 2 * self.size))
        self.b1 = nn.Parameter(0.2 * torch.randn(2, blocks, 2 * self.size))
        self.w2 = nn.Parameter(0.2 * torch.randn(2, blocks, 2 * self.size, self.size))
        self.b2 = nn.Parameter(0.2 * torch.randn(2, blocks, self.size))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        z = torch.fft.rfft2(x, dim=(1, 2), norm="ortho").reshape(batch, height, width // 2 + 1, self.blocks, self.size)
        modes = int((height // 2 + 1) * self.kept)
        rows = slice(height // 2 + 1 - modes, height // 2 + 1 + modes)
        kept = z[:, rows, :modes]
        out_re, out_im = torch.zeros_like(z.real), torch.zeros_like(z.real)

        def layer(re: Tensor, im: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            mix = lambda part, weight: torch.einsum("...bi,bio->...bo", part, weight)  # noqa: E731
            return mix(re, w[0]) - mix(im, w[1]) + b[0], mix(im, w[0]) + mix(re, w[1]) + b[1]

        re, im = (F.relu(part) for part in layer(kept.real, kept.imag, self.w1, self.b1))
        out_re[:, rows, :modes], out_im[:, rows, :modes] = layer(re, im, self.w2, self.b2)
        y = torch.view_as_complex(F.softshrink(torch.stack((out_re, out_im), -1), 0.01))
        return x + torch.fft.irfft2(y.flatten(3), s=(height, width), dim=(1, 2), norm="ortho")


class AFNOBlock(nn.Module):
    """AFNO, then an MLP on channels, each behind a norm and beside a skip (arXiv 2111.13587)."""

    def __init__(self, channels: int, blocks: int, kept: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.filter, self.mlp = AFNO(channels, blocks, kept), mlp(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.filter(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class GFNetBlock(nn.Module):
    """Global filter layer on tokens (arXiv 2107.00645, section 3.2): F⁻¹[K ⊙ F[x]], between norms and before an MLP.

    Shapes: (B, H·W, C) to the same.
    """

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        self.size = (height, width)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.filter = nn.Parameter(0.2 * torch.randn(height, width // 2 + 1, channels, 2))
        self.mlp = mlp(channels)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norms[0](x).view(x.shape[0], *self.size, -1)
        z = torch.fft.rfft2(z, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.filter)
        z = torch.fft.irfft2(z, s=self.size, dim=(1, 2), norm="ortho").reshape(x.shape)
        return x + self.mlp(self.norms[1](z))


class GFNet(nn.Module):
    """Patches of 16 × 16, blocks, and a classifier of the mean token (arXiv 2107.00645).

    Shapes: (B, 3, side, side) to (B, classes).
    """

    def __init__(self, channels: int = 256, depth: int = 2, side: int = 224, classes: int = 10):
        super().__init__()
        tokens = side // 16
        self.patches = nn.Conv2d(3, channels, 16, 16)
        self.position = nn.Parameter(0.2 * torch.randn(1, tokens**2, channels))
        self.blocks = nn.Sequential(*(GFNetBlock(channels, tokens, tokens) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


class FNet(nn.Module):
    """Fourier sublayer (arXiv 2105.03824, section 3): x + Re F_tokens(F_channels(x))."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real


class SpectralConvolution(nn.Module):
    """Fourier layer of FNO (arXiv 2010.08895, section 4): σ(W x + F⁻¹[R · F[x]]), R on the lowest modes alone.

    Shapes: (B, C, H, W) to the same.
    """

    def __init__(self, channels: int, modes: int):
        super().__init__()
        self.modes, self.pointwise = modes, nn.Conv2d(channels, channels, 1)
        self.weights = nn.Parameter(0.2 * torch.randn(2, channels, channels, modes, modes, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        z, m = torch.fft.rfft2(x), self.modes
        out = torch.zeros_like(z)
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", z[:, :, :m, :m], self.weights[0])
        out[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", z[:, :, -m:, :m], self.weights[1])
        return F.gelu(torch.fft.irfft2(out, s=x.shape[-2:]) + self.pointwise(x))


class FourierUnit(nn.Module):
    """ifft(ReLU(norm(conv([Re rfft(x) | Im rfft(x)])))), a 1 × 1 convolution (arXiv 2109.07161, section 2.1).

    Shapes: (B, C, H, W) to the same.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False), nn.BatchNorm2d(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfftn(x, dim=(-2, -1), norm="ortho")
        z = torch.stack((z.real, z.imag), dim=2).flatten(1, 2)
        z = F.relu(self.norm(self.conv(z))).unflatten(1, (-1, 2)).movedim(2, -1)
        return torch.fft.irfftn(torch.view_as_complex(z.contiguous()), s=x.shape[-2:], dim=(-2, -1), norm="ortho")


class FastFourierConvolution(nn.Module):
    """Local and global channels that exchange (arXiv 2109.07161, section 2.1), with norms and ReLUs.

    Shapes: local (B, L, H, W) and global (B, G, H, W) to the same.
    """

    def __init__(self, local: int, global_: int):
        super().__init__()
        convolve = lambda inputs, outputs: nn.Conv2d(  # noqa: E731
            inputs, outputs, 3, padding=1, padding_mode="reflect", bias=False
        )
        self.to_local = nn.ModuleList((convolve(local, local), convolve(global_, local)))
        self.to_global = convolve(local, global_)
        self.reduce = nn.Sequential(
            nn.Conv2d(global_, global_ // 2, 1, bias=False), nn.BatchNorm2d(global_ // 2), nn.ReLU()
        )
        self.unit, self.expand = FourierUnit(global_ // 2), nn.Conv2d(global_ // 2, global_, 1, bias=False)
        self.norms = nn.ModuleList((nn.BatchNorm2d(local), nn.BatchNorm2d(global_)))

    def forward(self, local: Tensor, global_: Tensor) -> tuple[Tensor, Tensor]:
        reduced = self.reduce(global_)
        spectral = self.expand(reduced + self.unit(reduced))
        return (
            F.relu(self.norms[0](self.to_local[0](local) + self.to_local[1](global_))),
            F.relu(self.norms[1](self.to_global(local) + spectral)),
        )


class LaMaBlock(nn.Module):
    """Residual block of LaMa (arXiv 2109.07161): two fast Fourier convolutions beside a skip.

    Shapes: (B, C, H, W) to the same; three quarters of the channels are global.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.local = channels // 4
        self.convolutions = nn.ModuleList(FastFourierConvolution(self.local, channels - self.local) for _ in range(2))
        spread(self)

    def forward(self, x: Tensor) -> Tensor:
        local, global_ = x[:, : self.local], x[:, self.local :]
        for convolution in self.convolutions:
            local, global_ = convolution(local, global_)
        return x + torch.cat((local, global_), dim=1)


class LongConvolution(nn.Module):
    """Causal convolution as long as the sequence, by FFT (arXiv 2302.10866), with a kernel of its own.

    Shapes: (B, C, L) to the same.
    """

    def __init__(self, channels: int, length: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, length) / length)

    def forward(self, x: Tensor) -> Tensor:
        return convolve_by_fft(x, self.kernel)


class Hyena(nn.Module):
    """Order-N Hyena operator (arXiv 2302.10866, section 3): z ← xⁿ ⊙ (hⁿ ∗ z), from z = v, for n = 1 … N.

    The filters hⁿ are a small network of the position (complex exponentials in, sine activations) under a decaying
    window, so they depend on the weights alone. Shapes: (B, L, C) to the same.
    """

    def __init__(self, channels: int, length: int, order: int = 2, bands: int = 4, width: int = 32):
        super().__init__()
        self.order = order
        self.project = nn.Linear(channels, (order + 1) * channels)
        self.short = nn.Conv1d(
            (order + 1) * channels, (order + 1) * channels, 3, padding=2, groups=(order + 1) * channels
        )
        time = torch.linspace(0, 1, length)[:, None]
        angles = 2 * math.pi * time * torch.arange(1, bands + 1)
        self.register_buffer("features", torch.cat((time, angles.cos(), angles.sin()), dim=1))
        self.register_buffer("window", torch.exp(-time * torch.linspace(1, 8, channels)))
        self.layers = nn.ModuleList((nn.Linear(2 * bands + 1, width), nn.Linear(width, width)))
        self.filters = nn.Linear(width, order * channels, bias=False)
        self.skip = nn.Parameter(torch.randn(order, channels))
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        hidden = self.features
        for layer in self.layers:
            hidden = torch.sin(layer(hidden))
        kernels = (self.filters(hidden).unflatten(1, (self.order, -1)) * self.window[:, None]).permute(1, 2, 0)
        *gates, v = self.short(self.project(x).transpose(1, 2))[..., :length].chunk(self.order + 1, dim=1)
        for gate, kernel, skip in zip(gates, kernels, self.skip, strict=True):
            v = gate * (convolve_by_fft(v, kernel) + skip[:, None] * v)
        return self.out(v.transpose(1, 2))


def convolve_by_fft(x: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution of (…, L) with (…, L), zero-padded to twice the length against wrapping."""
    n = 2 * x.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(kernel, n=n) * torch.fft.rfft(x, n=n), n=n)[..., : x.shape[-1]]


def mlp(channels: int) -> nn.Sequential:
    """Two layers, four times as wide between them."""
    return nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))


def spread(module: nn.Module) -> None:
    """Draw what batch norms are born with as zeros and ones, so that mixing them up shows."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (norm.bias.data, norm.running_mean):
                tensor.normal_(0, 0.2)
