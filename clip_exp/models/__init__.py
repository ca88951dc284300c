"""Dual encoders in plain torch. Suggested reading order: layers, families.clip (vit, text, resnet), clip, then the other families.

Names of tensors end in their axes: B batch, C channels, H height, W width, N tokens of an image or a text, L tokens of a text, D width
of a tower or of the shared space, A attention heads, E width of a head.
"""
