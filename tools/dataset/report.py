"""What a job made: an index, statistics in numbers and in words, and a contact sheet."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dataset.job import Item, JobConfig

SHEET_ROWS = 16


def write_reports(out: Path, items: Sequence[Item], config: JobConfig, quarantine: dict[str, dict], session: dict) -> dict:
    """Write index.json, report.json, report.md and contact_sheet.png into ``out``; returns the report."""
    from near.atomic import write_bytes
    from near.output import write_png
    from near.training.starter import read_starter

    paths = [(i, out / i.file(config.shards)) for i in items]
    made = [(i, p) for i, p in paths if p.is_file()]
    entries, measured, broken = [], [], []
    for item, path in made:
        try:
            meta = read_meta(path)
            entries.append({"file": path.relative_to(out).as_posix(), **{k: meta.get(k) for k in ("object", "kind", "source", "spp", "triangles", "material_count")}})
            measured.append((meta, path.stat().st_size))
        except (OSError, ValueError, KeyError) as error:
            broken.append({"file": path.relative_to(out).as_posix(), "reason": str(error)[:200]})
    write_bytes(out / "index.json", (json.dumps(entries, indent=1) + "\n").encode())
    chosen = [p for _, p in _spread(made, SHEET_ROWS)]
    objects = [read_starter(p) for p in chosen]
    report = {"objects": len(entries), "of": len(items), "broken": broken, "quarantine": quarantine, "session": session,
              **(_statistics(measured) if measured else {}), **(_pixels(objects) if objects else {})}
    write_bytes(out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_bytes(out / "report.md", _words(report).encode())
    if objects:
        write_png(out / "contact_sheet.png", contact_sheet_of(objects))
    return report


def read_meta(path: Path) -> dict:
    """An object's facts without its pictures."""
    with np.load(path, allow_pickle=False) as file:
        return json.loads(bytes(file["meta"]))


def _spread(made: list, count: int) -> list:
    """At most ``count`` of a list, evenly."""
    return made if len(made) <= count else [made[round(k * (len(made) - 1) / (count - 1))] for k in range(count)]


def _summary(values: Iterable[float]) -> dict:
    values = sorted(values)
    return {"least": round(values[0], 4), "median": round(statistics.median(values), 4), "most": round(values[-1], 4)}


def _statistics(measured: list[tuple[dict, int]]) -> dict:
    metas = [m for m, _ in measured]
    lights = Counter(light["hdri"] for m in metas for view in m["lights"] for light in view)
    photos = [p for m in metas for p in m.get("photos", ())]
    return {
        "kinds": dict(Counter(m["kind"] for m in metas)), "arrangements": dict(Counter(m["arrangement"] for m in metas if "arrangement" in m)),
        "parts": dict(Counter(k for m in metas for k in m.get("parts", ()))), "views": sum(len(m["lights"]) for m in metas),
        "lit_images": sum(lights.values()), "lights_used": len(lights), "photos": len(photos),
        "photo_views": dict(Counter(" / ".join(filter(None, (p["capture"]["view"], p["capture"]["look"]))) for p in photos)),
        "photo_backgrounds": dict(Counter(p["capture"]["background"] for p in photos)),
        "photos_cut_by_frame": sum(p["view"]["cut_by_frame"] for p in photos),
        "triangles": _summary(m["triangles"] for m in metas), "materials": _summary(m["material_count"] for m in metas),
        "megabytes": round(sum(size for _, size in measured) / 1e6, 2), "kilobytes_per_object": _summary(size / 1e3 for _, size in measured)}


def _pixels(objects: list) -> dict:
    """Of the objects on the contact sheet."""
    base = np.concatenate([o.point_base_lin709.numpy() for o in objects])
    return {"measured_on": len(objects), "coverage": _summary(float(o.alpha[c].mean()) for o in objects for c in range(len(o.cameras))),
            "lit_mean": _summary(float(o.light[c, k][o.alpha[c] > 0.5].mean()) for o in objects for c in range(len(o.cameras)) for k in range(len(o.lights[c])) if (o.alpha[c] > 0.5).any()),
            "base_luminance": _summary((base @ np.array([0.2126, 0.7152, 0.0722])).tolist()),
            "roughness": _summary(np.concatenate([o.point_roughness.numpy() for o in objects]).tolist()),
            "metallic_share": round(float(np.concatenate([o.point_metallic.numpy() for o in objects]).mean()), 4)}


def _words(report: dict) -> str:
    session = report["session"]
    lines = ["# Data engine: report", "", f"{report['objects']} of {report['of']} objects, {len(report['quarantine'])} in quarantine, {len(report['broken'])} broken files.", "",
             f"This run: {session['made']} objects in {session['wall_seconds'] / 60:.1f} min, {session['objects_per_hour']} objects an hour"
             + (f", {session['core_seconds_per_object']} s of one core an object." if session["core_seconds_per_object"] else "."), ""]
    skipped = ("objects", "of", "broken", "quarantine", "session")
    for name, value in report.items():
        if name not in skipped:
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            lines.append(f"- {name.replace('_', ' ')}: {text}")
    if report["quarantine"]:
        lines += ["", "## Quarantine", "", *(f"- {key} ({entry['source']}): {entry['status']}; {entry['reason']}" for key, entry in report["quarantine"].items())]
    return "\n".join(lines) + "\n"


def contact_sheet_of(objects: list) -> np.ndarray:
    """A row per object: homogeneous light, two lights, shadow, base colour, normal, roughness and metallic, photos."""
    from near.colour import agx_srgb, srgb_encode, to_uint8
    from near.sheets import contact_sheet

    def grey(x):
        return to_uint8(x.clamp(0, 1)[..., None].expand(*x.shape, 3)).numpy()

    def shown(x):
        return to_uint8(agx_srgb(x)).numpy()

    rows, labels, titles = [], [], []
    for item in objects:
        first, last = item.lights[0][0], item.lights[0][-1]
        surface = item.roughness[0][..., None].expand(-1, -1, 3).clone()
        surface[..., 2] = item.metallic[0]
        cells = [shown(item.ambient[0]), shown(item.light[0, 0]), shown(item.light[0, -1]), None if item.shadow is None else grey(item.shadow[0, 0]),
                 to_uint8(srgb_encode(item.base_lin709[0].clamp(0, 1))).numpy(), to_uint8((item.normal[0] * 0.5 + 0.5) * item.alpha[0][..., None]).numpy(),
                 to_uint8(surface.clamp(0, 1)).numpy()]
        texts = ["white light", first.hdri, last.hdri, "shadow", "base colour", "normal", "roughness, metallic"]
        for photo in item.photos[:2]:
            cells.append(photo.srgb.numpy())
            texts.append(f"{photo.capture['look'] or photo.capture['view']}, q{photo.capture['jpeg_quality']}")
        rows.append(cells)
        labels.append(texts)
        titles.append(item.name[:18])
    return contact_sheet(rows, labels=labels, row_titles=titles, title="Training objects", cell=(128, 128))
