"""Blender's data as plain data: objects, cameras, light, colour."""
