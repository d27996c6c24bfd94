"""The scripted user's journey in a real Blender window: `inside.py` runs in Blender, `stage.py` makes and enters a system with one."""
