"""Families of towers, one package each: `__init__` contains the configuration (no torch), the other modules the tower itself.

A family defines everything that depends on the kind of a tower: its configuration keys and their rules, how it is built, its tokenizer,
whether texts can be trimmed, the names of its parameters in other libraries, and how other libraries describe it. The interface is
`Tower` in `clip_exp.config.model`, with defaults. No other package refers to a kind of tower. `published` describes whole models: the
classes of transformers, and the models of open_clip and big_vision.
"""
