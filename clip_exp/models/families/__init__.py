"""Families of towers: a package each, whose `__init__` has what is known of a tower without torch, and its other modules the tower.

A family answers everything that depends on the kind of a tower: its fields and their rules, how it is built, its tokenizer, whether texts
may be trimmed, its parameters in other libraries' files, and how other libraries describe it. `Tower` of `clip_exp.config.model` is the
contract, with a default for whatever a family need not know; no other package names a kind of tower. `published` has what is known of
pairs: the classes of transformers, and open_clip's and big_vision's models.
"""
