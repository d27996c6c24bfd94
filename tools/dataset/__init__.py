"""The data engine: training objects rendered with Cycles, from user assets and from a generator of its own.

job (what is to be made) -> pool (processes, Ray) -> worker (one Blender) -> record (one object) -> file; report at the end.
"""
