"""Scores of saved predictions, averaged per task, model and light; as JSON, as a table, as a page."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from near.evaluation.bench import Bench, Target
from near.evaluation.metrics import score
from near.output import png_bytes, read_rgba

METRICS = ("psnr_frame", "psnr_mask", "ssim", "perceptual")
HEADINGS = {"psnr_frame": "PSNR frame", "psnr_mask": "PSNR mask", "ssim": "SSIM", "perceptual": "perceptual"}


def score_targets(bench: Bench, targets: Iterable[Target], path_of: Callable[[Target], Path]) -> dict:
    """Scores of the predictions at ``path_of(target)``; targets without a prediction are left out and counted.

    Returns:
        ``{"mean", "models", "lights", "targets", "missing"}``; means are over targets.
    """
    rows, missing = [], 0
    for target in targets:
        path = path_of(target)
        if not path.is_file():
            missing += 1
            continue
        scores = score(read_rgba(path), read_rgba(bench.root / target.image))
        rows.append({"model": target.model, "image": target.image, "view": target.label.split(",")[0], "light": target.light.name,
                     **scores.as_dict()})
    return {"mean": _mean(rows), "models": _by(rows, "model"), "lights": _by(rows, "light"), "targets": rows, "missing": missing}


def _mean(rows: Sequence[dict]) -> dict[str, float] | None:
    return {m: round(statistics.fmean(r[m] for r in rows), 3) for m in METRICS} if rows else None


def _by(rows: Sequence[dict], key: str) -> dict[str, dict]:
    return {name: _mean([r for r in rows if r[key] == name]) for name in dict.fromkeys(r[key] for r in rows)}


def copy_baseline(bench: Bench) -> dict:
    """*copy*: the photo's own frame, unchanged, as the prediction of every relighting target."""
    own = {m.name: bench.root / m.targets["reconstruction"][0].image for m in bench.models if m.targets["reconstruction"]}
    targets = [t for m in bench.models if m.name in own for t in m.targets["relighting"]]
    return {"relighting": score_targets(bench, targets, lambda t: own[t.model])}


def against_baselines(results: dict[str, dict], baselines: dict[str, dict]) -> dict[str, dict]:
    """What the predictions gain on each baseline, by baseline and task: ``psnr_mask`` dB and ``perceptual`` (positive is better)."""
    out: dict[str, dict] = {}
    for name, tasks in baselines.items():
        for task, result in tasks.items():
            ours, theirs = (results.get(task) or {}).get("mean"), result["mean"]
            if ours and theirs:
                out.setdefault(name, {})[task] = {"psnr_mask": round(ours["psnr_mask"] - theirs["psnr_mask"], 3),
                                                  "perceptual": round(theirs["perceptual"] - ours["perceptual"], 3)}
    return out


def table_lines(report: dict) -> list[str]:
    """The report's means as lines of text."""
    lines = [f"{'':<34}" + "".join(f"{HEADINGS[m]:>12}" for m in METRICS)] if report["tasks"] else []
    for task, result in report["tasks"].items():
        lines.append(_line(task, result["mean"]))
        lines += [_line(f"  {name}", scores) for name, scores in result["models"].items()]
    for name, tasks in report["baselines"].items():
        lines += [_line(f"{name}: {task}", result["mean"]) for task, result in tasks.items()]
    for name, tasks in report.get("against", {}).items():
        lines += [f"{task} against {name}: {gain['psnr_mask']:+.2f} dB, perceptual {'better' if gain['perceptual'] > 0 else 'not better'}"
                  f" by {gain['perceptual']:+.3f}" for task, gain in tasks.items()]
    for task, why in report["skipped"].items():
        lines.append(f"{task}: skipped. {why}")
    for error in report["errors"]:
        lines.append(f"{error['model']} ({error['tasks']}): Error [{error['code']}]: {error['what']} {error['remedy']}")
    if report["tasks"]:
        lines.append(f"perceptual: {report['perceptual']}; lower is better")
    if "consistency" in report:
        lines += consistency_lines(report["consistency"])
    return lines


def consistency_lines(result: dict) -> list[str]:
    """The consistency checks (:mod:`near.evaluation.consistency`) as lines of text."""
    return [f"{'consistency':<34}{'mean':>12}{'worst':>12}  limit",
            *(f"{name:<34}{mean:>12.4g}{worst:>12.4g}  {limit}" for name, mean, worst, limit in consistency_rows(result))]


def consistency_rows(result: dict) -> list[tuple[str, float, float, str]]:
    """(name, mean, worst, limit and whether it is met) of each check."""
    return [(name, mean, result["worst"][name], f"{result['limits'][name]} {'ok' if result['met'][name] else 'missed'}" if name in result["met"] else "")
            for name, mean in result["mean"].items()]


def _line(name: str, scores: dict | None) -> str:
    if scores is None:
        return f"{name:<34}" + "   (nothing to score)"
    return f"{name:<34}" + "".join(f"{scores[m]:>12.2f}" if m.startswith("psnr") else f"{scores[m]:>12.3f}" for m in METRICS)


def report_page(report: dict, sheets: dict[str, np.ndarray]) -> str:
    """The report as one self-contained HTML page; ``sheets``: title -> uint8 picture."""
    parts = ["<!doctype html><meta charset='utf-8'><title>near eval</title><style>"
             "body{font:15px/1.5 system-ui;margin:2em auto;max-width:1500px;padding:0 1em;background:#18191c;color:#ebebee}"
             "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .9em;text-align:right;border-bottom:1px solid #333}"
             "td:first-child,th:first-child{text-align:left}img{max-width:100%}tr.mean{font-weight:bold}</style>",
             f"<h1>near eval: {html.escape(report['bench'])}</h1><p>near {html.escape(report['near'])}, pack {html.escape(report['pack'])}. "
             f"Perceptual: {html.escape(report['perceptual'])}; lower is better.</p>"]
    for task, result in report["tasks"].items():
        parts.append(f"<h2>{html.escape(task)}</h2>")
        baselines = {name: tasks[task]["mean"] for name, tasks in report["baselines"].items() if task in tasks}
        parts.append(_html_table({"mean": result["mean"], **baselines}, {**result["models"]}, {**result["lights"]}))
        if task in sheets:
            data = base64.b64encode(png_bytes(sheets[task])).decode()
            parts.append(f"<img alt='{html.escape(task)}: prediction, target, difference' src='data:image/png;base64,{data}'>")
    if "consistency" in report:
        rows = "".join(f"<tr><td>{html.escape(n)}</td><td>{m:.4g}</td><td>{w:.4g}</td><td>{limit}</td></tr>" for n, m, w, limit in consistency_rows(report["consistency"]))
        parts.append(f"<h2>consistency</h2><table><tr><th></th><th>mean</th><th>worst</th><th>limit</th></tr>{rows}</table>")
    if report["errors"] or report["skipped"]:
        parts.append("<h2>not done</h2><ul>" + "".join(f"<li>{html.escape(e['model'])} ({html.escape(e['tasks'])}): {html.escape(e['what'])}</li>" for e in report["errors"])
                     + "".join(f"<li>{html.escape(task)}: {html.escape(why)}</li>" for task, why in report["skipped"].items()) + "</ul>")
    return "\n".join(parts)


def _html_table(*groups: dict[str, dict | None]) -> str:
    head = "<tr><th></th>" + "".join(f"<th>{HEADINGS[m]}</th>" for m in METRICS) + "</tr>"
    body = ""
    for index, group in enumerate(groups):
        for name, scores in group.items():
            if scores is not None:
                cells = "".join(f"<td>{scores[m]:.2f}</td>" if m.startswith("psnr") else f"<td>{scores[m]:.3f}</td>" for m in METRICS)
                body += f"<tr{' class=mean' if index == 0 else ''}><td>{html.escape(name)}</td>{cells}</tr>"
    return f"<table>{head}{body}</table>"


