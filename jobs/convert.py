#!/usr/bin/env python
"""Converts a pickle of weights once, without running anything that it holds.

    python jobs/convert.py pickle=edm-cifar10-32x32-cond-vp.pkl out=edm_cifar10
    python jobs/convert.py pickle=model.bin network.config='{...}' out=teacher
    python jobs/convert.py pickle=model.bin out=tensors

A network of EDM (DDPM++, NCSN++ or ADM) becomes a folder that teacher=... takes. So do tensors that are named as those
of the network that is described. Of another pickle all tensors are written under their own names, with what it says of
its modules. EDM's baselines and EDM2 are refused.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from safetensors.torch import save_file

from fewstep.config import LocalPath, OutPathOrURL, Strict, command, resolve
from fewstep.folders import NETWORK, appearing
from fewstep.networks.convert import edm_denoiser, read_pickle, to_denoiser
from fewstep.networks.pretrained import Network, save_denoiser
from fewstep.storage.place import located_out


class Convert(Strict):
    """Converts a pickle of weights once, without running anything that it holds."""

    pickle: LocalPath
    """File: a pickle, or what torch.save wrote."""
    out: OutPathOrURL
    """Folder to write, or its URL (s3://bucket/x); it must not exist."""
    network: Network | None = None
    """The network whose tensors these are; null knows EDM's, and writes other tensors under their own names."""
    part: str = ""
    """Dotted name below which the network's tensors lie, such as ema.model or state_dict. A pickle of several EDM
    networks needs the name of one, such as ema."""


@command(Convert)
def main(job: Convert) -> None:
    out = located_out(job.out)
    with appearing(out, NETWORK, overwrite=False) as folder:
        pickle = read_pickle(resolve(job.pickle))
        if job.network is None:
            net = edm_denoiser(pickle, job.part)
        else:
            net = to_denoiser(pickle.tensors, job.network, job.part)
        if net is not None:
            save_denoiser(net, folder)
        else:
            save_file(pickle.tensors, folder / "tensors.safetensors")
            modules = [{"name": name, "class": kind, "settings": settings} for name, kind, settings in pickle.modules]
            (folder / "modules.json").write_text(json.dumps(modules, indent=1) + "\n")
    for name, kind, _ in pickle.modules:
        print(f"{name or '.'}: {kind}")
    print(json.dumps({"out": str(out), "tensors": len(pickle.tensors), "teacher": net is not None}))


if __name__ == "__main__":
    main()
