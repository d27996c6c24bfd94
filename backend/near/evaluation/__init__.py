"""The four tasks on a bench folder: prediction, scores, baselines, sheets, report (DESIGN section 8)."""
