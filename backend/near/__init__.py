"""NeAR Relight: photos become relightable neural assets."""

__version__ = "0.1.0"
