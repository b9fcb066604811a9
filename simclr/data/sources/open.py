"""Where images come from: a folder, a tar archive, either of them in S3, a torchvision dataset, the built-in patterns. One
streaming pass each."""

from __future__ import annotations

import difflib
import tarfile
from collections import Counter
from pathlib import Path

from simclr.data.s3.uri import address
from simclr.data.sources.folder import folder_source
from simclr.data.sources.patterns import patterns_source
from simclr.data.sources.s3 import s3_archive, s3_prefix
from simclr.data.sources.source import Source
from simclr.data.sources.tar import ARCHIVES, ends_of, read_tar
from simclr.data.sources.torchvision import DATASETS, torchvision_source
from simclr.errors import UserError


def open_source(spec: str) -> Source:
    """The source that `spec` names.

    A directory or tar archive of split/class/file, class/file, or files alone (unlabelled), on disk or at s3://bucket/prefix;
    the name of a dataset (`cifar10`, or `torchvision:NAME`), downloaded where there is a network; `patterns`, with options as
    in `patterns:train=4000,test=1000,size=32,seed=0,coloured`. Raises UserError if it is missing, empty or unknown.
    """
    name, _, options = spec.partition(":")
    if name == "patterns":
        return patterns_source(spec, options)
    if spec in ("torchvision", "torchvision:"):
        raise UserError("which torchvision dataset? torchvision:NAME, as in torchvision:CIFAR10")
    if name == "torchvision" or (spec in DATASETS and DATASETS[spec].torchvision):
        return torchvision_source(spec, options or DATASETS[spec].torchvision)
    remote = address(spec)
    if remote is not None:
        return s3_archive(remote) if remote.name.lower().endswith(ARCHIVES) else s3_prefix(remote)
    path = Path(spec).expanduser()
    if path.is_dir():
        return folder_source(path)
    if path.is_file():
        if not path.name.lower().endswith(ARCHIVES) and not tarfile.is_tarfile(path):
            raise UserError(f"{path} is no tar archive; expected a folder, one of {', '.join(ARCHIVES)}, or a dataset's name")
        ignored: Counter[str] = Counter()
        return Source(str(path), None, lambda: read_tar(path, ignored), ends_of(path), ignored)
    known = ["patterns", *(n for n, d in DATASETS.items() if d.torchvision)]
    near = difflib.get_close_matches(spec, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"give a folder, a tar archive or one of {', '.join(known)}"
    raise UserError(f"no source at {spec}: there is no such file or folder and no dataset of that name; {hint}")
