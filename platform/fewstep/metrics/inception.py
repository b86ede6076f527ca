"""clean-fid's Inception, the only network whose scores are called `fid` and `kid`.

Parmar et al. 2022, arXiv:2104.11222.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from fewstep.files import put_in_place, sha256_of
from fewstep.metrics.base import File, Files, Metric, Outputs
from fewstep.metrics.reference import REFERENCE
from fewstep.texts import one_line

FILE = "inception-2015-12-05.pt"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INSTEAD = "Metrics that need no Inception: fd_<features>, precision, recall, density, coverage"


def folders() -> tuple[Path, ...]:
    """Folders of the weights in the order of search: the user's cache, then clean-fid's own folder."""
    return Path.home() / ".cache" / "clean-fid", Path(tempfile.gettempdir())


def find_inception(download: bool = True) -> Path:
    """The official weights in one of the usual folders; where they are in none, clean-fid downloads them if asked.

    Raises FileNotFoundError that says which file to put where, ValueError where another file was downloaded.
    """
    if files := [folder / FILE for folder in folders() if (folder / FILE).is_file()]:
        return files[0]
    absent = f"no {FILE} in {' or '.join(map(repr, map(str, folders())))}"
    if not download:
        raise FileNotFoundError(absent)
    from cleanfid import downloads_helper

    cache = folders()[0]
    cache.mkdir(parents=True, exist_ok=True)
    # Under another name until it is whole: a file cut short would be found, and refused, for ever after.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        try:
            path = Path(downloads_helper.check_download_inception(folder))
        except OSError as error:
            raise FileNotFoundError(
                f"inception: {absent}, and {error}; download {downloads_helper.inception_url} to "
                f"{str(cache / FILE)!r} or name the file with inception=<path>. {INSTEAD}"
            ) from None
        if (digest := sha256_of(path)) != SHA256:
            raise ValueError(
                f"inception: what {downloads_helper.inception_url} gave has sha256 {digest}, {FILE} has {SHA256}; "
                "name the right file with inception=<path>"
            )
        put_in_place(path, cache / FILE)
    return cache / FILE


class Inception:
    """A TorchScript network in the form of clean-fid's Inception: uint8 images, resized by clean-fid, to 2048 features.

    Only the official weights are named "inception"; any other file takes its hash into its name, and so do its scores.
    """

    def __init__(self, path: Path, device: str | torch.device = "cpu", batch: int = 50):
        from cleanfid.inception_torchscript import InceptionV3W

        self.hash = sha256_of(path)
        self.name = "inception" if self.hash == SHA256 else f"inception-{self.hash[:8]}"
        self.device, self.batch = torch.device(device), batch
        # clean-fid takes a folder and looks in it for its own file name.
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / FILE).symlink_to(path.absolute())
            try:
                self.net = InceptionV3W(folder, download=False, resize_inside=False).to(self.device).eval()
            except (RuntimeError, AttributeError) as error:
                raise ValueError(
                    f"inception: {str(path)!r} is not a TorchScript Inception ({one_line(error, 200)})"
                ) from None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Outputs:
        """Features (N, 2048) of uint8 images (N, 1 or 3, H, W); a grey image becomes three equal channels."""
        from cleanfid.resize import build_resizer

        if images.shape[1] not in (1, 3):
            raise ValueError(f"images: {images.shape[1]} channels; Inception takes 1 or 3")
        resize = build_resizer("clean")
        features = []
        for part in images.split(self.batch):
            pixels = part.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
            x = torch.from_numpy(np.stack([resize(image) for image in pixels])).permute(0, 3, 1, 2)
            features.append(self.net(x.to(self.device)).float().cpu())
        return Outputs(torch.cat(features).numpy())


def open_inception(path: Path, device: str | torch.device = "cpu") -> Inception:
    """The network in a TorchScript file. Raises FileNotFoundError or ValueError with its name."""
    if not path.is_file():
        raise FileNotFoundError(f"inception: no file {str(path)!r}; the official one is {FILE}. {INSTEAD}")
    return Inception(path, device)


def check_official(path: Path) -> None:
    """Raises OSError or ValueError where the file does not hold the official weights."""
    if (digest := sha256_of(path)) != SHA256:
        raise ValueError(f"{path} is not the official {FILE}: its sha256 is {digest[:12]}..., not {SHA256[:12]}...")


INCEPTION = File(
    open=open_inception,
    suffix=".pt",
    check=check_official,
    find=find_inception,
    remedy=(
        "where there is a network: python -c 'from fewstep.metrics.inception import find_inception as f; print(f())', "
        "and copy that file to the same place on every node"
    ),
)


class InceptionMetric(Metric):
    """Base of the metrics on clean-fid's Inception."""

    inception: Annotated[str | None, INCEPTION] = None
    """clean-fid's Inception weights; null looks where clean-fid keeps them."""
    inception_reference: Annotated[str | None, REFERENCE] = None
    """Statistics of the real images under Inception."""

    def network(self, files: Files) -> Inception:
        """Inception with the official weights. Raises ValueError for others: their scores have another name."""
        network = files.open(self, "inception")
        if network.name != "inception":
            raise ValueError(
                f"inception: the weights have sha256 {network.hash[:12]}..., the official ones {SHA256[:12]}...; a "
                f"score by other weights is not called {self.name}"
            )
        return network
