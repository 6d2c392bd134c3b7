"""Linear layers of a source that are read a few rows at a time.

Owns: how a layer that is larger than memory is cut into blocks, and joined with others without reading them whole.
Does not own: where the rows come from (``sources``, ``folder``) or the forms of weights (``dmoe/core/linear``).

Invariant: the blocks joined are, byte for byte, the layer read at once. Nothing is read before it is asked for, but for
one row that shows the layer's form.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.errors import IntegrityError
from dmoe.core.linear import Form, Linear, alike, join_rows

Array = NDArray[Any]

BLOCK_WEIGHTS_MAX = 1 << 21
"""Weights read at once: 8 MiB as fp32, and about five times that while they are quantised."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A layer of ``rows`` outputs and ``columns`` inputs, called ``name`` in its source. ``read`` gives the rows of a
    slice in the wanted form."""

    rows: int
    columns: int
    name: str
    read: Callable[[slice], Linear]

    def blocks(self) -> Iterator[tuple[slice, Linear]]:
        """All rows in order, a block at a time, each in the sample's form. Raises IntegrityError as reading does."""
        form = self.sample().form
        step = max(1, BLOCK_WEIGHTS_MAX // max(1, self.columns))
        for start in range(0, self.rows, step):
            rows = slice(start, min(start + step, self.rows))
            yield rows, self._in_form(self.read(rows), form)

    def _in_form(self, block: Linear, form: Form) -> Linear:
        """Only floats vary with the rows read: halves need an even number of weights, and numbers in their range."""
        if block.form == form:
            return block
        if form.suffixes == ("w",):
            return Linear({"w": block.dequantised()})
        fault = f"tensor {self.name} holds numbers that {form.suffixes[0]} cannot hold beside others that it can"
        raise IntegrityError("integrity", fault, "import it in another format: int8, or source")

    def sample(self) -> Linear:
        """The first row: it shows which parts the layer has. Raises IntegrityError as reading does."""
        return self.read(slice(0, 1))

    def shapes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of the whole layer's parts, by suffix."""
        found = {}
        for suffix, part in self.sample().parts.items():
            axis = rows_axis(suffix)
            found[suffix] = part.dtype, (*part.shape[:axis], self.rows, *part.shape[axis + 1 :])
        return found


def rows_axis(suffix: str) -> int:
    """Which axis of a part counts the layer's outputs."""
    return 1 if suffix == "c" else 0


def joined(layers: Sequence[Rows]) -> Rows:
    """Layers that read the same input, as one. Those that are stored in different forms get a common one."""
    samples = [layer.sample() for layer in layers]
    ends = list(accumulate(layer.rows for layer in layers))

    def read(rows: slice) -> Linear:
        found, inside = list(samples), []
        for index, (layer, end) in enumerate(zip(layers, ends, strict=True)):
            start = end - layer.rows
            wanted = slice(max(rows.start - start, 0), min(rows.stop - start, layer.rows))
            if wanted.start < wanted.stop:
                found[index] = layer.read(wanted)
                inside.append(index)
        common = alike(found)  # of all of them, whichever are read: every block gets the same form
        return join_rows([common[index] for index in inside])

    return Rows(ends[-1], layers[0].columns, layers[0].name, read)
