"""What `make gpu-pack` left for a machine that can neither build nor fetch, put where it is looked for.

lib/            the compiled parts, as setup.py builds them beside the torch of that machine
triton.tgz      a Triton cache with every launch that tests and benchmarks make
triton_key      what Triton's keys of these hold beside the kernels
commit          of the sources that all of it was made from
path/           links by which the packages are found without an installation
"""

import json
import os
import shutil
import tarfile
from pathlib import Path

from ..machine import sources
from .facts import ROOT

GROUP = "__grp__"  # how Triton's files begin that list a kernel's others, by their absolute paths


def unpack(pack: Path, cache: Path) -> dict[str, str]:
    """Libraries into the package, kernels into Triton's cache; returns the environment that goes with them.

    Raises:
        FileNotFoundError: if this is no such folder.
    """
    if not (pack / "commit").is_file():
        raise FileNotFoundError(f"{pack} is no folder that `make gpu-pack` made: it has no file named commit")
    for library in sorted((pack / "lib").glob("*.so")):
        # Another name first: a process that has the old one loaded keeps it.
        new = ROOT / "fastvit" / f"{library.name}.new"
        shutil.copy(library, new)
        new.replace(new.with_suffix(""))
        new.with_name(f"{library.name.partition('.')[0]}.missing").unlink(missing_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(pack / "triton.tgz") as tar:
        tar.extractall(cache, filter="data")
    for group in cache.glob(f"*/{GROUP}*.json"):
        names = json.loads(group.read_text())["child_paths"]
        here = {name: str(group.parent / Path(path).name) for name, path in names.items()}
        group.write_text(json.dumps({"child_paths": here}))
    commit = (pack / "commit").read_text().strip()
    if (pack / "sources").read_text().strip() != sources():
        commit += "-changed"
        print(f"gpu: {pack} was made from other sources: libraries are of these, and kernels compile anew")
    found = [str((pack / "path").absolute()), os.environ.get("PYTHONPATH", "")]
    return {
        "FASTVIT_COMMIT": commit,
        "FASTVIT_PACKED_KEY": (pack / "triton_key").read_text().strip(),
        "PYTHONPATH": os.pathsep.join(filter(None, found)),
    }
