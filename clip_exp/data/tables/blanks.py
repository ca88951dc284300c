"""Characters that show nothing, at the ends of labels and in captions that are empty to everybody who looks at them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clip_exp.data.tables.columns import bool_array, string_buffers

# What `str.isspace` is true of, the no-break and the ideographic space among them, and what has no width or no ink.
BLANKS = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029"
    "\u202f\u205f\u3000"
    "\xad\u180e\u200b\u200c\u200d\u200e\u200f\u2060\u2800\u3164\ufeff"
)
_STARTS_BLANK = np.isin(np.arange(256), [blank.encode()[0] for blank in BLANKS])  # by a string's first byte


def trimmed(column: pa.LargeStringArray) -> pa.LargeStringArray:
    """Return the strings without the blanks around them."""
    return pc.utf8_trim(column, BLANKS)


def count_blank(column: pa.LargeStringArray) -> int:
    """Return how many strings are empty or hold nothing but blanks. Those that begin with something else need not be searched."""
    starts, data = string_buffers(column)
    if not len(data):
        return len(column)
    first = data[np.minimum(starts[:-1], len(data) - 1)]
    candidates = column.filter(bool_array(_STARTS_BLANK[first] | (np.diff(starts) == 0)))
    starts, _ = string_buffers(trimmed(candidates))
    return len(candidates) - int(np.count_nonzero(np.diff(starts)))
