"""Arithmetic on quantized weights: packed bits in, floats out.

Here live operators that know tensors and nothing else: no layer, no checkpoint, no configuration. Each
folder holds ``reference.py`` (the definition), ``op.py`` (schema, fake, gradient) and the fast paths.
May import torch; never ``peft_quantlayers``.
"""
