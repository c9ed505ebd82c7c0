"""Ahead-of-time compilation: the real train step and the real sampler, compiled for TPU slices that are not there.

`command.run` is `unimat train --mode=compile`; `program.compile_for` is the same from Python.
"""
