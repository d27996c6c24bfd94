"""One Blender, making one object after the other: python -m dataset.worker SETTINGS.json

Orders come as JSON lines on stdin ({"item", "output"}), answers go as JSON lines to stdout ({"ok", "reason", "cpu_seconds"}). It ends
when stdin is closed. A crash of Blender takes only this process with it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # Blender writes to stdout at every turn; ours is kept apart for the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from dataset.assets import AssetError
    from dataset.job import Item, JobConfig
    from dataset.record import Places, make_object
    from near.errors import NearError

    config = JobConfig(**settings["config"])
    places = Places(Path(settings["lights"]), Path(settings["assets"]) if settings["assets"] else None)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        order, start, reason = json.loads(line), time.process_time(), None
        try:
            make_object(Item(**order["item"]), config, places, settings["threads"], Path(order["output"]))
        except AssetError as error:
            reason = str(error)
        except NearError as error:
            reason = f"{error.code}: {error.what}"
        except Exception as error:  # Blender and generators fail in many ways; the object is set aside, the job goes on
            traceback.print_exc()
            reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
        print(json.dumps({"ok": reason is None, "reason": reason, "cpu_seconds": time.process_time() - start}), file=answers, flush=True)


if __name__ == "__main__":
    status = 1
    try:
        main()
        status = 0
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    finally:
        sys.stderr.flush()
        os._exit(status)  # finalising the interpreter with Blender in it can hang
