"""Make training objects with Cycles: python tools/render_dataset.py OUT [--own N] [--assets DIR] [--hdris DIR] ...

    python tools/render_dataset.py data --own 200                               # objects of its own, no data needed
    python tools/render_dataset.py data --own 200 --assets models --hdris hdris # and yours: GLB, glTF, blend, OBJ, FBX, PLY
    python tools/render_dataset.py data --own 5000 --processes 16               # many Blenders on this machine
    python tools/render_dataset.py data --own 50000 --ray ray://head:10001      # on a cluster; assets under one path on all nodes
    near train precompute data/objects --hdris data/hdris -o cache              # what comes next

The same job gives the same files, wherever it runs. It can be stopped or killed at any time: the same command goes on where
it was. Objects that fail are set aside in OUT/quarantine.json. OUT/report.md and OUT/contact_sheet.png show what was made.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

HELP = {"own": "objects of the generator", "repeats": "objects made of each asset", "seed": "of everything random", "size": "pixels of the views",
        "samples": "per pixel", "cameras": "views of an object", "lights": "of each view", "photos": "of an object", "photo_size": "pixels of the photos",
        "points": "surface samples of an object", "own_lights": "environments of the engine's own", "shards": "folders for the objects"}


def parser() -> argparse.ArgumentParser:
    from dataset.job import JobConfig

    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path, metavar="OUT")
    made.add_argument("--assets", type=Path, metavar="DIR", help="folder of assets, searched through")
    made.add_argument("--hdris", type=Path, metavar="DIR", help="folder of lights (.exr, .hdr), beside those of the engine's own")
    for entry in fields(JobConfig):
        if entry.name in HELP:
            made.add_argument(f"--{entry.name.replace('_', '-')}", type=int, default=entry.default, metavar="N", help=f"{HELP[entry.name]} (default {entry.default})")
    made.add_argument("--no-shadow", dest="shadow", action="store_false", help="leave the shadow images out")
    made.add_argument("--processes", type=int, default=1, metavar="N", help="Blenders at a time on this machine (default 1)")
    made.add_argument("--threads", type=int, default=0, metavar="N", help="of each Blender (default: the cores shared out)")
    made.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster: ray://HOST:PORT, HOST:PORT or auto")
    made.add_argument("--timeout", type=float, default=900.0, metavar="S", help="an object that takes longer is set aside (default 900)")
    made.add_argument("--retry-quarantined", action="store_true", help="try the objects again that were set aside")
    return made


def main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from dataset.job import JobConfig, JobError
    from dataset.run import Options, run_job
    from near.errors import NearError

    args = parser().parse_args()
    try:
        config = JobConfig(**{f.name: getattr(args, f.name) for f in fields(JobConfig)})
        options = Options(max(args.processes, 1), max(args.threads, 0), args.ray, args.timeout, args.retry_quarantined)
        run_job(config, args.out, assets=args.assets, hdris=args.hdris, options=options, tell=lambda text: print(text, flush=True))
    except JobError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except NearError as error:
        print(f"Error [{error.code}]: {error.what}\nWhat to do: {error.remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
