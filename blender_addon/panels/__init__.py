"""The "NeAR" tab of the 3D view's sidebar, and the preferences."""
