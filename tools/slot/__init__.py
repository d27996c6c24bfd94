"""Training in short slots on a borrowed machine: one package there, weights in small pieces back (tools/train_compact.sh)."""
